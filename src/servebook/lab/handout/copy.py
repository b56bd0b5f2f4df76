"""A learner's copy of the labs: made, found, and one blank of it opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.lab.manifest import Lab, find_exercise, load_labs
from servebook.lab.record import Store
from servebook.lab.shell import again, read_notebook
from servebook.whole import write_whole


def make_copy(target: Path) -> tuple[list[Lab], list[Lab]]:
    """Copy the labs to `target` and remember it as the place to work in.

    A notebook that is there already stays as it is. Returns the labs copied and the labs kept.
    """
    copied, kept = [], []
    for lab in load_labs():
        path = target / lab.path
        if path.exists():
            kept.append(lab)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _at(ROOT / "labs", lab).read_bytes())  # half a notebook would be kept the next time
        copied.append(lab)
    with Store() as progress:
        progress.folder = target.resolve()
    return copied, kept


def lab_notebook(lab: Lab) -> Path:
    """The notebook that the learner works in: in the folder of `servebook labs init`, else in `labs/`.

    Raises:
        ServebookError: it is in neither.
    """
    with Store() as progress:
        folder = progress.folder
    return _at(folder if folder and folder.is_dir() else ROOT / "labs", lab)


def reset(exercise_id: str) -> Path:
    """Open an exercise's blank again and forget its progress; return the notebook that was changed.

    Raises:
        ServebookError: there is no such exercise, or its notebook cannot be read or has lost its answer cell.
    """
    lab, exercise = find_exercise(exercise_id)
    path = lab_notebook(lab)
    notebook = read_notebook(path)
    answer = next((cell for cell in notebook.cells if cell.id == f"{exercise.cell}-answer"), None)
    if answer is None or "servebook" not in answer.metadata:
        raise ServebookError(f"{path} has no answer cell for {exercise_id}.", again(path))
    answer.source, answer.outputs, answer.execution_count = answer.metadata["servebook"]["stub"], [], None
    mark = answer.metadata.get("nbgrader")

    # The other part of an answer that was split: JupyterLab deletes none, as it does what was pasted.
    def other_part(cell: Any) -> bool:
        same = cell is not answer and mark and cell.metadata.get("nbgrader") == mark
        return bool(same and not cell.metadata.get("deletable", True))

    notebook.cells = [cell for cell in notebook.cells if not other_part(cell)]
    # There is no other copy of the learner's answers.
    write_whole(path, nbformat.writes(notebook) + "\n", path.stat().st_mode & 0o777)
    with Store() as progress:
        progress.records.pop(exercise_id, None)
    return path


def _at(folder: Path, lab: Lab) -> Path:
    path = folder / lab.path
    if not path.is_file():
        raise ServebookError(f"There is no {path}.", "Run `servebook labs init DIR`, or `make labs` in the repository.")
    return path
