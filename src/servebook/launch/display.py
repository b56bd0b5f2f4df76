"""Shows what a start waits for: a changing line in a notebook, a spinner in a terminal, plain lines elsewhere."""

from __future__ import annotations

import html
import sys
import time
from functools import cache
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status
from rich.text import Text


class Progress:
    """One wait with a phase and the elapsed time; use as a context manager and call `phase` as often as you like."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.started = time.monotonic()
        self.current = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self.show(f"{self.what}: stopped after {self.elapsed}", final=True)

    @property
    def elapsed(self) -> str:
        return f"{time.monotonic() - self.started:.0f} s"

    def phase(self, name: str) -> None:
        """Say what is going on now."""
        self.current = name
        self.show(f"{self.what}: {name} … {self.elapsed}")

    def done(self, text: str) -> None:
        """Say how it ended."""
        self.show(f"{self.what}: {text}", final=True)

    def show(self, text: str, final: bool = False) -> None:
        raise NotImplementedError


class NotebookProgress(Progress):
    """One HTML line, updated in place; a screen reader is told of changes politely."""

    def __init__(self, what: str) -> None:
        from IPython.display import HTML, display

        super().__init__(what)
        self.html = HTML
        self.handle = display(HTML(html.escape(what)), display_id=True)
        self.last = ""

    def show(self, text: str, final: bool = False) -> None:
        if text != self.last and self.handle is not None:
            mark = "" if not final else "<b>■</b> "
            self.handle.update(self.html(f'<div role="status" aria-live="polite">{mark}{html.escape(text)}</div>'))
            self.last = text


def plain_console(stderr: bool = False, soft_wrap: bool = False) -> Console:
    """A terminal that shows text as it is: of `[fd00:a::5]` Rich would make a style, and of `:a:` a picture."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


@cache
def stderr() -> Console:
    """One for all: it stacks the spinners of servers that start at once."""
    return plain_console(stderr=True)


class TerminalProgress(Progress):
    """A spinner on a terminal; on a pipe one line a phase."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.console = stderr()
        self.status: Status | None = None
        self.last_phase = ""

    def show(self, text: str, final: bool = False) -> None:
        if final:
            if self.status:
                self.status.stop()
            self.console.print(text, soft_wrap=True)
        elif self.console.is_terminal:
            if not self.status:
                self.status = self.console.status(Text(text))
                self.status.start()
            self.status.update(Text(text))
        elif self.current != self.last_phase:
            self.console.print(f"{self.what}: {self.current}")
            self.last_phase = self.current


def progress(what: str) -> Progress:
    """The display that fits where this runs."""
    if "ipykernel" in sys.modules and getattr(sys.modules["ipykernel"], "kernelapp", None):
        return NotebookProgress(what)
    return TerminalProgress(what)
