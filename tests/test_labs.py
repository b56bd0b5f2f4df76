"""The labs' proofs: blanks fail, solutions pass, mistakes are told, other right ways are accepted."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict

from servebook import notebook_gate
from servebook.lab import rehearsal
from servebook.lab.manifest import Exercise, Lab, exercises, load_labs
from servebook.lab.shell import LabShell

ROOT = Path(__file__).parents[1]
OpenSession = Callable[[Lab], LabShell]


REGION = re.compile(r"(.*?\n|)( *)(?:// )?### BEGIN SOLUTION.*?### END SOLUTION\n?(.*)", re.DOTALL)


class Answer(BaseModel):
    """An answer other than the solution's: its cell with some edits, or with another text in place of the blank.

    `cause` is for wrong ones: words that the feedback must name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    cause: str = ""
    edits: tuple[tuple[str, str], ...] = ()
    body: str = ""

    def applied_to(self, solution: str) -> str:
        """The answer cell's text."""
        if self.body:
            head, indentation, tail = REGION.fullmatch(solution).groups()  # type: ignore[union-attr]
            return head + indent(self.body, indentation) + tail
        for old, new in self.edits:
            assert old in solution, f"{old!r} is not in the solution"
            solution = solution.replace(old, new)
        return solution


class Answers(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    wrong: tuple[Answer, ...]
    right: tuple[Answer, ...]


@cache
def answers(stem: str) -> dict[str, Answers]:
    """What `lab_answers/` has for a lab, by exercise."""
    text = (ROOT / "tests/lab_answers" / f"{stem}.toml").read_text()
    return {key: Answers.model_validate(value) for key, value in tomllib.loads(text).items()}


def each(kind: Literal["wrong", "right"]) -> list[Any]:
    """Every wrong or right answer of every exercise, as pytest parameters."""
    return [
        pytest.param(lab, exercise, answer, id=f"{exercise.id}-{answer.name.replace(' ', '_')}")
        for lab, exercise in exercises()
        for answer in getattr(answers(lab.stem)[exercise.id], kind)
    ]


EXERCISES = [pytest.param(lab, exercise, id=exercise.id) for lab, exercise in exercises()]
LABS = [pytest.param(lab, id=lab.stem) for lab in load_labs()]


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenSession:
    """Opens the solution of a lab, with its servers up and its shared cells run; once for all of its proofs."""
    sessions: dict[str, LabShell] = {}

    def open_session(lab: Lab) -> LabShell:
        if lab.stem not in sessions:
            for server in lab.servers:
                request.getfixturevalue({"grpc": "grpc_server"}.get(server, server.replace("-", "_")))
            sessions[lab.stem] = LabShell(ROOT / "solutions" / lab.path)
            sessions[lab.stem].prepare()
        return sessions[lab.stem]

    return open_session


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Learners' files go to a folder of their own."""
    with contextlib.chdir(tmp_path_factory.mktemp("learner")):
        yield


@pytest.fixture(scope="module", autouse=True)
def vllm_process() -> Iterator[None]:
    """Lab 03 keeps vLLM imported from check to check; not longer than the proofs."""
    yield
    rehearsal.end()


@pytest.mark.engine
@pytest.mark.parametrize("lab", LABS)
def test_solution_passes_in_a_kernel(
    lab: Lab, session: OpenSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook as a whole, through the gate; a check that fails stops it there."""
    session(lab)
    monkeypatch.setenv("NBGRADER_EXECUTION", "validate")
    # A copy: some answers write files beside their notebook.
    copy = tmp_path / f"{lab.stem}.ipynb"
    copy.write_bytes((ROOT / "solutions" / lab.path).read_bytes())
    assert not notebook_gate.run(copy).problem


@pytest.mark.engine
@pytest.mark.parametrize(("lab", "exercise"), EXERCISES)
def test_open_blank_is_caught_by_its_own_check(lab: Lab, exercise: Exercise, session: OpenSession) -> None:
    """With this one blank open and all others solved."""
    released = LabShell(ROOT / "labs" / lab.path)
    shell = session(lab)
    for other in lab.exercises:
        if other != exercise:
            assert shell.run(shell.source(other.id)) is None
    result = shell.check(exercise.id, released.source(exercise.id))
    assert result.state == "open", result.render()


@pytest.mark.engine
@pytest.mark.parametrize(("lab", "exercise", "answer"), each("wrong"))
def test_wrong_answer_is_told_its_cause(lab: Lab, exercise: Exercise, answer: Answer, session: OpenSession) -> None:
    shell = session(lab)
    shell.forget()
    result = shell.check(exercise.id, answer.applied_to(shell.source(exercise.id)))
    assert result.state == "wrong", result.render()
    assert answer.cause in result.cause, result.render()
    assert result.expected, result.render()
    assert result.got, result.render()
    assert "Traceback" not in result.render()


@pytest.mark.engine
@pytest.mark.parametrize(("lab", "exercise", "answer"), each("right"))
def test_other_right_answer_is_accepted(lab: Lab, exercise: Exercise, answer: Answer, session: OpenSession) -> None:
    shell = session(lab)
    shell.forget()
    result = shell.check(exercise.id, answer.applied_to(shell.source(exercise.id)))
    assert result.passed, result.render()


@pytest.mark.parametrize(("lab", "exercise"), EXERCISES)
def test_enough_answers_are_tried(exercise: Exercise, lab: Lab) -> None:
    tried = answers(lab.stem)[exercise.id]
    assert len({answer.name for answer in tried.wrong if answer.cause}) >= 4
    assert len({answer.name for answer in tried.right}) >= 2


def test_no_answer_is_orphaned() -> None:
    assert {path.stem for path in (ROOT / "tests/lab_answers").iterdir()} == {lab.stem for lab in load_labs()}
    for lab in load_labs():
        assert answers(lab.stem).keys() == {exercise.id for exercise in lab.exercises}
