"""Ends what a killed stub would leave behind; run by path, with the standard library only.

Triton does not notice that a stub died: it stays "ready", and whoever waits for an answer waits for ever.
And the engine's processes live on. This small process holds the end of a pipe from the stub. When the pipe
closes without a word, it kills the engine, and the server with it: a client then sees a closed connection at once,
and whoever keeps the server can start it again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

MARK = "SERVEBOOK_TRITON_STUB"
"""Environment variable with the stub's process id: how its descendants are found when it is gone."""


class Guardian:
    """The stub's end of the pipe."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def release(self) -> None:
        """Say that the stub ends as it should, and wait for the guardian's own end."""
        self.process.communicate(b"done")


def start_guardian() -> Guardian:
    """Start a guardian of this process, and mark what this process starts from now on."""
    os.environ[MARK] = str(os.getpid())
    words = [sys.executable, "-I", __file__, str(os.getppid()), *shared_memory()]
    return Guardian(subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True))


def shared_memory() -> set[str]:
    """Triton's regions in /dev/shm that this process has mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if "_backend_shm_region_" in line}


def marked(stub: str) -> list[int]:
    """Process ids of the stub's descendants, but not of this process.

    Nor of Python's resource trackers: they free what the others leave in shared memory, and then end by themselves.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environ = (folder / "environ").read_bytes().split(b"\0")
            tracker = b"resource_tracker" in (folder / "cmdline").read_bytes()
            if f"{MARK}={stub}".encode() in environ and not tracker and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def main() -> None:
    """Wait for the stub's end; unless it said "done", end its engine and its server."""
    server = os.pidfd_open(int(sys.argv[1]))  # not the bare id, which the kernel may give to another process
    if sys.stdin.buffer.read() == b"done":
        return
    print("servebook: the stub died; ending the engine and the server", file=sys.stderr, flush=True)
    for pid in marked(os.environ[MARK]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # Before the server: whoever keeps that may end this process with it.
    for region in sys.argv[2:]:
        Path(region).unlink(missing_ok=True)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(server, signal.SIGKILL)


if __name__ == "__main__":
    main()
