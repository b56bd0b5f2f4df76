"""Judges a service stage by stage, and says what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from servebook.errors import ServebookError
from servebook.lab.capstone.bench import Bench
from servebook.lab.capstone.contract import FOLDER, ID
from servebook.lab.capstone.stages import STAGES, Stage
from servebook.lab.feedback import NotYet
from servebook.lab.learner_server.judge import last_error
from servebook.lab.rest import had_room
from servebook.launch import Server, serve

MARKS = {"passed": "✓", "wrong": "✗", "not judged": "–"}


@dataclass(frozen=True)
class Outcome:
    """How one stage ended; what was `expected`, `got` and the likely `cause` are for a wrong one."""

    stage: Stage
    state: Literal["passed", "wrong", "not judged"]
    expected: str = ""
    got: str = ""
    cause: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcomes of all stages, in order."""

    outcomes: Sequence[Outcome]

    @property
    def points(self) -> int:
        return sum(each.stage.points for each in self.outcomes if each.state == "passed")

    @property
    def passed(self) -> bool:
        """Whether all stages are."""
        return all(each.state == "passed" for each in self.outcomes)

    @property
    def first_wrong(self) -> Outcome | None:
        return next((each for each in self.outcomes if each.state == "wrong"), None)

    def render(self) -> str:
        """A line a stage, and the first that went wrong explained."""
        lines = [f"{ID} Capstone: {self.points} of {sum(stage.points for stage in STAGES)} points"]
        for each in self.outcomes:
            earned = each.stage.points if each.state == "passed" else 0
            worth = f"{earned} of {each.stage.points}" if each.state != "not judged" else "not judged"
            lines.append(f"{MARKS[each.state]} {each.stage.number:2} {each.stage.title:36} {worth}")
        if wrong := self.first_wrong:
            lines += ["", f"stage {wrong.stage.number}, {wrong.stage.title}"]
            for label, text in (
                ("expected", wrong.expected),
                ("got", wrong.got),
                ("likely cause", wrong.cause),
                ("hint", wrong.stage.hint),
            ):
                lines.append(f"  {label:<13} " + text.replace("\n", "\n" + " " * 16))
        return "\n".join(lines)


def judge_service(folder: Path = FOLDER, vllm: Server | None = None, last: int = len(STAGES)) -> Verdict:
    """Start the service in `folder` and judge it, up to the stage `last`.

    A stage that goes wrong costs its points and no more, unless the service has ended.

    Raises:
        ServebookError: there is no service, or the engine has no room or is gone, which is not the learner's fault.
    """
    bench = Bench(folder, vllm or serve("vllm"))
    outcomes: list[Outcome] = []
    try:
        with bench.running():
            for stage in STAGES[:last]:
                dead = bool(outcomes) and not bench.alive()
                outcomes.append(Outcome(stage, "not judged") if dead else outcome(bench, stage))
    except NotYet as fault:
        outcomes = [Outcome(STAGES[0], "wrong", fault.expected, fault.got, fault.cause)]
    return Verdict([*outcomes, *(Outcome(stage, "not judged") for stage in STAGES[len(outcomes) :])])


def outcome(bench: Bench, stage: Stage) -> Outcome:
    """Judge one stage; what the judge itself stumbles over costs this stage, not the verdict on the others.

    Raises:
        ServebookError: the engine has no room, or is gone.
    """
    before, said = len(bench.exchanges), len(bench.child.said())
    try:
        stage.judge(bench)
    except NotYet as fault:
        for exchange in bench.exchanges[before:]:
            had_room(exchange)
        error = last_error(bench.child.said()[said:])
        got = f"{fault.got}\nits log: {error}" if error and error not in fault.got else fault.got
        return Outcome(stage, "wrong", fault.expected, got, fault.cause)
    except ServebookError:
        raise
    except Exception as error:
        cause = "the judge itself stumbled: judge again; `servebook status` shows whether the engine is well"
        return Outcome(stage, "wrong", "a stage that can be judged", f"{type(error).__name__}: {error}", cause)
    return Outcome(stage, "passed")
