"""A pytest plugin: `--lane several` runs what needs the engines of several ways, `--lane one` all other tests.

The two run side by side, each with servers of its own. An engine takes 3 GB, so of the tests that need any, only those
marked `one_engine` are in the second lane. They come first there.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which lane; without it, all tests."""
    parser.addoption("--lane", choices=["several", "one"], help="run one of the two lanes of the suite")


def has_servers(item: pytest.Item) -> bool:
    """Whether a test needs an engine, or a browser, which looks at what an engine writes."""
    return any(item.get_closest_marker(name) for name in ("engine", "browser"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of the other lane, once conftest.py has marked what uses which engine."""
    if lane := config.getoption("lane"):
        lanes: dict[str, list[pytest.Item]] = {"several": [], "one": []}
        for item in items:
            beside = item.get_closest_marker("one_engine") and not item.get_closest_marker("several_engines")
            lanes["one" if beside or not has_servers(item) else "several"].append(item)
        items[:] = sorted(lanes.pop(lane), key=lambda item: lane == "one" and not has_servers(item))
        config.hook.pytest_deselected(items=next(iter(lanes.values())))
