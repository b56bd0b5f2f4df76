"""Server lifetimes, with real processes: what starts is found again, and what ends leaves nothing."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import pty
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from queue import Empty
from threading import Event, Thread
from typing import Any
from unittest.mock import MagicMock

import psutil
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from desk import IPV6, TINY, Desk, eventually
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jupyter_client.manager import KernelManager

from servebook import launch
from servebook.bench.resources import is_engine
from servebook.engine import faster_cpu
from servebook.engine.arguments import promised_bytes
from servebook.errors import LaunchError, ModelError
from servebook.launch import display, find_server, keep, lifetime, link, supervisor
from servebook.launch.files import Files, read_log, tail, visible
from servebook.launch.keep import Kept, Phase, await_ready
from servebook.launch.link import died, root_cause
from servebook.launch.plan import Start, plan
from servebook.launch.probes import http_ok
from servebook.launch.supervisor import Order
from servebook.launch.table import Endpoints
from servebook.processes import free_port
from servebook.settings import in_address, load_settings
from servebook.ways.custom_grpc.certificates import make_certificates
from servebook.ways.metrics import metric

SERVEBOOK = Path(sys.executable).with_name("servebook")
KEY = "sk-not-for-other-eyes"
WITHOUT_ENGINE = """
import multiprocessing, time
from servebook.processes import die_with_parent
from servebook.ways.custom_grpc.server import __main__ as server

def core():
    die_with_parent()
    time.sleep(600)

def start_engine(_):
    multiprocessing.get_context("fork").Process(target=core).start()
    time.sleep(600)

server.start_engine = start_engine
server.main()
"""


# --- up, status, down ---------------------------------------------------------------------------------------------


def test_up_twice_starts_one_and_down_leaves_nothing(desk: Desk) -> None:
    desk.run("up", "vllm")
    first = desk.status()
    assert first["state"] == "ready"
    assert first["owner"] == "cli"
    eventually(lambda: len(desk.family()) == 5, "guardian, supervisor, server, child, grandchild")
    assert "attached to" in desk.run("up", "vllm")
    assert desk.status() == first
    sockets = sockets_folder(desk)
    assert "ended" in desk.run("down", "vllm")
    assert desk.family() == []
    assert not sockets.exists()
    assert desk.status()["state"] == "stopped"
    assert "was not running" in desk.run("down", "vllm")


def test_status_has_the_documented_fields(desk: Desk) -> None:
    desk.run("up", "vllm")
    (entry, *others) = json.loads(desk.run("status", "--json"))
    assert [other["state"] for other in others] == ["stopped"] * (len(launch.SERVERS) - 1)
    assert set(entry) == {"name", "state", "pid", "model", "endpoints", "owner", "log"}
    assert psutil.pid_exists(entry["pid"])
    assert entry["model"] == "smollm2"
    assert "Starting to load model" in Path(entry["log"]).read_text()
    assert entry == desk.status()


def test_two_ups_at_once_start_one(desk: Desk) -> None:
    both = [desk.start(TINY, "cli", "up", "vllm") for _ in range(3)]
    for child in both:
        assert child.wait(60) == 0, child.communicate()
    eventually(lambda: len(desk.family()) == 5, "the whole family")
    assert Path(desk.status()["log"]).read_text().count("Starting to load model") == 1


def test_starting_is_seen_as_such(desk: Desk) -> None:
    desk.start(TINY, "cli", "up", "vllm", engine_args="--delay 600")
    entry = eventually(lambda: (e := desk.status())["state"] == "starting" and e, "a starting server")
    assert psutil.pid_exists(entry["pid"])


def test_a_server_that_was_ready_and_is_broken_is_not_starting(desk: Desk) -> None:
    desk.run("up", "vllm")
    entry = desk.status()
    assert requests.get(f"http://{entry['endpoints']['http']}/break", timeout=10).status_code == 200
    broken = desk.status()
    assert (broken["state"], broken["pid"]) == ("failed", entry["pid"])
    text = desk.run("up", "vllm", expect=1)
    assert "was ready and is not any more" in text
    assert "servebook down vllm" in text


def test_a_server_that_dies_at_start_says_why(desk: Desk) -> None:
    text = desk.run("up", "vllm", expect=1, engine_args="--die 3")
    assert "exit code 3" in text
    assert "the weights are torn" in text
    desk.nothing_left()
    another = desk.run("up", "vllm", expect=1, host="192.0.2.1", api_key=KEY)
    assert "cannot start vllm on 192.0.2.1" in another
    assert "exit code" not in another, "that was the one before"
    desk.run("up", "vllm", expect=1, engine_args="--die 3")
    assert desk.status()["state"] == "failed"
    assert "the weights are torn" in desk.run("logs", "vllm")


def test_start_timeout(desk: Desk) -> None:
    text = desk.run("up", "vllm", expect=1, engine_args="--delay 600", start_timeout="1")
    assert "not ready within 1 s" in text
    assert "SERVEBOOK_START_TIMEOUT" in text
    desk.nothing_left()


def test_other_settings_are_not_silently_ignored(desk: Desk) -> None:
    desk.run("up", "vllm")
    assert "other settings" in desk.run("up", "vllm", expect=1, engine_args="--linger 0")
    assert desk.status()["state"] == "ready"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["up", "nonsense"], 1, "Choose from vllm"),
        (["down", "nonsense"], 1, "Choose from vllm"),
        (["logs", "nonsense"], 1, "Choose from vllm"),
        (["logs", "vllm"], 1, "has not run yet"),
        (["down"], 2, "name a server, or say --all"),
        (["up"], 2, "Missing argument"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_bad_commands(desk: Desk, words: list[str], code: int, says: str) -> None:
    assert says in desk.run(*words, expect=code)


def test_instance_names_cannot_leave_the_state_folder(desk: Desk) -> None:
    with pytest.raises(LaunchError, match="cannot name a server"):
        launch.serve("vllm", instance="../../escape", settings=desk.settings)


# --- ports and people ---------------------------------------------------------------------------------------------


def test_port_taken_by_a_stranger(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", int(desk.env["SERVEBOOK_VLLM_HTTP_PORT"]))) as stranger:
        port = stranger.getsockname()[1]
        assert f"port {port} was taken" in desk.run("up", "vllm")
        entry = desk.status()
        assert entry["state"] == "ready"
        assert entry["endpoints"]["http"] != f"127.0.0.1:{port}"


def test_a_server_that_died_comes_back_where_it_was(desk: Desk) -> None:
    """A router, say, still looks for it there: at its own port, which is free by now, nobody found it."""
    own = f"127.0.0.1:{desk.env['SERVEBOOK_VLLM_HTTP_PORT']}"
    with socket.create_server(("127.0.0.1", int(desk.env["SERVEBOOK_VLLM_HTTP_PORT"]))):
        desk.run("up", "vllm")
    first = desk.status()
    os.kill(first["pid"], signal.SIGKILL)
    eventually(lambda: desk.status()["state"] == "failed", "its end in the status")
    desk.run("up", "vllm")
    assert desk.status()["endpoints"] == first["endpoints"] != {"http": own}
    desk.run("down", "vllm")
    desk.run("up", "vllm")
    assert desk.status()["endpoints"] == {"http": own}, "it was ended in order"


def test_where_a_server_was_is_taken_only_from_a_record_that_can_be_true(tmp_path: Path) -> None:
    files = Files(tmp_path / "state", "vllm")
    files.make_folders()
    own, other = free_port(), free_port()
    order: Any = {"name": "vllm", "state_dir": str(tmp_path / "state"), "ports": {"http": own}}
    right = {"was_ready": True, "preferred": {"http": own}, "endpoints": {"http": f"127.0.0.1:{other}"}}

    def chosen(record: dict[str, Any], others: tuple[int, ...] = ()) -> int:
        files.record.write_text(json.dumps(record))
        before = supervisor.ports_before(order).get("http")
        port, claim = supervisor.choose_port("127.0.0.1", own, {own, *others}, before)
        claim.close()
        return port

    assert chosen(right) == other
    assert chosen(right, (other,)) == own, "another server has been given that port since"
    assert chosen(right | {"was_ready": False}) == own
    assert chosen(right | {"preferred": {"http": other}}) == own
    places: list[Any] = [None, 1, [], {"http": None}, {"http": "h:x"}, {"http": "h:99999"}, {"grpc": f"h:{other}"}]
    for place in places:
        assert chosen(right | {"endpoints": place}) == own, place
    with socket.create_server(("127.0.0.1", other)):
        assert chosen(right) == own


def test_two_people_on_one_machine(desk: Desk, tmp_path: Path) -> None:
    other = Desk(tmp_path / "other", int(desk.env["SERVEBOOK_VLLM_HTTP_PORT"]))
    starts = [desk.start(TINY, "cli", "up", "vllm"), other.start(TINY, "cli", "up", "vllm")]
    assert [start.wait(60) for start in starts] == [0, 0]
    mine, theirs = desk.status(), other.status()
    assert mine["state"] == theirs["state"] == "ready"
    assert mine["endpoints"] != theirs["endpoints"]
    other.close()
    assert desk.status() == mine


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to act as another user")
@pytest.mark.parametrize("place", ["state", "state/servers"])
def test_a_folder_that_others_may_write_to_is_not_trusted(place: str) -> None:
    """Another user's socket there is no server of ours, and none of ours is started beside it."""
    squat = (
        "import os, socket, sys; os.chdir(sys.argv[1]); os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
        "s.bind('vllm.sock'); s.listen(); print('held', flush=True); sys.stdin.read()"
    )
    with tempfile.TemporaryDirectory() as scratch:
        desk = Desk(Path(scratch, "state"), free_port())
        servers = desk.folder / "servers"
        servers.mkdir(parents=True)
        servers.chmod(0o777)
        holder = desk.start("-c", squat, servers)
        assert holder.stdout
        assert holder.stdout.readline() == "held\n", holder.communicate()
        servers.chmod(0o700)
        Path(scratch, place).chmod(0o777)
        assert desk.status()["state"] == "stopped"
        text = desk.run("up", "vllm", expect=1)
        assert f"{Path(scratch, place)} cannot be used: every user of this machine may write to it" in text
        assert "SERVEBOOK_STATE_DIR" in text
        desk.close()


