"""A pytest plugin: the suite in lanes that run side by side (scripts/test), each with servers of its own.

A test goes into the lane that its mark `lane` names, else with servers into "several" and without into "one". Tests
wait a quarter of their time, for answers and for starts: two lanes left two cores idle for as long.
"""

from __future__ import annotations

import pytest

LANES = {
    "several": "what needs the engines of several ways",
    "one": "what needs that of vLLM's own server and at most one more at a time, or none",
    "own": "what starts and ends engines itself, and the router with its two",
}
"""What is in each lane. An engine takes up to 2.5 GB; of those in a lane, four are up at a time, two, and three."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which lane; without it, all tests."""
    parser.addoption("--lane", choices=LANES, help="run one of the lanes of the suite")


def lane_of(item: pytest.Item) -> str:
    """The lane in which a test runs."""
    if mark := item.get_closest_marker("lane"):
        return str(mark.args[0])
    return "several" if has_servers(item) else "one"


def has_servers(item: pytest.Item) -> bool:
    """Whether a test needs an engine, or a browser, which looks at what an engine writes."""
    return any(item.get_closest_marker(name) for name in ("engine", "browser"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of the other lane, once conftest.py has marked what uses which engine.

    What needs servers comes first, in the order that conftest.py gives it.
    """
    if lane := config.getoption("lane"):
        others = [item for item in items if lane_of(item) != lane]
        items[:] = sorted((item for item in items if lane_of(item) == lane), key=lambda item: not has_servers(item))
        config.hook.pytest_deselected(items=others)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A chapter may have no test in a lane."""
    option = session.config.option
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and option.lane and option.keyword:
        session.exitstatus = pytest.ExitCode.OK
