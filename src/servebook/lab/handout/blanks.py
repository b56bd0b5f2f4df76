"""From a solution to a student's notebook: nbgrader's own steps, and two of ours.

`python -m servebook.lab.handout.blanks` writes `labs/`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nbconvert.exporters import NotebookExporter
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearOutput,
    ClearSolutions,
    ComputeChecksums,
    LockCells,
    NbGraderPreprocessor,
    SaveCells,
)

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.lab.manifest import load_labs
from servebook.lab.shell import exercise_of, tagged
from servebook.whole import write_whole

TASK = re.compile(r"(// |)### BEGIN SOLUTION (.+)")


class OpenBlanks(ClearSolutions):  # type: ignore[misc]
    """Replaces `### BEGIN SOLUTION task` … `### END SOLUTION` by a TODO with the task and the exercise's id.

    What it leaves is kept in the cell's metadata too, so that `servebook labs reset` has it at hand.
    """

    def preprocess_cell(self, cell: Any, resources: Any, index: int) -> tuple[Any, Any]:
        part = exercise_of(cell)
        if not part or part[1] != "answer":
            return cell, resources
        if not (task := TASK.search(cell.source)):
            raise ValueError(f"Cell {cell.id} has no line `### BEGIN SOLUTION task`.")
        mark, after = ("// ", "// ") if task[1] else ("# ", "")  # a .proto file has comments of its own kind
        self.code_stub = {"python": f'{mark}TODO({part[0]}): {task[2]}\n{after}raise NotImplementedError("{part[0]}")'}
        cell, resources = super().preprocess_cell(cell, resources, index)
        cell.metadata["servebook"] = {"stub": cell.source}
        return cell, resources


class DropInstructorCells(NbGraderPreprocessor):  # type: ignore[misc]
    """Leaves out the cells tagged `instructor`."""

    def preprocess(self, notebook: Any, resources: Any) -> tuple[Any, Any]:
        drop_instructor_cells(notebook)
        return notebook, resources


def drop_instructor_cells(notebook: Any) -> None:
    """Leave out the cells tagged `instructor`."""
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "instructor")]


STEPS = [
    DropInstructorCells,
    LockCells,
    OpenBlanks,
    ClearOutput,
    CheckCellMetadata,
    ComputeChecksums,
    SaveCells,
]
"""For `GenerateAssignment.preprocessors`; SaveCells puts the cells into nbgrader's gradebook."""


def student_notebook(solution: Path) -> str:
    """The text of the student's notebook for the solution in that file; the same at every call."""
    exporter = NotebookExporter()
    for step in STEPS:
        if step is not SaveCells:
            exporter.register_preprocessor(step, enabled=True)
    text, _ = exporter.from_filename(str(solution))
    return str(text)


def require_solutions(root: Path) -> Path:
    """The folder of solutions.

    Raises:
        ServebookError: this is not the instructor's repository.
    """
    if not (root / "solutions").is_dir():
        raise ServebookError(f"{root} holds no solutions.", "Run this in the instructor's repository.")
    return root / "solutions"


def handed_out(root: Path = ROOT) -> dict[str, str]:
    """Every lab's student notebook, by its path below `labs/`: made anew, whatever somebody has done in that folder.

    Raises:
        ServebookError: this is not the instructor's repository.
    """
    solutions = require_solutions(root)
    return {lab.path: student_notebook(solutions / lab.path) for lab in load_labs()}


def write_labs(target: Path, root: Path = ROOT) -> list[Path]:
    """Write every lab's student notebook below `target`; return their paths."""
    written = []
    for name, text in handed_out(root).items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
        written.append(path)
    return written


if __name__ == "__main__":
    for path in write_labs(ROOT / "labs"):
        print(path.relative_to(ROOT))
