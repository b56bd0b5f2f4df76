"""Runs a program for the length of a `with` block, and ends it with everything that it started."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from servebook.engine.model import model_path
from servebook.environment import child_environment
from servebook.errors import LaunchError
from servebook.launch.bound import bound
from servebook.launch.memory import memory_for
from servebook.launch.probes import http_ok
from servebook.processes import end, free_port, wait_until
from servebook.settings import Settings

START_SECONDS = 60.0
GRACE_SECONDS = 10.0
TAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Child:
    """A program that runs."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def said(self) -> str:
        """Everything that it has printed so far."""
        return os.pread(self.output.fileno(), os.fstat(self.output.fileno()).st_size, 0).decode(errors="replace")


@contextmanager
def run_child(
    words: Sequence[str | Path],
    ready: Callable[[Child], object] = lambda _: True,
    *,
    name: str = "",
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    seconds: float = START_SECONDS,
    grace: float = GRACE_SECONDS,
) -> Iterator[Child]:
    """Run a command, wait until `ready` is true of it, and end its whole family with the block.

    `env` is added to its environment; it starts in the folder `cwd`; `grace` is how long the family may take to end
    after SIGTERM (0: it is killed). It survives a notebook's Interrupt, and ends with this thread whatever ends that.

    Raises:
        LaunchError: it ended, or was not ready in time; the message has the end of its output.
        OSError: there is no such program.
    """
    mark = f"_SERVEBOOK_CHILD_{uuid4().hex}=1"
    environment = child_environment() | (env or {}) | dict([mark.split("=")])
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            bound(words, environment, cwd),
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        child = Child(process, output)

        def state() -> str:
            return "ended" if process.poll() is not None else "ready" if ready(child) else ""

        try:
            if wait_until(state, seconds) != "ready":
                name = name or Path(words[0]).name
                raise LaunchError(
                    f"{name} did not start. The end of its output:\n{child.said()[-TAIL_CHARACTERS:]}",
                    "Correct what it says there; what the machine lacks, `servebook doctor` says.",
                )
            yield child
        finally:
            end(mark, grace)
            process.kill()
            process.wait()


@contextmanager
def run_engine(
    settings: Settings, words: Sequence[str | Path], ready: Callable[[Child], object], **options: Any
) -> Iterator[Child]:
    """`run_child` for a program that holds an engine: until it is ready, no other start counts on its memory.

    Of the machine's memory, no other start of this process.

    Raises:
        LaunchError: as `run_child`, or there is too little memory.
    """
    with ExitStack() as starting:
        starting.enter_context(memory_for(settings, model_path(settings), lambda _: None))
        with run_child(words, ready, **options) as child:
            starting.close()
            yield child


@contextmanager
def child_server(module: str, *words: str, ready: str = "/healthz", port: int = 0, **env: str) -> Iterator[str]:
    """Run `python -m module --http-port PORT words…` and give its URL once GET `ready` answers 200.

    Without `port` a free one is taken. `env` is added to its environment.

    Raises:
        LaunchError: as `run_child`.
    """
    port = port or free_port()
    command = [sys.executable, "-m", module, "--http-port", str(port), *words]
    with run_child(command, lambda _: http_ok(f"127.0.0.1:{port}", ready), name=module, env=env):
        yield f"http://127.0.0.1:{port}"