def test_open_to_the_network_only_with_a_key(desk: Desk) -> None:
    text = desk.run("up", "vllm", expect=1, host="0.0.0.0")
    assert "SERVEBOOK_API_KEY" in text
    assert desk.family() == []
    desk.run("up", "vllm", host="0.0.0.0", api_key=KEY)
    entry = desk.status()
    assert entry["state"] == "ready"
    assert entry["endpoints"]["http"].startswith("127.0.0.1:")
    for words in (("status",), ("logs", "vllm"), ("down", "vllm")):  # who looks, or ends, opens nothing
        desk.run(*words, host="0.0.0.0")
    assert desk.status()["state"] == "stopped"


def listening(pid: int) -> set[tuple[str, int]]:
    """The addresses and ports on which a process listens."""
    return {(at.laddr.ip, at.laddr.port) for at in psutil.Process(pid).connections("tcp") if at.status == "LISTEN"}


def test_what_stands_behind_a_front_is_not_opened_with_it(desk: Desk) -> None:
    desk.run("up", "gateway", host="0.0.0.0", api_key=KEY)
    at = {name: {address for address, _ in listening(desk.status(name)["pid"])} for name in ("gateway", "vllm")}
    assert at == {"gateway": {"0.0.0.0"}, "vllm": {"127.0.0.1"}}
    assert "up with other settings" in desk.run("up", "vllm", expect=1, host="0.0.0.0", api_key=KEY)


def test_a_front_takes_the_engine_that_was_opened_on_purpose(desk: Desk) -> None:
    desk.run("up", "vllm", host="0.0.0.0", api_key=KEY)
    engine = desk.status()
    text = desk.run("up", "gateway", host="0.0.0.0", api_key=KEY)
    assert re.search(r"vllm: attached to.*gateway: ready", text, re.DOTALL)
    assert "attached to" in desk.run("up", "vllm", api_key=KEY)
    assert desk.status() == engine


def test_a_word_that_is_no_server_is_found_before_the_first_is_started(desk: Desk) -> None:
    assert "There is no server 'tirton'" in desk.run("up", "vllm", "tirton", expect=1)
    assert desk.status()["state"] == "stopped"


def test_the_version_names_the_engine_too(desk: Desk) -> None:
    assert re.fullmatch(r"servebook \S+, vLLM \d+\.\d+\.\S+\n", desk.run("--version"))


@pytest.mark.parametrize(("name", "behind"), [("gateway", "vllm"), ("front", "vllm"), ("hub", "front")])
def test_needs_stay_on_this_machine(name: str, behind: str) -> None:
    settings = load_settings(host="0.0.0.0", api_key=KEY, model="of-mine")
    needed = find_server(name).needs(settings)
    # A room's engine has arguments and a key of its own, which tests/test_room_front.py holds.
    alike = {name: each.model_copy(update={"engine_args": "", "api_key": None}) for name, each in needed.items()}
    assert alike == {behind: settings.model_copy(update={"host": "127.0.0.1", "api_key": None})}


def test_no_replica_has_another_servers_port() -> None:
    settings = load_settings(device="gpu", replicas=8)
    ports = [each.vllm_http_port for each in find_server("router").needs(settings).values()]
    assert ports == [8092, 8093, 8094, 8096, 8097, 8098, 8099, 8103], "8095 is the front's, 8100 to 8102 the hub's"


