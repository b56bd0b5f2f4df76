"""Several fronts of the gRPC server over one engine: one port, one page of metrics, and one front may die."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest
import requests
import zmq
from desk import Desk, eventually
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from scripted import WANTS, require_all_is_counted

from servebook import launch, serve
from servebook.bench.arms import open_arm
from servebook.bench.cost import fit_cost
from servebook.bench.load import Job, ask
from servebook.bench.paths import find_path
from servebook.bench.protocol import serve_scripted
from servebook.errors import LaunchError
from servebook.protos.llm.v1 import llm_pb2 as pb
from servebook.protos.llm.v1 import llm_pb2_grpc
from servebook.settings import Settings, load_settings
from servebook.ways.custom_grpc.certificates import Certificates, make_certificates
from servebook.ways.custom_grpc.server import fronts
from servebook.ways.custom_grpc.server.fronts import GIVE_UP_DEATHS, GIVE_UP_SECONDS, Front, Fronts, reserve
from servebook.workbook.notebook import measure_pace

pytestmark = [pytest.mark.lane("own"), pytest.mark.timeout(600)]

FRONTS = 2
LONG = pb.StreamGenerateRequest(prompt="Once", max_tokens=2000, sampling=pb.Sampling(ignore_eos=True))
SHORT = pb.GenerateRequest(prompt="Once", max_tokens=5, sampling=pb.Sampling(ignore_eos=True))
BACK_SECONDS = 3
"""How soon another front serves in the place of one that died, of a core's time."""
DEAD_SECONDS = 40
"""Until every caller knows that the engine is dead: long before a call's own time is up, on any machine."""
SLOW_TOKENS = 60
"""More than fit into the buffers of a connection that nobody reads."""
IDLE_SECONDS = 60
"""How long a busy machine may take where the speed is not what is tested."""


def of_tokens(kind: type[Any], tokens: int) -> Any:
    """A request for so many."""
    return kind(prompt="Once", max_tokens=tokens, sampling=pb.Sampling(ignore_eos=True))


def figure(server: launch.Server, *begins: str) -> float:
    """The sum of the metrics whose lines begin with any of these."""
    lines = requests.get(f"http://{server.metrics}/metrics", timeout=60).text.splitlines()
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


def running(server: launch.Server) -> float:
    """Requests that the engine itself counts, of whichever front."""
    return figure(server, "vllm:num_requests_running{", "vllm:num_requests_waiting{")


def own_channel(
    server: launch.Server, credentials: grpc.ChannelCredentials | None = None, *options: tuple[str, int]
) -> grpc.Channel:
    """A channel with a connection of its own: gRPC's channels to one address share one otherwise."""
    own = [("grpc.use_local_subchannel_pool", 1), *options]
    if credentials:
        return grpc.secure_channel(server.grpc, credentials, own)
    return grpc.insecure_channel(server.grpc, own)


def stub_on(channel: grpc.Channel) -> Any:
    return llm_pb2_grpc.LLMServiceStub(channel)


def a_channel_to_each(
    server: launch.Server, stack: ExitStack, credentials: grpc.ChannelCredentials | None = None
) -> dict[int, grpc.Channel]:
    """By the front's process. The kernel chooses, so it takes some channels until each front has one."""
    found: dict[int, grpc.Channel] = {}
    for _ in range(40):
        before = connections(server)
        channel = stack.enter_context(own_channel(server, credentials))
        grpc.channel_ready_future(channel).result(timeout=IDLE_SECONDS)
        [pid] = [pid for port, pid in connections(server).items() if port not in before]
        found.setdefault(pid, channel)
        if len(found) == FRONTS:
            return found
    raise AssertionError(f"40 connections went to {len(found)} of {FRONTS} fronts")


