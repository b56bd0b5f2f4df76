"""From desks to nbgrader's `submitted/`: what learners have written, as files that nobody has prepared for us."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from servebook.lab.manifest import load_labs

MAX_BYTES = 20 << 20
"""Of one notebook, outputs included."""


@dataclass(frozen=True)
class Collected:
    """One learner's labs: those taken, and what was left, with the reason."""

    learner: str
    labs: list[str]
    left: dict[str, str]


def collect(desks: Path, submitted: Path) -> list[Collected]:
    """Copy the labs' notebooks, and nothing else, from every desk to `submitted/LEARNER/LAB/LAB.ipynb`.

    A desk's files are its learner's: a link could name a file of ours, a pipe never end. Those are left, and named.
    """
    found = []
    for desk in sorted(path for path in desks.iterdir() if path.is_dir() and not path.is_symlink()):
        labs: list[str] = []
        left: dict[str, str] = {}
        for lab in load_labs():
            try:
                text = read(desk, ("labs", lab.stem, f"{lab.stem}.ipynb"))
            except FileNotFoundError:
                continue
            except OSError as error:
                left[lab.stem] = error.strerror or str(error)
                continue
            target = submitted / desk.name / lab.stem / f"{lab.stem}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
            labs.append(lab.stem)
        found.append(Collected(desk.name, labs, left))
    return found


def read(folder: Path, names: tuple[str, ...]) -> bytes:
    """The file at `folder/NAME/…`, no step of which may be a link.

    Raises:
        OSError: there is none; or it is a link, no file, or too long.
    """
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    for name in names[:-1]:
        try:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        finally:
            os.close(at)
        at = inner
    try:
        # Not blocking: to open a pipe that nobody writes to would wait for ever.
        file = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    with os.fdopen(file, "rb") as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no file")
        if status.st_size > MAX_BYTES:
            raise OSError(0, f"it has more than {MAX_BYTES >> 20} MiB")
        return opened.read(MAX_BYTES)