@pytest.mark.parametrize(
    ("name", "addresses"),
    [
        ("grpc", {"grpc": "192.0.2.1", "metrics": "127.0.0.1"}),
        ("hub", {"http": "192.0.2.1", "routes": "127.0.0.1", "api": "127.0.0.1"}),
    ],
)
def test_ports_that_are_never_opened(name: str, addresses: dict[str, str], tmp_path: Path) -> None:
    settings = load_settings(host="192.0.2.1", api_key=KEY, state_dir=tmp_path)
    at: dict[str, Endpoints] = {"front": {"http": "127.0.0.1:8095"}}
    order = Start(find_server(name), settings, name, "cli").order(tmp_path, at)
    assert order["hosts"] == order["client_hosts"] == addresses


def test_the_metrics_of_the_grpc_server_stay_on_this_machine(tmp_path: Path) -> None:
    """The server itself, opened to the network; where it would load an engine, it waits."""
    files, grpc, metrics = make_certificates(tmp_path), free_port(), free_port()
    server = subprocess.Popen(
        [
            *(sys.executable, "-c", WITHOUT_ENGINE, "--host", "0.0.0.0"),
            *("--grpc-port", str(grpc), "--metrics-port", str(metrics)),
            *("--tls-cert", files.server_cert, "--tls-key", files.server_key),
        ],
        env=os.environ | {"SERVEBOOK_API_KEY": KEY},
    )
    try:
        found = eventually(lambda: len(found := listening(server.pid)) == 2 and found, "both ports")
        at = {port: address for address, port in found}
        assert at[grpc] in ("0.0.0.0", "::")
        assert at[metrics] == "127.0.0.1"
    finally:
        server.kill()
        server.wait()


def test_a_host_that_is_not_this_machine(desk: Desk) -> None:
    text = desk.run("up", "vllm", expect=1, host="192.0.2.1", api_key=KEY)
    assert "cannot start vllm on 192.0.2.1: [Errno 99]" in text
    desk.nothing_left()


def test_the_key_is_in_no_command_line_log_or_state_file(desk: Desk) -> None:
    text = desk.run("up", "vllm", api_key=KEY) + desk.run("status", "--json") + desk.run("status", api_key=KEY)
    family = desk.family()
    assert any(process.environ().get("VLLM_API_KEY") == KEY for process in family)
    assert all(KEY not in word for process in family for word in process.cmdline())
    files = [path for path in desk.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".log", ".json"}
    assert all(KEY not in path.read_text() for path in files)
    assert KEY not in text
    assert desk.folder.stat().st_mode & 0o077 == 0


# --- faults -------------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_all_that_start_side_by_side(desk: Desk) -> None:
    kernel = desk.start(TINY, "kernel", "side by side", engine_args="--delay 600")
    eventually(lambda: len(desk.family()) == 5, "the whole family")
    kernel.send_signal(signal.SIGINT)
    _, err = kernel.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    desk.nothing_left()


def test_an_interrupt_is_heard_whatever_a_start_waits_for() -> None:
    """A download, for example, which does not hear of it."""
    begun, come, over = Event(), Event(), Event()

    def start(_: str) -> Any:
        begun.set()
        come.wait(60)
        over.set()

    def press() -> None:
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    presses = Thread(target=press)
    presses.start()
    with pytest.raises(KeyboardInterrupt):
        launch.serve_all(["vllm"], start)
    assert not over.is_set(), "the download has come by now"
    come.set()
    presses.join()


def keepers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Those that this process begins from now on."""
    begun: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *words: Any, **more: Any) -> None:
            super().__init__(*words, **more)
            begun.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return begun


@pytest.mark.lifetime
def test_a_start_that_nobody_waits_for_leaves_no_keeper_and_takes_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while what is left of the server before still ends, nor when one is there at last."""

    def nobody_waits(_: str) -> None:
        raise LaunchError("vllm was given up.")

    begun = keepers(monkeypatch)
    order: Any = {"name": "vllm", "state_dir": str(tmp_path)}
    files = Files(tmp_path, "vllm")
    files.make_folders()
    with files.socket.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match="given up"):
            link.spawn(order, nobody_waits)
    assert begun[0].wait(60) == -signal.SIGKILL
    abandoned = Event()
    abandoned.set()
    monkeypatch.setattr(keep, "ABANDONED", ContextVar("abandoned", default=abandoned))
    with socket.socket() as connection, pytest.raises(LaunchError, match="given up"):
        await_ready(kept(connection, tmp_path))


