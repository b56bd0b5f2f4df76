"""A pytest plugin: where a run's time went, by file of tests: a chapter's proofs are in the file of its stem."""

from __future__ import annotations

from collections import defaultdict

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
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
