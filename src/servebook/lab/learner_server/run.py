"""A learner's server, run as a process of its own and reached over its socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from servebook.errors import LaunchError
from servebook.launch.child import PR_SET_PDEATHSIG, free_port, libc

START_SECONDS = 60
IDLE_SECONDS = 4.0
"""How long it may wait, neither computing nor listening, before it is said never to start."""


class OwnServer:
    """The server in `file` while the `with` block lasts; it ends with this process at the latest.

    It finds the engine by the environment: ENGINE_URL, ENGINE_KEY, ENGINE_MODEL, and ENGINE_TIMEOUT in seconds.

    Attributes:
        address: "host:port".
        url: the same as `http://host:port`.
    """

    def __init__(self, file: str | Path, engine_url: str, key: str, model: str, timeout: float = 30) -> None:
        self.file = Path(file).resolve()
        port = free_port()
        engine = {"ENGINE_URL": engine_url, "ENGINE_KEY": key, "ENGINE_MODEL": model, "ENGINE_TIMEOUT": str(timeout)}
        self.address, self.url = f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"
        self.spent, self.looked, self.busy_at = 0, time.monotonic(), time.monotonic()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "servebook.lab.learner_server", str(self.file), str(port)],
            env=os.environ | engine,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )

    def __enter__(self) -> OwnServer:
        started = self.busy_at = time.monotonic()
        host, port = self.address.split(":")
        while self.process.poll() is None and self.working() and time.monotonic() < started + START_SECONDS:
            try:
                with socket.create_connection((host, int(port)), timeout=1):
                    return self
            except OSError:
                time.sleep(0.05)
        ended, said = self.process.poll() is not None, self.said()
        self.__exit__(None, None, None)
        how = "does not start" if ended else "waits, and does not start to listen"
        raise LaunchError(f"{self.file.name} {how}. The end of its output:\n{said[-1500:]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Learners' code may ignore SIGTERM, and has nothing to save.
        self.process.kill()
        self.process.wait()
        self.output.close()

    def working(self) -> bool:
        """Whether the server has computed anything, or waited for a core, within the last IDLE_SECONDS."""
        with suppress(OSError):
            fields = [task.read_text().split() for task in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")]
            spent = sum(int(number) for each in fields for number in each[:2])
            if spent - self.spent > 2e7 * max(1, time.monotonic() - self.looked):  # beyond a beat now and then
                self.busy_at = time.monotonic()
            self.spent, self.looked = spent, time.monotonic()
        return time.monotonic() < self.busy_at + IDLE_SECONDS

    def last_words(self) -> str:
        """What it has printed, once no more comes: a server answers first, and writes its traceback then."""
        said, deadline = "", time.monotonic() + 2
        while (now := self.said()) != said or (not now and time.monotonic() < deadline - 1.5):
            said = now
            if time.monotonic() > deadline:
                break
            time.sleep(0.3)
        return said

    def said(self) -> str:
        """Everything that the server has printed so far."""
        self.output.seek(0)
        return self.output.read()
