"""What notebooks use to display: expected errors, source code, bytes on the wire, pictures, versions.

Every picture is an SVG with alt text in an <img>: JupyterLab strips a bare <svg> from notebooks that it does not trust.
"""

from __future__ import annotations

import ast
import base64
import html
import inspect
import io
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import matplotlib as mpl
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer, TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

from servebook.checkout import ROOT
from servebook.engine.arguments import cpu_name
from servebook.engine.gpu import cards
from servebook.processes import wait_until
from servebook.settings import Settings, installed, own_settings

T = TypeVar("T")
PACKAGES = {
    "vLLM": "vllm",
    "torch": "torch",
    "nvidia-pytriton (holds Triton 2.51)": "nvidia-pytriton",
    "tritonclient": "tritonclient",
    "grpcio": "grpcio",
    "KServe": "kserve",
    "openai": "openai",
    "FastAPI": "fastapi",
}
"""What `versions` lists: the reader's name and the distribution's."""

PACE_TOKENS, PACE_SECONDS = (32, 128, 512), 0.25
"""What `measure_pace` has written: more where little takes so little that it is mostly the way there and back."""

STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#1f4e79", "marker": "o", "linestyle": "-"},
    {"color": "#c55a11", "marker": "s", "linestyle": "--"},
    {"color": "#3f3f3f", "marker": "^", "linestyle": ":"},
    {"color": "#548235", "marker": "D", "linestyle": "-."},
    {"color": "#7f6000", "marker": "v", "linestyle": (0, (5, 1))},
    {"color": "#7030a0", "marker": "P", "linestyle": (0, (1, 1))},
)
"""One per line of a picture; marker and dash tell them apart in grey too."""

COLOURS = ("#1f4e79", "#f4b183", "#9dc3e6", "#548235", "#d9d9d9")
"""One per owner of squares."""


GROUND = (
    "background: #f8f8f8; color: #222222; padding: 6px; margin: 0; "
    "font-size: 13px; word-break: normal; word-wrap: break-word"  # as in a cell, and not cut in the middle of a word
)
ADDED, REMOVED = "background: #d4f4dd", "background: #fbdfdf"
FOLDED_LINES = 60
"""Source beyond this many lines is folded away until the reader opens it."""


