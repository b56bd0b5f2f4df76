"""One engine of each kind for the whole run; afterwards nothing of ours may be left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

# Before servebook is imported anywhere: this run's servers are its own, apart from those of the person at work.
STATE_DIR = Path(os.environ.setdefault("SERVEBOOK_STATE_DIR", tempfile.mkdtemp(prefix="servebook-tests-")))

from servebook import launch, notebook_gate  # noqa: E402
from servebook.settings import Settings, load_settings  # noqa: E402


@pytest.fixture(scope="session")
def settings() -> Settings:
    return load_settings()


@pytest.fixture(scope="session")
def vllm() -> launch.Server:
    return launch.serve("vllm")


@pytest.fixture(scope="session")
def triton() -> launch.Server:
    return launch.serve("triton")


@pytest.fixture(scope="session")
def grpc_server() -> launch.Server:
    return launch.serve("grpc")


@pytest.fixture(scope="session")
def gateway(vllm: launch.Server) -> launch.Server:
    return launch.serve("gateway")


@pytest.fixture(scope="session")
def kserve() -> launch.Server:
    return launch.serve("kserve")


@pytest.fixture(scope="session")
def vllm_grpc() -> launch.Server:
    return launch.serve("vllm-grpc")


NOTEBOOK_RESULTS = pytest.StashKey[list[notebook_gate.Result]]()


@pytest.fixture(scope="session")
def run_notebook(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Put a chapter's notebook through the gate: `run_notebook("01_openai_rest")`; the table comes at the end."""
    results = pytestconfig.stash.setdefault(NOTEBOOK_RESULTS, [])

    def run(stem: str) -> None:
        results.append(notebook_gate.run(notebook_gate.NOTEBOOKS / f"{stem}.ipynb"))
        assert not results[-1].problem, f"{stem}:\n{results[-1].problem}"

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what each notebook took, and how much of it was run."""
    if results := config.stash.get(NOTEBOOK_RESULTS, []):
        terminalreporter.section("notebooks")
        terminalreporter.write_line(notebook_gate.table(results))


NEEDS_ENGINE = {"vllm", "triton", "grpc_server", "gateway", "kserve", "vllm_grpc", "run_notebook"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses an engine is marked so: `make check` leaves it out."""
    for item in items:
        if NEEDS_ENGINE & set(getattr(item, "fixturenames", ())):
            item.add_marker("engine")


def ours() -> list[psutil.Process]:
    """Every process of this run's servers: the supervisors' environment names the state folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("SERVEBOOK_TEST_RUN") == str(os.getpid()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """End all servers after the run and assert that no process of ours is left."""
    os.environ["SERVEBOOK_TEST_RUN"] = str(os.getpid())
    yield
    for entry in launch.status():
        launch.down(entry["name"])
    psutil.wait_procs(ours(), timeout=5)
    left = [" ".join(process.cmdline()) for process in ours()]
    assert not left, f"left running: {left}"
