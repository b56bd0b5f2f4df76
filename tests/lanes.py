"""A pytest plugin: `--lane engines` runs what needs an engine or a browser, in order, `--lane rest` all other tests.

The two can run side by side: each has servers of its own, and only the first has large ones.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which lane; without it, all tests."""
    parser.addoption("--lane", choices=["engines", "rest"], help="run one of the two halves of the suite")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of the other lane, once conftest.py has marked what uses an engine."""
    if lane := config.getoption("lane"):
        lanes: dict[str, list[pytest.Item]] = {"engines": [], "rest": []}
        for item in items:
            engines = item.get_closest_marker("engine") or item.get_closest_marker("browser")
            lanes["engines" if engines else "rest"].append(item)
        items[:] = lanes.pop(lane)
        config.hook.pytest_deselected(items=next(iter(lanes.values())))
