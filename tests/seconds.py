"""A pytest plugin: where a run's time went, by file of tests: a chapter's proofs are in the file of its stem."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds of each file that took one or more; fixtures count where they were made."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds by file")
    for file, took in seconds.most_common():
        if took >= 1:
            terminalreporter.write_line(f"{took:7.0f}  {file}")
