"""Ends what a killed or stuck stub would leave behind; run by path, with the standard library only.

Triton does not notice that a stub died: it stays "ready", and whoever waits for an answer waits for ever.
And the engine's processes live on. This small process watches the stub, which talks to it through a pipe. When the
stub ends without a word, it kills the engine, and the server with it: a client then sees a closed connection at once,
and whoever keeps the server can start it again.

Nor does every stub end that is told to, and Triton waits for it: what Python frees in its last steps may want a lock
that nobody gives back. And a timer in a stuck stub may never fire. So the stub says when its engine died and when it is
done with the unload, and the same happens if one whose engine died does not end soon.

And a load may never end. While it lasts, Triton 24.10 wants a sign of life from the stub in each second of the clock on
the wall. If one is missing, as on a machine that was paused, it waits without a word for the end of the stub, which is
well and waits for Triton (`StubLauncher::ReceiveMessageFromStub` in its Python backend). So a server that waits for a
child before the stub has said that it ends is ended, too, and `serve` starts another.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "SERVEBOOK_TRITON_STUB"
"""Environment variable with the stub's process id: how its descendants are found when it is gone."""

DYING, DONE = b"dying", b"done"
DEATH_SECONDS = 10.0
"""How long a stub whose engine died may take to unload its model."""
END_SECONDS = 5.0
"""How long it may then take to end: some tenths of a second, or two on busy cores. Where no engine died nothing is
known to hang, and the server may have other models: it is left alone."""
LOST_SECONDS = 5.0
"""How long Triton may wait for the end of a process: another model's may be ending, which takes a second or two."""
LOST = "Triton lost sight of its backend (was this machine paused, or its clock set?)"
POLL_SECONDS = 2.0
"""How often that is looked for."""


class Guardian:
    """The stub's end of the pipe."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def expect_the_end(self) -> None:
        """Say that the engine died: from now on the stub has `death_seconds` to unload its model."""
        self._say(DYING)

    def release(self) -> None:
        """Say that all is unloaded, and nothing is left but the stub's own end: after a death it has `end_seconds`."""
        self._say(DONE)

    def _say(self, word: bytes) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it was killed: then it is Triton alone that ends the stub
            self.process.stdin.write(word)
            self.process.stdin.flush()


def start_guardian(
    death_seconds: float = DEATH_SECONDS, lost_seconds: float = LOST_SECONDS, end_seconds: float = END_SECONDS
) -> Guardian:
    """Start a guardian of this process, and mark what this process starts from now on."""
    # SPT_NOENV: vLLM's processes rename themselves, and that would write over their environment with the mark.
    os.environ |= {MARK: str(os.getpid()), "SPT_NOENV": "1"}
    times = [str(death_seconds), str(lost_seconds), str(end_seconds)]
    words = [sys.executable, "-I", __file__, str(os.getppid()), *times, *shared_memory()]
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


def hear(stub: int, seconds: float) -> bytes | None:
    """What the stub says next; nothing if it has died, None if it says nothing for so many seconds."""
    ready, _, _ = select.select([stub, sys.stdin], [], [], seconds)
    if sys.stdin in ready:  # first: it may have said something and then ended
        return os.read(sys.stdin.fileno(), 64)
    return b"" if ready else None


def waits_for_a_child(pid: int) -> bool:
    """Whether a thread of the process is in the kernel's `waitpid`; False where the kernel does not tell."""
    with suppress(OSError):
        return any(file.read_text() == "do_wait" for file in Path(f"/proc/{pid}/task").glob("*/wchan"))
    return False


def what_went_wrong(stub: int, server: int, death_seconds: float, lost_seconds: float, end_seconds: float) -> str:
    """Listen until the stub, a file descriptor, ends; "" if it said that it would. `server` is a process id."""
    dying = lost = None  # since when
    while (word := hear(stub, min(POLL_SECONDS, lost_seconds))) != b"":
        now = time.monotonic()
        if word and DYING in word:
            dying = now
        if word and word.endswith(DONE):
            # No more of the pipe: Python may close it before the process ends.
            ended, _, _ = select.select([stub], [], [], end_seconds if dying else 0)
            return "" if ended or not dying else "the stub does not end"
        if dying and now > dying + death_seconds:
            return "the stub is stuck"
        lost = (lost or now) if not dying and waits_for_a_child(server) else None
        if lost and now > lost + lost_seconds:
            return LOST
    return "the stub died"


def main() -> None:
    """Wait for the stub's end; unless it said "done", end it, its engine and its server."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who ends the whole family must not end this one first
    pid, seconds = int(sys.argv[1]), [float(word) for word in sys.argv[2:5]]
    # Not the bare ids, which the kernel may give to other processes.
    server, stub = os.pidfd_open(pid), os.pidfd_open(int(os.environ[MARK]))
    what = what_went_wrong(stub, pid, *seconds)
    if not what:
        return
    print(f"servebook: {what}; ending it, the engine and the server", file=sys.stderr, flush=True)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(stub, signal.SIGKILL)
    for pid in marked(os.environ[MARK]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # Before the server: whoever keeps that may end this process with it.
    for region in sys.argv[5:]:
        Path(region).unlink(missing_ok=True)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(server, signal.SIGKILL)


if __name__ == "__main__":
    main()