@pytest.mark.lifetime
def test_a_server_that_another_start_began_and_that_has_ended_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper of the second start has seen it, and the second start has not."""
    files = Files(tmp_path, "vllm")
    files.make_folders()
    begun, attach = keepers(monkeypatch), link.attach
    first, lock = socket.socket(socket.AF_UNIX), files.socket.with_suffix(".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with supervisor.short_path(files.socket) as name:
        first.bind(name)
    first.listen()

    def too_late(order: supervisor.Order) -> link.Lease | None:
        if begun[0].poll() is None:
            return None
        lock.close()
        first.close()
        return attach(order)

    monkeypatch.setattr(link, "attach", too_late)
    spec = replace(find_server("vllm"), argv=lambda *_: ["sleep", "600"])
    order = Start(spec, load_settings(state_dir=tmp_path), "vllm", owner="kernel").order(tmp_path, {})
    lease, there = link.spawn(order, lambda _: None)
    assert begun[0].wait() == supervisor.EX_TEMPFAIL
    assert psutil.Process(there["pid"]).name() == "sleep"
    lease.ask("stop")
    assert lease.wait_closed(60)


def test_kernel_killed_while_the_server_starts(desk: Desk) -> None:
    kernel = desk.start(TINY, "kernel", engine_args="--delay 600")
    eventually(lambda: len(desk.family()) == 5, "the whole family")
    kernel.kill()
    desk.nothing_left()
    assert desk.status()["state"] == "stopped"


def test_kernel_killed_while_the_server_serves(desk: Desk) -> None:
    kernel, server = desk.kernel()
    assert desk.status()["owner"] == "kernel"
    assert desk.status()["pid"] == server["pid"]
    kernel.kill()
    desk.nothing_left()
    assert desk.status()["state"] == "stopped"


def test_a_second_kernel_keeps_the_server(desk: Desk) -> None:
    first, server = desk.kernel()
    second, same = desk.kernel()
    assert same == server
    first.kill()
    first.wait()
    assert desk.status()["state"] == "ready"
    second.kill()
    desk.nothing_left()


def test_up_takes_over_a_kernels_server(desk: Desk) -> None:
    kernel, server = desk.kernel()
    assert "attached to" in desk.run("up", "vllm")
    kernel.kill()
    kernel.wait()
    entry = desk.status()
    assert (entry["state"], entry["owner"], entry["pid"]) == ("ready", "cli", server["pid"])


def test_down_ends_a_kernels_server(desk: Desk) -> None:
    desk.kernel()
    assert "ended" in desk.run("down", "vllm")
    assert desk.status()["state"] == "stopped"


def test_a_restarted_kernel_waits_for_its_former_server_to_end(desk: Desk) -> None:
    kernel, server = desk.kernel(engine_args="--linger 2")
    kernel.kill()
    _, fresh = desk.kernel(engine_args="--linger 2")
    assert fresh["pid"] != server["pid"]
    eventually(lambda: len(desk.family()) == 5, "the whole family")


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_ends_what_it_started(desk: Desk, sig: signal.Signals) -> None:
    up = desk.start(TINY, "cli", "up", "vllm", engine_args="--delay 600")
    eventually(lambda: len(desk.family()) == 5, "the whole family")
    up.send_signal(sig)
    out, err = up.communicate(timeout=60)
    assert "Traceback" not in out + err
    assert up.returncode == (130 if sig == signal.SIGINT else -sig)
    said = "servebook: stopped; what had not finished starting was ended" in err
    assert said == (sig == signal.SIGINT)
    desk.nothing_left()
    assert desk.status()["state"] == "stopped"


def test_who_ends_a_server_that_has_just_died_leaves_no_record_of_it(desk: Desk) -> None:
    """Its keeper may be about to write that it failed."""
    for _ in range(3):
        desk.run("up", "vllm")
        os.kill(desk.status()["pid"], signal.SIGKILL)
        launch.down("vllm", desk.settings)
        assert desk.status()["state"] == "stopped"


@pytest.mark.survives(
    "server, keeper or guardian killed (SIGKILL)", "every server", lost="the server; nothing is left running"
)
@pytest.mark.parametrize("victim", ["server", "supervisor", "guardian"])
def test_killed_by_9(desk: Desk, victim: str) -> None:
    desk.run("up", "vllm", engine_args="--deaf")
    keeper = desk.supervisor()
    guardian = keeper.parent()
    assert guardian
    pid = {"server": desk.status()["pid"], "supervisor": keeper.pid, "guardian": guardian.pid}[victim]
    os.kill(pid, signal.SIGKILL)
    desk.nothing_left()
    entry = desk.status()
    assert entry["state"] == ("stopped" if victim == "guardian" else "failed")
    assert entry["pid"] is None
    desk.run("up", "vllm")
    assert desk.status()["state"] == "ready"


def test_a_server_that_ended_by_chance_is_started_once_more(desk: Desk, tmp_path: Path) -> None:
    said = desk.run("up", "vllm", engine_args=f"--lost {tmp_path}/lost")
    assert "ready: http" in said
    assert desk.status()["state"] == "ready"
    assert "nobody's fault" in Path(f"{desk.status()['log']}.1").read_text(), "the log of the first try"


def test_a_keeper_that_does_not_answer_is_not_waited_for_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.run("up", "vllm")
    keeper = desk.supervisor()
    monkeypatch.setattr(link, "STOP_SECONDS", 0.5)
    order: Any = {"name": "vllm", "state_dir": str(desk.folder), "fingerprint": "", "host": "127.0.0.1"}
    keeper.suspend()
    try:
        with pytest.raises(LaunchError, match="has not answered"):
            link.attach(order)
    finally:
        keeper.resume()


@pytest.mark.survives("state files of any content", "every server", lost="nothing")
def test_corrupted_state_files(desk: Desk) -> None:
    kinds = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"pid": 1, "state": "running", "endpoints": 7, "model": []}']
    desk.run("up", "vllm")
    before = desk.status()
    record = desk.folder / "servers/vllm.json"
    for rubbish in kinds:
        record.write_bytes(rubbish)
        assert desk.status() == before, rubbish
    desk.supervisor().kill()
    desk.nothing_left()
    for rubbish in kinds:
        record.write_bytes(rubbish)
        entry = desk.status()
        assert entry["pid"] is None, rubbish  # a pid on disk is never believed
        assert entry["state"] in ("failed", "stopped"), rubbish


def test_a_lost_record_does_not_hide_a_server(desk: Desk) -> None:
    desk.run("up", "vllm")
    (desk.folder / "servers/vllm.json").unlink()
    assert desk.status()["state"] == "ready"
    desk.run("down", "--all")
    desk.nothing_left()


@pytest.mark.survives("a state folder that cannot be written", "every server", lost="the start, with the remedy")
@pytest.mark.parametrize("place", ["/dev/null/state", "/proc/servebook"])
def test_state_folder_that_cannot_be_written(desk: Desk, place: str) -> None:
    text = desk.run("up", "vllm", expect=1, state_dir=place)
    assert f"{place} cannot be used" in text
    assert "SERVEBOOK_STATE_DIR" in text
    assert json.loads(desk.run("status", "--json", state_dir=place))[0]["state"] == "stopped"


def test_cache_folder_that_cannot_be_written(desk: Desk) -> None:
    text = desk.run("up", "vllm", expect=1, cache_dir="/dev/null/cache")
    assert "SERVEBOOK_CACHE_DIR" in text


def test_model_that_does_not_exist(desk: Desk) -> None:
    text = desk.run("up", "vllm", expect=1, model="/no/such/model")
    assert "no model folder '/no/such/model'" in text
    assert desk.family() == []


def test_longer_than_the_model(desk: Desk) -> None:
    text = desk.run("up", "vllm", expect=1, max_model_len="100000")
    assert "100000" in text
    assert "8192" in text
    assert desk.family() == []


def test_too_little_memory_is_refused_before_the_start(desk: Desk) -> None:
    with pytest.raises(LaunchError, match=r"needs about 10000\d\.\d GiB"):
        launch.serve("vllm", settings=desk.settings, kv_cache_gib=100_000)
    assert desk.family() == []


def test_no_engine_at_the_given_url(desk: Desk) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(LaunchError, match="No vLLM answers"):
        launch.serve("vllm", settings=desk.settings, engine_url=url)
    desk.run("up", "vllm")
    with pytest.raises(LaunchError, match="404"):
        launch.serve("vllm", settings=desk.settings, engine_url=f"http://{desk.status()['endpoints']['http']}")
    assert "runs elsewhere" in desk.run("up", "vllm", expect=1, engine_url=url)


def test_who_stands_before_an_engine_elsewhere_needs_no_model_here(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has the name of the engine's."""
    monkeypatch.setattr("servebook.launch.keep.ask_elsewhere", lambda _: ("qwen3-8b", {"http": "gpu-box:8000"}))
    nothing_here = desk.settings.model_copy(update={"model": "/no/such/model", "engine_url": "http://gpu-box:8000"})
    tiny = replace(find_server("vllm"), ready=lambda at: http_ok(at["http"], "/health"), has_engine=False)
    words = [sys.executable, str(TINY), "server", "--host", "127.0.0.1", "--port", "{http}"]
    gateway = replace(tiny, name="gateway", argv=lambda *_: words, needs=find_server("gateway").needs)
    server = launch.serve("gateway", settings=nothing_here, spec=gateway)
    try:
        assert server.model == "qwen3-8b"
    finally:
        server.stop()
    with pytest.raises(ModelError, match="no model folder"):
        launch.serve("vllm", settings=nothing_here, engine_url="", spec=replace(tiny, argv=lambda *_: words))


