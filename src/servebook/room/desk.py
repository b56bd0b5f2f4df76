"""A learner's desk: `python -m servebook.room.desk MASTER DESK` lays it out as the master desk is.

The master is made once for a room; a desk is then laid out in a moment.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from servebook.checkout import ROOT
from servebook.lab.record import Store
from servebook.whole import write_whole


def make_master(master: Path, root: Path = ROOT) -> None:
    """Put what every learner gets into `master`: the notebooks without instructor's notes, and the labs.

    Those are made anew: in `labs/` an instructor may have tried them.

    Raises:
        ServebookError: this is not the instructor's repository.
    """
    from servebook.lab.handout.blanks import write_labs
    from servebook.lab.handout.bundle import clean_notebooks, copy_tracked

    if master.exists():
        shutil.rmtree(master)
    copy_tracked(root, ["notebooks", "BENCHMARKS.md"], master)
    write_labs(master / "labs", root)
    clean_notebooks(master / "notebooks")


def lay_out(master: Path, desk: Path) -> None:
    """Copy the master's files to `desk`; what is there already stays as the learner left it."""
    desk.mkdir(parents=True, exist_ok=True, mode=0o700)
    for source in filter(Path.is_file, master.rglob("*")):
        target = desk / source.relative_to(master)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, source.read_bytes())  # half a notebook would stay as the learner's
    with Store() as progress:
        progress.folder = desk / "labs"


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]), Path(sys.argv[2]))
