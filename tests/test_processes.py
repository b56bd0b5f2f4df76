"""Children and their families, waits and ports: the tools that launch, labs and tests share."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
from desk import IPV6

from servebook.errors import LaunchError
from servebook.launch import lifetime
from servebook.launch.bound import bound
from servebook.launch.child import Child, run_child
from servebook.launch.link import STOP_SECONDS, Link
from servebook.launch.probes import only_ours, others_listen
from servebook.processes import (
    GIVEN_PORTS,
    KEPT,
    can_bind,
    end,
    environment_of,
    free_port,
    listeners,
    marked,
    wait_until,
)
from servebook.settings import in_address, load_settings

FAMILY = """
import signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
time.sleep(600)
"""
MARK = f"SERVEBOOK_TEST_FAMILY={os.getpid()}"


def deaf(child: Child) -> bool:
    return "deaf" in child.said()


@pytest.mark.parametrize("grace", [0, 0.5])
def test_a_child_ends_with_all_that_it_started(grace: float) -> None:
    with run_child([sys.executable, "-c", FAMILY], deaf, env=dict([MARK.split("=")]), grace=grace):
        assert len(marked(MARK)) == 2
    assert marked(MARK) == {}


def test_a_child_is_started_by_no_fork_which_threads_of_grpc_would_break() -> None:
    script = (
        "import os; from servebook.launch.child import run_child\n"
        "os.register_at_fork(before=lambda: print('forked', flush=True))\n"
        "with run_child(['sleep', '600']): print('ran')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "ran\n"


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "torn").write_text("no program")
    (tmp_path / "torn").chmod(0o755)
    for program in ("no-such-program", tmp_path / "none", "./none"):
        with pytest.raises(FileNotFoundError), run_child([program], cwd=tmp_path):
            pytest.fail("it runs")
    torn = run_child(["./torn"], lambda _: False, cwd=tmp_path)
    with pytest.raises(LaunchError, match="torn: Exec format error"), torn:
        pytest.fail("it runs")


def test_a_child_that_ends_or_never_listens_is_a_message_with_its_output() -> None:
    with (
        pytest.raises(LaunchError, match=r"(?s)tiny did not start.*the weights are torn\n\n→ Correct"),
        run_child([sys.executable, "-c", "print('the weights are torn')"], lambda _: False, name="tiny"),
    ):
        pytest.fail("it is not ready")
    with pytest.raises(LaunchError, match="did not start"), run_child(["sleep", "600"], lambda _: False, seconds=0.1):
        pytest.fail("it is not ready")


def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    code = (
        "import sys, time; from servebook.launch.child import run_child\n"
        f"with run_child(['sleep', '600'], env={dict([MARK.split('=')])}): print('there', flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent:
        said, family = parent.stdout.readline(), marked(MARK)
        parent.kill()
    assert (said, len(family)) == ("there\n", 1)
    assert wait_until(lambda: not marked(MARK), 10)


def test_a_process_has_its_environment_while_it_becomes_another() -> None:
    mark = dict([MARK.split("=")])
    without = 0
    for _ in range(10):
        with subprocess.Popen(bound(["sleep", "600"], os.environ), env=os.environ | mark) as process:
            words = Path(f"/proc/{process.pid}/cmdline")
            while not words.read_bytes().startswith(b"sleep"):
                without += not mark.items() <= environment_of(process.pid).items()
            process.kill()
    assert without == 0


def test_a_file_beside_the_reader_is_not_run_by_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("print('planted', flush=True)")
    monkeypatch.chdir(tmp_path)
    words = ["sh", "-c", '"$0" -m tempfile && echo ran && exec sleep 600', sys.executable]
    with run_child(words, lambda child: "ran" in child.said()) as child:
        assert child.said() == "ran\n"


def test_end_tells_only_the_supervisor_of_a_server_until_the_grace_is_over() -> None:
    # An empty mark: with any other it would be an orphan to the doctors of tests beside this one.
    kept = subprocess.Popen(["sleep", "600"], env=os.environ | dict([MARK.split("=")]) | {KEPT: ""})
    assert end(MARK, 0.3) == {"sleep 600"}
    assert kept.wait() == -signal.SIGKILL


def test_wait_until_does_not_count_the_time_in_which_the_machine_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += 12 if self.now < 0.4 else seconds

    clock = Clock()
    monkeypatch.setattr("servebook.processes.time", clock)
    looks: list[float] = []
    assert not wait_until(lambda: looks.append(clock.now), 1, every=0.25)
    assert looks == [0, 12, 12.25, 12.5, 12.75]


def test_wait_until_gives_the_value_or_the_last_false_one() -> None:
    numbers = count()
    assert wait_until(lambda: next(numbers) == 3 and "three", 10, every=0) == "three"
    assert wait_until(lambda: [], 0) == []


def test_ports() -> None:
    port = free_port()
    assert can_bind("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        assert not can_bind("127.0.0.1", port)
    assert 20_000 <= port < 30_000, "below what Linux gives to whoever connects"
    given = f"from servebook.processes import claim_name; print(claim_name('given-port-{port}'))"
    said = subprocess.run([sys.executable, "-c", given], capture_output=True, text=True, check=True).stdout
    assert said == "None\n", "another program would get the same"
    with pytest.raises(OSError, match="assign"):
        can_bind("192.0.2.1", 8000)


def test_a_port_on_which_somebody_listens_is_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        drawn = [taken := listener.getsockname()[1], *GIVEN_PORTS]
        monkeypatch.setattr("servebook.processes.random.SystemRandom", lambda: Mock(sample=lambda *_: drawn))
        assert free_port() != taken


@IPV6
def test_ports_of_ipv6() -> None:
    port = free_port("::1")
    assert can_bind("::1", port)
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        assert not can_bind("::1", port)


@pytest.mark.parametrize(
    ("host", "address", "other"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.2"),
        ("0.0.0.0", "127.0.0.1", "127.0.0.2"),
        pytest.param("::", "127.0.0.1", "127.0.0.2", marks=IPV6),
        pytest.param("::1", "::1", "::2", marks=IPV6),
    ],
)
def test_who_listens(host: str, address: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::") as listener:
        port = listener.getsockname()[1]
        assert listeners(address, port) == {os.getuid()}
        assert only_ours(f"http://{in_address(address)}:{port}/path")
        assert not others_listen(f"{in_address(address)}:{port}")
        monkeypatch.setattr("os.getuid", lambda: 1_000_000)
        assert others_listen(f"{in_address(address)}:{port}")
        monkeypatch.undo()
        with socket.create_connection((address, port)):
            assert listeners(other, port) == ({os.getuid()} if host in ("0.0.0.0", "::") else set())
    assert listeners(address, port) == set()
    assert not others_listen(f"{in_address(address)}:{port}")
    assert not only_ours(f"http://{in_address(address)}:{port}/path")


def test_who_listens_where_a_name_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"localhost:{listener.getsockname()[1]}"
        assert only_ours(f"http://{address}")
        assert not others_listen(address)
        monkeypatch.setattr("os.getuid", lambda: 1_000_000)
        assert not only_ours(f"http://{address}")
        assert others_listen(address)
    assert not others_listen("no-such-host.invalid:80")
    assert not only_ours("http://no-such-host.invalid")


@IPV6
@pytest.mark.skipif(os.getuid() != 0, reason="needs root to act as another user")
def test_who_listens_by_ipv6_only_takes_nothing_from_who_listens_by_ipv4() -> None:
    theirs = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_INET6); "
        "s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1); s.bind(('::', int(sys.argv[1]))); s.listen(); "
        "print('listens', flush=True); sys.stdin.read()"
    )
    with socket.create_server(("0.0.0.0", 0)) as ours:
        port = ours.getsockname()[1]
        with subprocess.Popen(
            [sys.executable, "-c", theirs, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout
            assert other.stdout.readline() == b"listens\n"
            assert listeners("127.0.0.1", port) == {os.getuid()}
            assert not others_listen(f"127.0.0.1:{port}")
            assert others_listen(f"[::1]:{port}")
            other.communicate()


def test_the_environment_of_a_process() -> None:
    with subprocess.Popen(["sleep", "600"], env={"A": "b=c"}) as child:
        assert wait_until(lambda: environment_of(child.pid) == {"A": "b=c"}, 10)
        child.kill()
    assert environment_of(child.pid) == {}


@pytest.mark.parametrize("module", ["servebook", "servebook.launch.supervisor", "servebook.ways.v2.contract"])
def test_a_server_and_its_supervisor_do_not_load_the_launcher(module: str) -> None:
    code = (
        f"import sys, {module}; print(sorted(sys.modules.keys() & {{'servebook.launch.lifetime', 'pydantic', 'rich'}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_what_the_package_offers_is_there_when_it_is_asked_for() -> None:
    import servebook
    from servebook import launch

    for package in (servebook, launch):
        assert all(getattr(package, name) for name in package.__all__)
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            package.nonsense  # noqa: B018


class Silent:
    """In place of a link to a keeper that does not answer: the time passes that it is given."""

    def __init__(self, clock: list[float], keeper: int) -> None:
        self.clock, self.keeper = clock, keeper

    def ask(self, _: str) -> None:
        self.clock[0] += STOP_SECONDS

    def wait_closed(self, seconds: float) -> bool:
        self.clock[0] += seconds
        return False


@pytest.mark.parametrize(("keeper", "remedy"), [(4711, "kill -9 4711"), (0, "in the one where it was started")])
def test_a_keeper_that_does_not_answer_is_waited_for_as_long_as_is_said(
    keeper: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another container has no number here, and `kill -9 0` would end who types it."""
    clock = [0.0]
    monkeypatch.setattr(Link, "open", lambda _: Silent(clock, keeper))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises(LaunchError, match=rf"does not end(.|\n)*{remedy}"):
        lifetime.down("vllm", load_settings(state_dir=tmp_path))
    assert clock[0] == pytest.approx(STOP_SECONDS, abs=1)
