"""A learner's server, run as a process of its own and reached over its socket."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from servebook.errors import LaunchError
from servebook.launch.child import Child, run_child
from servebook.launch.probes import listens
from servebook.processes import free_port, wait_until

IDLE_SECONDS = 6.0
"""How long it may wait, neither computing nor listening, before it is said never to start."""
LOOK_SECONDS = 0.5
"""What one look may add to that, however long ago the one before was: this process may have stood still, too."""


class OwnServer:
    """The server in `file` while the `with` block lasts; it ends with this process at the latest.

    It finds the engine by the environment: ENGINE_URL, ENGINE_KEY, ENGINE_MODEL, and ENGINE_TIMEOUT in seconds.

    Attributes:
        address: "host:port".
        url: the same as `http://host:port`.
    """

    def __init__(self, file: str | Path, engine_url: str, key: str, model: str, timeout: float = 30) -> None:
        self.file = Path(file).resolve()
        self.port = free_port()
        self.env = {"ENGINE_URL": engine_url, "ENGINE_KEY": key, "ENGINE_MODEL": model, "ENGINE_TIMEOUT": str(timeout)}
        self.address, self.url = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{self.port}"
        self.ending = ExitStack()
        self.spent, self.looked, self.idle = 0, 0.0, 0.0

    def __enter__(self) -> OwnServer:
        command = [sys.executable, "-P", "-m", "servebook.lab.learner_server", str(self.file), str(self.port)]
        # Learners' code may ignore SIGTERM, and has nothing to save: no grace.
        running = run_child(command, self._listens, name=self.file.name, env=self.env, grace=0)
        self.child = self.ending.enter_context(running)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ending.close()

    def _listens(self, child: Child) -> bool:
        self.child = child
        there = listens(self.address)
        if not there and not self.working():
            said = child.said()[-1500:]
            raise LaunchError(f"{self.file.name} waits, and does not start to listen. It said:\n{said}")
        return there

    def working(self) -> bool:
        """Whether the server has computed anything, or waited for a core, in IDLE_SECONDS of looking."""
        now = time.monotonic()
        with suppress(OSError):
            accounts = Path(f"/proc/{self.child.process.pid}/task").glob("*/schedstat")
            spent = sum(int(number) for each in accounts for number in each.read_text(encoding="utf-8").split()[:2])
            since = now - (self.looked or now)
            busy = spent - self.spent > 2e7 * max(1, since)  # beyond a beat now and then
            self.idle = 0.0 if busy or not self.looked else self.idle + min(since, LOOK_SECONDS)
            self.spent, self.looked = spent, now
        return self.idle < IDLE_SECONDS

    def last_words(self) -> str:
        """What it has printed, once no more comes: a server answers first, and writes its traceback then."""
        before = [""]

        def still() -> bool:
            before[:] = [*before[-1:], self.said()]
            return before[0] == before[1] != ""

        wait_until(still, 2, every=0.3)
        return before[-1]

    def said(self) -> str:
        """Everything that the server has printed so far."""
        return self.child.said()
