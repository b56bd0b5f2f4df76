"""The labs: exercises, their checks and hints, a learner's progress, and what an instructor hands out."""

from servebook.lab.checking import check, hint

__all__ = ["check", "hint"]
