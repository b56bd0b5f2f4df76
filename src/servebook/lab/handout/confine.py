"""Confines what a submission runs to the files that a student has: neither solutions, nor others' work, nor grades.

By Linux's Landlock, which needs no rights and lasts for the process and all that it starts. Reading is allowed
everywhere but in the instructor's folders, writing in the submission's own. Root's powers are given up, too.
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

TMP, DEVICES = Path("/tmp"), Path("/dev")
EVERYBODYS = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "nvidia*")
"""The devices that a program may need. Root's include disks."""
TOLD = "SERVEBOOK_CONFINED_TO"
"""In the environment of a process that is to confine itself: the file that names the folders, in JSON.

Not the folders themselves: they may be thousands, and one variable holds 128 KiB at the most (MAX_ARG_STRLEN).
"""
NAMED = "folders.json"
"""That file's name, beside the folder for temporary files."""
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
LIST = 0b1000
"""The names in a folder."""
RIGHTS = {"read": READ, "list": LIST, "write": WRITE, "make folders": MAKE_FOLDERS}
VERSION = 3
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
CAPABILITIES = struct.pack("=Ii", 0x20080522, 0), bytes(24)
"""What capset wants to take all of them from this process: linux/capability.h, version 3."""
O_PATH = getattr(os, "O_PATH", 0)
libc = ctypes.CDLL(None, use_errno=True)


def possible() -> bool:
    """Whether this machine can confine."""
    return platform.system() == "Linux" and int(libc.syscall(CREATE_RULESET, None, 0, 1)) >= VERSION


def folders(submission: Path, course: Path, scratch: Path) -> dict[str, list[str]]:
    """Where a submission may read, write and make folders; `scratch` is its folder for temporary files.

    It writes nothing that anybody else runs or reads: no home folder, whose configuration is code to Jupyter and
    IPython, no cache, and of the devices those that every program may have.
    """
    from servebook.lab.handout.bundle import BUNDLE

    submission, course, scratch = submission.resolve(), course.resolve(), scratch.resolve()
    settings = load_settings()
    prefix, state = Path(sys.prefix).resolve(), settings.state_dir.resolve()
    for name in ("", "logs", "servers", "triton"):  # beside a room nothing can be made
        (state / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    hidden = [ROOT.resolve(), course, prefix, DEVICES]
    hidden += [each for each in (Path.home().resolve(),) if each.parts[1:]]  # "/" in some containers
    hidden += [room for room in (state / "room", Path(os.environ.get(FROM, state / "room")).resolve()) if room.exists()]
    given = [*(ROOT / name for name in (*BUNDLE, "labs", ".venv")), prefix, Path(sys.base_prefix).resolve()]
    given += [settings.cache_dir, hub_cache(), scratch.parent / NAMED, Path(settings.model).expanduser().resolve()]
    own = [submission, scratch, *around(state, hidden), sockets_folder()]
    own += [path for name in EVERYBODYS for path in DEVICES.glob(name)]
    return {
        "read": [*map(str, [*around(Path("/"), hidden), *given])],
        "list": [str(DEVICES)],
        "write": [*map(str, own)],
        # Triton's stub makes itself a folder there, whatever TMPDIR says.
        "make folders": [str(TMP)],
    }


def home(scratch: Path) -> dict[str, str]:
    """The environment in which a submission has a home of its own in `scratch`, and finds model and servers."""
    settings, place = load_settings(), scratch / "home"
    place.mkdir()
    names = {"HOME": "", "IPYTHONDIR": ".ipython", "JUPYTER_CONFIG_DIR": ".jupyter", "JUPYTER_DATA_DIR": ".data"}
    names |= {"XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config", "XDG_DATA_HOME": ".data", "HF_HOME": ".hf"}
    return {name: str(place / folder) for name, folder in names.items()} | {
        "HF_HUB_CACHE": str(hub_cache()),
        "SERVEBOOK_CACHE_DIR": str(settings.cache_dir),
        "SERVEBOOK_STATE_DIR": str(settings.state_dir),
        "VLLM_CACHE_ROOT": str(place / "vllm"),
    }


def hub_cache() -> Path:
    """Where models from the hub lie; beside them is a token."""
    ours = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(ours, "hub")).expanduser()


def sockets_folder() -> Path:
    """For the sockets of submissions' kernels, and nothing else: beside it lie the keys to the instructor's own."""
    return Path(jupyter_runtime_dir(), "nbgrader")


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
    for capability in range(64):  # root has them again with each program that it starts, but for these
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.capset(*CAPABILITIES)
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
