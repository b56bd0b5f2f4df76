"""The pictures of chapters 8 and 9, drawn from results; `servebook.workbook.notebook` displays them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from servebook.bench.report import size_name
from servebook.bench.stats import Estimate
from servebook.bench.tensors import TensorCost
from servebook.workbook.notebook import STYLES, one_each, picture


def forest(found: Mapping[str, Estimate], *, xlabel: str, title: str, line: float = 1.0) -> None:
    """One row per label: a dot for each pair, the median, and its 95 % interval as a bar where there is one.

    `line` is where nothing differs; a median is orange only where its interval leaves that out.
    """
    figure = Figure(figsize=(8, 0.9 + 0.32 * len(found)), layout="constrained")
    axes = figure.subplots()
    for row, each in enumerate(found.values()):
        axes.plot(each.each, [row] * len(each.each), linestyle="none", marker=".", color="#9dc3e6", zorder=1)
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [row, row], color="#1f4e79", linewidth=2)
        axes.plot([each.value], [row], color="#c55a11" if each.leaves_out(line) else "#1f4e79", marker="D")
    axes.axvline(line, color="#3f3f3f", linestyle=":")
    axes.set_yticks(range(len(found)), [f"{label} ({each.pairs} pairs)" for label, each in found.items()])
    axes.set_ylim(len(found) - 0.5, -0.5)
    orange = (
        f" (orange: the interval leaves {line:g} out)" if any(each.low is not None for each in found.values()) else ""
    )
    axes.set(xlabel=xlabel + orange, title=title)
    rows = (
        f"{label} {each.text(2)}" + (f", {each.pairs} pairs" if each.low is not None else "")
        for label, each in found.items()
    )
    picture(figure, f"{title}, {xlabel}: {'; '.join(rows)}.")


def sweep(costs: Sequence[TensorCost], *, title: str) -> None:
    """Milliseconds over the size of the tensor, one line per encoding, both axes logarithmic.

    Raises:
        ValueError: there are more encodings than STYLES.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    rows = []
    for label, style in one_each((cost.encoding for cost in costs), STYLES).items():
        points = [(cost.tensor_bytes, cost.median_ms) for cost in costs if cost.encoding == label]
        axes.plot(*zip(*points, strict=True), label=label, **style)
        rows.append(f"{label} {points[-1][1]:,.1f} ms at {size_name(points[-1][0])}")
    sizes = sorted({cost.tensor_bytes for cost in costs})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [size_name(size) for size in sizes])
    axes.set(xlabel="size of the tensor", ylabel="ms, there and back", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture(figure, f"{title}: {'; '.join(rows)}.")
