"""Numbers on the command lines that argparse reads: one out of range is refused, and told what it must be.

typer's options say the same by `min` and `max`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

N = TypeVar("N", int, float)
MOST_PORT = 65535
HOUR_SECONDS = 3600


def number(kind: type[N], least: float, most: float = math.inf) -> Callable[[str], N]:
    """For `type=` of an argument: a number from `least` to `most`, and finite."""

    def read(word: str) -> N:
        with suppress(ValueError, OverflowError):
            found = kind(word)
            if least <= found <= most and math.isfinite(found):
                return found
        what = "a whole number" if kind is int else "a number"
        bounds = f"from {least:g} to {most:.0f}" if most < math.inf else f"of at least {least:g}"
        raise argparse.ArgumentTypeError(f"{word} is not {what} {bounds}")

    return read


port = number(int, 1, MOST_PORT)
"""Not 0, any that is free: nobody would be told which one it is."""
