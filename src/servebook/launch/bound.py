"""A program that the kernel kills when the thread that started it ends: `python -I -S bound.py PARENT PROGRAM WORD…`.

Popen's `preexec_fn` could ask for that, too, but it makes of Popen a fork, in which gRPC starts its threads again: they
use files that Popen is closing, and abort the child before it is the program. Measured: of 1,500 starts beside busy
gRPC calls 8 died so; without a `preexec_fn` Python forks by vfork, which runs nothing of the kind, and none did.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1


def bound(words: Sequence[str | Path], env: Mapping[str, str], cwd: Path | None = None) -> list[str]:
    """The command `words` for Popen with this `env` and `cwd`, bound to the thread that calls it.

    Raises:
        OSError: there is no such program.
    """
    program = os.fspath(words[0])
    place = str(Path(cwd or ".") / program) if os.sep in program else program
    if not shutil.which(place, path=env.get("PATH")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *(os.fspath(word) for word in words)]


def main(parent: str, *words: str) -> None:
    """Become the program."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        return
    try:
        os.execvp(words[0], words)
    except OSError as error:
        sys.exit(f"{words[0]}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])
