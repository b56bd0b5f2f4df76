"""A pytest plugin: a whole run in which too few tests passed has failed. Tests that get lost make no noise."""

from __future__ import annotations

import pytest

FLOOR = {None: 3630, "several": 685, "one": 2810, "own": 134}
"""How many tests pass at least, in all and by lane: what there are, less those that skip without root or on a GPU."""
SHARE = 0.93
"""The part of a whole run's tests below which its floor has aged: as many more could get lost unheard."""
PROBLEM = pytest.StashKey[str]()


def problem(session: pytest.Session) -> str:
    """What is wrong with the number of tests that passed; "" where nothing is, or where a part was asked for."""
    config, option = session.config, session.config.option
    part = option.keyword or option.markexpr or option.collectonly or config.getoption("lf", False)
    if part or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return ""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    passed = len(reporter.stats.get("passed", [])) if reporter else 0
    floor, there = FLOOR[lane := config.getoption("lane", None)], session.testscollected
    if passed < floor:
        return f"FAILED: {passed} tests passed, and in a whole run at least {floor} must"
    if floor < SHARE * there:
        return f"FAILED: {there} tests are there: raise FLOOR[{lane!r}] in tests/floor.py, which is {floor}"
    return ""


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn a run that would have succeeded into a failed one."""
    if exitstatus == pytest.ExitCode.OK and (found := problem(session)):
        session.config.stash[PROBLEM] = found
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say so."""
    if found := config.stash.get(PROBLEM, ""):
        terminalreporter.write_line(found, red=True)
