"""Faults that take too long for every run, at each server: `make survived` runs them and stores what was seen.

For one server: `pytest tests/faults_by_hand.py --store-survived -k triton`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from threading import Thread

import aiohttp
import psutil
import pytest
from desk import eventually

from servebook import launch
from servebook.bench.resources import ProcessTree, is_engine
from servebook.clients import CLIENTS
from servebook.launch.table import in_a_room
from servebook.processes import can_bind, free_port
from servebook.room.keys import Roll
from servebook.room.limits import Limits
from servebook.settings import load_settings
from servebook.ways.client import AioClient, Piece
from servebook.ways.limits import GIVEN_UP
from servebook.ways.vllm_native_grpc.aio_client import VllmGrpcAioClient

SERVERS = ("vllm", "gateway", "triton", "grpc", "kserve", "vllm-grpc", "vllm-rs")
PROMPT = "Count from 1 to 1000, one number after the other: 1, 2, 3, 4, 5,"
STOPPED_SECONDS = 30
OPEN_STREAMS, PATIENCE_SECONDS = 20, 60
IDLE_CONNECTIONS = 200
CALLS, WARM_UP, AT_ONCE = 2_000, 200, 32
SLOW_SECONDS, FIRST_BYTES = 20, 2_000
READ_SECONDS = 25
LIMITS = Limits()
pytestmark = pytest.mark.timeout(900)
Seen = Callable[[str, object], None]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[launch.Server]:
    server = launch.serve(request.param)
    yield server
    server.stop()
    if request.param == "gateway":
        launch.down("vllm")


def engine_of(server: launch.Server) -> psutil.Process:
    """The process that computes."""
    pid = launch.serve("vllm").pid if server.name == "gateway" else server.pid
    (core,) = [each for each in psutil.Process(pid).children(recursive=True) if is_engine(each)]
    return core


def is_idle(engine: psutil.Process) -> bool:
    """Whether the engine has nothing to do, as its CPU time of half a second tells; every server has that."""
    return engine.cpu_percent(0.5) < 10


def client_of(server: launch.Server) -> AioClient:
    return CLIENTS[server.name].aio_client(server)


async def end_of(client: AioClient, max_tokens: int, *, prompt: str = PROMPT, seconds: float = 300) -> str:
    """How a stream ended for its caller: "whole", "an error", or "cut short" where nothing said so."""
    pieces: list[Piece] = []
    try:
        async for piece in client.stream(prompt, timeout=seconds, max_tokens=max_tokens, temperature=0):
            pieces.append(piece)  # noqa: PERF401  # what came before an error counts
    except Exception:  # each library has its own; a caller sees it
        return "an error"
    return "whole" if pieces and pieces[-1].finish_reason in ("length", "stop") else "cut short"


async def answers(client: AioClient) -> bool:
    return (await client.generate("x", timeout=120, max_tokens=1, temperature=0)).tokens == 1


@pytest.mark.survives("200 callers who leave at random", lost="nothing")
async def test_callers_who_leave(server: launch.Server, record_property: Seen) -> None:
    chance, left = random.Random(7), Counter[str]()

    async def leave(client: AioClient) -> None:
        try:
            async with (
                asyncio.timeout(chance.expovariate(2)),
                aclosing(client.stream(PROMPT, timeout=120, max_tokens=800, temperature=0)) as stream,
            ):
                async for _ in stream:
                    pass
            left["done"] += 1
        except TimeoutError:
            left["left"] += 1

    async with client_of(server) as client:
        for _ in range(10):
            await asyncio.gather(*(leave(client) for _ in range(20)))
        await asyncio.to_thread(eventually, lambda: is_idle(engine_of(server)), "an idle engine")
        assert await answers(client)
    assert left["left"] > 150
    record_property("seen", "the engine idle at once, the next call answered")


@pytest.mark.survives("200 idle connections", lost="nothing")
async def test_idle_connections(server: launch.Server, record_property: Seen) -> None:
    host, port = (server.endpoints.get("grpc") or server.http).rsplit(":", 1)
    with ExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
        async with client_of(server) as client:
            assert await asyncio.gather(*(answers(client) for _ in range(8))) == [True] * 8
    record_property("seen", "calls beside them answered")


@contextmanager
def slow_wire(address: str) -> Iterator[str]:
    """An address that leads to this one, and brings one byte a second back after the first few."""
    host, port = address.rsplit(":", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as open_ends:

        def carry() -> None:
            with suppress(OSError):
                near = open_ends.enter_context(listener.accept()[0])
                far = open_ends.enter_context(socket.socket())
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                far.connect((host, int(port)))
                open_ends.callback(hang_up, far)
                Thread(target=there, args=(near, far), daemon=True).start()
                count = 0
                while byte := far.recv(64 if count < FIRST_BYTES else 1):
                    near.sendall(byte)
                    count += len(byte)
                    if count >= FIRST_BYTES:
                        time.sleep(1)  # the fault itself

        def hang_up(end: socket.socket) -> None:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # closing is not enough: a thread that waits in recv keeps it open

        def there(near: socket.socket, far: socket.socket) -> None:
            with suppress(OSError):
                while data := near.recv(65536):
                    far.sendall(data)

        Thread(target=carry, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.survives("a reader of one byte a second", lost="nothing of others; the reader gets what it reads")
async def test_reader_of_a_byte_a_second(server: launch.Server, record_property: Seen) -> None:
    kind = "http" if server.name in ("vllm", "gateway") else "grpc"
    served = 0
    with slow_wire(server.endpoints[kind]) as address:
        slow = launch.Server(server.name, server.model, {kind: address}, server.settings)
        async with client_of(slow) as reader, client_of(server) as client:
            if isinstance(client, VllmGrpcAioClient) and isinstance(reader, VllmGrpcAioClient):
                reader._tokenizer = await client.tokenizer()  # it is fetched first, and not what is read slowly here
            task = asyncio.create_task(end_of(reader, 1_500))
            began = time.monotonic()
            while time.monotonic() - began < SLOW_SECONDS:
                assert await answers(client)
                served += 1
            assert not task.done(), "still reading"
            task.cancel()
    await asyncio.to_thread(eventually, lambda: is_idle(engine_of(server)), "an idle engine")
    record_property("seen", f"for {SLOW_SECONDS} s; calls beside it answered; the engine idle when it left")


@pytest.mark.survives("2,000 short calls, a third of them left early", lost="nothing")
async def test_soak(server: launch.Server, record_property: Seen) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(client: AioClient, number: int) -> None:
        async with places:
            if number % 3 == 0:
                assert await answers(client)
            elif number % 3 == 1:
                assert await end_of(client, 1, prompt="x") == "whole"
            else:
                async with aclosing(client.stream("x", timeout=120, max_tokens=4, temperature=0)) as stream:
                    await anext(stream)

    async with client_of(server) as client:
        await asyncio.gather(*(one(client, number) for number in range(WARM_UP)))  # the first fill caches
        tree = ProcessTree(server.pid)
        before = tree.memory_mib() or 0
        await asyncio.gather(*(one(client, number) for number in range(CALLS)))
        await asyncio.to_thread(eventually, lambda: is_idle(engine_of(server)), "an idle engine")
        after = tree.memory_mib() or 0
    record_property("seen", f"memory {before:,.0f} MiB before, {after:,.0f} MiB after")
    assert after - before < 100


@pytest.mark.survives("the engine stopped (SIGSTOP) for 30 s", lost="nothing without an error")
async def test_engine_stopped(server: launch.Server, record_property: Seen) -> None:
    engine = engine_of(server)
    async with client_of(server) as client:
        under_way = [asyncio.create_task(end_of(client, 150)) for _ in range(4)]
        await asyncio.to_thread(eventually, lambda: not is_idle(engine), "an engine at work")
        engine.send_signal(signal.SIGSTOP)
        try:
            impatient = await end_of(client, 4, seconds=5)
            await asyncio.sleep(STOPPED_SECONDS - 5)  # the fault itself
        finally:
            engine.send_signal(signal.SIGCONT)
        ends = Counter(await asyncio.gather(*under_way))
        assert impatient == "an error", "a deadline of 5 s is kept"
        assert not ends["cut short"]
        assert await answers(client)
        await asyncio.to_thread(eventually, lambda: is_idle(engine), "an idle engine")
    said = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
    record_property("seen", f"of 4 streams under way: {said}; a deadline of 5 s kept; answers afterwards")


@pytest.mark.survives("SIGTERM with 20 streams open", lost="nothing without an error")
async def test_sigterm(server: launch.Server, record_property: Seen) -> None:
    """The last of a server."""
    engine, process = engine_of(server), psutil.Process(server.pid)
    async with client_of(server) as client:
        streams = [asyncio.create_task(end_of(client, 16, seconds=PATIENCE_SECONDS)) for _ in range(OPEN_STREAMS)]
        await asyncio.to_thread(eventually, lambda: not is_idle(engine), "an engine at work")
        family = [process, *process.children(recursive=True)]
        process.terminate()
        began = time.monotonic()
        ends = Counter(await asyncio.gather(*streams))
        took = time.monotonic() - began
    assert not ends["cut short"]
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, timeout=60)
    assert not alive, "nothing is left of it"
    record_property("seen", f"{', '.join(f'{number} {end}' for end, number in sorted(ends.items()))}; in {took:.0f} s")


def worst_requests() -> dict[str, dict[str, object]]:
    """The dearest requests that a room's front lets pass, one of each kind; no cache has seen them."""
    chance = random.Random()
    prompts = [" ".join(str(chance.randrange(100)) for _ in range(680)) for _ in range(LIMITS.learner_places)]
    names = {f"{chance.randrange(10**9)}": {"type": "string", "maxLength": 1} for _ in range(199)}
    return {
        "16 long prompts": {"prompt": prompts, "max_tokens": 1},
        "n at 16": {"prompt": PROMPT, "n": LIMITS.learner_places, "max_tokens": 300, "ignore_eos": True},
        "a large schema": {
            "prompt": PROMPT,
            "max_tokens": 8,
            "structured_outputs": {"json": {"type": "object", "properties": names, "required": [*names]}},
        },
    }


