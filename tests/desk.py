"""One person's state folder, and the commands that this person types; for tests of server lifetimes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from servebook import launch
from servebook.launch.files import Files
from servebook.launch.link import Link
from servebook.processes import POLL_SECONDS, can_bind, marked, wait_until
from servebook.settings import Settings, load_settings

TINY = Path(__file__).with_name("tiny_server.py")


def has_ipv6() -> bool:
    """Whether a server can listen at ::1. Where IPv6 is switched off, as in many containers, none can."""
    try:
        return can_bind("::1", 0)
    except OSError:
        return False


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def eventually(condition: Callable[[], Any], what: str, seconds: float = 60, every: float = POLL_SECONDS) -> Any:
    """Poll until `condition` holds; fail with `what` when time is up."""
    value = wait_until(condition, seconds, every)
    assert value, f"not within {seconds} s: {what}"
    return value


def held_open(start: str) -> set[str]:
    """What this process has open whose name begins so: a path, or "pipe:".

    A mere number of open files says too much: a thread of the run's own reads of all processes meanwhile.
    """
    names = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the list itself
            names.add(str(link.readlink()))
    return {name for name in names if name.startswith(start)}


def seconds_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> float:
    """How long it takes until `condition` holds, to some 10 ms; fail as `eventually` does."""
    start = time.monotonic()
    eventually(condition, what, seconds, every=0.01)
    return time.monotonic() - start


@contextmanager
def spared(made: Callable[[], float], running: Callable[[], float], wanted: int) -> Iterator[None]:
    """The engine lets go of what asks it for `wanted` tokens in this block: it makes less than half of them.

    That it is idle at last would prove nothing: a fast one is done by then.
    """
    before = made()
    yield
    eventually(lambda: not running(), "an idle engine")
    assert made() - before < wanted / 2


def half_a_request(url: str, path: str, ask: dict[str, Any]) -> socket.socket:
    """Send a request and leave its answer unread."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    body = json.dumps(ask).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


class Desk:
    """One person's state folder, and the commands that this person types."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.env = os.environ | {"SERVEBOOK_STATE_DIR": str(folder), "SERVEBOOK_VLLM_HTTP_PORT": str(port)}
        self.children: list[subprocess.Popen[str]] = []

    @property
    def settings(self) -> Settings:
        return load_settings(state_dir=self.folder)

    def start(self, *words: str | Path, **env: str) -> subprocess.Popen[str]:
        """`python` with these words; `env` are settings."""
        child = subprocess.Popen(
            [sys.executable, *words],
            env=self.env | {f"SERVEBOOK_{name.upper()}": value for name, value in env.items()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.children.append(child)
        return child

    def run(self, *words: str, expect: int | None = 0, **env: str) -> str:
        """A `servebook` command; returns all that it printed, and asserts its exit code (None: it may be any)."""
        child = self.start(TINY, "cli", *words, **env)
        out, err = child.communicate(timeout=120)
        assert expect in (None, child.returncode), out + err
        assert "Traceback" not in out + err
        return out + err

    def kernel(self, **env: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """A process that holds a lease on the server, once it is ready."""
        child = self.start(TINY, "kernel", **env)
        assert child.stdout
        assert child.stderr
        line = child.stdout.readline()
        assert line, child.stderr.read()
        return child, json.loads(line)

    def status(self, name: str = "vllm") -> dict[str, Any]:
        return dict(next(entry for entry in launch.status(self.settings) if entry["name"] == name))

    def supervisor(self) -> psutil.Process:
        link = Link.open(Files(self.folder, "vllm"))
        assert link
        with closing(link.connection):
            return psutil.Process(link.keeper)

    def family(self) -> list[psutil.Process]:
        """Every process of this person, but for the commands: supervisor, guardian, server and its descendants."""
        found = []
        for pid in marked(f"SERVEBOOK_STATE_DIR={self.folder}").keys() - {child.pid for child in self.children}:
            with suppress(psutil.Error):
                found.append(psutil.Process(pid))
        return found

    def nothing_left(self) -> None:
        eventually(lambda: not self.family(), f"the end of every process of {self.folder}")

    def close(self) -> None:
        """End all that is left, from here: a command that says so takes a second to be imported."""
        settings = self.settings
        names = [entry["name"] for entry in launch.status(settings) if entry["state"] != "stopped"]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: launch.down(name, settings), names))
        for child in self.children:
            child.kill()
            child.communicate()
        self.nothing_left()
