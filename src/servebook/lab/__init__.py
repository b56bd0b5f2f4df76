"""The labs: exercises, their checks and hints, a learner's progress, and what an instructor hands out."""

from servebook.lab.checking import check, hint
from servebook.lab.learner_server.run import OwnServer

__all__ = ["OwnServer", "check", "hint"]
