"""Confines a process to folders, by Linux's Landlock, which needs no rights and lasts for all that it starts.

With the standard library only, because it is also a program: `python landlock.py WORDS…` confines itself as its
environment says, and becomes the program that the words name.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

TOLD = "SERVEBOOK_CONFINED_TO"
"""In the environment of a process that is to confine itself: the file that names the folders, in JSON.

Not the folders themselves: they may be thousands, and one variable holds 128 KiB at the most (MAX_ARG_STRLEN).
"""
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""The numbers of Landlock's system calls, the same on every machine; uapi/linux/landlock.h for the rights."""
READ = 0b1101
"""Execute, read files, read folders."""
WRITE = 0x7FFF
"""All of the third version (Linux 6.2): also make, remove, link and cut."""
MAKE_FOLDERS = 0b10000000
"""And nothing else: who may also remove them can give another name to one that is full."""
LIST = 0b1000
"""The names in a folder."""
RIGHTS = {"read": READ, "list": LIST, "write": WRITE, "make folders": MAKE_FOLDERS}
VERSION, VERSION_OF_SIGNALS = 3, 6
SIGNALS = 2
"""LANDLOCK_SCOPE_SIGNAL (Linux 6.12): no signal to who is not confined with this process, or further."""
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 22, 24, 38
OWN_LIMITS = (
    (0x20, 0, 0, 4),  # for what kind of machine is the call?
    (0x15, 0, 6, 0xC000003E),  # not for x86-64: refused
    (0x20, 0, 0, 0),  # which call is it?
    (0x35, 4, 0, 0x40000000),  # one of x32: refused
    (0x15, 0, 2, 302),  # not prlimit64: allowed
    (0x20, 0, 0, 16),  # of which process?
    (0x15, 0, 1, 0),  # not of this one: refused
    (0x06, 0, 0, 0x7FFF0000),  # allowed
    (0x06, 0, 0, 0x00050001),  # refused: EPERM
)
"""A filter of system calls for x86-64, in linux/filter.h's words: a process sets its own limits, and nobody else's.

A limit of processor seconds ends a process as a signal does (`prlimit --cpu=1 --pid PID`).
"""
CAPABILITIES = struct.pack("=Ii", 0x20080522, 0), bytes(24)
"""What capset wants to take all of them from this process: linux/capability.h, version 3."""
O_PATH = getattr(os, "O_PATH", 0)
libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """That of this machine's Landlock; -1 where there is none."""
    return int(libc.syscall(CREATE_RULESET, None, 0, 1)) if platform.system() == "Linux" else -1


def possible() -> bool:
    """Whether this machine can confine."""
    return version() >= VERSION


def confine(allowed: dict[str, list[str]]) -> None:
    """Confine this process and all that it will start; what it has open stays open. Root's powers are given up, too.

    It ends none of this user's other processes, by a signal (Linux 6.12) or by a limit (x86-64).

    Raises:
        OSError: the kernel refuses.
    """
    attributes = struct.pack("QQQ", WRITE, 0, SIGNALS) if version() >= VERSION_OF_SIGNALS else struct.pack("Q", WRITE)
    ruleset = libc.syscall(CREATE_RULESET, attributes, len(attributes), 0)
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
    if platform.machine() == "x86_64":
        _set_filter()


def _set_filter() -> None:
    words = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in OWN_LIMITS))
    program = struct.pack("@HP", len(OWN_LIMITS), ctypes.addressof(words))
    if libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp refuses")


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
        confine(json.loads(Path(os.environ[TOLD]).read_text(encoding="utf-8")))


def as_told(command: Sequence[str]) -> list[str]:
    """That command, for a child that runs what a learner wrote: it confines itself once more, if this process did."""
    return [sys.executable, "-P", str(Path(__file__)), *command] if TOLD in os.environ else [*command]


if __name__ == "__main__":
    confine_as_told()
    os.execvp(sys.argv[1], sys.argv[1:])
