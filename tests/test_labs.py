"""The labs' proofs: blanks fail, solutions pass, mistakes are told, other right ways are accepted."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Any, Literal

import nbformat
import pytest
from pydantic import BaseModel, ConfigDict

from servebook.lab.manifest import Exercise, Lab, exercises, load_labs
from servebook.lab.shell import LabShell, exercise_of

ROOT = Path(__file__).parents[1]
OpenSession = Callable[[Lab], LabShell]


class Answer(BaseModel):
    """An answer other than the solution's: its cell with some edits, or its `def` with another body.

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
            head, found, _ = solution.partition("    ### BEGIN SOLUTION")
            assert found
            return head + indent(self.body, "    ")
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


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners' files go to a folder of their own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.engine
@pytest.mark.parametrize(("lab", "exercise"), EXERCISES)
def test_solution_passes(lab: Lab, exercise: Exercise, session: OpenSession) -> None:
    result = session(lab).check(exercise.id)
    assert result.passed, result.render()


@pytest.mark.engine
@pytest.mark.parametrize(("lab", "exercise"), EXERCISES)
def test_open_blank_fails_its_own_check_only(lab: Lab, exercise: Exercise, session: OpenSession) -> None:
    """With this one blank open and all others solved, exactly its own check fails."""
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
def test_enough_answers_are_tried(lab: Lab, exercise: Exercise) -> None:
    tried = answers(lab.stem)[exercise.id]
    assert len({answer.name for answer in tried.wrong if answer.cause}) >= 4
    assert len({answer.name for answer in tried.right}) >= 2


@pytest.mark.parametrize("lab", LABS)
def test_notebook_agrees_with_the_manifest(lab: Lab) -> None:
    """Each exercise has its cells, in order, with the manifest's title, points and minutes."""
    cells = nbformat.read(ROOT / "solutions" / lab.path, as_version=4).cells
    order = [cell.id for cell in cells if exercise_of(cell)]
    assert [cell_id for cell_id in order if cell_id.endswith("-check")] == [f"{e.cell}-check" for e in lab.exercises]
    by_id = {cell.id: cell for cell in cells}
    assert len(by_id) == len(cells)
    for exercise in lab.exercises:
        head = f"## {exercise.id} · {exercise.title}\n*{exercise.kind.capitalize()} · {exercise.worth} · about "
        assert by_id[f"{exercise.cell}-brief"].source.startswith(head + f"{exercise.minutes} minutes*")
        answer, check = by_id[f"{exercise.cell}-answer"], by_id[f"{exercise.cell}-check"]
        assert order.index(check.id) == order.index(answer.id) + 1
        assert answer.metadata.nbgrader.solution
        assert not answer.metadata.nbgrader.grade
        assert check.metadata.nbgrader.grade
        assert check.metadata.nbgrader.locked
        assert check.metadata.nbgrader.points == exercise.points
        assert check.source == f'check("{exercise.id}")'
    assert {"intro", "parameters", "setup"} <= by_id.keys()
    assert 3 <= len(lab.exercises) <= 6
    assert 20 <= lab.minutes <= 45


def test_nothing_is_orphaned() -> None:
    """Every solution, lab, check function and answer file belongs to the manifest."""
    labs = load_labs()
    assert {path.name for path in (ROOT / "solutions").iterdir()} == {lab.stem for lab in labs}
    assert {path.name for path in (ROOT / "labs").iterdir()} == {lab.stem for lab in labs}
    checks = ROOT / "src/servebook/lab/checks"
    assert {path.stem for path in checks.glob("c[0-9]*.py")} == {f"c{lab.stem}" for lab in labs}
    for lab in labs:
        functions = re.findall(r"^def check_(\d\d_\d)\(", (checks / f"c{lab.stem}.py").read_text(), re.M)
        assert functions == [exercise.id.replace(".", "_") for exercise in lab.exercises]
        assert answers(lab.stem).keys() == {exercise.id for exercise in lab.exercises}
    assert {path.stem for path in (ROOT / "tests/lab_answers").glob("*.toml")} == {lab.stem for lab in labs}


@pytest.mark.parametrize("lab", LABS)
def test_notebooks_are_python(lab: Lab) -> None:
    for folder in ("solutions", "labs"):
        for cell in nbformat.read(ROOT / folder / lab.path, as_version=4).cells:
            if cell.cell_type == "code" and not cell.source.startswith("%%"):
                compile(cell.source, cell.id, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
