"""A pytest plugin: a whole run in which too few tests passed has failed. Tests that get lost make no noise."""

from __future__ import annotations

import pytest

FLOOR = {None: 2810, "several": 640, "one": 2060, "own": 105}
"""How many tests pass at least, of about 2,850, in all and by lane; raise it as they grow."""


def shortfall(config: pytest.Config) -> str:
    """What is wrong with the number of tests that passed; "" where nothing is, or where a part was asked for."""
    option = config.option
    part = option.keyword or option.markexpr or option.collectonly or config.getoption("lf", False)
    if part or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return ""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    passed = len(reporter.stats.get("passed", [])) if reporter else 0
    floor = FLOOR[config.getoption("lane", None)]
    return "" if passed >= floor else f"FAILED: {passed} tests passed, and in a whole run at least {floor} must"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn a run that would have succeeded into a failed one."""
    if exitstatus == pytest.ExitCode.OK and shortfall(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Say so."""
    if exitstatus == pytest.ExitCode.OK and (problem := shortfall(config)):
        terminalreporter.write_line(problem, red=True)
