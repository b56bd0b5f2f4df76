"""A pytest plugin: `--lane several` runs what needs the engines of several ways, `--lane one` all other tests.

The two run side by side, each with servers of its own. An engine takes 3 GB, so of the tests that need any, only those
marked `one_engine` are in the second lane. They come first there, then its engine ends. Until it has, the first lane
waits with chapter 06, from which on it has the most: for a lock on the file that TEST_LANES names.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path

import pytest

LOCK = pytest.StashKey[int]()
"""The second lane's lock, held until its engine has ended; the kernel gives it back where the run breaks off."""
LARGE = "test_06"
"""The files whose tests wait for it, by the beginning of their names."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which lane; without it, all tests."""
    parser.addoption("--lane", choices=["several", "one"], help="run one of the two lanes of the suite")


def pytest_configure(config: pytest.Config) -> None:
    """Take the lock."""
    if config.getoption("lane") == "one" and (path := os.environ.get("TEST_LANES")):
        config.stash[LOCK] = os.open(path, os.O_RDWR)
        fcntl.flock(config.stash[LOCK], fcntl.LOCK_EX)


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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Wait for the other lane's engine to end: out here no test's timeout runs."""
    path = os.environ.get("TEST_LANES")
    if item.config.getoption("lane") == "several" and path and item.path.name.startswith(LARGE):
        with Path(path).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the second lane's servers after the last test that needs them, and give the lock back."""
    lock = item.config.stash.get(LOCK, None)
    if lock is not None and has_servers(item) and nextitem and not has_servers(nextitem):
        from servebook import launch

        for entry in launch.status():
            launch.down(entry["name"])
        os.close(lock)
