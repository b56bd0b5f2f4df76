"""A pytest plugin: where a run's time went, by file of tests, and how many engines and kernels it started.

A chapter's proofs are in the file of its stem.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from contextlib import suppress

import psutil
import pytest

POLL_SECONDS = 1.0
"""How often the machine's processes are looked at; an engine lives for a minute, a kernel for seconds."""
YOUNG_SECONDS = 60.0
"""For how long a process is looked at: to ask all of them each time took a hundredth of a core."""
COSTLY = {"engines": "VLLM::EngineCor", "kernels": "ipykernel_launcher"}
"""What takes seconds to start, by a piece of its name or of its command."""


class Counter(threading.Thread):
    """Counts processes that come up on this machine while the tests run, whoever starts them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.seen: dict[str, set[tuple[int, float]]] = {what: set() for what in COSTLY}

    def run(self) -> None:
        started = psutil.Process().create_time()
        while not self.ended.wait(POLL_SECONDS):
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    born = process.create_time()
                    if born <= max(started, time.time() - YOUNG_SECONDS):
                        continue
                    words = " ".join([process.name(), *process.cmdline()])
                    for what, mark in COSTLY.items():
                        if mark in words:
                            self.seen[what].add((process.pid, born))


COUNTER = pytest.StashKey[Counter]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count: for all of the machine, so not in each lane, nor in each worker of pytest-xdist."""
    if hasattr(config, "workerinput") or config.getoption("lane", None) not in (None, "several"):
        return
    config.stash[COUNTER] = Counter()
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
