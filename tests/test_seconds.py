"""What a run counts as its own, beside the work of others on the same machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psutil
import pytest
from seconds import RUN, Counter

PROGRAM = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
KERNEL = [sys.executable, "-c", PROGRAM, "ipykernel_launcher"]
"""By its words a kernel; it ends with its standard input."""
ALONE = ["sh", "-c", 'exec 3<&0; setsid "$@" <&3 & ', "sh"]
"""What follows is nobody's child, and in a session of its own, as a server's supervisor is."""
Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program that says its id once it runs; the id."""
    with ExitStack() as ends:

        def begin(command: list[str], env: dict[str, str] | None = None) -> int:
            pipe = subprocess.PIPE
            program = ends.enter_context(subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True))
            assert program.stdout
            return int(program.stdout.readline())

        yield begin


def test_a_run_counts_its_own_processes_and_no_strangers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN, f"{os.environ[RUN]}/within")
    counter = Counter(os.environ[RUN])
    bare = {"PATH": os.environ["PATH"]}
    of_another = bare | {RUN: "/another"}
    own = {start(KERNEL), start([*ALONE, *KERNEL]), start(KERNEL, bare)}
    others = {start([*ALONE, *KERNEL], bare), start([*ALONE, *KERNEL], of_another)}
    counter.look()
    counted = {pid for pid, _ in counter.seen["kernels"]}
    assert own <= counted
    assert not others & counted
    assert all(psutil.pid_exists(pid) for pid in others), "there was something to be left out"


def test_a_run_counts_what_a_run_within_it_starts(start: Start) -> None:
    counter = Counter(os.environ[RUN])
    within = start([*ALONE, *KERNEL], os.environ | {RUN: f"{os.environ[RUN]}/within"})
    counter.look()
    assert within in {pid for pid, _ in counter.seen["kernels"]}
