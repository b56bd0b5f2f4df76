"""From a solution to a student's notebook: nbgrader's own steps, and two of ours."""

from __future__ import annotations

import re
from typing import Any

from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearOutput,
    ClearSolutions,
    ComputeChecksums,
    LockCells,
    NbGraderPreprocessor,
    SaveCells,
)

from servebook.lab.shell import exercise_of, tagged

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
        notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "instructor")]
        return notebook, resources


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
