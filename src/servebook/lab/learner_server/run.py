"""A learner's server, run as a process of its own and reached over its socket."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from servebook.launch.child import Child, run_child
from servebook.launch.processes import free_port


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

    def __enter__(self) -> OwnServer:
        command = [sys.executable, "-m", "servebook.lab.learner_server", str(self.file), str(self.port)]
        # Learners' code may ignore SIGTERM, and has nothing to save: no grace.
        running = run_child(command, self._listens, name=self.file.name, env=self.env, grace=0)
        self.child = self.ending.enter_context(running)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ending.close()

    def _listens(self, _: Child) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def said(self) -> str:
        """Everything that the server has printed so far."""
        return self.child.said()
