"""From desks to nbgrader's `submitted/`, and feedback back: files in folders where learners may have set traps."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from servebook.checkout import ROOT
from servebook.lab.manifest import load_labs
from servebook.whole import write_whole

MAX_BYTES = 20 << 20
"""Of one notebook, outputs included."""
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True)
class Collected:
    """One learner's labs: those taken, and what was left, with the reason, by its path in `labs/`."""

    learner: str
    labs: list[str]
    left: dict[str, str]


def collect(desks: Path, submitted: Path, root: Path = ROOT) -> list[Collected]:
    """Copy the labs' notebooks, and nothing else, from every desk to `submitted/LEARNER/LAB/LAB.ipynb`.

    A desk's files are its learner's: a link could name a file of ours, a pipe never end. Those are left, and named; so
    is whatever else lies beside a notebook. What is as it was handed out has not been worked on, and is no hand-in. One
    that has changed gets a new time in `timestamp.txt`, by which nbgrader knows that it has to be graded anew; one that
    is gone from a desk stays as it was handed in before.

    Raises:
        ServebookError: this is not the instructor's repository.
    """
    from servebook.lab.handout.blanks import handed_out
    from servebook.lab.handout.remarks import DAMAGED, is_notebook

    found, blank = [], handed_out(root)
    for desk in sorted(path for path in desks.iterdir() if path.is_dir() and not path.is_symlink()):
        labs: list[str] = []
        left: dict[str, str] = {}
        for lab in load_labs():
            try:
                with opened(desk, "labs", lab.stem) as folder:
                    with os.scandir(folder) as entries:
                        others = {entry.name for entry in entries} - {f"{lab.stem}.ipynb", ".ipynb_checkpoints"}
                    left |= {f"{lab.stem}/{name}": "not handed out" for name in sorted(others)}
                    text = read(folder, f"{lab.stem}.ipynb")
            except FileNotFoundError:
                continue
            except OSError as error:
                left[lab.stem] = error.strerror or str(error)
                continue
            if text == blank[lab.path].encode():
                continue
            target = submitted / desk.name / lab.stem
            if (target / f"{lab.stem}.ipynb").is_file() and not is_notebook(text):
                left[lab.stem] = f"{DAMAGED}; what was handed in before stays"
                continue
            hand_in(target, f"{lab.stem}.ipynb", text)
            labs.append(lab.stem)
        found.append(Collected(desk.name, labs, left))
    return found


def hand_in(folder: Path, name: str, text: bytes) -> None:
    """Write a notebook to `submitted/`, with the time, unless it lies there already."""
    target = folder / name
    if target.is_file() and target.read_bytes() == text:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # The time first: once the notebook lies there, no later call would write it.
    write_whole(folder / "timestamp.txt", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f} UTC")
    write_whole(target, text)


@contextmanager
def opened(folder: Path, *names: str) -> Iterator[int]:
    """The folder at `folder/NAME/…`, open, no step of which may be a link.

    Raises:
        OSError: there is none.
    """
    at = os.open(folder, FOLDER)
    try:
        for name in names:
            inner = os.open(name, FOLDER, dir_fd=at)
            os.close(at)
            at = inner
        yield at
    finally:
        os.close(at)


def read(folder: int, name: str) -> bytes:
    """A file in a folder that is open.

    Raises:
        OSError: there is none; or it is a link, no file, or too long.
    """
    # Not blocking: to open a pipe that nobody writes to would wait for ever.
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with os.fdopen(file, "rb") as opened_file:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no file")
        if status.st_size > MAX_BYTES:
            raise OSError(0, f"it has more than {MAX_BYTES >> 20} MiB")
        return opened_file.read(MAX_BYTES)


def deliver(desk: Path, folder: str, name: str, content: bytes) -> None:
    """Put a file into a folder at a desk, as its learner's; one of that name is replaced, and no link is followed.

    Raises:
        OSError: there is no such desk, or the folder is a link or a file.
    """
    with opened(desk) as at:
        owner = os.fstat(at)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700, dir_fd=at)
        with opened(desk, folder) as inside:
            os.fchown(inside, owner.st_uid, owner.st_gid)
            draft = f".{secrets.token_hex(8)}"
            try:
                file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=inside)
                with os.fdopen(file, "wb") as new:
                    new.write(content)
                    os.fchown(file, owner.st_uid, owner.st_gid)
                os.rename(draft, name, src_dir_fd=inside, dst_dir_fd=inside)
            except OSError:
                with suppress(FileNotFoundError):
                    os.unlink(draft, dir_fd=inside)
                raise
