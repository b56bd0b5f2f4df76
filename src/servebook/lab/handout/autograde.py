"""Grading with nbgrader: each submission is confined, judged from outside, and leaves nothing running.

The kernel of a submission runs the learner's cells and nothing that decides on points: where a check stands, a judge in
a process of its own asks the kernel, and its verdict becomes the cell's output.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import nbformat
from nbclient.exceptions import DeadKernelError
from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbformat.v4 import new_output
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearOutput,
    DeduplicateIds,
    Execute,
    IgnorePattern,
    LimitOutput,
    NbGraderPreprocessor,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
)

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.lab.feedback import Result
from servebook.lab.handout import confine, landlock, provided
from servebook.lab.handout.blanks import student_notebook
from servebook.lab.handout.remarks import forget_remarks, remark
from servebook.lab.judge.process import JudgeProcess
from servebook.lab.manifest import load_labs
from servebook.processes import end
from servebook.settings import load_settings

MARK = "NBGRADER_SUBMISSION"
"""In the environment of a submission's kernel, and so of whatever descends from it: a word of this run alone."""
GRACE_SECONDS = 25.0
"""More than a supervisor takes to end its server in order."""
CHECK_SECONDS = 900
"""For the cell of a check: more than its calls may last together, each with a limit of its own, on a slow engine."""
CHECK = re.compile(r'check\("(\d\d\.\d)"\)')


class MendStructure(NbGraderPreprocessor):  # type: ignore[misc]
    """Puts back what a notebook has lost: cells that its exercises build on, and the marks of answers and checks.

    nbgrader's marks are those that were handed out, one of each. JupyterLab copies them where a cell is pasted or
    split; of copies nbgrader empties the marks, takes an empty one for an old version's, and then grades nobody more.
    What a link in the hand-in leads to is left out before.
    """

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        forget_remarks(resources)
        leave_out_links(resources)
        stem = resources["nbgrader"]["notebook"]
        # Made anew: in labs/ the instructor may have tried it.
        source = ROOT / "solutions" / stem / f"{stem}.ipynb"
        if source.is_file():
            place, marks = 0, {}
            for cell in nbformat.reads(student_notebook(source), as_version=4).cells:
                found = place_of(cell, nb.cells)
                if found is not None:
                    place = found + 1
                    if "nbgrader" in cell.metadata:
                        if "nbgrader" not in nb.cells[found].metadata:
                            nb.cells[found]["id"] = cell.id
                            remark(resources, f"the cell {cell.id} had lost its metadata, and was given them back")
                        marks[id(nb.cells[found])] = cell.metadata["nbgrader"]
                elif cell.cell_type == "code":
                    nb.cells.insert(place, cell)
                    place += 1
                    remark(resources, f"the cell {cell.id} was missing, and was put back as it was handed out")
                    if "nbgrader" in cell.metadata:
                        marks[id(cell)] = cell.metadata["nbgrader"]
            for cell in nb.cells:
                cell.metadata.pop("nbgrader", None)
                if id(cell) in marks:
                    cell.metadata["nbgrader"] = marks[id(cell)]
        return nb, resources


def leave_out_links(resources: Any) -> None:
    """Remove what nbgrader has copied through links, with the rights of who grades: solutions, or others' work.

    Raises:
        ServebookError: the notebook itself, or its folder, is a link.
    """
    place, handed_in = resources["nbgrader"], Path(resources["metadata"]["path"])
    copied = Path("autograded", place["student"], place["assignment"])
    for path in (handed_in, handed_in / f"{place['notebook']}.ipynb"):
        if path.is_symlink():
            remark(resources, f"not graded: {path.name} is a link")
            raise ServebookError(f"{path} is a link, and may lead to a solution.", "Put what was handed in there.")
    for link in (path for path in handed_in.rglob("*") if path.is_symlink()):
        (copied / link.relative_to(handed_in)).unlink(missing_ok=True)
        remark(resources, f"{link.relative_to(handed_in)} is a link, and was left out")


def place_of(released: Any, cells: list[Any]) -> int | None:
    """Where that cell is, by nbgrader's mark, by its id, or by the check in it; some programs lose ids.

    Of several the last: all that the student has defined is there by then.
    """
    mark = released.metadata.get("nbgrader", {}).get("grade_id")
    kept = released.id in ("parameters", "setup") or CHECK.fullmatch(released.source)

    def marked(cell: Any) -> bool:  # one that has become text, too: nbgrader makes it code again
        return bool(mark) and cell.metadata.get("nbgrader", {}).get("grade_id") == mark

    def named(cell: Any) -> bool:
        return bool(cell.cell_type == released.cell_type and cell.get("id") == released.id)

    def alike(cell: Any) -> bool:
        same = cell.cell_type == released.cell_type and cell.source.strip() == released.source.strip()
        return bool(kept and same)

    places = range(len(cells) - 1, -1, -1)
    return next((place for how in (marked, named, alike) for place in places if how(cells[place])), None)


