"""What a check tells a learner: expected, got, the likely cause, the next hint. Never a traceback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isclose
from typing import Any, Literal

from servebook.errors import ServebookError
from servebook.lab.manifest import Exercise

WIDTH = 400
"""How many characters of a value are shown."""
MOST = 2000
"""How many of a text that a check has put together: a value in it may have any length."""


class NotYet(Exception):
    """Raised by a check: the answer is not right yet, and why that is likely so."""

    def __init__(self, expected: Any, got: Any, cause: str) -> None:
        super().__init__(cause)
        self.expected = cut(expected, MOST) if isinstance(expected, str) else shorten(expected)
        self.got = cut(got or "nothing", MOST) if isinstance(got, str) else shorten(got)
        self.cause = cause


class StillOpen(Exception):
    """The blank is still there."""


class NotPassed(ServebookError):
    """Stands for a failed check where nbgrader grades; a learner at work only reads the feedback."""


@dataclass(frozen=True)
class Result:
    """The outcome of one check. "stuck" means that the check could not run, which is not the learner's fault."""

    exercise: Exercise
    state: Literal["passed", "open", "wrong", "stuck"]
    expected: str = ""
    got: str = ""
    cause: str = ""

    @property
    def passed(self) -> bool:
        return self.state == "passed"

    def render(self, hint: str = "") -> str:
        """The lines that a learner reads, with `hint` as the last of them."""
        head = f"{self.exercise.id} {self.exercise.title}"
        if self.passed:
            return f"✓ {head} ({self.exercise.worth})"
        lines = [f"○ {head}: still open" if self.state == "open" else f"✗ {head}"]
        for label, text in (
            ("expected", self.expected),
            ("got", self.got),
            ("likely cause", self.cause),
            ("next hint", hint),
        ):
            if text:
                lines.append(f"  {label:<13} " + text.replace("\n", "\n" + " " * 16))
        return "\n".join(lines)


def require(condition: bool, expected: Any, got: Any, cause: str) -> None:
    """Raise NotYet unless `condition` holds."""
    if not condition:
        raise NotYet(expected, got, cause)


Known = tuple[bool | Callable[[Any, Any], Any], str]
"""A known mistake: whether it was made, or a function of (got, right) that says so; and the cause to name."""


def judge(
    right: Any, got: Any, *known: Known, otherwise: str, expected: Any = None, shown: Any = None, fits: Any = None
) -> None:
    """Raise NotYet unless `got` is `right`; its cause is the first of the known mistakes that was made.

    `fits(got, right)` says whether it is right where equality does not; `expected` and `shown` replace `right` and
    `got` in the feedback. A function that stumbles over a `got` of an odd type does not hold.
    """
    if _holds(fits or (lambda got, right: got == right), got, right):
        return
    cause = next((cause for mistake, cause in (TEXT, TRUTH, *known) if _holds(mistake, got, right)), otherwise)
    raise NotYet(right if expected is None else expected, got if shown is None else shown, cause)


def _holds(condition: bool | Callable[[Any, Any], Any], got: Any, right: Any) -> bool:
    if not callable(condition):
        return condition
    try:
        return bool(condition(got, right))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return False


def rounded(got: Any, right: Any) -> bool:
    """Whether `got` is what `round` makes of `right`: of a number, or of some of several by name."""
    if isinstance(right, Mapping):
        return all(isclose(got[name], each, rel_tol=1e-6) or rounded(got[name], each) for name, each in right.items())
    return any(got == round(right, digits) for digits in range(1, 6))


ROUNDED: Known = (rounded, "rounded: return the number as it comes")


def _somewhere(mistake: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """Whether `got` has this mistake: itself, or one of several in the same place as in `right`."""

    def holds(got: Any, right: Any) -> bool:
        if isinstance(right, Mapping):
            return any(holds(got[name], each) for name, each in right.items())
        if isinstance(right, tuple) and isinstance(got, tuple | list):
            return any(map(holds, got, right))
        return mistake(got, right)

    return holds


def _text_for_number(got: Any, right: Any) -> bool:
    if isinstance(got, str) and isinstance(right, int | float) and not isinstance(right, bool):
        with suppress(ValueError):
            float(got)
            return True
    return False


def _text_for_truth(got: Any, right: Any) -> bool:
    return isinstance(got, str) and isinstance(right, bool) and got.strip().lower() in TRUTHS


TRUTHS = {"true", "false", "yes", "no", "on", "off", "1", "0"}
TEXT: Known = (_somewhere(_text_for_number), "a number, not a text: whoever reads it wants to reckon with it")
TRUTH: Known = (
    _somewhere(_text_for_truth),
    "a text, not a truth value: write True or False without quotation marks, even if a server guesses what is meant",
)


def shorten(value: Any) -> str:
    """`repr(value)`, cut in the middle where it is long."""
    return cut(repr(value), WIDTH)


def cut(text: str, width: int) -> str:
    """`text`, without its middle where it is longer than that.

    Half of a surrogate pair is written out: neither a notebook nor a graded file could hold it.
    """
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"