# --- machines of others -------------------------------------------------------------------------------------------


def test_what_was_left_in_the_shell_or_lies_in_the_folder_reaches_no_server(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes' VLLM_PORT, another engine's key, a strict reader of warnings, and a learner's own random.py."""
    for module in ("random", "http", "socket"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    desk.env |= {"VLLM_PORT": "tcp://10.0.0.1:8000", "VLLM_API_KEY": "another-engine's", "PYTHONWARNINGS": "error"}
    desk.env |= {"TMPDIR": str(tmp_path / ("x" * 90)), "HF_HOME": "/dev/null/hf", "PYTHONSAFEPATH": "1"}
    (tmp_path / ("x" * 90)).mkdir()
    desk.run("up", "vllm")
    env = psutil.Process(desk.status()["pid"]).environ()
    assert not {"VLLM_PORT", "VLLM_API_KEY", "PYTHONWARNINGS"} & env.keys()
    assert (env["TMPDIR"], env["PYTHONSAFEPATH"], env["PYTHONUTF8"]) == ("/tmp", "1", "1")
    assert Path(env["VLLM_RPC_BASE_PATH"]).parent == Path("/tmp")
    assert env["HF_HOME"] == str(desk.settings.cache_dir / "hf_home")


def test_a_state_folder_deeper_than_a_sockets_name_may_be(tmp_path: Path) -> None:
    desk = Desk(tmp_path / ("a" * 100) / ("b" * 100), free_port())
    try:
        desk.run("up", "vllm")
        assert desk.status()["state"] == "ready"
        assert (desk.folder / "servers/vllm.sock").is_socket()
    finally:
        desk.close()


@IPV6
def test_an_ipv6_address(desk: Desk) -> None:
    desk.run("up", "vllm", host="::1")
    entry = desk.status()
    assert entry["endpoints"]["http"].startswith("[::1]:")
    assert entry["state"] == "ready"
    assert requests.get(f"http://{entry['endpoints']['http']}/health", timeout=10).status_code == 200
    assert {at for at, _ in listening(entry["pid"])} == {"::1"}


def kept(connection: socket.socket, state_dir: Path, **endpoints: str) -> Kept:
    """A server that says that it is ready, with a keeper at the other end of `connection`."""
    spec = replace(find_server("vllm"), ready=lambda _: True)
    start = Start(spec, load_settings(state_dir=state_dir, start_timeout=60), "vllm", owner="kernel")
    there: Any = {"was_ready": False, "endpoints": endpoints, "preferred": {}}
    shown = display.progress("vllm")
    return Kept(start, link.Link(connection), there, attached=False, display=shown, claim=ExitStack())


def test_a_server_that_ends_in_the_moment_of_ready_is_not_said_to_be_ready(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(LaunchError, match="vllm ended before it was ready"):
        await_ready(kept(ours, tmp_path))


def test_a_port_that_another_user_has_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for, as if the server were slow."""
    monkeypatch.setattr(keep, "others_listen", lambda address: address == "127.0.0.1:8001")
    monkeypatch.setattr("servebook.launch.table.others_listen", lambda address: address == "127.0.0.1:8001")
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        pytest.raises(LaunchError, match=r"listens at 127\.0\.0\.1:8001, where vllm(.|\n)*servebook down"),
    ):
        await_ready(kept(ours, tmp_path, grpc="127.0.0.1:8000", http="127.0.0.1:8001"))


def test_a_lease_is_not_a_forks(tmp_path: Path) -> None:
    """A worker of a kernel's pool may outlive it, and needs no server."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    lifetime._leases[Files(tmp_path, "vllm")] = link.Link(ours)
    fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    fork.start()
    try:
        lifetime._leases.pop(Files(tmp_path, "vllm")).close()
        assert theirs.recv(1) == b"", "nobody holds the other end"
        assert fork.is_alive()
    finally:
        fork.kill()
        fork.join()


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=IPV6)])
def test_ready_is_who_has_opened_all_ports(host: str) -> None:
    """Several open theirs one after the other, and one may answer for the server before another is open."""
    spec = replace(find_server("kserve"), ready=lambda _: True)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as first, socket.socket(family) as second:
        second.bind((host, 0))
        at = {str(each): f"{in_address(host)}:{each.getsockname()[1]}" for each in (first, second)}
        assert not spec.answers(at)
        second.listen()
        assert spec.answers(at)


def test_few_open_files(desk: Desk) -> None:
    """The soft limit is raised for a server as far as it goes; a hard limit that is too low is named."""
    for hard, code in (("", 0), ("ulimit -n 64; ", 1)):
        command = f"{hard}ulimit -S -n 64; exec {sys.executable} {TINY} cli up vllm"
        done = subprocess.run(["bash", "-c", command], env=desk.env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        if code:
            assert "A process may open 64 files here" in done.stderr
            assert "ulimit -n" in done.stderr
        else:
            pid = desk.status()["pid"]
            assert psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE)[0] >= 1024
            desk.run("down", "vllm")