@contextmanager
def room_front(upstream: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A room's front before an engine: its URL, and the keys of two learners."""
    roll, port = Roll(folder / "roll"), free_port()
    keys = [roll.issue(name) for name in ("ada", "bo")]
    words = ["--upstream", upstream, "--roll", str(folder / "roll"), "--http-port", str(port)]
    front = subprocess.Popen(
        [sys.executable, "-P", "-m", "servebook.room", *words], env=os.environ | {"SERVEBOOK_API_KEY": "x" * 16}
    )
    try:
        eventually(lambda: not can_bind("127.0.0.1", port), "a front", seconds=60)
        yield f"http://127.0.0.1:{port}", keys
    finally:
        front.terminate()
        front.wait()


@pytest.mark.survives("another learner's worst permitted request", "room", lost="time between tokens")
async def test_worst_permitted_request(tmp_path: Path, record_property: Seen) -> None:
    """One learner reads a stream, alone and while another sends one such request after the other."""
    seen: dict[str, float] = {}
    server = launch.serve("vllm", settings=in_a_room(load_settings()))
    model = {"model": server.model}
    with room_front(f"http://{server.http}", tmp_path) as (url, (reader, other)):
        async with aiohttp.ClientSession(url) as session:

            async def post(key: str, body: dict[str, object]) -> aiohttp.ClientResponse:
                return await session.post(
                    "/v1/completions", json=model | body, headers={"Authorization": f"Bearer {key}"}
                )

            async def again_and_again(kind: str) -> None:
                while True:
                    async with await post(other, worst_requests()[kind]) as answer:
                        # 400: beside other work the schema may take more than its 10 s of a core, and is given up.
                        assert answer.status in (200, 400, 429), await answer.text()
                        assert answer.status != 400 or GIVEN_UP in await answer.text()
                        if answer.status == 429:
                            await asyncio.sleep(0.5)  # as it is told to

            async def p99(kind: str = "") -> float:
                """Of a stream that was under way before the other's first request."""
                body = {"prompt": PROMPT, "max_tokens": 1_500, "stream": True, "temperature": 0, "ignore_eos": True}
                times: list[float] = []
                async with await post(reader, body) as answer:
                    assert answer.status == 200
                    await answer.content.readline()
                    beside = asyncio.create_task(again_and_again(kind)) if kind else None
                    with suppress(TimeoutError):
                        async with asyncio.timeout(READ_SECONDS):
                            async for line in answer.content:
                                if line.startswith(b'data: {"id"'):
                                    times.append(time.monotonic())  # noqa: PERF401  # each as it comes, until time is up
                    times.append(time.monotonic())  # what is waited for counts
                    if beside:
                        assert not beside.done()
                        beside.cancel()
                await asyncio.to_thread(eventually, lambda: is_idle(engine_of(server)), "an idle engine")
                return quantiles([after - before for before, after in pairwise(times)], n=100, method="inclusive")[-1]

            for kind in ("", *worst_requests()):
                seen[f"beside {kind}" if kind else "alone"] = await p99(kind)
    said = ", ".join(f"{1000 * seconds:,.0f} ms {kind}" for kind, seconds in seen.items())
    record_property("seen", f"p99 between tokens: {said}")
