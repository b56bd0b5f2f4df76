"""One engine of each kind for the whole run; afterwards nothing of ours may be left."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from playwright.sync_api import Browser, Page, expect, sync_playwright

# What the tests import is some million objects, which stay: nothing is searched for garbage until all is collected.
gc.disable()

# Before servebook is imported anywhere: this run's servers are its own, apart from those of the person at work, and
# where pytest-xdist runs tests side by side, each of its workers has a folder of its own.
OWN = "SERVEBOOK_STATE_DIR" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ
MADE = tempfile.mkdtemp(prefix="servebook-tests-") if OWN else ""
STATE_DIR = Path(MADE or os.environ["SERVEBOOK_STATE_DIR"])
os.environ["SERVEBOOK_STATE_DIR"] = str(STATE_DIR)

# Nor do that person's settings reach the tests, but for what the machine needs. And an option that pytest has read by
# now is not for those that tests start.
OF_THE_MACHINE = {f"SERVEBOOK_{name}" for name in ("STATE_DIR", "CACHE_DIR", "KV_CACHE_GIB", "DEVICE")}
OF_THE_MACHINE |= {"SERVEBOOK_VLLM_RS_FILE", "SERVEBOOK_START_TIMEOUT"}
for variable in list(os.environ):
    if variable.upper().startswith("SERVEBOOK_") and variable.upper() not in OF_THE_MACHINE:
        del os.environ[variable]
os.environ.pop("PYTEST_ADDOPTS", None)

# As in an activated environment: protoc and nbgrader look for their own helpers on the path.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# A shell starts its background jobs with SIGINT ignored, and their children inherit that: the tests that press
# Ctrl-C must not depend on how they were started.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nor may an engine on a CPU want a compiler, which a laptop may not have, and a container has not.
os.environ["CXX"] = "/there/is/no/compiler"

# The same examples each time: a change is red for what it changed, and not for what is drawn today.
hypothesis_settings.register_profile("repeatable", derandomize=True)
hypothesis_settings.load_profile("repeatable")

from desk import Desk  # noqa: E402

from servebook import launch  # noqa: E402
from servebook.lab.manifest import Lab  # noqa: E402
from servebook.processes import can_bind, free_port, marked, wait_until  # noqa: E402
from servebook.settings import Settings, load_settings, settings_file  # noqa: E402
from servebook.workbook import gate  # noqa: E402
from servebook.workbook.doctor import find_browser  # noqa: E402

pytest_plugins = ["lanes", "floor", "seconds", "survived"]


def pytest_configure(config: pytest.Config) -> None:
    """End a run for which a settings file says what is tested."""
    if config.pluginmanager.hasplugin("dsession"):  # the workers of pytest-xdist collect, and this process does not
        gc.enable()
    if file := settings_file():
        needs = ", ".join(sorted(OF_THE_MACHINE))
        pytest.exit(f"{file} changes what is tested: move it away. What the machine needs may be in {needs}.", 1)


@pytest.fixture(scope="session")
def settings() -> Settings:
    return load_settings()


@pytest.fixture
def low_ports_barred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports below 1024 are not for this process, as they are not for most users: the tests may be root's."""
    bind = socket.socket.bind

    def barred(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[1] < 1024:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", barred)


SHARED = {
    "router": "router",
    "vllm": "vllm",
    "grpc_server": "grpc",
    "triton": "triton",
    "kserve": "kserve",
    "vllm_grpc": "vllm-grpc",
    "vllm_rs": "vllm-rs",
}
"""The servers with engines of their own that several tests share: their names by fixture, in the order of the tests
that need them. Each ends after its last test, so that four are up at a time and not seven, of 3 GB each."""


class Starts:
    """Starts the shared engines that this run wants, in its order: each of them while the one before is in use."""

    def __init__(self, wanted: list[str], pool: ThreadPoolExecutor) -> None:
        self.wanted, self.pool = wanted, pool
        self.begun: dict[str, Future[launch.Server]] = {}

    def server(self, fixture: str) -> launch.Server:
        """The engine of a fixture, ready."""
        ahead = self.wanted[self.wanted.index(fixture) + 1 :] if fixture in self.wanted else []
        for each in [fixture, *ahead[:1]]:
            if each not in self.begun:
                self.begun[each] = self.pool.submit(launch.serve, SHARED[each])
        return self.begun[fixture].result()


@pytest.fixture(scope="session")
def starts(request: pytest.FixtureRequest) -> Iterator[Starts]:
    used = (fixture for item in request.session.items for fixture in shared_by(item))
    with ThreadPoolExecutor(2) as pool:
        yield Starts([fixture for fixture in dict.fromkeys(used) if fixture != "router"], pool)


@pytest.fixture(scope="session")
def vllm(starts: Starts) -> launch.Server:
    return starts.server("vllm")


@pytest.fixture(scope="session")
def triton(starts: Starts) -> launch.Server:
    return starts.server("triton")


@pytest.fixture(scope="session")
def grpc_server(starts: Starts) -> launch.Server:
    return starts.server("grpc_server")


@pytest.fixture(scope="session")
def gateway(vllm: launch.Server) -> launch.Server:
    return launch.serve("gateway")


@pytest.fixture(scope="session")
def kserve(starts: Starts) -> launch.Server:
    return starts.server("kserve")


@pytest.fixture(scope="session")
def vllm_grpc(starts: Starts) -> launch.Server:
    return starts.server("vllm_grpc")


@pytest.fixture(scope="session")
def vllm_rs(starts: Starts) -> launch.Server:
    return starts.server("vllm_rs")


@pytest.fixture(scope="session")
def router() -> launch.Server:
    """The router and its two engines."""
    return launch.serve("router")


@pytest.fixture
def server_of(request: pytest.FixtureRequest) -> Callable[[str], launch.Server]:
    """Asks for a server by its own name: `server_of("vllm-rs")`. The test's mark `needs` tells of it beforehand."""
    fixtures = {server: fixture for fixture, server in SHARED.items()}
    return lambda name: request.getfixturevalue(fixtures.get(name, name))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """The state folder of a person of its own; all servers in it end with the test."""
    desk = Desk(tmp_path / "state", free_port())
    yield desk
    desk.close()


NOTEBOOK_RESULTS = pytest.StashKey[list[gate.Result]]()


@pytest.fixture(scope="session")
def run_notebook(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Put a chapter's notebook through the gate: `run_notebook("01_openai_rest")`; the table comes at the end."""
    results = pytestconfig.stash.setdefault(NOTEBOOK_RESULTS, [])

    def run(stem: str) -> None:
        results.append(gate.run(gate.NOTEBOOKS / f"{stem}.ipynb"))
        assert not results[-1].problem, f"{stem}:\n{results[-1].problem}"

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what each notebook took, and how much of it was run."""
    if results := config.stash.get(NOTEBOOK_RESULTS, []):
        terminalreporter.section("notebooks")
        terminalreporter.write_line(gate.table(results))


def lab_of(item: pytest.Item) -> Lab | None:
    """The lab that a proof belongs to, None for every other test."""
    lab = item.callspec.params.get("lab") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    return lab if isinstance(lab, Lab) else None


def shared_by(item: pytest.Item) -> list[str]:
    """The fixtures in SHARED that a test uses.

    Which those are that it asks for by `server_of`, its marks `needs` and `ends` tell, or its lab.
    """
    fixtures = set(getattr(item, "fixturenames", ()))
    servers = {name for mark in item.iter_markers() if mark.name in ("needs", "ends") for name in mark.args}
    if "servers" in fixtures and (lab := lab_of(item)):
        servers.update(lab.servers)
    return [fixture for fixture, server in SHARED.items() if fixture in fixtures or server in servers]


def ended_by(item: pytest.Item) -> set[str]:
    """The servers in SHARED that a test ends, or leaves broken: nobody can use them after it."""
    return {name for mark in item.iter_markers("ends") for name in mark.args}


def turns(items: list[pytest.Item]) -> dict[str, tuple[int, bool]]:
    """When each test is due, by id: the place in SHARED of its last server; one that shares none goes with its file.

    One that ends a server comes behind all that use it.
    """
    order = list(SHARED)
    own = {item.nodeid: max(map(order.index, shared_by(item)), default=-1) for item in items}
    of_file: defaultdict[Path, int] = defaultdict(lambda: -1)
    of_server: defaultdict[str, int] = defaultdict(lambda: -1)
    for item in items:
        of_file[item.path] = max(of_file[item.path], own[item.nodeid])
        for fixture in shared_by(item):
            of_server[SHARED[fixture]] = max(of_server[SHARED[fixture]], own[item.nodeid])
    due = {item.nodeid: own[item.nodeid] if shared_by(item) else of_file[item.path] for item in items}
    last = {item.nodeid: max(map(of_server.__getitem__, ended_by(item)), default=-1) for item in items}
    return {item.nodeid: (max(due[item.nodeid], last[item.nodeid]), bool(ended_by(item))) for item in items}


NEEDS_ENGINE = {*SHARED, "gateway", "run_notebook", "doomed", "starting", "steps"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what uses an engine, a desk with servers, or a clone: `make check` leaves it out. In the order of SHARED.

    And labs come one after the other, as their proofs are made.
    """
    files = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in items))}
    turn = turns(items)
    items.sort(key=lambda item: (turn[item.nodeid], files[item.path], lab.stem if (lab := lab_of(item)) else ""))
    for item in items:
        fixtures, shared = set(getattr(item, "fixturenames", ())), shared_by(item)
        if shared or NEEDS_ENGINE & fixtures:
            item.add_marker("engine")
        lane = "own" if "router" in shared else "several" if set(shared) - {"vllm"} else "one"
        if lane != "one" or (shared and lab_of(item)):
            item.add_marker(pytest.mark.lane(lane))
        if {"desk", "clone"} & fixtures:
            item.add_marker("lifetime")
    if config.option.keyword:
        side_by_side(items)


