"""Several fronts of the gRPC server over one engine: one port, one page of metrics, and one front may die."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import psutil
import pytest
import requests
from desk import Desk, eventually
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from servebook import launch, serve
from servebook.protos.llm.v1 import llm_pb2 as pb
from servebook.protos.llm.v1 import llm_pb2_grpc
from servebook.ways.custom_grpc.server.fronts import reserve
from servebook.workbook.notebook import measure_pace

pytestmark = [pytest.mark.lane("own"), pytest.mark.timeout(600)]

FRONTS = 2
LONG = pb.StreamGenerateRequest(prompt="Once", max_tokens=2000, sampling=pb.Sampling(ignore_eos=True))
SHORT = pb.GenerateRequest(prompt="Once", max_tokens=5, sampling=pb.Sampling(ignore_eos=True))


def of_tokens(kind: type[Any], tokens: int) -> Any:
    """A request for so many."""
    return kind(prompt="Once", max_tokens=tokens, sampling=pb.Sampling(ignore_eos=True))


def figure(server: launch.Server, *begins: str) -> float:
    """The sum of the metrics whose lines begin with any of these."""
    lines = requests.get(f"http://{server.metrics}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(begins))


def connections_of(process: psutil.Process) -> list[Any]:
    """Its TCP sockets; none where it has just died."""
    with suppress(psutil.NoSuchProcess):
        return list(process.connections("tcp"))
    return []


def listening(server: launch.Server) -> set[int]:
    """The processes that take connections on the server's port."""
    port = int(server.grpc.rsplit(":", 1)[1])
    family = psutil.Process(server.pid).children(recursive=True)
    return {
        process.pid
        for process in family
        if any(at.laddr.port == port and at.status == psutil.CONN_LISTEN for at in connections_of(process))
    }


def connections(server: launch.Server) -> dict[int, int]:
    """The clients' ports, and the process that each is connected to."""
    port = int(server.grpc.rsplit(":", 1)[1])
    return {
        at.raddr.port: pid
        for pid in listening(server)
        for at in connections_of(psutil.Process(pid))
        if at.laddr.port == port and at.status == psutil.CONN_ESTABLISHED
    }


def own_channel(server: launch.Server) -> grpc.Channel:
    """A channel with a connection of its own: gRPC's channels to one address share one otherwise."""
    return grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)])


def stub_on(channel: grpc.Channel) -> Any:
    return llm_pb2_grpc.LLMServiceStub(channel)


def a_channel_to_each(server: launch.Server, stack: ExitStack) -> dict[int, grpc.Channel]:
    """By the front's process. The kernel chooses, so it takes some channels until each front has one."""
    found: dict[int, grpc.Channel] = {}
    for _ in range(40):
        before = connections(server)
        channel = stack.enter_context(own_channel(server))
        grpc.channel_ready_future(channel).result(timeout=20)
        [pid] = [pid for port, pid in connections(server).items() if port not in before]
        found.setdefault(pid, channel)
        if len(found) == FRONTS:
            return found
    raise AssertionError(f"40 connections went to {len(found)} of {FRONTS} fronts")


def core_seconds(pid: int) -> float:
    """A core's time that the process has had: beside other work the clock tells nothing."""
    return sum(psutil.Process(pid).cpu_times()[:2])


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[launch.Server, float]]:
    """The server, and what it took the slower of its fronts to listen, in seconds of a core."""
    server = serve("grpc", instance="grpc-fronts", fronts=FRONTS)
    eventually(lambda: len(listening(server)) == FRONTS, "all fronts listening")
    yield server, max(map(core_seconds, listening(server)))
    server.stop()


@pytest.fixture(scope="module")
def server(started: tuple[launch.Server, float]) -> launch.Server:
    return started[0]


def test_the_port_of_a_server_that_has_just_ended_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as before:
        host, port = before.getsockname()
        with socket.create_connection((host, port)) as caller:
            before.accept()[0].close()  # first: its end of the connection stays for a minute
            assert caller.recv(1) == b""
    with reserve(host, port) as held:
        assert held.getsockname() == (host, port)
        with pytest.raises(OSError, match="in use"):
            socket.create_server((host, port))


