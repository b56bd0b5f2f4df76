"""Lays out a learner's desk: `python -m servebook.room.desk DIR` puts the notebooks and a copy of the labs there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nbformat

from servebook.lab.folder import make_copy
from servebook.lab.release import ROOT
from servebook.lab.shell import tagged


def lay_out(desk: Path) -> None:
    """Fill `desk`; what is there already stays as the learner left it."""
    for source in sorted((ROOT / "notebooks").rglob("*")):
        target = desk / source.relative_to(ROOT)
        if source.is_dir() or target.exists() or ".ipynb_checkpoints" in source.parts:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".ipynb":
            notebook = nbformat.read(source, as_version=4)
            notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "instructor")]
            nbformat.write(notebook, target)
        else:
            shutil.copyfile(source, target)
    make_copy(desk / "labs")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