def test_a_state_folder_that_is_a_file(desk: Desk, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for command in (["up", "vllm"], ["labs", "list"]):
        assert "SERVEBOOK_STATE_DIR" in desk.run(*command, expect=1, state_dir=str(file))
    assert "was not running" in desk.run("down", "vllm", state_dir=str(file))


def test_a_working_folder_that_was_removed(desk: Desk, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    command = f"mkdir {gone}; cd {gone}; rmdir {gone}; {sys.executable} {TINY} cli "
    for words in ("up vllm", "labs list", "down vllm"):
        done = subprocess.run(["bash", "-c", command + words], env=desk.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_a_terminal_that_knows_ascii_only(desk: Desk, locale: dict[str, str]) -> None:
    desk.env |= locale
    for words in (["labs", "list"], ["labs", "hint", "01.1"], ["--help"]):
        assert desk.run(*words)
    desk.run("doctor", expect=None)


def test_what_a_log_sends_to_a_terminal_is_shown_and_not_obeyed(desk: Desk) -> None:
    log = desk.folder / "logs/vllm.log"
    log.parent.mkdir(parents=True)
    log.write_bytes("caf\u00e9\x1b]0;owned\x07 \x9b2J \u202egnp\n\ttab\r50 %\n".encode() + b"\xff")
    text = desk.run("logs", "vllm")
    assert text == "caf\u00e9\\x1b]0;owned\\x07 \\x9b2J \\u202egnp\n\ttab\n50 %\n\ufffd\n"
    assert desk.run("logs", "vllm", "-n", "2") == "50 %\n\ufffd\n"


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", ".hidden", "a/b", "a\nb", "x" * 65, "", "é"])
def test_names_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    settings = load_settings(state_dir=tmp_path / "state")
    for use in (launch.down, lambda name, settings: launch.serve("vllm", instance=name or "/", settings=settings)):
        with pytest.raises(LaunchError, match="cannot name a server"):
            use(name, settings)


def test_logs_takes_names_only(desk: Desk) -> None:
    (desk.folder.parent / "outside.log").write_text("secret")
    text = desk.run("logs", "../../outside", expect=1)
    assert "'../../outside' cannot name a server" in text


VLLMS = """
(APIServer pid=1) INFO 11-26 [utils.py:1] initialized
(EngineCore pid=2) WARNING 11-26 [a.py:1] Failed to import: ImportError: libcuda.so is missing
(EngineCore pid=2) ERROR 11-26 [core.py:9] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-26 [core.py:9]   File "core.py", line 9, in run
(EngineCore pid=2) ERROR 11-26 [core.py:9] ValueError: invalid literal for int() with base 10: 'tcp://10.0.0.1'
Traceback (most recent call last):
  File "x.py", line 1, in <module>
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (VLLMS, "ValueError: invalid literal for int() with base 10: 'tcp://10.0.0.1'"),
        ("Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory. Tried", "torch.OutOfMemory"),
        ("servebook: Triton takes no folder\n", "Triton takes no folder"),
        ("all is well\n", ""),
    ],
)
def test_the_first_exception_is_the_cause(log: str, cause: str) -> None:
    assert root_cause(log).startswith(cause)
    assert bool(root_cause(log)) is bool(cause)


@pytest.mark.survives("a full disk at start", "every server", lost="the start, with the cause and the remedy")
def test_a_full_disk_is_the_cause_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("of the run before")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(OSError, match="No space left") as caught:
        supervisor.open_log(log)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["of the run before"]
    said = str(link.unusable_folder(tmp_path, str(caught.value.strerror)))
    assert "cannot be used: No space left on device" in said
    assert "Free some disk space" in said


def test_a_log_that_cannot_be_written_any_more_ends_no_server(desk: Desk) -> None:
    kernel, _ = desk.kernel()
    resource.prlimit(desk.supervisor().pid, resource.RLIMIT_FSIZE, (0, 0))
    assert "attached to" in desk.run("up", "vllm")  # which has to be noted on the disk
    kernel.kill()
    eventually(lambda: kernel.poll() is not None, "the end of the kernel")
    assert desk.status()["state"] == "ready"


def test_the_cause_stands_before_the_log_and_what_to_do_after_it(tmp_path: Path) -> None:
    files = Files(tmp_path, "vllm")
    files.make_folders()
    files.log.write_text(
        "\n".join(["OSError: [Errno 28] No space left on device", *map(str, range(99)), "RuntimeError: x"])
    )
    first, *_, last = str(died(files)).splitlines()
    assert first == "vllm ended before it was ready: OSError: [Errno 28] No space left on device"
    assert "Free some disk space" in last
    assert "servebook logs vllm" in last


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner))


@given(st.text())
def test_of_any_log_a_terminal_gets_nothing_that_it_would_obey(text: str) -> None:
    shown = visible(text)
    assert all(each.isprintable() or each in "\n\t" for each in shown)
    assert shown.count("\n") == text.count("\n"), "line by line as it was"
    assert visible(shown) == shown


@given(
    st.binary()
    | st.dictionaries(st.sampled_from(["model", "owner", "log", "exit", "state"]) | st.text(), JSON).map(
        lambda record: json.dumps(record).encode()
    )
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_a_record_of_any_content(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), "vllm")
        files.make_folders()
        files.record.write_bytes(content)
        files.record.with_name("a name.json").write_bytes(content)
        (entry, *others) = launch.status(load_settings(state_dir=folder))
        assert entry["state"] in ("failed", "stopped")
        assert entry["pid"] is None
        assert all(isinstance(entry[key], str | None) for key in ("model", "owner", "log"))
        assert {other["state"] for other in others} == {"stopped"}
        assert "servebook logs vllm" in str(died(files))


@pytest.mark.parametrize(("server", "more"), [("vllm-rs", {}), ("grpc", {}), ("grpc", {"fronts": 2})])
def test_tls_files_that_cannot_be_used_are_told_before_an_engine_starts(
    server: str, more: dict[str, Any], desk: Desk, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)
    locked = tmp_path / "locked.key"
    key = serialization.load_pem_private_key(certificates.server_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    how = serialization.BestAvailableEncryption(b"a password")
    locked.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, how)
    )
    locked.chmod(0o600)
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    nonsense.chmod(0o600)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tls_cert": certificates.server_cert}, "go together"),
        ({"tls_cert": certificates.server_cert, "tls_key": certificates.client_key}, "mismatch"),
        ({"tls_cert": certificates.server_cert, "tls_key": tmp_path / "none.key"}, "No such file"),
        ({"tls_cert": nonsense, "tls_key": nonsense}, "PEM"),
        ({"tls_cert": certificates.server_cert, "tls_key": locked}, "PEM"),
    ]
    for files, why in cases:
        with pytest.raises(LaunchError, match=f"TLS files cannot be used: .*{why}"):
            launch.serve(server, settings=desk.settings, **files, **more)
    assert not desk.family()


# --- what the person sees -----------------------------------------------------------------------------------------


def test_addresses_and_names_are_shown_as_they_are(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a pair of brackets Rich makes a style, or an error, and of a word between colons a picture."""
    strange = "[fd00:a::5]:8000 [/x]"
    desk.env["COLUMNS"] = "200"
    said = desk.run("up", "vllm", served_name=strange) + desk.run("status")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    display.stderr.cache_clear()
    with display.TerminalProgress(strange) as shown:
        shown.phase("importing")
        shown.done("ready")
    display.stderr.cache_clear()
    assert strange in said
    assert capsys.readouterr().err.count(strange) >= 2, "the spinner and what is left"


def test_progress_on_a_pipe_is_one_line_a_phase(desk: Desk, tmp_path: Path) -> None:
    up = desk.start(TINY, "cli", "up", "vllm", engine_args=f"--until {tmp_path}/seen")
    assert up.stderr
    lines = []
    for line in up.stderr:
        lines.append(line.rstrip())
        if "loading weights" in line:
            (tmp_path / "seen").touch()
    assert up.wait(60) == 0
    assert [line.split(" (")[0] for line in lines] == [
        "vllm: looking for the model",
        "vllm: importing",
        "vllm: loading weights",
        f"vllm: ready: http {desk.status()['endpoints']['http']}",
    ]


def test_progress_on_a_terminal_shows_phase_and_seconds(desk: Desk, tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    command = [sys.executable, str(TINY), "cli", "up", "vllm"]
    env = desk.env | {"SERVEBOOK_ENGINE_ARGS": f"--until {tmp_path}/seen", "TERM": "xterm"}
    with subprocess.Popen(command, env=env, stdin=writer, stdout=writer, stderr=writer) as up:
        os.close(writer)
        text = b""
        try:
            while chunk := os.read(reader, 4096):
                text += chunk
                if (
                    len(
                        seconds := set(re.findall("vllm: loading weights … ([0-9]+) s", text.decode("utf-8", "ignore")))
                    )
                    == 2
                ):
                    (tmp_path / "seen").touch()
        except OSError:  # EIO: the terminal's other end is closed
            os.close(reader)
    assert up.returncode == 0
    assert len(seconds) >= 2, text
    assert b"ready: http" in text


def test_a_real_kernel_shows_progress_survives_interrupt_and_takes_its_server_along(desk: Desk) -> None:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=desk.env | {"PYTHONPATH": f"{TINY.parent}:{desk.env.get('PYTHONPATH', '')}"})
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    try:
        shown: list[str] = []

        def output(message: dict[str, Any]) -> None:
            shown.append(json.dumps(message["content"]))

        code = "import tiny_server; tiny_server.install()\nfrom servebook import serve\nvllm = serve('vllm')"
        reply = client.execute_interactive(code, output_hook=output, timeout=60)
        assert reply["content"]["status"] == "ok", shown
        assert any("aria-live" in text and "ready: http" in text for text in shown)
        before = desk.status()
        assert before["state"] == "ready"

        asked = client.execute("import time\nprint('asleep', flush=True)\ntime.sleep(600)")
        stream = eventually(lambda: _stream(client), "the cell's first output")
        assert "asleep" in stream
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=30)
        assert reply["parent_header"]["msg_id"] == asked
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert desk.status() == before

    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)  # SIGKILL
    desk.nothing_left()


def _stream(client: Any) -> str:
    try:
        message = client.get_iopub_msg(timeout=0.1)
    except Empty:
        return ""
    return str(message["content"].get("text", ""))


# --- with the real engine -----------------------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Desk]:
    """A desk for real engines, which leave nothing in shared memory either."""
    desk = Desk(tmp_path / "state", free_port())
    before = shared_memory()
    yield desk
    desk.close()
    eventually(lambda: shared_memory() <= before, "nothing in shared memory that nobody uses")


def shared_memory() -> set[str]:
    """What Python's multiprocessing has there and no process has mapped: the other lanes' tests use it, too."""
    files = {}
    for file in (file for pattern in ("psm_*", "sem.mp-*") for file in Path("/dev/shm").glob(pattern)):
        with suppress(OSError):  # it is gone meanwhile
            files[str(file)] = str(file.stat().st_ino)
    mapped = set()  # by number: a semaphore is made under another name than it has later
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            mapped |= {line.split()[4] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return {name for name, number in files.items() if number not in mapped}


def sockets_folder(desk: Desk) -> Path:
    """Where vLLM has those of the server; it ends with it."""
    return Path(psutil.Process(desk.status()["pid"]).environ()["VLLM_RPC_BASE_PATH"])


def engine_cores(desk: Desk) -> list[psutil.Process]:
    """vLLM's process behind its server, once it is there."""
    return [process for process in desk.family() if is_engine(process)]


def kib_of_mappings(process: psutil.Process) -> list[tuple[int, int]]:
    """Of each: its size, and how much of it has been used."""
    smaps = Path(f"/proc/{process.pid}/smaps").read_text()
    both = zip(*(re.findall(rf"^{line}: +(\d+) kB$", smaps, re.MULTILINE) for line in ("Size", "Rss")), strict=True)
    return [(int(size), int(used)) for size, used in both]


def asks_for_the_key_everywhere(url: str, model: str) -> None:
    """The whole server, where `test_engine_key.py` has its middleware alone."""
    hello = {"model": model, "prompt": "Hello", "max_tokens": 1}
    key = {"Authorization": f"Bearer {KEY}"}
    for path in ("/v1/completions", "/invocations", "/tokenize"):
        assert requests.post(url + path, json=hello, timeout=60).status_code == 401, path
        withit = requests.post(url + path, json=hello, headers=key, timeout=60)
        assert withit.status_code == 200, withit.text
    for path in ("/metrics", "/version", "/docs", "/openapi.json", "/ping", "/metrics/x", "/v1/models"):
        assert requests.get(url + path, timeout=60).status_code == 401, path
    assert requests.get(f"{url}/v1/models", headers=key, timeout=60).status_code == 200
    assert metric(url, "vllm:num_requests_running", key=KEY) == 0
    assert requests.get(f"{url}/health", timeout=60).status_code == 200


@pytest.mark.survives("the engine killed (SIGKILL)", "vllm", lost="the server; nothing is left running")
@pytest.mark.engine
@pytest.mark.timeout(600)
def test_real_engine_killed_while_it_serves(real: Desk) -> None:
    """Open to the network until then, with a key, which it asks for everywhere."""
    up = real.start(SERVEBOOK, "up", "vllm", host="0.0.0.0", api_key=KEY)
    assert up.wait(280) == 0, up.communicate()
    entry = real.status()
    assert entry["state"] == "ready"
    assert {at for at, _ in listening(entry["pid"])} == {"0.0.0.0"}
    asks_for_the_key_everywhere(f"http://{entry['endpoints']['http']}", entry["model"])
    assert KEY not in Path(entry["log"]).read_text()
    (core,) = engine_cores(real)
    if not load_settings().on_gpu:  # there the engine is started, and its cache kept, as vLLM does by itself
        assert psutil.Process(core.ppid()).children() == [core], "a fork: beside a spawned one is a resource tracker"
        assert f"rms_norm=['{faster_cpu.OURS}', " in Path(entry["log"]).read_text()
        size, used = max(kib_of_mappings(core))
        assert size > 0.99 * real.settings.kv_cache_gib * 2**20, "the KV cache, in whole blocks"
        assert 0 < used < size / 10
        assert promised_bytes() >= (size - used) * 2**10
    sockets = sockets_folder(real)
    assert list(sockets.iterdir())
    core.kill()
    real.nothing_left()
    assert not sockets.exists()
    assert real.status()["state"] == "failed"


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_real_engine_whose_supervisor_is_killed_while_it_starts(real: Desk) -> None:
    kernel = real.start("-c", "from servebook import serve; serve('vllm')")
    eventually(lambda: kernel.poll() is not None or engine_cores(real), "EngineCore", seconds=250)
    assert kernel.poll() is None, kernel.communicate()
    assert real.status()["state"] == "starting"
    sockets = sockets_folder(real)
    real.supervisor().kill()
    real.nothing_left()
    assert real.status()["state"] == "failed"
    assert not sockets.exists()


@pytest.mark.lifetime
def test_vllms_own_command_line_works_on_cpu() -> None:
    done = subprocess.run([Path(sys.executable).with_name("vllm"), "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].startswith("0.32.0")


def test_the_repositorys_folder_triton_does_not_hide_the_compilers_absence() -> None:
    command = [sys.executable, "-c", "import torch._dynamo, torch.utils._triton as t; print(t.has_triton_package())"]
    done = subprocess.run(command, cwd=TINY.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- logs and times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [1, 15, 4000, 100_000])
def test_the_end_of_a_log_is_its_last_lines(lines: int, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("".join(f"{number} ü가\x1b\n" for number in range(20_000)) + "half a line")
    assert tail(log, lines) == visible("\n".join(read_log(log).splitlines()[-lines:]))
    log.write_text("first\nasked\v\f\x1c\x85\u2028for\n")  # by a caller, whose words are no line
    assert tail(log, 1) == r"asked\x0b\x0c\x1c\x85\u2028for"
    log.write_text("short\r\nlog\n")
    assert tail(log, lines) == ("log" if lines == 1 else "short\nlog")
    assert tail(tmp_path / "none.log", lines) == ""


def test_a_long_log_is_not_read_whole_for_its_end(tmp_path: Path) -> None:
    """A server that nobody ends writes some 100 MB."""
    log = tmp_path / "vllm.log"
    with log.open("wb") as file:
        file.seek(20 * 2**20)
        file.write(b"\n" + b"a line\n" * 20)
    tracemalloc.start()
    try:
        assert tail(log, 2) == "a line\na line"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_each_whole_line_of_a_log_is_read_once_for_the_phase_of_a_start(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    phase = Phase(log)
    assert phase.now() == "importing"
    with log.open("w+") as file:
        for says, expected in [
            ("Initializing a V1 LLM engine\nStarting to", "starting the engine"),
            (" load model\n", "loading weights"),
            ("Initializing a V1 LLM engine\n", "loading weights"),
            ("Loading weights took 1 s\n", "warming up"),
            ("Capturing CUDA graphs:   0%| 0/51\rCapturing CUDA", "capturing graphs"),
            (" graphs: 100%| 51/51\n", "capturing graphs"),
        ]:
            file.write(says)
            file.flush()
            assert phase.now() == expected
        file.seek(0)
        file.write("init engine took\n")
        file.flush()
        assert phase.now() == "capturing graphs", "it has read again what it had read"


def test_who_ends_a_server_waits_for_longer_than_it_takes(tmp_path: Path) -> None:
    """Where a number is in words or of another program, and cannot be derived."""
    from servebook.lab.handout import autograde
    from servebook.ways.custom_grpc.server.__main__ import read_arguments
    from servebook.ways.triton_grpc.backend.repository import MODEL_REPOSITORY
    from servebook.ways.triton_grpc.backend.server import tritonserver_command

    command = tritonserver_command(MODEL_REPOSITORY, tmp_path, grpc_port=1, http_port=2, metrics_port=3)
    (triton,) = re.findall(r"--exit-timeout-secs=(\d+)", " ".join(command))
    grpc = read_arguments([])[0].grace
    assert int(triton) < supervisor.TERM_SECONDS
    assert grpc + 2 < supervisor.TERM_SECONDS, "as much as the parent of several fronts gives them"
    assert supervisor.END_SECONDS < autograde.GRACE_SECONDS < link.STOP_SECONDS
    assert supervisor.END_SECONDS < link.SUPERVISOR_SECONDS
    assert f"after {link.STOP_SECONDS:.0f} seconds" in str(launch.down.__doc__)


# --- the supervisor's parts ---------------------------------------------------------------------------------------


def test_a_name_in_shared_memory_that_somebody_else_has_taken_keeps_no_server_from_ending(tmp_path: Path) -> None:
    numbers = random.sample(range(10**8, 10**9), 2)  # of no process: Linux numbers them up to 2^22
    others, ours = (Path(f"/dev/shm/__KMP_REGISTERED_LIB_{number}_{os.getuid()}") for number in numbers)
    others.mkdir()  # as another user's file, it cannot be removed by `unlink`
    ours.touch()
    try:
        supervisor.remove_leftovers(str(tmp_path))
        assert (others.exists(), ours.exists(), tmp_path.exists()) == (True, False, False)
    finally:
        others.rmdir()
        ours.unlink(missing_ok=True)


def test_two_starts_take_turns_from_the_very_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both ask for the lock in the moment in which it is made."""

    def slowly(files: Files) -> int:
        time.sleep(0.05)
        return hash((files.state_dir, files.instance))

    def look(_: Order) -> tuple[link.Link, Any]:
        looking.append(len(looking) + 1)
        time.sleep(0.2)
        most.append(max(looking))
        looking.pop()
        return MagicMock(), {}

    looking: list[int] = []
    most: list[int] = []
    monkeypatch.setattr(Files, "__hash__", slowly)
    monkeypatch.setattr(keep, "model_path", lambda _: tmp_path)
    monkeypatch.setattr(keep, "attach", look)
    start = Start(find_server("vllm"), load_settings(state_dir=tmp_path, device="cpu"), "vllm", owner="kernel")
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(keep.begin, start, {}, "", MagicMock(), ExitStack()) for _ in range(2)]:
            each.result()
    assert most == [1, 1]


@pytest.mark.parametrize(("name", "host"), [("vllm-grpc", "[::1]"), ("vllm-rs", "::1"), ("vllm", "::1")])
def test_each_of_vllms_servers_is_told_an_ipv6_address_as_it_reads_it(name: str, host: str) -> None:
    """vLLM's gRPC server puts a colon and the port behind what it is told."""
    words = find_server(name).argv(load_settings(host="::1", device="cpu"), Path("/m"), {})
    assert words[words.index("--host") + 1] == host


@pytest.mark.parametrize("name", ["vllm", "gateway"])
def test_a_port_that_is_not_for_this_user_is_told_before_anything_starts(name: str, low_ports_barred: None) -> None:
    start = Start(find_server(name), load_settings(vllm_http_port=80, device="cpu"), name, "cli")
    with pytest.raises(LaunchError, match=r"vllm cannot listen on port 80 \(http\): .*\n→ Choose a port from 1024"):
        plan(start)


def test_a_core_that_is_not_there_is_told_before_anything_starts() -> None:
    """And not by the settings: a process that a library has bound to one core reads them, too."""
    here = sorted(os.sched_getaffinity(0))
    start = Start(find_server("vllm"), load_settings(cores=f"{here[0]},9998", device="cpu"), "vllm", "cli")
    with pytest.raises(LaunchError, match=re.escape(f"no core 9998 can be used here, only {here}.\n→ Choose of those")):
        plan(start)
    start = Start(find_server("vllm"), load_settings(cores=",".join(map(str, here)), device="cpu"), "vllm", "cli")
    assert plan(start) == [[start]]


def test_choose_port_skips_the_taken_the_claimed_and_other_servers_defaults() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        start = busy.getsockname()[1]
        port, claim = supervisor.choose_port("127.0.0.1", start, {start, start + 1})
        with claim:
            assert port > start + 1
            following, its_claim = supervisor.choose_port("127.0.0.1", port, set())
            its_claim.close()
            assert following > port
    port, claim = supervisor.choose_port("127.0.0.1", port, set())
    claim.close()