@pytest.mark.engine
def test_each_front_serves_and_their_figures_add_up(server: launch.Server) -> None:
    completed = 'servebook_grpc_tokens_total{kind="completion"}'
    before = figure(server, completed)
    with ExitStack() as stack:
        channels = a_channel_to_each(server, stack)
        answers = [stub_on(channel).Generate(SHORT, timeout=60) for channel in channels.values()]
    assert [answer.usage.completion_tokens for answer in answers] == [5] * FRONTS
    assert figure(server, completed) - before == 5 * FRONTS
    assert figure(server, "servebook_grpc_fronts ") == FRONTS
    assert figure(server, "servebook_grpc_open_calls ") == 0


@pytest.mark.survives("one of two fronts killed (SIGKILL)", "grpc", lost="its own streams")
@pytest.mark.engine
def test_a_killed_front_costs_its_own_streams_and_is_back_soon(started: tuple[launch.Server, float]) -> None:
    server, first_took = started
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        channels = a_channel_to_each(server, stack)
        doomed, other = channels
        pace = measure_pace(lambda n: stub_on(channels[other]).Generate(of_tokens(pb.GenerateRequest, n), timeout=60))
        # Shorter than the doomed one's: if both went on, this would end first.
        tokens = pace.tokens(8, at_least=100, at_most=LONG.max_tokens - 100)
        lost = stub_on(channels[doomed]).StreamGenerate(LONG, timeout=120)
        next(lost)
        kept = stub_on(channels[other]).StreamGenerate(of_tokens(pb.StreamGenerateRequest, tokens), timeout=120)
        pieces = [next(kept)]
        rest = pool.submit(list, kept)
        psutil.Process(doomed).kill()
        with pytest.raises(grpc.RpcError) as caught:
            list(lost)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        eventually(lambda: figure(server, "vllm:num_requests_running") <= 1, "only one request left")
        assert not rest.done(), "the one that is left is the other's: that of the dead front was aborted"

        eventually(lambda: doomed not in listening(server), "its end")

        def back() -> bool:
            with own_channel(server) as channel:  # whoever comes meanwhile is served
                assert stub_on(channel).Generate(SHORT, timeout=60).usage.completion_tokens == 5
            return len(listening(server) - {doomed}) == FRONTS

        eventually(back, "a new front in its place", 60)
        [front] = listening(server) - channels.keys()
        assert core_seconds(front) < 2 * first_took, "no dearer than a front of the server's start"
        new = a_channel_to_each(server, stack)
        assert doomed not in new
        for channel in new.values():  # at once: who listens can serve
            assert stub_on(channel).Generate(SHORT, timeout=60).usage.completion_tokens == 5
        pieces += rest.result(timeout=120)
        assert pieces[-1].is_finished
        assert sum(len(piece.token_ids) for piece in pieces) == tokens, "the other has gone on, to its end"
    assert figure(server, "servebook_grpc_fronts ") == FRONTS


@pytest.mark.survives("the engine killed (SIGKILL)", "grpc", lost="its answers, each with an error")
@pytest.mark.engine
def test_a_dead_engine_is_told_by_every_front(server: launch.Server) -> None:
    """The last test of this server."""
    with ExitStack() as stack:
        channels = a_channel_to_each(server, stack)
        streams = [stub_on(channel).StreamGenerate(LONG, timeout=60) for channel in channels.values()]
        for stream in streams:
            next(stream)
        [core] = [each for each in psutil.Process(server.pid).children() if "EngineCore" in each.name()]
        core.kill()
        for stream in streams:
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert reason(caught.value) == "ENGINE_DEAD"
        for channel in channels.values():
            with pytest.raises(grpc.RpcError) as caught:
                stub_on(channel).Generate(SHORT, timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert reason(caught.value) == "ENGINE_DEAD"
        assert len(listening(server)) == FRONTS, "they stay to say so"


def reason(error: Any) -> str:
    status = rpc_status.from_call(error)
    assert status is not None, error
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return str(info.reason)


def test_a_port_that_is_taken_is_refused_before_the_engine_starts() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "servebook.ways.custom_grpc.server", "--fronts", "2", "--grpc-port", port]
        ended = subprocess.run([*command, "--model", "none"], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [(["grpc", "--fronts", "0"], "or equal to 1"), (["vllm", "--fronts", "2"], "--fronts is for `grpc`")],
)
def test_fronts_that_make_no_sense(desk: Desk, words: list[str], says: str) -> None:
    assert says in desk.run("up", *words, expect=2)
