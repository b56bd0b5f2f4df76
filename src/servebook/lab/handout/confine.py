"""Confines what a submission runs to the files that a student has: neither solutions, nor others' work, nor grades.

By Linux's Landlock, which needs no rights and lasts for the process and all that it starts. Reading is allowed
everywhere but in the instructor's folders, writing where a learner writes.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from jupyter_core.paths import jupyter_runtime_dir

from servebook.checkout import ROOT
from servebook.settings import load_settings

TMP = Path("/tmp")
TOLD = "SERVEBOOK_CONFINED_TO"
"""In the environment of a process that is to confine itself: the file that names the folders, in JSON.

Not the folders themselves: they may be thousands, and one variable holds 128 KiB at the most (MAX_ARG_STRLEN).
"""
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""The numbers of Landlock's system calls, the same on every machine; uapi/linux/landlock.h for the rights."""
FROM = "SERVEBOOK_CONFINED_FROM"
"""In the environment of who grades: one more folder that no submission reads, a room's with its keys and desks."""
READ = 0b1101
"""Execute, read files, read folders."""
WRITE = 0x7FFF
"""All of the third version (Linux 6.2): also make, remove, link and cut."""
MAKE_FOLDERS = 0b10000000
"""And nothing else: who may also remove them can give another name to one that is full."""
RIGHTS = {"read": READ, "write": WRITE, "make folders": MAKE_FOLDERS}
VERSION = 3
PR_SET_NO_NEW_PRIVS = 38
O_PATH = getattr(os, "O_PATH", 0)
libc = ctypes.CDLL(None, use_errno=True)


def possible() -> bool:
    """Whether this machine can confine."""
    return platform.system() == "Linux" and int(libc.syscall(CREATE_RULESET, None, 0, 1)) >= VERSION


def folders(submission: Path, course: Path, scratch: Path) -> dict[str, list[str]]:
    """Where a submission may read, write and make folders; `scratch` is its folder for temporary files."""
    from servebook.lab.handout.bundle import BUNDLE

    submission, course, scratch = submission.resolve(), course.resolve(), scratch.resolve()
    home, prefix = Path.home().resolve(), Path(sys.prefix).resolve()
    hidden = [ROOT.resolve(), course, prefix]
    if FROM in os.environ:
        hidden.append(Path(os.environ[FROM]).resolve())
    given = [ROOT / name for name in (*BUNDLE, "labs", ".venv")] + [prefix]
    settings = load_settings()
    own = [submission, scratch, Path("/dev"), Path("/proc"), settings.state_dir, settings.cache_dir]
    for name in (".cache", ".config", ".ipython", ".jupyter", ".triton"):
        own += around(home / name, hidden)
    own += around(TMP, hidden)
    own.append(Path(jupyter_runtime_dir()))
    return {
        "read": [*map(str, [*around(Path("/"), hidden), *given])],
        "write": [*map(str, own)],
        # Triton's stub makes itself a folder there, whatever TMPDIR says. Where something is hidden there that is all.
        "make folders": [str(TMP)],
    }


def around(folder: Path, hidden: Iterable[Path]) -> Iterator[Path]:
    """What lies in `folder` but for what is hidden, in as few paths as can be; a link could lead to what is hidden."""
    inside = [each for each in hidden if each.is_relative_to(folder)]
    if not inside:
        yield folder
    elif folder not in inside:
        for each in sorted(path for path in folder.iterdir() if not path.is_symlink()):
            yield from around(each, inside)


def confine(allowed: dict[str, list[str]]) -> None:
    """Confine this process and all that it will start; what it has open stays open."""
    ruleset = libc.syscall(CREATE_RULESET, struct.pack("Q", WRITE), 8, 0)
    for what, paths in allowed.items():
        for path in paths:
            _allow(ruleset, path, RIGHTS[what])
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.syscall(RESTRICT_SELF, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock refuses")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # a link to nowhere, or not there
    try:
        if not Path(path).is_dir():
            rights &= 0b100000000000111  # a file is executed, written, read, cut
        libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, place), 0)
    finally:
        os.close(place)


def confine_as_told() -> None:
    """Confine this process if its environment says so; once more is stricter: it may not look into its parent then."""
    if TOLD in os.environ:
        confine(json.loads(Path(os.environ[TOLD]).read_text()))


def scratch_folder() -> Path:
    """A new folder for a submission's temporary files, in one that only this user may enter."""
    return Path(tempfile.mkdtemp(dir=tempfile.mkdtemp(prefix="submission-")))
