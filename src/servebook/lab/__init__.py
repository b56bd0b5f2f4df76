"""The labs: exercises, their checks and hints, a learner's progress, and what an instructor hands out.

What notebooks import from here is loaded when they do: a learner's own server, a process of its own below this package,
needs nothing of it and would start half a second later.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from servebook.lab.checking import check, hint
    from servebook.lab.learner_server.run import OwnServer

__all__ = ["OwnServer", "check", "hint"]
PLACES = {"OwnServer": "learner_server.run", "check": "checking", "hint": "checking"}


def __getattr__(name: str) -> object:
    if name not in PLACES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