def core_seconds(pid: int) -> float:
    """A core's time that the process has had: beside other work the clock tells nothing."""
    return sum(psutil.Process(pid).cpu_times()[:2])


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[tuple[launch.Server, float]]:
    """The server, and what it took the slower of its fronts to listen, in seconds of a core."""
    server = serve("grpc", instance="grpc-fronts", fronts=FRONTS)
    eventually(lambda: len(listening(server)) == FRONTS, "all fronts listening")
    took = max(map(core_seconds, listening(server)))
    if any("guarded" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("starting")  # the other one starts beside the tests of this one
    yield server, took
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


@pytest.mark.engine
async def test_the_text_is_that_of_vllms_own_server(server: launch.Server) -> None:
    """As in chapter 08's parity test, which holds vLLM's own server to the same numbers: this model is sure of them."""
    async with find_path("grpc-fronts").open(server) as send:  # over eight connections
        answers = await asyncio.gather(*(ask(send, Job("100, 102, 104, 106, 108,", 24)) for _ in range(8)))
    evens = "".join(f" {number}," for number in range(110, 200, 2))
    [text] = {answer.text for answer in answers}
    assert evens.startswith(text)
    assert {(answer.finish_reason, answer.prompt_tokens, answer.output_tokens) for answer in answers} == {
        ("length", 24, 24)
    }
    assert all(len(answer.arrivals) > 1 for answer in answers)


@pytest.mark.engine
@pytest.mark.parametrize(
    "end", [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED], ids=lambda end: end.name
)
def test_the_engine_lets_a_call_go_that_ends_early(server: launch.Server, end: grpc.StatusCode) -> None:
    """Each front's in turn, beside a shorter one of the other's: if both went on, that would end first."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        channels = list(a_channel_to_each(server, stack).values())
        pace = measure_pace(lambda n: stub_on(channels[0]).Generate(of_tokens(pb.GenerateRequest, n), timeout=60))
        for front, other in itertools.permutations(channels):
            late = end is grpc.StatusCode.DEADLINE_EXCEEDED
            early = stub_on(front).StreamGenerate(LONG, timeout=pace.seconds(1000, at_most=5) if late else 120)
            next(early)
            shorter = of_tokens(pb.StreamGenerateRequest, LONG.max_tokens - 100)
            kept = stub_on(other).StreamGenerate(shorter, timeout=120)
            next(kept)
            rest = pool.submit(list, kept)
            if not late:
                early.cancel()
            with pytest.raises(grpc.RpcError) as caught:
                list(early)
            assert caught.value.code() is end
            eventually(lambda: running(server) <= 1, "one request left", IDLE_SECONDS)
            assert not rest.done(), "the one that is left is the other's"
            kept.cancel()
            eventually(lambda: not running(server), "an idle engine", IDLE_SECONDS)
    eventually(lambda: not figure(server, "servebook_grpc_open_calls "), "no call in the fronts")


@pytest.mark.engine
def test_a_slow_reader_holds_up_nobody_and_loses_nothing(server: launch.Server) -> None:
    small_window = ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64)  # soon full
    with ExitStack() as stack:
        slow = stack.enter_context(own_channel(server, None, *small_window))
        call = stub_on(slow).StreamGenerate(of_tokens(pb.StreamGenerateRequest, SLOW_TOKENS), timeout=200)
        pieces = [next(call)]
        for channel in a_channel_to_each(server, stack).values():  # its own front too
            assert stub_on(channel).Generate(SHORT, timeout=60).usage.completion_tokens == 5
        eventually(lambda: not running(server), "the engine done, reader or not", 150)
        assert figure(server, "servebook_grpc_open_calls ") == 1
        pieces += call
    assert sum(len(piece.token_ids) for piece in pieces) == pieces[-1].usage.completion_tokens == SLOW_TOKENS
    assert max(len(piece.token_ids) for piece in pieces) > 1, "its front had to wait for it"
    assert [piece.sequence for piece in pieces] == list(range(len(pieces)))


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
        family = psutil.Process(server.pid).children(recursive=True)
        psutil.Process(doomed).kill()
        eventually(
            lambda: [each for each in psutil.Process(server.pid).children(recursive=True) if each not in family],
            "another front begun",
        )
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
        assert core_seconds(front) < BACK_SECONDS, "with a core of its own it is back by then"
        new = a_channel_to_each(server, stack)
        assert doomed not in new
        for channel in new.values():  # at once: who listens can serve
            assert stub_on(channel).Generate(SHORT, timeout=60).usage.completion_tokens == 5
        pieces += rest.result(timeout=120)
        assert pieces[-1].is_finished
        assert sum(len(piece.token_ids) for piece in pieces) == tokens, "the other has gone on, to its end"
    assert figure(server, "servebook_grpc_fronts ") == FRONTS


@pytest.mark.survives("both of two fronts killed (SIGKILL)", "grpc", lost="their streams")
@pytest.mark.engine
def test_all_fronts_dead_at_once_are_replaced(server: launch.Server) -> None:
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        channels = a_channel_to_each(server, stack)
        lost = [stub_on(channel).StreamGenerate(LONG, timeout=120) for channel in channels.values()]
        for stream in lost:
            next(stream)
        for pid in channels:
            psutil.Process(pid).kill()
        for stream in lost:
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        eventually(lambda: len(listening(server) - channels.keys()) == FRONTS, "two new fronts", IDLE_SECONDS)
        one, two = a_channel_to_each(server, stack).values()
        kept = stub_on(one).StreamGenerate(of_tokens(pb.StreamGenerateRequest, 1500), timeout=120)
        next(kept)
        rest = pool.submit(list, kept)
        eventually(lambda: running(server) == 1, "the engine without those of the dead", IDLE_SECONDS)
        assert not rest.done(), "shorter than those: it would have ended before them"
        assert stub_on(two).Generate(SHORT, timeout=60).usage.completion_tokens == 5
        kept.cancel()
    assert figure(server, "servebook_grpc_fronts ") == FRONTS


@pytest.mark.survives("the engine killed (SIGKILL)", "grpc", lost="its answers, each with an error")
@pytest.mark.engine
def test_a_dead_engine_is_told_by_every_front(server: launch.Server) -> None:
    """The last test of this server. By the clock: on two cores with ten busy processes it took 80 ms."""

    def told(call: Callable[..., object], *arguments: Any, **options: Any) -> float:
        """When the call ended with the word that the engine is dead."""
        with pytest.raises(grpc.RpcError) as caught:
            call(*arguments, **options)
        at = time.monotonic()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "ENGINE_DEAD"
        return at

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(FRONTS))
        channels = a_channel_to_each(server, stack)
        streams = [stub_on(channel).StreamGenerate(LONG, timeout=60) for channel in channels.values()]
        for stream in streams:
            next(stream)
        ends = [pool.submit(told, list, stream) for stream in streams]
        [core] = [each for each in psutil.Process(server.pid).children() if "EngineCore" in each.name()]
        killed = time.monotonic()
        core.kill()
        times = [end.result(timeout=60) - killed for end in ends]
        times += [told(stub_on(channel).Generate, SHORT, timeout=60) - killed for channel in channels.values()]
        assert max(times) < DEAD_SECONDS, times
        assert len(listening(server)) == FRONTS, "they stay to say so"


def detail(error: Any, kind: type[Any]) -> Any:
    """The one `google.rpc` detail of `error`, which must be of `kind`."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    [packed] = status.details
    message = kind()
    assert packed.Unpack(message), packed.type_url
    return message


# A server with mutual TLS, a key, and room for two calls in each front


KEY = "a key for a test"
KEYED = [("authorization", f"Bearer {KEY}")]
GRACE_SECONDS = 120


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def starting(certificates: Certificates) -> Iterator[Future[launch.Server]]:
    """Its engine has no model (`bench.scripted`), and is there sooner: 20 tokens a second for each stream."""
    guards = load_settings(
        api_key=KEY,
        tls_cert=certificates.server_cert,
        tls_key=certificates.server_key,
        tls_client_ca=certificates.ca,
        engine_args=f"--max-calls 2 --grace {GRACE_SECONDS}",
    )
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(serve_scripted, find_path("grpc-fronts"), guards)
        yield started
        started.result().stop()


@pytest.fixture(scope="module")
def guarded(starting: Future[launch.Server]) -> launch.Server:
    server = starting.result()
    eventually(lambda: len(listening(server)) == FRONTS, "all fronts listening", IDLE_SECONDS)
    return server


def credentials_of(certificates: Certificates, with_certificate: bool = True) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=certificates.ca.read_bytes(),
        private_key=certificates.client_key.read_bytes() if with_certificate else None,
        certificate_chain=certificates.client_cert.read_bytes() if with_certificate else None,
    )


