"""Ends what a killed or stuck stub would leave behind; run by path, with the standard library only.

Triton does not notice that a stub died: it stays "ready", and whoever waits for an answer waits for ever.
And the engine's processes live on. This small process holds the end of a pipe from the stub. When the pipe
closes without a word, it kills the engine, and the server with it: a client then sees a closed connection at once,
and whoever keeps the server can start it again.

Nor does Triton always finish the unload of a model whose engine died, and a timer in a stuck stub may never fire. So
the stub says when the unload begins, and the same happens if it takes too long.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

MARK = "SERVEBOOK_TRITON_STUB"
"""Environment variable with the stub's process id: how its descendants are found when it is gone."""

DYING, DONE = b"dying", b"done"
DEATH_SECONDS = 10.0
"""How long a stub whose engine died may take to end."""


class Guardian:
    """The stub's end of the pipe."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def expect_the_end(self) -> None:
        """Say that the engine died: from now on the stub has `death_seconds` to end."""
        assert self.process.stdin
        self.process.stdin.write(DYING)
        self.process.stdin.flush()

    def release(self) -> None:
        """Say that the stub ends as it should, and wait for the guardian's own end."""
        self.process.communicate(DONE)


def start_guardian(death_seconds: float = DEATH_SECONDS) -> Guardian:
    """Start a guardian of this process, and mark what this process starts from now on."""
    os.environ[MARK] = str(os.getpid())
    words = [sys.executable, "-I", __file__, str(os.getppid()), str(death_seconds), *shared_memory()]
    return Guardian(subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True))


def shared_memory() -> set[str]:
    """Triton's regions in /dev/shm that this process has mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
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


def hear(seconds: float | None) -> bytes:
    """What the stub says next; nothing if it has died, or says nothing for so many seconds."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return os.read(sys.stdin.fileno(), 64) if ready else b""


def main() -> None:
    """Wait for the stub's end; unless it said "done", end it, its engine and its server."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who ends the whole family must not end this one first
    server = os.pidfd_open(int(sys.argv[1]))  # not the bare id, which the kernel may give to another process
    word = hear(None)
    if word == DYING:
        word = hear(float(sys.argv[2]))
    if word.endswith(DONE):
        return
    print("servebook: the stub died or is stuck; ending it, the engine and the server", file=sys.stderr, flush=True)
    if os.getppid() == int(os.environ[MARK]):
        os.kill(os.getppid(), signal.SIGKILL)
    for pid in marked(os.environ[MARK]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # Before the server: whoever keeps that may end this process with it.
    for region in sys.argv[3:]:
        Path(region).unlink(missing_ok=True)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(server, signal.SIGKILL)


if __name__ == "__main__":
    main()
