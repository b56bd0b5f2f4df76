"""The labs' proofs: blanks fail, solutions pass, mistakes are told, other right ways are accepted."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Any, Literal

import nbformat
import pytest
from nbgrader.utils import determine_grade
from proofs import ROOT, Proof, Prover, prover
from pydantic import BaseModel, ConfigDict

from servebook import launch
from servebook.lab.checks import c08_measure
from servebook.lab.handout.autograde import ExecuteAndEnd
from servebook.lab.manifest import Exercise, Lab, exercises, load_labs
from servebook.launch import Server

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


def blank(lab: Lab, exercise: Exercise) -> Proof:
    """The exercise as it is handed out, with all others solved."""
    return Proof(lab.stem, exercise.id, source(ROOT / "labs" / lab.path, exercise), among_solved=True)


def answered(lab: Lab, exercise: Exercise, answer: Answer) -> Proof:
    solution = source(ROOT / "solutions" / lab.path, exercise)
    return Proof(lab.stem, exercise.id, answer.applied_to(solution))


@cache
def cells(notebook: Path) -> dict[str, str]:
    return {cell.id: str(cell.source) for cell in nbformat.read(notebook, as_version=4).cells}


def source(notebook: Path, exercise: Exercise) -> str:
    """What a notebook has in the exercise's answer cell."""
    return cells(notebook)[f"{exercise.cell}-answer"]


@pytest.fixture(scope="module")
def proofs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prover]:
    """Makes the proofs that this run wants."""
    wanted = []
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if isinstance(params.get("answer"), Answer):
            wanted.append(answered(**params))
        elif item.name.startswith("test_open_blank"):
            wanted.append(blank(**params))
    with prover(wanted, tmp_path_factory.mktemp("learner")) as made:
        yield made


@pytest.fixture
def servers(lab: Lab, server_of: Callable[[str], Server]) -> None:
    """What the lab needs is up."""
    for server in lab.servers:
        server_of(server)


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("lab", LABS)
def test_solution_earns_all_points_when_graded(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook as a whole, in a kernel that is confined, judged from outside."""
    for server in lab.servers:
        launch.serve(server)  # as `room collect --grade` does: a test before may have ended a replica
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.read(ROOT / "solutions" / lab.path, as_version=4)
    graded, _ = ExecuteAndEnd(timeout=150).preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    errors = [output.evalue for cell in graded.cells for output in cell.get("outputs", []) if "evalue" in output]
    assert not errors, "\n".join(errors)
    checks = {cell.id: determine_grade(cell)[0] for cell in graded.cells if cell.id.endswith("-check")}
    assert checks == {f"{exercise.cell}-check": exercise.points for exercise in lab.exercises}


@pytest.mark.engine
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize(("lab", "exercise"), EXERCISES)
def test_open_blank_is_caught_by_its_own_check(lab: Lab, exercise: Exercise, proofs: Prover) -> None:
    """With this one blank open and all others solved."""
    result = proofs.result(blank(lab, exercise))
    assert result.state == "open", result.render()


@pytest.mark.engine
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize(("lab", "exercise", "answer"), each("wrong"))
def test_wrong_answer_is_told_its_cause(lab: Lab, exercise: Exercise, answer: Answer, proofs: Prover) -> None:
    result = proofs.result(answered(lab, exercise, answer))
    assert result.state == "wrong", result.render()
    assert answer.cause in result.cause, result.render()
    assert result.expected, result.render()
    assert result.got, result.render()
    assert "Traceback" not in result.render()


@pytest.mark.engine
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize(("lab", "exercise", "answer"), each("right"))
def test_other_right_answer_is_accepted(lab: Lab, exercise: Exercise, answer: Answer, proofs: Prover) -> None:
    result = proofs.result(answered(lab, exercise, answer))
    assert result.passed, result.render()


@pytest.mark.parametrize(("lab", "exercise"), EXERCISES)
def test_enough_answers_are_tried(exercise: Exercise, lab: Lab) -> None:
    tried = answers(lab.stem)[exercise.id]
    assert len({answer.name for answer in tried.wrong if answer.cause}) >= 6
    assert len({answer.name for answer in tried.right}) >= 3


def test_no_answer_is_orphaned() -> None:
    assert {path.stem for path in (ROOT / "tests/lab_answers").iterdir()} == {lab.stem for lab in load_labs()}
    for lab in load_labs():
        assert answers(lab.stem).keys() == {exercise.id for exercise in lab.exercises}


@pytest.mark.parametrize(("measured", "right"), [((0.1, 0.29), True), ((0.1, 0.31), False), ((0.09, 0.29), False)])
def test_a_call_may_have_waited_for_a_core_but_not_for_the_next_call(measured: tuple[float, ...], right: bool) -> None:
    assert c08_measure._within(list(measured), [(0.1, 0.11), (0.1, 0.3)]) is right