class expect_error:
    """Context manager for a mistake made on purpose: prints the error that came, and fails if none came.

    `value` is the error afterwards. An error of another type goes through.

    Raises:
        AssertionError: the block ended without an error.
    """

    value: BaseException

    def __init__(self, *types: type[BaseException]) -> None:
        self.types = types or (Exception,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is None:
            wanted = " or ".join(each.__name__ for each in self.types)
            raise AssertionError(f"This was meant to end in {wanted}, and no error came.")
        if not isinstance(error, self.types):
            return False
        self.value = error
        print(f"{type(error).__name__}: {_message(error)}")
        return True


def _message(error: BaseException) -> str:
    """The error's text; of a gRPC error its status code and details, without the transport's debug string."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if callable(code) and callable(details):
        return f"{code().name}: {details()}"
    return str(error)


def show(*objects: Any) -> None:
    """Display the source of functions, classes or modules, or the text of files given as `Path`, highlighted.

    A pair `(path, name)` is the function or class of that name in a file that would be slow to import.

    Raises:
        FileNotFoundError: a path names no file.
        StopIteration: a file has nothing of that name.
        TypeError: an object has no Python source.
    """
    for thing in objects:
        path, first, text = _source(thing)
        title = _title(path, first)
        try:
            lexer = PythonLexer() if first else get_lexer_for_filename(path.name)
        except ClassNotFound:
            lexer = TextLexer()
        # Styles inline: a stylesheet would be stripped from an output that is not trusted. With a ground of its own,
        # since the colours are made for a light one and JupyterLab's may be dark.
        code = highlight(text, lexer, HtmlFormatter(noclasses=True, style="default", prestyles=GROUND))
        _display_code(title, text, code)


def difference(before: Any, after: Any) -> list[str]:
    """What has to be done to the source of `before` to have that of `after`; both as `show` takes them.

    The lines of a unified diff with two lines around each change, without its head: they begin with "+", "-" or " ",
    and "⋯" stands for what is left out. Nothing where both are the same.
    """
    old, new = (_source(thing)[2].splitlines() for thing in (before, after))
    lines = list(unified_diff(old, new, n=2, lineterm=""))[2:]
    return ["⋯" if line.startswith("@@") else line for line in lines]


def show_difference(before: Any, after: Any) -> None:
    """Display what changes from `before` to `after`, both as `show` takes them: a + and green is new, a - and red goes.

    Raises: as `show`.
    """
    lines = difference(before, after)
    title = f"{_title(*_source(before)[:2])} → {_title(*_source(after)[:2])}"
    # The signs tell without colours too. A ground of its own, as in `show`.
    spans = (
        f'<span style="display: block; {ADDED if line[:1] == "+" else REMOVED if line[:1] == "-" else ""}">'
        f"{html.escape(line) or ' '}</span>"
        for line in lines
    )
    _display_code(title, "\n".join(lines), f'<pre style="{GROUND}; line-height: 125%">{"".join(spans)}</pre>')


def _source(thing: Any) -> tuple[Path, int | None, str]:
    """Of what `show` takes: the file, the line where it begins (None for a whole file), the text."""
    if isinstance(thing, tuple):
        path, name = thing
        text = path.read_text(encoding="utf-8")
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))
        first, lines = next(node.lineno for node in nodes if node.name == name), text.splitlines(keepends=True)
        return path, first, inspect.cleandoc("\n" + "".join(inspect.getblock(lines[first - 1 :])))
    if isinstance(thing, Path):
        return thing, None, thing.read_text(encoding="utf-8")
    path = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "")
    lines, start = inspect.getsourcelines(thing)
    return path, start or None, inspect.cleandoc("\n" + "".join(lines))


def _title(path: Path, first: int | None) -> str:
    """Where a reader finds it."""
    path = path.resolve()
    where = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return f"{where}, line {first}" if first else where


def _display_code(title: str, text: str, code: str) -> None:
    """Display the HTML `code` of `text` under its title, folded away where it is long."""
    caption = f'<span style="font: 13px sans-serif">{html.escape(title)}</span>'
    if (count := len(text.splitlines())) > FOLDED_LINES:
        shown = f"<details><summary>{caption} · {count} lines, click to open</summary>{code}</details>"
    else:
        shown = f"<div>{caption}</div>{code}"
    display({"text/html": shown, "text/plain": f"{title}\n{text}"}, raw=True)


def wire(data: bytes, limit: int = 512) -> None:
    """Print raw bytes as they travelled.

    Text comes as a line per newline, with what is not printable ASCII as `\\xNN`; bytes of a binary protocol as
    rows of 16 in hexadecimal, with the printable ones beside them. At most `limit` bytes are printed, then how many
    more there were.
    """
    part = data[:limit]
    if set(part) & set(range(32)) - set(b"\t\r\n"):
        for start in range(0, len(part), 16):
            row = part[start : start + 16]
            text = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in row)
            print(f"{start:4}  {row.hex(' '):47}  {text}")
    else:
        for line in part.splitlines(keepends=True):
            print(re.sub(r"(\\\\)|\\'", lambda found: found[1] or "'", repr(line)[2:-1]))
    if len(data) > limit:
        print(f"… and {len(data) - limit} bytes more")


def timeline(
    streams: Mapping[str, Sequence[float]], title: str = "Arrival of tokens", since: str = "the request was sent"
) -> None:
    """Draw one row per stream and one stroke per event; the first event of each is marked.

    Args:
        streams: label → arrival times in seconds, ascending.
        title: what the picture shows.
        since: from when all of them count; not always is it each one's own request.
    """
    row_height = 0.4 if len(streams) < 10 else 0.2  # inches; two dozen rows still fit on a screen
    figure = Figure(figsize=(8, 0.9 + row_height * len(streams)), layout="constrained")
    axes = figure.subplots()
    for row, times in enumerate(streams.values()):
        axes.plot(times, [row] * len(times), linestyle="none", marker="|", markersize=11, color="#1f4e79")
        axes.plot(times[:1], [row] * len(times[:1]), linestyle="none", marker="D", markersize=6, color="#c55a11")
    axes.set_yticks(range(len(streams)), list(streams))
    axes.invert_yaxis()
    axes.set_ylim(len(streams) - 0.5, -0.5)
    axes.set_xlim(0, 1.02 * max((times[-1] for times in streams.values() if times), default=1))
    axes.set_xlabel(f"seconds since {since} (◆ first event)")
    axes.set_title(title)
    rows = (
        f"{label}: {len(times)} events from {times[0]:.2f} s to {times[-1]:.2f} s"
        for label, times in streams.items()
        if times
    )
    picture(figure, f"{title}. {'; '.join(rows)}.")


def curves(
    x: Sequence[float],
    ys: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    alt: str = "",
    log: str = "",
) -> None:
    """Draw one line per label over the same `x`; `log` names the logarithmic axes ("x", "y" or "xy").

    Raises:
        ValueError: there are more labels than STYLES.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, style in one_each(ys, STYLES).items():
        axes.plot(x, ys[label], label=label, **style)
    if "x" in log:
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{value:g}" for value in x])
    if "y" in log:
        axes.set_yscale("log")
    else:
        axes.margins(y=0.08)  # no marker on the frame
        axes.set_ylim(bottom=0)
        if all(float(value).is_integer() for line in ys.values() for value in line):
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))  # no half request
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    rows = (
        f"{label}: {_figure(values[0])} at {x[0]:g}, {_figure(values[-1])} at {x[-1]:g}" for label, values in ys.items()
    )
    picture(figure, alt or f"{title}: {ylabel} over {xlabel}. {'; '.join(rows)}.")


