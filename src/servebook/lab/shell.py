"""Runs a lab's notebook in this process, cell by cell and without a kernel: for the command line and the proofs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.lab.checking import evaluate
from servebook.lab.feedback import MOST, Result, cut
from servebook.lab.manifest import Exercise, find_exercise
from servebook.lab.submission import unattended, where, words_of

PART = re.compile(r"(\d\d)-(\d)-(brief|given|answer|check|try)")
"""The ids of an exercise's cells; every other cell belongs to the lab as a whole."""


class CellError(ServebookError):
    """A cell of the lab's own raised: one that is neither an exercise's nor the learner's."""

    def __init__(self, cell_id: str, error: BaseException) -> None:
        # An error of ours brings its own remedy.
        remedy = "" if isinstance(error, ServebookError) else "Run the notebook from its top to that cell, and mend it."
        super().__init__(f"The cell {cell_id!r} failed: {type(error).__name__}: {words_of(error)}", remedy)


def read_notebook(path: Path) -> Any:
    """Read a lab's notebook.

    Raises:
        ServebookError: it is no notebook, because it was cut off or edited by hand.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat's errors have nothing in common
        reason = str(error).partition("\n")[0]
        raise ServebookError(f"{path} cannot be read as a notebook: {reason}", again(path)) from None
    if any("id" not in cell for cell in notebook.cells):
        _restore_ids(notebook, released(path))
    return notebook


def released(path: Path) -> list[Any]:
    """The cells of the same lab as it was handed out; none where that is not here."""
    blank = ROOT / "labs" / path.parent.name / path.name
    return list(nbformat.read(blank, as_version=4).cells) if blank.is_file() else []


def _restore_ids(notebook: Any, blank: list[Any]) -> None:
    """Give back the cells' ids, which Colab and old versions of Jupyter do not save."""
    known = {cell.source: cell.id for cell in blank}
    for cell in notebook.cells:
        graded = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.id = graded or known.get(cell.source) or uuid4().hex[:8]
    notebook.nbformat_minor = 5


def again(path: Path) -> str:
    """The remedy where a lab's notebook has lost what it needs."""
    folder = path.parents[1]
    if folder == ROOT / "labs":  # of which copies are made
        return f"Take {path.relative_to(ROOT)} anew from where the course came from, or by `git checkout` of it."
    return f"Remove {path.name} and run `servebook labs init {shlex.quote(str(folder))}` again."


def exercise_of(cell: Any) -> tuple[str, str] | None:
    """The exercise's id and the part that a cell plays in it, such as ("04.2", "answer")."""
    match = PART.fullmatch(cell.id)
    return (f"{match[1]}.{match[2]}", match[3]) if match else None


def tagged(cell: Any, tag: str) -> bool:
    """Whether a cell carries that tag."""
    return tag in cell.metadata.get("tags", [])


class LabShell:
    """A session with the lab in `notebook`: `prepare()` once, then answers and checks in any order."""

    def __init__(self, notebook: Path, **parameters: str) -> None:
        """Read the notebook; `parameters` take the place of its own, as papermill's do.

        Raises:
            ServebookError: it cannot be read.
        """
        self.notebook = notebook
        self.parameters = parameters
        self.cells = read_notebook(notebook).cells
        quiet = Config()
        quiet.HistoryManager.enabled = False
        # A module of its own: the default would take the place of this process's __main__.
        self.shell = InteractiveShell(user_module=ModuleType("lab"), config=quiet)
        self.shell.ask_exit = sys.exit  # what its exit() and quit() call, and only a terminal's shell has

    def prepare(self, exercise_id: str | None = None) -> None:
        """Run the cells that the exercises build on: the shared ones, and what is given for them.

        With `exercise_id` it is all that stands above its answer, earlier answers too: one may use another. What
        belongs to other exercises, or is the learner's own, may fail.

        Raises:
            CellError: one that the lab was handed out with failed.
        """
        ours = {cell.id for cell in released(self.notebook)}
        runs = (None, "given", "answer") if exercise_id else (None, "given")
        begun = False  # what stands above the first exercise is the lab's, also where its id got lost
        for cell in self.cells:
            exercise, part = exercise_of(cell) or (None, None)
            begun = begun or exercise is not None
            if exercise_id and (exercise, part) == (exercise_id, "answer"):
                break
            if cell.cell_type == "code" and part in runs and not tagged(cell, "demo"):
                error = self.run(cell.source)
                needed = (cell.id in ours or not begun) and (part is None or exercise_id in (None, exercise))
                if error and needed:
                    raise CellError(cell.id, error) from error
                if tagged(cell, "parameters"):
                    self.shell.user_ns.update(self.parameters)
        self.base = dict(self.shell.user_ns)

    def forget(self) -> None:
        """Forget all answers."""
        self.shell.user_ns.clear()
        self.shell.user_ns.update(self.base)

    def source(self, exercise_id: str) -> str:
        """What the notebook has in the answer cell.

        Raises:
            ServebookError: the notebook has lost that cell.
        """
        _, exercise = find_exercise(exercise_id)
        for cell in self.cells:
            if cell.id == f"{exercise.cell}-answer":
                return str(cell.source)
        raise ServebookError(f"{self.notebook} has no answer cell for {exercise_id}.", again(self.notebook))

    def run(self, source: str) -> BaseException | None:
        """Run a cell silently; return the error that it ended with.

        Raises:
            KeyboardInterrupt: Ctrl-C, which IPython keeps to itself, is no error of the cell's.
        """
        with capture_output(), unattended():
            done = self.shell.run_cell(source)
        error: BaseException | None = done.error_before_exec or done.error_in_exec
        if isinstance(error, KeyboardInterrupt):
            raise error
        return error

    def check(self, exercise_id: str, answer: str | None = None) -> Result:
        """Run the answer cell, or `answer` in its place, and its check."""
        _, exercise = find_exercise(exercise_id)
        error = self.run(self.source(exercise_id) if answer is None else answer)
        if error:
            return _broken(exercise, error)
        with capture_output():
            return evaluate(exercise_id, self.shell.user_ns)


def _broken(exercise: Exercise, error: BaseException) -> Result:
    if isinstance(error, NotImplementedError) and error.args == (exercise.id,):
        return Result(exercise, "open")
    return Result(
        exercise,
        "wrong",
        "a cell that runs",
        cut(f"{type(error).__name__}: {words_of(error)}{where(error)}", MOST),
        "the answer cell itself raised this error",
    )
