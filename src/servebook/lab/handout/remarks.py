"""What grading has to say of a submission beside its points, and an export that says it.

nbgrader's own export gives 0 to whoever has no grade: a file with another name or a dead kernel looks as if it were
earned.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import nbformat
from nbgrader.api import Gradebook
from nbgrader.plugins import ExportPlugin

from servebook.whole import write_whole

FILE = Path("remarks.json")
"""In the course's folder: remarks by assignment and student."""
DAMAGED = "no notebook, or a damaged one"
COLUMNS = (
    *("assignment", "duedate", "timestamp", "student_id", "last_name", "first_name", "email"),
    *("raw_score", "late_submission_penalty", "score", "max_score", "remark"),
)


def remarks() -> dict[str, dict[str, list[str]]]:
    """All remarks so far."""
    try:
        found: dict[str, dict[str, list[str]]] = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def forget_remarks(resources: Any) -> None:
    """A submission is graded anew."""
    everything = remarks()
    everything.get(resources["nbgrader"]["assignment"], {}).pop(resources["nbgrader"]["student"], None)
    _write(everything)


def remark(resources: Any, text: str) -> None:
    """Note something of the submission that is being graded."""
    place = (resources or {}).get("nbgrader")
    if place:
        everything = remarks()
        everything.setdefault(place["assignment"], {}).setdefault(place["student"], []).append(text)
        _write(everything)


def _write(everything: dict[str, dict[str, list[str]]]) -> None:
    write_whole(FILE, json.dumps(everything, indent=1, ensure_ascii=False))


class GradesWithRemarks(ExportPlugin):  # type: ignore[misc]
    """grades.csv as nbgrader writes it, with a remark for each; who was not graded has no score."""

    def export(self, gradebook: Gradebook) -> None:
        """Write the file."""
        noted = remarks()
        text = io.StringIO(newline="")
        rows = csv.DictWriter(text, COLUMNS, restval="")
        rows.writeheader()
        for assignment in gradebook.assignments:
            for student in gradebook.students:
                if self._wanted(assignment.name, student.id):
                    said = noted.get(assignment.name, {}).get(student.id, [])
                    rows.writerow(row(gradebook, assignment, student, said))
        write_whole(Path(self.to or "grades.csv"), text.getvalue())

    def _wanted(self, assignment: str, student: str) -> bool:
        return (not self.assignment or assignment in self.assignment) and (
            not self.student or student in map(str, self.student)
        )


def row(gradebook: Gradebook, assignment: Any, student: Any, said: list[str]) -> dict[str, Any]:
    """One line of the file."""
    line = {name: getattr(student, name) for name in ("last_name", "first_name", "email")}
    line |= {"assignment": assignment.name, "duedate": assignment.duedate, "student_id": student.id}
    line |= {"max_score": assignment.max_score}
    if problem := not_graded(Path("submitted") / student.id / assignment.name, assignment.name):
        return line | {"remark": "; ".join([problem, *said])}
    # nbgrader enters a submission before it runs it, and takes the folder away again when that fails.
    if not (Path("autograded") / student.id / assignment.name).is_dir():
        return line | {"remark": "; ".join(said) or "not graded: `nbgrader autograde` has not come to its end with it"}
    submission = gradebook.find_submission(assignment.name, student.id)
    penalty = submission.late_submission_penalty or 0.0
    score = {"raw_score": submission.score, "late_submission_penalty": penalty}
    score |= {"score": max(0.0, submission.score - penalty), "timestamp": submission.timestamp}
    return line | score | {"remark": "; ".join(said)}


def not_graded(folder: Path, assignment: str) -> str:
    """Why there can be no grade for what was handed in, "" where there can."""
    if not folder.is_dir():
        return "nothing was handed in"
    if not (folder / f"{assignment}.ipynb").is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.ipynb"))) or "no notebook"
        return f"not graded: there is no {assignment}.ipynb, but {others}"
    path = folder / f"{assignment}.ipynb"
    if not path.is_symlink() and not is_notebook(path.read_bytes()):  # a link was left out, which another remark says
        return f"not graded: {assignment}.ipynb is {DAMAGED}"
    return ""


def is_notebook(content: bytes) -> bool:
    """Whether a file that a student has written can be read as a notebook."""
    try:
        nbformat.reads(content.decode(), as_version=4)
    except Exception:  # whatever nbformat meets in it
        return False
    return True