def bars(values: Mapping[str, float], *, xlabel: str, title: str) -> None:
    """Draw one horizontal bar per label, with its value beside it."""
    figure = Figure(figsize=(8, 0.9 + 0.4 * len(values)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(values), list(values.values()), color="#9dc3e6", edgecolor="#1f4e79")
    axes.bar_label(drawn, [_figure(value) for value in values.values()], padding=4)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, title=title)
    rows = (f"{label} {_figure(value)}" for label, value in values.items())
    picture(figure, f"{title}, {xlabel}: {'; '.join(rows)}.")


def pieces(rows: Mapping[str, tuple[float, float]], *, title: str) -> None:
    """Draw one row per label, with a bar from when that piece of work began to when it ended, in seconds."""
    figure = Figure(figsize=(8, 0.9 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    lengths = [end - begin for begin, end in rows.values()]
    begins = [begin for begin, _ in rows.values()]
    drawn = axes.barh(list(rows), lengths, left=begins, color="#9dc3e6", edgecolor="#1f4e79")
    axes.bar_label(drawn, [f"{_figure(1000 * length)} ms" for length in lengths], padding=4)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title=title)
    parts = (f"{label.strip()} from {begin:.3f} s to {end:.3f} s" for label, (begin, end) in rows.items())
    picture(figure, f"{title}: {'; '.join(parts)}.")


def squares(owners: Mapping[str, int], total: int, *, unit: str, title: str) -> None:
    """Draw `total` squares, one for each `unit`: first those of each owner, in its colour and with its name, then free.

    Raises:
        ValueError: the owners have more than there are, or are more than COLOURS.
    """
    if (free := total - sum(owners.values())) < 0:
        raise ValueError(f"{sum(owners.values())} are more than {total}")
    columns = max(28, math.ceil(math.sqrt(4 * total)))
    rows = math.ceil(total / columns)
    figure = Figure(figsize=(8, 0.9 + 7 * rows / columns), layout="constrained")
    axes = figure.subplots()
    names = [name for name, count in owners.items() for _ in range(count)]
    colours = one_each(owners, COLOURS)
    for number in range(total):
        row, column = divmod(number, columns)
        name = names[number] if number < len(names) else ""
        colour = colours.get(name, "white")
        axes.add_patch(Rectangle((column, row), 0.9, 0.9, facecolor=colour, edgecolor="#7f7f7f", linewidth=0.5))
        if name:
            ink = "white" if colour in ("#1f4e79", "#548235") else "black"
            axes.text(column + 0.45, row + 0.5, name, ha="center", va="center", color=ink, fontsize=8)
    axes.set(xlim=(-0.2, columns), ylim=(rows, -0.2), aspect="equal", title=title)
    axes.axis("off")
    held = "; ".join(f"{name} has {count}" for name, count in owners.items())
    picture(figure, f"{title}: {total} squares, one for each {unit}. {held}; {free} are free.")


def one_each(labels: Iterable[str], looks: Sequence[T]) -> dict[str, T]:
    """A look of its own for each label.

    Raises:
        ValueError: there are too few.
    """
    names = dict.fromkeys(labels)
    if len(names) > len(looks):
        raise ValueError(f"{len(names)} do not fit into one picture, which tells {len(looks)} apart")
    return dict(zip(names, looks, strict=False))


def _figure(value: float) -> str:
    """Three digits that count, and no power of ten: 0.0586, 23.4, 1,536."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def picture(figure: Figure, alt: str) -> None:
    """Display a matplotlib figure as SVG with `alt` as its text for screen readers."""
    buffer = io.BytesIO()
    # Text stays text, and neither a date nor a random id goes in: the same data give the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "servebook"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    source = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{source}" style="max-width: 100%">'
    display({"text/html": image, "text/plain": alt}, raw=True)


def versions(settings: Settings | None = None) -> None:
    """Display a table of what runs here: the packages, the model, the device and the processor."""
    settings = settings or own_settings()
    rows = {"Python": platform.python_version()}
    rows |= {label: installed(package) or "not installed" for label, package in PACKAGES.items()}
    rows |= {
        "model": f"{settings.model_name} ({settings.model})",
        "device": _device(settings),
        "processor": _processor(),
    }
    cells = "".join(
        f'<tr><th scope="row" style="text-align: left">{html.escape(name)}</th>'
        f'<td style="text-align: left">{html.escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    plain = "\n".join(f"{name}: {value}" for name, value in rows.items())
    table = f"<table><caption>What runs here</caption><tbody>{cells}</tbody></table>"
    display({"text/html": table, "text/plain": plain}, raw=True)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Ask again and again until `condition()` is true.

    Raises:
        TimeoutError: it was not in so many `seconds`.
    """
    if not wait_until(condition, seconds, every=0.02):
        raise TimeoutError(f"What this cell waits for has not come in {seconds:.0f} s: see `servebook status`.")


@dataclass(frozen=True)
class Pace:
    """How fast an engine wrote for one caller a moment ago: sizes and deadlines that hold on a slow machine and a fast.

    `tokens_per_s` is for one request, from its sending to its end. No answer is asked for that is longer than `most`.
    """

    tokens_per_s: float
    most: int = 1500

    def seconds(self, tokens: int, at_most: float) -> float:
        """What so many tokens take, but no more than `at_most`: a deadline that a longer answer cannot meet."""
        return min(at_most, tokens / self.tokens_per_s)

    def tokens(self, seconds: float, at_least: int, at_most: int = 1500) -> int:
        """As many tokens as take so many seconds: an answer long enough to do something in the meantime."""
        return max(at_least, min(at_most, self.most, round(seconds * self.tokens_per_s)))


def measure_pace(write: Callable[[int], object]) -> Pace:
    """Have the engine write some tokens and look at the clock; `write(n)` waits for exactly n tokens."""

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        write(tokens)
        return time.perf_counter() - started

    write(4)  # what only the first request pays for
    for tokens in PACE_TOKENS:
        # The better of two: an engine taken for slow, because others had the processor, gets too short a task.
        if (took := min(seconds(tokens), seconds(tokens))) > PACE_SECONDS:
            break
    return Pace(tokens / took)


def machine_card(write: Callable[[int], object], settings: Settings | None = None) -> Pace:
    """Display on what this notebook runs and how fast that writes, as `measure_pace` finds it."""
    settings = settings or own_settings()
    room = 3 * settings.max_model_len // 4  # of the context: a prompt of some words fits in as well
    pace = Pace(measure_pace(write).tokens_per_s, most=min(Pace.most, room))
    device = _device(settings) if settings.on_gpu else f"cpu: {_processor()}"
    text = f"{device} · {settings.model_name} · {pace.tokens_per_s:.0f} tokens/s for one caller"
    display({"text/html": f"<p><b>This machine</b> {html.escape(text)}</p>", "text/plain": text}, raw=True)
    return pace


def _processor() -> str:
    """The processor, and how many of its cores this process may use."""
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def _device(settings: Settings) -> str:
    return f"gpu: {', '.join(card.name for card in cards()[:1])}" if settings.on_gpu else "cpu"
