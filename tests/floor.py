"""A pytest plugin: a whole run in which too few tests passed has failed. Tests that get lost make no noise.

A floor that has aged is told before the first test, and by `make check`: a suite of an hour must not end on it.
"""

from __future__ import annotations

from collections import Counter

import pytest
from lanes import lane_of

FLOOR = {None: 3900, "several": 700, "one": 3050, "own": 138}
"""How many tests pass at least, in all and by lane: what there are, less those that skip without root or on a GPU."""
SHARE = 0.93
"""The part of the tests that are there below which a floor has aged: as many more could get lost unheard."""
DESELECTED = pytest.StashKey[list[pytest.Item]]()
AGED = pytest.StashKey[str]()
PROBLEM = pytest.StashKey[str]()


def is_whole(config: pytest.Config) -> bool:
    """Whether all tests run, or all of a lane, and no part was asked for."""
    part = config.option.keyword or config.option.markexpr or config.option.collectonly or config.getoption("lf", False)
    return not part and config.args_source is pytest.Config.ArgsSource.TESTPATHS


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Keep what another lane or `make check` leaves out: it is there."""
    if items:
        items[0].config.stash.setdefault(DESELECTED, []).extend(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which floors are too low for the tests that are there; a whole run ends at that.

    Raises:
        pytest.UsageError: Says which to raise.
    """
    config = session.config
    there = [*session.items, *config.stash.setdefault(DESELECTED, [])]
    lanes: Counter[str | None] = Counter(map(lane_of, there))
    lanes[None] = len(there)
    low = [
        f"FLOOR[{lane!r}], {floor}, for {lanes[lane]} tests"
        for lane, floor in FLOOR.items()
        if floor < SHARE * lanes[lane]
    ]
    config.stash[AGED] = f"raise in tests/floor.py: {'; '.join(low)}" if low else ""
    if low and is_whole(config):
        raise pytest.UsageError(config.stash[AGED])


def problem(session: pytest.Session) -> str:
    """What is wrong with the number of tests that passed; "" where nothing is, or where a part was asked for."""
    if not is_whole(session.config):
        return ""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed = len(reporter.stats.get("passed", [])) if reporter else 0
    floor = FLOOR[session.config.getoption("lane", None)]
    return f"FAILED: {passed} tests passed, and in a whole run at least {floor} must" if passed < floor else ""


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn a run that would have succeeded into a failed one."""
    if exitstatus == pytest.ExitCode.OK and (found := problem(session)):
        session.config.stash[PROBLEM] = found
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say so."""
    if found := config.stash.get(PROBLEM, ""):
        terminalreporter.write_line(found, red=True)
