"""Runs a small server for the length of a `with` block."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from servebook.errors import LaunchError
from servebook.launch.servers import http_ok

START_SECONDS = 60
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


@contextmanager
def child_server(module: str, *words: str, ready: str = "/healthz", port: int = 0, **env: str) -> Iterator[str]:
    """Run `python -m module --http-port PORT words…` and give its URL; the server ends with the block.

    It is ready when GET `ready` answers 200. Without `port` a free one is taken. `env` is added to its environment.
    It survives a notebook's Interrupt, and ends with this process whatever ends that.

    Raises:
        LaunchError: it ended, or was not ready within a minute; the message has its output.
    """
    port = port or free_port()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--http-port", str(port), *words],
            env=os.environ | env,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not http_ok(f"127.0.0.1:{port}", ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise LaunchError(f"{module} did not start. Its output:\n{output.read()[-2000:]}")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