def side_by_side(items: list[pytest.Item]) -> None:
    """Of a chapter by itself (K=…), give its notebook, its labs and its tests a lane each.

    Its server is started more often, and it is done sooner. Tests that start servers of their own go with the labs.
    """
    from lanes import LANES, has_servers, lane_of  # not above: it is a plugin, which pytest imports itself

    taken: defaultdict[str, set[str]] = defaultdict(set)
    notebooks = {item for item in items if "run_notebook" in getattr(item, "fixturenames", ())}
    for item in items:
        if shared_by(item) and item not in notebooks:
            taken[item.path.stem].add(lane_of(item))
    for item in items:
        lab = lab_of(item)
        free = sorted(set(LANES) - taken[f"test_{lab.stem}" if lab else item.path.stem])
        if item in notebooks and len(free) > 1:
            item.add_marker(pytest.mark.lane(free[0]), append=False)
        starts_its_own = has_servers(item) and not shared_by(item) and not item.get_closest_marker("lane")
        if free and item not in notebooks and (shared_by(item) if lab else starts_its_own):
            item.add_marker(pytest.mark.lane(free[-1]), append=False)


ENDING = pytest.StashKey[dict[str, list[str]]]()
"""The shared servers that end with a test, by its id."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which test is the last of each shared server, and end a run that will want a browser and has none."""
    gc.freeze()
    gc.enable()
    last = {name: item.nodeid for item in session.items for name in shared_by(item)}
    session.config.stash[ENDING] = {nodeid: [name for name in last if last[name] == nodeid] for nodeid in last.values()}
    wanted = any("chromium" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly and not find_browser():
        pytest.exit("There is no Chromium: run scripts/browser, or leave these tests out with -m 'not browser'.", 1)


SCREENSHOTS = Path(__file__).parents[1] / "scratch" / "screenshots"
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 60_000
"""How long a browser test waits for what it expects to see."""
REPORT = pytest.StashKey[pytest.TestReport]()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Chromium for one module: while Playwright runs, no test can start an event loop of its own."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A fresh window; of a failed test a screenshot is kept."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    try:
        yield page
        report = request.node.stash.get(REPORT, None)  # none where a later fixture failed before the test
        if report is None or report.failed:
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SCREENSHOTS / f"{request.node.name}.png")
    finally:
        context.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let fixtures see whether their test failed."""
    report = yield
    if report.when == "call":
        item.stash[REPORT] = report
    return report


def ours() -> dict[int, str]:
    """Every process that this run has started."""
    return marked(f"SERVEBOOK_TEST_RUN={os.getpid()}")


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """End all servers after the run and assert that no process and no port of ours is left."""
    os.environ["SERVEBOOK_TEST_RUN"] = str(os.getpid())
    yield
    entries = launch.status()
    with ThreadPoolExecutor() as pool:
        list(pool.map(launch.down, [entry["name"] for entry in entries]))
    wait_until(lambda: not ours(), 30)
    assert not ours(), f"left running: {list(ours().values())}"
    addresses = [address.rsplit(":", 1) for entry in entries for address in entry["endpoints"].values()]
    assert all(can_bind(host, int(port)) for host, port in addresses), f"left listening: one of {addresses}"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End the shared servers of which this was the last test; vLLM's, which others stand before, ends with the run."""
    names = [SHARED[name] for name in item.config.stash[ENDING].get(item.nodeid, []) if name != "vllm"]
    if names:
        names += ["vllm-replica-1", "vllm-replica-2"] if "router" in names else []
        with ThreadPoolExecutor() as pool:
            list(pool.map(launch.down, names))
        assert {entry["state"] for entry in launch.status() if entry["name"] in names} == {"stopped"}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove the run's folder; where tests failed it stays, with the servers' logs."""
    if MADE and not session.testsfailed:
        shutil.rmtree(MADE)
