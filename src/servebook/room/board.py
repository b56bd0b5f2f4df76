"""Who is where in the labs, and since when: what a room's front hears from the checks, for its instructor's eyes."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from servebook.lab.manifest import exercises

CAUSE_CHARS = 300
MINUTE = 60.0
KNOWN = {exercise.id: exercise for _, exercise in exercises()}


def watch_key(instructors_key: str) -> str:
    """A key that opens the board and nothing else: it stands in the address of a page that a projector shows."""
    return hmac.new(instructors_key.encode(), b"servebook room watch", hashlib.sha256).hexdigest()


class Attempt(BaseModel):
    """One check at a desk, as the desk tells it: a learner can say what they like here, about themselves only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exercise: str
    state: Literal["passed", "open", "wrong", "stuck"]
    cause: str = ""

    @field_validator("exercise")
    @classmethod
    def _known(cls, exercise: str) -> str:
        if exercise not in KNOWN:
            raise ValueError("there is no such exercise")
        return exercise


@dataclass
class Standing:
    """Where a learner is: the exercise that was checked last, how often, since when, and how that ended last."""

    exercise: str
    since: float
    last: float
    tries: int = 0
    state: str = "open"
    cause: str = ""


@dataclass
class Board:
    """All learners' standings since the front started; times are of `time.monotonic`."""

    standings: dict[str, Standing] = field(default_factory=dict)
    passed: dict[str, set[str]] = field(default_factory=dict)
    checks: deque[float] = field(default_factory=deque)
    """When they were, of the last minute."""

    def note(self, learner: str, attempt: Attempt) -> None:
        """A check was made."""
        now = time.monotonic()
        self.checks.append(now)
        self.checks_per_minute()  # forgets older ones, also while nobody looks
        at = self.standings.get(learner)
        if at is None or at.exercise != attempt.exercise:
            at = self.standings[learner] = Standing(attempt.exercise, now, now)
        at.tries += 1
        at.last, at.state, at.cause = now, attempt.state, " ".join(attempt.cause.split())[:CAUSE_CHARS]
        if attempt.state == "passed":
            self.passed.setdefault(learner, set()).add(attempt.exercise)

    def checks_per_minute(self) -> int:
        """How many there were in the last minute."""
        while self.checks and self.checks[0] < time.monotonic() - MINUTE:
            self.checks.popleft()
        return len(self.checks)

    def row(self, learner: str) -> dict[str, Any]:
        """A learner's line, times in seconds. `needs_help`: longer at it since its first check than it takes in all."""
        at = self.standings.get(learner)
        now = time.monotonic()
        if at is None:
            at = Standing("", now, now, state="")
        since = now - at.since
        return {
            "exercise": at.exercise,
            "state": at.state,
            "tries": at.tries,
            "since": round(since),
            "quiet": round(now - at.last),
            "cause": at.cause,
            "needs_help": at.state not in ("", "passed") and since > KNOWN[at.exercise].minutes * MINUTE,
            "passed": len(self.passed.get(learner, ())),
        }


def stuck_first(row: dict[str, Any]) -> tuple[bool, bool, int, str]:
    """The order of the board: who needs help, then who is at work on something, longest first."""
    working = row["state"] not in ("", "passed")
    return not row["needs_help"], not working, -row["since"] if working else 0, row["name"]