def health_of(channel: grpc.Channel) -> int:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    return int(answer.status)


@pytest.mark.engine
def test_each_front_wants_the_key_and_a_certificate(
    guarded: launch.Server, certificates: Certificates, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        for channel in a_channel_to_each(guarded, stack, credentials_of(certificates)).values():
            for metadata in ([], [("authorization", f"Bearer {KEY} ")]):
                with pytest.raises(grpc.RpcError) as caught:
                    stub_on(channel).Generate(SHORT, timeout=60, metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert health_of(channel) == health_pb2.HealthCheckResponse.SERVING
            answer = stub_on(channel).Generate(SHORT, timeout=60, metadata=KEYED)
            assert answer.usage.completion_tokens == 5
    other = make_certificates(tmp_path)
    for stranger in (credentials_of(certificates, with_certificate=False), credentials_of(other), None):
        for _ in range(8):  # whichever front each comes to
            with own_channel(guarded, stranger) as channel, pytest.raises(grpc.RpcError) as caught:
                health_of(channel)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.engine
def test_a_full_front_says_when_to_come_back(guarded: launch.Server, certificates: Certificates) -> None:
    with ExitStack() as stack:
        for full, free in itertools.permutations(
            a_channel_to_each(guarded, stack, credentials_of(certificates)).values()
        ):
            calls = [stub_on(full).StreamGenerate(LONG, timeout=120, metadata=KEYED) for _ in range(2)]
            for call in calls:
                next(call)
            with pytest.raises(grpc.RpcError) as caught:
                stub_on(full).Generate(SHORT, timeout=60, metadata=KEYED)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert detail(caught.value, error_details_pb2.RetryInfo).retry_delay.seconds == 1
            assert stub_on(free).Generate(SHORT, timeout=60, metadata=KEYED).usage.completion_tokens == 5
            assert next(calls[0]).sequence == 1, "those inside go on"
            for call in calls:
                call.cancel()
            eventually(lambda: not figure(guarded, "servebook_grpc_open_calls "), "no call", IDLE_SECONDS)
            assert stub_on(full).Generate(SHORT, timeout=60, metadata=KEYED).usage.completion_tokens == 5


@pytest.mark.survives(
    "SIGTERM with streams open", "grpc", lost="nothing that ends in the grace time; new calls are refused"
)
@pytest.mark.engine
def test_sigterm_lets_the_streams_of_all_fronts_end(guarded: launch.Server, certificates: Certificates) -> None:
    """The last test of this server. It ends with the last stream, and not with the grace time."""
    tokens = 40  # two seconds
    with ExitStack() as stack:
        channels = a_channel_to_each(guarded, stack, credentials_of(certificates)).values()
        request = of_tokens(pb.StreamGenerateRequest, tokens)
        calls = [stub_on(channel).StreamGenerate(request, timeout=100, metadata=KEYED) for channel in channels]
        for call in calls:
            next(call)
        process = psutil.Process(guarded.pid)
        family = [process, *process.children(recursive=True)]
        process.terminate()

        def refused(channel: grpc.Channel) -> bool:
            """One that comes in the same moment as the signal may still be taken."""
            try:
                stub_on(channel).Generate(SHORT, timeout=30, metadata=KEYED)
            except grpc.RpcError as error:
                return bool(error.code() is grpc.StatusCode.UNAVAILABLE)
            return False

        for channel in channels:
            eventually(partial(refused, channel), "new calls refused", IDLE_SECONDS)
        for call in calls:
            last = list(call)[-1]
            assert last.is_finished
            assert last.usage.completion_tokens == tokens
    _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS / 2)
    assert not alive
    said = guarded.tail(100)
    assert said.count('"event": "stopped"') == FRONTS + 1
    assert "Traceback" not in said


# Without a server


class Brief:
    """In the place of a front's process: one that has ended before anybody looks."""

    exitcode = 1

    def start(self) -> None:
        with subprocess.Popen(["true"]) as process:
            self.pid, self.sentinel = process.pid, os.pidfd_open(process.pid)

    def is_alive(self) -> bool:
        return False

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@pytest.mark.parametrize(
    ("apart", "gives_up"), [(GIVE_UP_SECONDS / GIVE_UP_DEATHS, True), (GIVE_UP_SECONDS / (GIVE_UP_DEATHS - 1), False)]
)
def test_fronts_that_die_again_and_again_end_the_server(
    apart: float, gives_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No engine is there: the deaths come `apart` seconds after each other, and just too far where it goes on."""
    clock, started, enough = itertools.count(0, apart), list[Brief](), 4 * GIVE_UP_DEATHS

    def process(**_: object) -> Brief:
        started.append(Brief())
        both.stopping = len(started) == enough
        return started[-1]

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")  # afterwards it is as before
    monkeypatch.setattr(fronts, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    forks = SimpleNamespace(get_context=lambda _: SimpleNamespace(Process=process))
    monkeypatch.setattr(fronts, "multiprocessing", forks)
    both: Any = Fronts(argparse.Namespace(grace=0), [])
    both.engine = SimpleNamespace(sentinels=list, finished_procs=list, shutdown=lambda: None)
    with zmq.Context() as context:
        both.fronts = [Front(index, context, both.folder) for index in range(FRONTS)]
        for front in both.fronts:
            front.greeting = b""
            front.start(print)
        with pytest.raises(LaunchError, match="5 fronts ended within 20 s") if gives_up else nullcontext():
            both.relay(None)
        both.end()
        context.destroy(linger=0)
    for each in started:
        os.close(each.sentinel)
    assert len(started) == (FRONTS + GIVE_UP_DEATHS - 1 if gives_up else enough)


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


@pytest.mark.engine
async def test_the_benchmark_counts_all_tokens_of_several_fronts_and_what_they_cost(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have half of the callers each, and less to merge: with the fastest source a token would cost nothing."""
    monkeypatch.setenv("SERVEBOOK_SCRIPTED_RATE", "300")
    path = find_path("grpc-fronts")
    server = serve_scripted(path, settings)
    try:
        async with open_arm(path, server, WANTS, 1) as arm:
            await require_all_is_counted(arm)
            cost = await fit_cost(arm, callers=8, rounds=1)
    finally:
        server.stop()
    assert 0 < cost.busiest <= 1
    assert cost.token_us > 0
    assert 0 < cost.token_error < cost.token_us * 5