class ExecuteAndEnd(Execute):  # type: ignore[misc]
    """Runs a submission as nbgrader does, but for the checks; then ends its processes, of any session."""

    timeout: int

    def preprocess(self, nb: Any, resources: Any = None, km: Any = None) -> tuple[Any, Any]:
        self.mark = uuid4().hex
        self.scratch = confine.scratch_folder()
        self.folder = self.scratch / "work"
        self.allowed, told = None, {}
        try:
            # A copy: into the folder itself nbgrader writes, and would follow a link that a submission leaves there.
            shutil.copytree(Path(resources["metadata"]["path"]).resolve(), self.folder, symlinks=True)
            if confine.FROM in os.environ:  # else it is the affair of who grades
                stem = resources["nbgrader"]["notebook"]
                provided.start_servers(next(lab for lab in load_labs() if lab.stem == stem))
            provided.make_folders(self.scratch)
            # SPT_NOENV: vLLM's processes rename themselves, and would write over their environment with the mark.
            self.environment = provided.environment(self.scratch) | {MARK: self.mark, "SPT_NOENV": "1"}
            if landlock.possible():
                self.allowed = confine.folders(Path.cwd(), self.scratch)
                told[landlock.TOLD] = str(self.scratch.parent / confine.NAMED)
                Path(told[landlock.TOLD]).write_text(json.dumps(self.allowed), encoding="utf-8")
            else:
                self.log.warning("This machine has no Landlock: submissions can read all that you can, solutions too")
            if load_settings().key and "SERVEBOOK_API_KEY" not in self.environment:
                self.log.warning("Submissions get no key: they cannot attach to servers that were started with one")
            judges = {"SERVEBOOK_STATE_DIR": str(provided.judges_state(self.scratch))}
            self.judge = JudgeProcess(self.environment | told | judges, self.scratch.parent)
            try:
                tempfile.tempdir = str(self.scratch)  # for the file that tells the kernel its sockets
                executed: tuple[Any, Any] = super().preprocess(nb, resources, km)
                return executed
            finally:
                tempfile.tempdir = None
                self.judge.end()
        except DeadKernelError:
            remark(resources, "not graded: the submission's kernel died")
            raise
        finally:
            for command in end(f"{MARK}={self.mark}", GRACE_SECONDS):
                self.log.info("Ended what the submission had started: %s", command)
            shutil.rmtree(self.scratch.parent, ignore_errors=True)

    def setup_kernel(self, **kwargs: Any) -> AbstractContextManager[None]:
        if self.allowed:
            kwargs["preexec_fn"] = partial(landlock.confine, self.allowed)
        kernel: AbstractContextManager[None] = super().setup_kernel(
            env=self.environment, cwd=str(self.folder), **kwargs
        )
        return kernel

    def preprocess_cell(self, cell: Any, resources: Any, index: int) -> tuple[Any, Any]:
        check = CHECK.fullmatch(cell.source.strip())
        if cell.cell_type != "code" or not check or not cell.metadata.get("nbgrader", {}).get("grade"):
            executed: tuple[Any, Any] = super().preprocess_cell(cell, resources, index)
            return executed
        result = self._judged(check[1], cell, resources, index)
        if result.state == "stuck":
            problem, _, remedy = (part.partition("\n")[0] for part in result.got.partition("\n→ "))
            remark(resources, f"the check of {check[1]} could not run: {problem} {remedy}".rstrip())
        text = result.render()
        cell.outputs = [
            new_output("stream", name="stdout", text=text)
            if result.passed
            else new_output("error", ename="NotPassed", evalue=text, traceback=[f"NotPassed: {text}"])
        ]
        return cell, resources

    def _judged(self, exercise_id: str, cell: Any, resources: Any, index: int) -> Result:
        """Let the judge ask the kernel."""
        address = self.scratch / uuid4().hex[:8]
        source, limit = cell.source, self.timeout
        cell.source = f"from servebook.lab.judge.learner import serve as _serve; _serve({str(address)!r})"
        self.timeout = CHECK_SECONDS
        try:
            answer = partial(super().preprocess_cell, cell, resources, index)
            return self.judge.judged(exercise_id, self.folder, address, answer)
        finally:
            cell.source, self.timeout = source, limit


SANITIZE_STEPS = [MendStructure, ClearOutput, DeduplicateIds, OverwriteKernelspec, OverwriteCells, CheckCellMetadata]
"""For `Autograde.sanitize_preprocessors`: nbgrader's own, after ours."""
STEPS = [
    ExecuteAndEnd,
    IgnorePattern,
    ClearMetadataPreprocessor,
    LimitOutput,
    SaveAutoGrades,
    AssignLatePenalties,
    CheckCellMetadata,
]
"""For `Autograde.autograde_preprocessors`: nbgrader's own, but for the first."""
