"""A pytest plugin: where a run's time went, by file of tests, and how many engines and kernels it started.

A chapter's proofs are in the file of its stem.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from contextlib import suppress
from uuid import uuid4

import psutil
import pytest

POLL_SECONDS = 1.0
"""How often processes are looked at; an engine lives for a minute, a kernel for seconds."""
YOUNG_SECONDS = 60.0
"""For how long a process is looked at: to ask all of them each time took a hundredth of a core."""
COSTLY = {"engines": "VLLM::EngineCor", "kernels": "ipykernel_launcher"}
"""What takes seconds to start, by a piece of its name or of its command."""
RUN = "RUN_OF_TESTS"
"""In the environment of all that a run starts: which run, after the name of one that it runs within. The doctor would
warn of a name that begins as ours do."""


class Counter(threading.Thread):
    """Counts processes that come up while the tests run, and belong to the run: others may work on this machine."""

    def __init__(self, run: str) -> None:
        super().__init__(daemon=True)
        self.mark = run
        self.ended = threading.Event()
        self.started = psutil.Process().create_time()
        self.seen: dict[str, set[tuple[int, float]]] = {what: set() for what in COSTLY}

    def run(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            self.look()

    def look(self) -> None:
        """Count those that are there now."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                born = process.create_time()
                if born <= max(self.started, time.time() - YOUNG_SECONDS):
                    continue
                words = " ".join([process.name(), *process.cmdline()])
                for what, mark in COSTLY.items():
                    if mark in words and self.owns(process):
                        self.seen[what].add((process.pid, born))

    def owns(self, process: psutil.Process) -> bool:
        """Whether it, or one that it descends from, has the run's mark.

        A server is nobody's child but a supervisor's, and a desk of a room does not get its hub's environment.
        """
        return any(
            each.pid == os.getpid() or each.environ().get(RUN, "").startswith(self.mark)
            for each in (process, *process.parents())
        )


COUNTER = pytest.StashKey[Counter]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count; the workers of pytest-xdist inherit the mark."""
    if hasattr(config, "workerinput"):
        return
    os.environ[RUN] = f"{os.environ.get(RUN, '')}/{uuid4().hex}"
    config.stash[COUNTER] = Counter(os.environ[RUN])
    config.stash[COUNTER].start()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the seconds of each file that took one or more; fixtures count where they were made."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds by file")
    for file, took in sorted(seconds.items(), key=lambda item: -item[1]):
        if took >= 1:
            terminalreporter.write_line(f"{took:7.0f}  {file}")
    if not (counter := config.stash.get(COUNTER, None)):
        return
    counter.ended.set()
    counter.join()
    terminalreporter.write_line("started: " + ", ".join(f"{len(seen)} {what}" for what, seen in counter.seen.items()))
