"""`check("04.2")`: runs the exercise's check on what the learner wrote, and tells them in plain words."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import requests

from servebook.bearer import bearer
from servebook.environment import JUDGE_APART
from servebook.lab.capstone.contract import ID as CAPSTONE
from servebook.lab.feedback import MOST, NotPassed, NotYet, Result, StillOpen, cut
from servebook.lab.judge import process
from servebook.lab.manifest import Exercise, find_exercise
from servebook.lab.record import Store
from servebook.lab.submission import CheckFunction, Submission, unattended
from servebook.launch import Server
from servebook.settings import own_settings

TELL_SECONDS = 20.0
"""How long a check waits for a busy room to hear of it; a room that is not there refuses at once."""


def check(exercise_id: str) -> None:
    """Check an exercise in the notebook that calls this, or the capstone's service ("14"), and print what was found.

    Under nbgrader a failed check is an error too, because that is what costs the points.

    Raises:
        ServebookError: there is no such exercise, or no service to judge.
        NotPassed: the check failed, and nbgrader is grading or validating.
    """
    namespace = sys._getframe(1).f_globals
    if exercise_id == CAPSTONE:
        from servebook.lab.capstone.judge import judge_service  # a seventh of all that would be imported

        found = namespace.get("vllm")
        print(judge_service(vllm=found if isinstance(found, Server) else None).render())
        return
    if JUDGE_APART in os.environ:
        result = process.judged_apart(exercise_id, namespace)
    else:
        result = evaluate(exercise_id, namespace)
    grading = "NBGRADER_EXECUTION" in os.environ
    text = result.render("" if grading else remember(result))
    if grading and not result.passed:
        raise NotPassed(text)
    print(text)


def hint(exercise_id: str) -> None:
    """Print the hints of an exercise so far, and one more."""
    print(next_hint(exercise_id))


def next_hint(exercise_id: str) -> str:
    """Reveal one more hint; return all that are revealed."""
    _, exercise = find_exercise(exercise_id)
    with Store() as progress:
        record = progress.of(exercise_id)
        record.hints = min(record.hints + 1, len(exercise.hints))
        shown = record.hints
    lines = [f"{number}. {text}" for number, text in enumerate(exercise.hints[:shown], 1)]
    left = len(exercise.hints) - shown
    return "\n".join([*lines, f"({left} more)" if left else "(that was the last one)"])


def evaluate(exercise_id: str, namespace: Mapping[str, Any]) -> Result:
    """Run the check of an exercise on the names in `namespace`; whatever happens becomes a Result.

    Raises:
        ServebookError: there is no such exercise.
    """
    lab, exercise = find_exercise(exercise_id)
    function = find_check(lab.stem, exercise)
    try:
        # nbgrader takes any output on stderr for a failure, a mere warning too.
        with contextlib.redirect_stderr(sys.stdout), unattended():
            function(Submission(exercise, namespace))
    except StillOpen:
        return Result(exercise, "open")
    except NotYet as fault:
        return Result(exercise, "wrong", fault.expected, fault.got, fault.cause)
    except Exception as error:
        return Result(
            exercise,
            "stuck",
            got=cut(f"{type(error).__name__}: {error}", MOST),
            cause="the check itself could not run; `servebook status` shows whether the server is well",
        )
    return Result(exercise, "passed")


def find_check(stem: str, exercise: Exercise) -> CheckFunction:
    """The check function of an exercise: `check_04_2` in the module `checks/c04_…`."""
    module = import_module(f"servebook.lab.checks.c{stem}")
    function: CheckFunction = getattr(module, f"check_{exercise.id.replace('.', '_')}")
    return function


def tell_room(result: Result) -> None:
    """Tell the room's front, where there is one, how a check ended: its instructor sees who needs help."""
    settings = own_settings()
    if not (settings.engine_url and settings.key):
        return
    cause = result.cause if result.state == "wrong" else result.got.partition("\n")[0]
    said = {"exercise": result.exercise.id, "state": result.state, "cause": cause}
    with contextlib.suppress(requests.RequestException):  # it is no learner's matter whether it arrives
        requests.post(f"{settings.engine_url}/room/checks", json=said, auth=bearer(settings.key), timeout=TELL_SECONDS)


def remember(result: Result) -> str:
    """Keep the outcome in the learner's progress; return the hint that helps on, "" after a success."""
    tell_room(result)
    exercise = result.exercise
    with Store() as progress:
        record = progress.of(exercise.id)
        record.attempts += 1
        if result.passed:
            record.state = "passed"
            return ""
        if record.state == "new":
            record.state = "tried"
        if result.state == "stuck":
            return ""
        record.hints = min(max(record.hints, 1), len(exercise.hints))  # of an older workbook there may be more
        more = "" if record.hints == len(exercise.hints) else f'; more with hint("{exercise.id}")'
        return f"{exercise.hints[record.hints - 1]} ({record.hints} of {len(exercise.hints)}{more})"
