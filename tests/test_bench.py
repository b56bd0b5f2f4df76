"""The benchmark's own arithmetic, on arrivals that are known: no server needed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import islice, repeat
from math import comb
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any, ClassVar
from unittest.mock import AsyncMock, MagicMock, Mock
from uuid import uuid4

import aiohttp
import cells
import grpc
import jsonschema
import numpy as np
import psutil
import pytest
import uvloop
from desk import eventually
from typer.testing import CliRunner
from uvicorn import Config

from servebook.bench import crosscheck, guard, pictures, report, workload
from servebook.bench.arms import (
    CONTROL_LIMIT,
    WAVES,
    Arm,
    ArmResult,
    Block,
    Comparison,
    Workload,
    compare,
    compare_unhindered,
    jobs_for,
    judge_control,
    off_by,
    open_arm,
)
from servebook.bench.cli import custom
from servebook.bench.cost import Cost, fit
from servebook.bench.generators import GENERATOR_LIMIT, BusyGenerator, spread
from servebook.bench.load import BenchError, Job, Load, Message, Sample, ask, closed_loop, open_loop
from servebook.bench.paths import PATHS, ServingPath, find_path
from servebook.bench.paths.openai_rest import http_session
from servebook.bench.protocol import rate_from, scripted_instance, serve_scripted
from servebook.bench.resources import CpuSeconds, ProcessTree, engines_up
from servebook.bench.results import Results, load_results, new_results, now, stored
from servebook.bench.run import FULL, QUICK, Plan, Run, finished, start
from servebook.bench.stats import Estimate, ServiceLevel, difference, goodput, outer_rank, percentiles, ratio, summarize
from servebook.bench.sweep import Sweep, fronts_line, require_sweep, sweep, table
from servebook.bench.tensors import MIB
from servebook.bench.wire import WireCost, counted, wire_cost
from servebook.checkout import ROOT
from servebook.cli import app
from servebook.errors import ServebookError
from servebook.launch import Server, ServerSpec
from servebook.settings import Settings, load_settings


class Source:
    """A path without a server: sends `merged` tokens a message, one message each `interval` seconds."""

    def __init__(self, interval: float, merged: int = 1) -> None:
        self.interval, self.merged = interval, merged
        self.now = self.most = 0

    async def __call__(self, job: Job) -> AsyncIterator[Message]:
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(0, job.max_tokens, self.merged):
            await asyncio.sleep(self.interval)
            yield Message("x" * self.merged)
        yield Message("", "length", 3, job.max_tokens)
        self.now -= 1


NOBODY = Server("x", "m", {}, load_settings())


def arm(source: Source) -> Arm:
    return Arm(find_path("sse"), NOBODY, source, ProcessTree(os.getpid()), workload.completions(20, 8))


def test_times_and_tokens_of_one_sample() -> None:
    sample = Sample(due=10.0, arrivals=[10.5, 10.6, 10.8], output_tokens=7)
    assert sample.ttft == pytest.approx(0.5)
    assert sample.gaps == pytest.approx([0.1, 0.2])
    assert sample.tpot == pytest.approx(0.3 / 6), "time is shared by the tokens, not by the messages"


def test_tokens_are_counted_by_usage_even_when_messages_merge() -> None:
    load = Load([Sample(0, [1.0, 2.0], output_tokens=8), Sample(0, [1.0], output_tokens=4)], seconds=2.0)
    summary = summarize(load)
    assert (summary.output_tokens, summary.tokens_per_s, summary.tokens_per_message) == (12, 6.0, 4.0)
    assert summary.itl_ms is not None
    assert summary.itl_ms.p50 == 1000


def test_a_path_that_does_not_stream_has_no_inter_token_latency() -> None:
    summary = summarize(Load([Sample(0, [1.0], output_tokens=4)], seconds=1.0))
    assert summary.itl_ms is None
    assert summary.tpot_ms is None


def test_percentiles_are_milliseconds_and_refuse_nothing() -> None:
    found = percentiles([0.001 * n for n in range(101)])
    assert (found.p50, found.p90, found.p99) == pytest.approx((50, 90, 99))
    with pytest.raises(ValueError, match="no values"):
        percentiles([float("nan")])


def test_a_ratio_finds_a_real_difference_through_common_noise() -> None:
    machine = [100.0, 60.0, 140.0, 80.0, 120.0, 90.0]  # slow and fast minutes, common to both arms
    found = ratio([1.05 * value for value in machine], machine)
    assert found.value == pytest.approx(1.05)
    assert (found.low, found.high) == pytest.approx((1.05, 1.05))
    assert difference([value + 3 for value in machine], machine).value == pytest.approx(3)


def test_one_disturbed_block_moves_a_ratio_little() -> None:
    assert ratio([100, 101, 99, 20, 100, 100], [100] * 6).value == pytest.approx(1)


@pytest.mark.parametrize("pairs", [6, 8, 9, 12, 24])
def test_intervals_hold_the_truth_as_often_as_they_say(pairs: int) -> None:
    """Simulated blocks of a machine that drifts, with outliers: of 4,000 intervals at least 95 % hold the truth."""
    draw, runs, truth = np.random.default_rng(pairs), 4000, 0.97
    machine = draw.uniform(50, 150, (runs, pairs))
    noise = np.exp(0.04 * draw.standard_t(2, (2, runs, pairs)))
    arms, references = (truth * machine * noise[0]).tolist(), (machine * noise[1]).tolist()
    found = [ratio(*pair) for pair in zip(arms, references, strict=True)]
    held = sum(not each.leaves_out(truth) for each in found) / runs
    spared = 1 - 2 * sum(comb(pairs, k) for k in range(outer_rank(pairs))) / 2**pairs
    assert held == pytest.approx(spared, abs=0.015), "the share that the sign test promises"
    assert spared >= 0.95
    assert all(each.pairs == pairs == len(each.each) for each in found)


def test_five_pairs_or_fewer_give_no_interval() -> None:
    found = ratio([100, 110, 90, 105, 95], [100] * 5)
    assert (found.low, found.high, found.pairs) == (None, None, 5)
    assert str(found) == "1.000 (5 pairs)"
    assert not found.leaves_out(7)
    assert str(ratio([100, 110, 90, 105, 95, 98], [100] * 6)) == "0.990 [0.900, 1.100]"
    with pytest.raises(ValueError, match="no pairs"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize("concurrency", [1, 5, 512])
async def test_closed_loop_keeps_exactly_so_many_in_flight(concurrency: int) -> None:
    source = Source(0.001)
    jobs = workload.take(workload.completions(20, 4), 2 * concurrency)
    load = await closed_loop(source, jobs, concurrency)
    assert source.most == concurrency
    assert len(load.samples) == 2 * concurrency
    assert load.output_tokens == sum(job.max_tokens for job in jobs)


async def test_open_loop_does_not_wait_for_answers() -> None:
    source = Source(0.2)
    load = await open_loop(source, workload.take(workload.completions(20, 2), 20), rate=200)
    assert source.most > 10, "a closed loop of one caller would have one in flight"
    assert load.seconds < 20 * 0.4


async def test_a_generator_that_is_late_does_not_make_the_server_look_fast() -> None:
    """The time to the first text counts from when a request was due, and not from when it was sent."""
    source, sent = Source(0), list[Job]()

    async def held_up(job: Job) -> AsyncIterator[Message]:
        sent.append(job)
        if len(sent) == 1:
            sleep(0.5)  # noqa: ASYNC251  # the whole generator, while the others fall due
        async for message in source(job):
            yield message

    load = await open_loop(held_up, workload.take(workload.completions(20, 2), 20), rate=1000)
    assert min(sample.ttft for sample in load.samples) > 0.3


@pytest.mark.parametrize("turns", [1, 5])
async def test_an_open_loop_of_chats_sends_so_many_requests_a_second_and_not_so_many_chats(turns: int) -> None:
    jobs = [Job("a", 1, turns=turns)] * (300 // turns)
    load = await open_loop(Source(0.0005), jobs, rate=300)
    assert len(load.samples) == 300
    assert load.seconds > 0.6, "300 requests at 300 a second, by chance"
    if turns == 1:  # a later turn is due when the one before has ended
        dues = [sample.due for sample in load.samples]
        assert max(dues) - min(dues) == pytest.approx(1.027, abs=0.01), "as it is drawn, however slow the machine"


async def test_goodput_is_of_the_requests_that_were_to_be_sent() -> None:
    """Of two chats of five turns one ends with its first request: half of all fail or are never sent."""
    begun: list[Job] = []

    async def fails_once(job: Job) -> AsyncIterator[Message]:
        begun.append(job)
        if job.prompt == "a" and not job.history:
            raise ConnectionResetError
        yield Message("x", "length", 3, 1)

    load = await open_loop(fails_once, [Job("a", 1, turns=5), Job("b", 1, turns=5)], rate=1000)
    assert (len(begun), load.failed.total(), load.unsent) == (6, 1, 4)
    assert goodput(load, ServiceLevel(), rate=10) == 5.0


@pytest.mark.parametrize("concurrency", [0, 513])
async def test_concurrency_outside_its_bounds_is_refused(concurrency: int) -> None:
    with pytest.raises(BenchError, match="not within"):
        await closed_loop(Source(0), [], concurrency)


async def test_an_answer_without_a_count_is_refused() -> None:
    async def silent(job: Job) -> AsyncIterator[Message]:
        yield Message("text but no usage")

    with pytest.raises(BenchError, match="0 counted tokens"):
        await ask(silent, Job("a", 1))


@pytest.mark.parametrize("loop", [closed_loop, open_loop])
async def test_a_load_of_failures_alone_is_an_error_with_their_cause(loop: object) -> None:
    async def broken(job: Job) -> AsyncIterator[Message]:
        raise ConnectionResetError("gone")
        yield Message("")  # type: ignore[unreachable]

    with pytest.raises(BenchError, match=r"ConnectionResetError: gone \(1 times\)"):
        await loop(broken, [Job("a", 1)], 1)  # type: ignore[operator]


async def test_a_refused_caller_pauses_and_one_cause_is_counted_as_one() -> None:
    """Ten places for twenty callers: each refusal has an id of its own in it, and uses up one job and no more."""
    busy: set[Job] = set()

    async def ten_at_a_time(job: Job) -> AsyncIterator[Message]:
        if len(busy) == 10:
            raise BenchError(f'HTTP 503: {{"code": "overloaded", "request_id": "{uuid4().hex[:16]}"}}')
        busy.add(job)
        await asyncio.sleep(0.02)
        busy.remove(job)
        yield Message("x", "length", 3, 1)

    load = await closed_loop(ten_at_a_time, workload.take(workload.completions(20, 4), 100), 20)
    assert list(load.failed) == ['BenchError: HTTP 503: {"code": "overloaded", "request_id": "…"}']
    assert len(load.samples) > load.failed.total()


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("no 5fd8a1c2-12ab-4e7f-9a55-00c0ffee4711, nor cmpl-0123456789abcdef-0", "no …, nor …"),
        ("12345678 bytes of facade00", "12345678 bytes of facade00"),
        ("x" * 200_000, "x" * 200),
    ],
    ids=["ids", "numbers and words", "a long word"],
)
@pytest.mark.timeout(60)
async def test_a_cause_has_no_ids_and_an_end(said: str, kept: str) -> None:
    """It is looked through while others are measured: of a long word that must not take minutes."""

    async def broken(job: Job) -> AsyncIterator[Message]:
        raise BenchError(said)
        yield Message("")  # type: ignore[unreachable]

    with pytest.raises(BenchError) as caught:
        await closed_loop(broken, [Job("a", 1)], 1)
    assert str(caught.value).startswith(f"Every request failed: {f'BenchError: {kept}'[:200]} (1 times)")


async def test_an_error_over_grpc_says_what_the_server_said() -> None:
    async def refused(job: Job) -> AsyncIterator[Message]:
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.INVALID_ARGUMENT, grpc.aio.Metadata(), grpc.aio.Metadata(), "2994 tokens leave no room", ""
        )
        yield Message("")  # type: ignore[unreachable]

    with pytest.raises(BenchError, match=r"INVALID_ARGUMENT: 2994 tokens leave no room \(1 times\)"):
        await closed_loop(refused, [Job("a", 1)], 1)


class Restless:
    """An HTTP server that answers `OK` to most requests, and has `ANSWERS` for the others, by their number."""

    OK: ClassVar = {
        "choices": [{"text": "one two", "message": {"content": "Once."}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    ANSWERS: ClassVar = {
        1: b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy",
        2: b'HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n{"choices": [',
        3: b"",
    }

    def __init__(self, *broken: int) -> None:
        self.broken, self.seen = broken, list[dict[str, Any]]()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(re.findall(rb"content-length: (\d+)", head.lower())[0])
                self.seen.append(json.loads(await reader.readexactly(length)))
                body = json.dumps(self.OK).encode()
                answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
                number = len(self.seen) if len(self.seen) in self.broken else 0
                writer.write(self.ANSWERS.get(number, answer))
                await writer.drain()
                if number > 1:
                    break
        writer.close()

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Server]:
        async with await asyncio.start_server(self.serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            yield Server("x", "m", {"http": f"127.0.0.1:{port}"}, load_settings())


async def test_refused_and_broken_requests_are_counted_and_the_load_goes_on() -> None:
    async with Restless(1, 2, 3).up() as server, find_path("rest").open(server) as send:
        load = await closed_loop(send, workload.take(workload.completions(20, 2), 12), 1)
    assert len(load.samples) == 9
    causes = sorted(cause.partition(":")[0] for cause in load.failed)
    assert causes == ["BenchError", "ClientPayloadError", "ServerDisconnectedError"]
    summary = summarize(load)
    assert (summary.requests, sum(summary.failed.values())) == (9, 3)


async def test_an_idle_connection_is_left_before_the_server_closes_it() -> None:
    """uvicorn keeps one for 5 seconds, and a POST that meets its end is lost."""
    async with http_session("http://127.0.0.1:1", None) as session:
        assert isinstance(session.connector, aiohttp.TCPConnector)
        assert float(session.connector._keepalive_timeout or "inf") < Config("").timeout_keep_alive


async def test_a_load_that_one_process_cannot_make_is_made_by_several() -> None:
    here = Restless()
    async with here.up() as server:
        jobs, warm = workload.completions(20, 2), list[int]()
        load = await spread(find_path("rest"), server, jobs, 5, None, 30, 2, 1, lambda: warm.append(len(here.seen)))
    assert len(load.samples) == 30
    assert load.cpu > 0
    assert warm == [5], "when the server's CPU is read, each caller has warmed up, and none has begun"
    marks = [asked["prompt"].partition(":")[0] for asked in here.seen]
    assert len(set(marks)) == len(marks) == 35, "no prompt twice, nor in two processes"


async def test_a_shared_prefix_and_a_second_turn_reach_the_server() -> None:
    here = Restless()
    async with here.up() as server, find_path("rest-chat").open(server) as send:
        jobs = jobs_for(find_path("rest-chat"), Workload(shared_prefix_tokens=30, turns=2), 1)
        load = await closed_loop(send, workload.take(jobs, 2), 1)
    assert len(load.samples) == 4
    first, second, other = [asked["messages"] for asked in here.seen[:3]]
    assert [(turn["role"], turn["content"]) for turn in second] == [
        ("user", first[0]["content"]),
        ("assistant", "Once."),
        ("user", "And then?"),
    ]
    assert all(each[0]["content"].startswith(workload.prefix(30)) for each in (first, other))
    assert first != other


@pytest.mark.parametrize("name", ["grpc", "gateway-article"])
def test_a_second_turn_is_refused_where_requests_carry_none_before_anything_starts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("servebook.bench.run.start", lambda *_: pytest.fail("nothing is to be started"))
    monkeypatch.setattr(ServingPath, "serve", lambda *_: pytest.fail("nothing is to be started"))
    with pytest.raises(BenchError, match=f"{name} has no second turn.*\n.*sse-chat, rest-chat, gateway, gateway-whole"):
        next(jobs_for(find_path(name), Workload(turns=2), 1))
    for words in ([], ["--sweep"]):
        refused = CliRunner().invoke(app, ["bench", name, "--turns", "2", *words])
        assert f"{name} has no second turn" in str(refused.exception)


@pytest.mark.parametrize(
    ("path", "turns", "scripted", "against"),
    [
        ("grpc", 1, False, "sse on vllm"),
        ("gateway", 1, False, "sse on vllm"),
        ("sse-chat", 3, False, "sse-chat on vllm"),
        ("grpc", 1, True, "sse on vllm-scripted"),
        ("gateway", 2, True, "sse-chat on vllm-scripted"),
    ],
)
async def test_the_control_has_the_turns_and_the_source_of_its_plan(
    path: str, turns: int, scripted: bool, against: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    found = (await a_run()).control[0]

    async def cell(
        self: Run, name: str, path: ServingPath, reference: ServingPath, callers: int, up: Any, arm: Any = None
    ) -> Any:
        assert next(jobs_for(path, self.plan.workload_of(name), 1)).turns == turns
        seen.append(f"{path.name} on {up(path).name}")
        return found

    monkeypatch.setattr(Run, "compare", cell)
    monkeypatch.setattr(Run, "keep", lambda self, name, serve: Server(name, "m", {}, self.settings))
    plan = custom([path], [1], Workload(turns=turns), scripted)
    await start(plan, load_settings(), tmp_path / "bench.json").controls()
    assert seen == [against]


async def test_a_second_run_sends_none_of_the_firsts_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stays up has those in its prefix cache."""
    drawn: list[int] = []
    found = (await a_run()).control[0]

    @asynccontextmanager
    async def opened(path: ServingPath, server: Server, wants: Workload, seed: int, behind: Any) -> AsyncIterator[None]:
        drawn.append(seed)
        yield

    async def compared(*_: Any) -> Any:
        return found

    one_load = made_up(busy=0.5)

    async def load(path: Any, server: Any, jobs: Any, *more: Any) -> Load:
        drawn.append(int(next(jobs).prompt.partition("-")[0]))
        return await one_load(path, server, jobs, *more)

    monkeypatch.setattr("servebook.bench.run.open_arm", opened)
    monkeypatch.setattr("servebook.bench.run.compare_unhindered", compared)
    monkeypatch.setattr("servebook.bench.sweep.spread", load)
    sse, server = find_path("sse"), Server("x", "m", {}, load_settings())
    for _ in range(2):
        run = start(QUICK, load_settings(), tmp_path / "bench.json")
        for name in ("control @8", "rest @8"):
            await run.compare(name, sse, sse, 8, lambda _: server)
        await sweep(sse, server, Workload(), ServiceLevel(), most=2)
    assert len(set(drawn)) == len(drawn) == 2 * (4 + 6), "no two arms of a run have one, either"


@pytest.mark.parametrize("scripted", [False, True])
def test_what_is_named_twice_is_measured_once(scripted: bool) -> None:
    """A step is known by its name: a run that is resumed after the first of two would take both for done."""
    steps = custom(["grpc", "grpc"], [1, 8, 8], Workload(), scripted).steps
    assert len(steps) == len(set(steps)) == (4 if scripted else 3)


async def test_an_undecided_control_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two pairs, however far off; with a second engine it ends the run, too."""
    found = (await a_run(slower=3.0)).control[0]

    async def cell(*_: Any) -> Any:
        return found

    monkeypatch.setattr(Run, "compare", cell)
    monkeypatch.setattr(Run, "keep", lambda self, name, serve: Server(name, "m", {}, self.settings))
    said: list[str] = []
    plan = custom(["grpc"], [1], Workload(), scripted=False)
    run = start(plan, load_settings(), tmp_path / "bench.json")
    run.say = said.append
    await run.controls()
    assert "do not tell a difference of that size from chance" in said[-1]
    with pytest.raises(BenchError, match="marked as undecided"):
        await start(replace(plan, own_control=True), load_settings(), tmp_path / "own.json").controls()


def test_goodput_counts_what_kept_the_service_level() -> None:
    def sample(ttft: float, tpot: float) -> Sample:
        return Sample(due=0, arrivals=[ttft, ttft + tpot * 4], output_tokens=5)

    load = Load([sample(0.5, 0.05), sample(1.5, 0.05), sample(0.5, 0.2), Sample(0, [0.5], output_tokens=5)], seconds=2)
    load.failed["busy"] += 1
    assert goodput(load, ServiceLevel(ttft_ms=1000, tpot_ms=100)) == 1.0, "two of five, in two seconds"
    assert goodput(load, ServiceLevel(ttft_ms=1000, tpot_ms=100), rate=10) == 4.0, "two of five, at ten a second"


async def test_blocks_are_interleaved_abba_then_baab(monkeypatch: pytest.MonkeyPatch) -> None:
    """And neighbours, one of each arm, draw the same times in an open loop."""
    order: list[str] = []
    seeds: list[int] = []

    async def noted(self: Arm, concurrency: int, count: int, rate: float | None, seed: int) -> Block:
        seeds.append(seed)
        return await block(self, concurrency, count, rate, seed)

    block = Arm.block
    monkeypatch.setattr(Arm, "block", noted)

    class Noted(Source):
        async def __call__(self, job: Job) -> AsyncIterator[Message]:
            order.append(self.name)
            async for message in super().__call__(job):
                yield message

        name = ""

    a, b = Noted(0.0005), Noted(0.0005)
    a.name, b.name = "A", "B"
    wants = Workload(max_tokens=8, block_seconds=0.001, rounds=2)
    await compare("order", arm(b), arm(a), 1, wants)
    assert "".join(order[-8 * WAVES :: WAVES]) == "ABBABAAB"
    assert seeds == [1, 1, 2, 2, 3, 3, 4, 4]


async def test_the_cpu_of_the_servers_behind_counts() -> None:
    @asynccontextmanager
    async def opened(_: Server) -> AsyncIterator[Source]:
        yield Source(0)

    path = replace(find_path("gateway"), open=opened)
    front, engine = MagicMock(pid=os.getpid()), MagicMock(pid=os.getppid())
    async with open_arm(path, front, Workload(), 1, [engine]) as it:
        assert it.tree.roots == [os.getpid(), os.getppid()]


async def test_an_open_loop_of_chats_has_blocks_as_long_as_were_asked_for() -> None:
    chats = arm(Source(0.0005)), arm(Source(0.0005))
    for each in chats:
        each.jobs = repeat(Job("a", 2, turns=5))
    found = await compare("chats", *chats, 0, Workload(turns=5, rate=200, block_seconds=0.5, rounds=1))
    assert [found.arm.summary.requests, found.reference.summary.requests] == [200, 200]


async def test_a_slower_arm_is_seen_and_would_void_a_control() -> None:
    wants = Workload(max_tokens=8, block_seconds=0.3, rounds=2)
    found = await compare("slow", arm(Source(0.04)), arm(Source(0.02)), 2, wants)
    assert found.tokens_per_s.value < 0.8
    assert found.itl_p50 is not None
    assert found.itl_p50.value > 1.2
    assert off_by(found) > CONTROL_LIMIT


def test_prompts_do_not_repeat_and_are_the_same_for_the_same_seed() -> None:
    for make in (workload.completions, workload.chats):
        one, two = islice(workload.seeds(), 2)
        jobs = workload.take(make(40, 8, one), 64)
        other = workload.take(make(40, 8, two), 64)
        firsts = [job.prompt.partition(":")[0] for job in jobs + other]
        assert len(set(firsts)) == 128, "a prefix cache keeps blocks of 16 tokens: they differ before that"
        assert max(map(len, firsts)) < 16
        assert jobs == workload.take(make(40, 8, one), 64)
        assert [job.max_tokens for job in jobs] == [job.max_tokens for job in other], "the same work for both arms"
        assert {job.max_tokens for job in jobs} == set(range(4, 13)), "8 on average, and not all at once at the end"


def test_cpu_is_counted_outside_and_inside_the_engine() -> None:
    busy = "print(sum(range(3_000_000)), flush=True); input()"
    # A process of its own: this one's tree holds the run's servers, engines included.
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        tree = ProcessTree(child.pid)
        spent = tree.cpu()
        memory = tree.memory_mib()
        child.communicate(b"\n")
    assert spent.front is not None
    assert spent.front > 0
    assert spent.engine == 0
    assert memory is not None
    assert memory > 1
    assert ProcessTree(None).cpu().front is None


def test_a_helper_may_end_and_counts_no_further_but_a_server_may_not() -> None:
    helper = "import sys; sum(range(3_000_000)); print(flush=True); sys.stdin.readline()"
    both = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {helper!r}]); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", both], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as it:
        assert it.stdin
        assert it.stdout
        it.stdout.readline()
        tree = ProcessTree(it.pid)
        before = tree.by_process()
        memory = tree.memory_mib()
        it.stdin.write(b"\n")
        it.stdout.readline()
        after = tree.by_process()
        assert len(before) == len(after) == 2
        assert after[1] == before[1] > 0, "what it had spent when it was last read"
        assert (tree.cpu().front or 0) > after[1]
        assert 0 < (tree.memory_mib() or 0) < (memory or 0)
        it.communicate(b"\n")
    for ask_it in (tree.cpu, tree.by_process, tree.memory_mib, lambda: ProcessTree(it.pid)):
        with pytest.raises(BenchError, match=f"A server that was measured has ended \\(process {it.pid}\\)"):
            ask_it()


def test_a_process_that_ends_while_engines_are_counted_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        """What `process_iter` gave, and what has ended since."""

        def __init__(self, name: str | None) -> None:
            self.info = {"name": name}

        def name(self) -> str:
            raise psutil.NoSuchProcess(1)

    names = ("VLLM::EngineCor", "python", None)
    monkeypatch.setattr("servebook.bench.resources.psutil.process_iter", lambda _: map(Gone, names))
    assert engines_up() == 1


def made_up(busy: float, alone: float = 0) -> Callable[..., Awaitable[Load]]:
    """Instead of `spread`: a server for two callers at a time, ten requests a second each.

    `busy` is the generator's CPU seconds in a second, `alone` with one caller.
    """

    async def load(
        path: ServingPath,
        server: Server,
        jobs: Any,
        callers: int,
        rate: float | None,
        n: int,
        processes: int,
        seed: int,
        all_here: Callable[[], object] = lambda: None,
    ) -> Load:
        all_here()
        per_second = min(20.0, rate or 10.0 * callers)
        wait = (callers or 40 * ((rate or 0) > 20)) / per_second
        samples = [Sample(due=k / per_second, arrivals=[k / per_second + wait], output_tokens=5) for k in range(n)]
        return Load(samples, n / per_second, (alone if alone and callers == 1 else busy) * n / per_second)

    return load


async def test_a_sweep_ends_past_the_knee_and_then_sends_at_fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.bench.sweep.spread", made_up(busy=0.5))
    server = Server("x", "m", {}, load_settings())
    found = await sweep(find_path("sse"), server, Workload(), ServiceLevel(ttft_ms=250), most=64)
    assert [point.callers for point in found.points] == [1, 2, 4, 8, 0, 0, 0, 0], "two doublings gained nothing"
    assert found.knee.callers == 2
    assert [round(point.rate or 0) for point in found.points[4:]] == [10, 16, 20, 24]
    assert [round(point.goodput) for point in found.points] == [10, 20, 20, 0, 10, 16, 20, 0]
    assert all((point.processes, point.generator_share) == (1, 0.5) for point in found.points)
    head, rows = table(found)
    assert {len(row) for row in rows} == {len(head)}
    assert rows[-1][:4] == ("24.0/s asked for", "240", "0", "100")


async def test_the_open_loop_of_a_sweep_of_chats_has_as_many_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lasts as long: each chat is several requests, which `made_up` counts as one."""
    monkeypatch.setattr("servebook.bench.sweep.spread", made_up(busy=0.5))
    server = Server("x", "m", {}, load_settings())
    found = await sweep(find_path("sse-chat"), server, Workload(turns=5), ServiceLevel(), most=2)
    assert [point.summary.requests for point in found.points if point.rate] == [20, 32, 40, 48]


async def test_a_sweep_that_is_stopped_has_left_its_points_and_touches_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("servebook.bench.sweep.spread", made_up(busy=0.5))
    server, output = Server("x", "m", {}, load_settings()), tmp_path / "of" / "mine.json"

    def stop_after_three(found: Sweep) -> None:
        found.save(output)
        if len(found.points) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await sweep(find_path("sse"), server, Workload(), ServiceLevel(), on_point=stop_after_three)
    assert [point.callers for point in Sweep.model_validate_json(output.read_bytes()).points] == [1, 2, 4]
    require_sweep(output)  # which the next one is written over
    require_sweep(tmp_path / "new.json")
    run = start(QUICK, load_settings(), tmp_path / "bench.json")
    run.results.save(tmp_path / "bench.json")
    with pytest.raises(BenchError, match=r"bench\.json is no sweep, and stays as it is"):
        require_sweep(tmp_path / "bench.json")


@pytest.mark.parametrize(("words", "output"), [([], "sweep.json"), (["--output", "bench.json"], "bench.json")])
def test_a_sweep_is_not_written_over_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[str] = []

    async def one_point(*args: Any) -> Sweep:
        started.append("sweep")
        found = Sweep.model_validate(SWEEP)
        args[-1](found)
        return found

    monkeypatch.setattr("servebook.bench.sweep.sweep", one_point)
    monkeypatch.setattr("servebook.bench.protocol.serve_scripted", lambda *_: Server("x", "m", {}, load_settings()))
    monkeypatch.setattr(Server, "stop", lambda _: pytest.fail("another run may use it"))
    Path("bench.json").write_text("a finished run")
    done = CliRunner().invoke(app, ["bench", "sse", "--sweep", "--scripted", *words])
    assert Path("bench.json").read_text() == "a finished run"
    if output == "bench.json":
        assert isinstance(done.exception, BenchError)
        assert not started, "hours before there is something to write"
    else:
        assert done.exit_code == 0, done.output
        assert Sweep.model_validate_json(Path(output).read_bytes()).knee.callers == 1


SUMMARY = summarize(Load([Sample(due=0, arrivals=[0.1, 0.2], output_tokens=5)], 1, 0.1))
SWEEP: Any = {
    "path": "sse",
    "started": now(),
    "machine": new_results("quick", "m", "cpu").machine,
    "scripted": True,
    "workload": Workload(),
    "level": ServiceLevel(),
    "points": [{"callers": 1, "summary": SUMMARY, "goodput": 1, "processes": 1, "generator_share": 0.1}],
}


@pytest.mark.parametrize(
    ("four", "says"),
    [
        (
            [(1, 300), (256, 25_000), (512, 25_500)],
            "2.50 times, at least 2.5 are asked: grpc-fronts 25,000 tokens/s at 256 callers; "
            "grpc 10,000 tokens/s at 64 callers",
        ),
        ([(1, 300), (512, 20_000)], "2.00 times, .* 20,000 tokens/s at 512 callers \\(the most that were tried\\); "),
    ],
)
def test_the_knees_of_two_sweeps_are_set_side_by_side(four: list[tuple[int, int]], says: str, tmp_path: Path) -> None:
    def kept(name: str, points: list[tuple[int, int]], **more: Any) -> str:
        each = [
            SWEEP["points"][0] | {"callers": callers, "summary": SUMMARY.model_copy(update={"tokens_per_s": speed})}
            for callers, speed in points
        ]
        Sweep.model_validate(SWEEP | {"path": name, "points": each} | more).save(tmp_path / f"{name}.json")
        return str(tmp_path / f"{name}.json")

    one = [(1, 300), (64, 10_000), (128, 10_100)]
    assert re.match(says, fronts_line(kept("grpc-fronts", four), kept("grpc", one)))
    with pytest.raises(BenchError, match="differ in more than their fronts"):
        fronts_line(kept("grpc-fronts", four), kept("sse", one, scripted=False))
    with pytest.raises(BenchError, match="is no sweep"):
        fronts_line(kept("grpc-fronts", four), str(tmp_path / "nothing.json"))


@pytest.mark.parametrize("given", ["many", "0", "-1", "nan", "inf"])
def test_a_rate_of_the_scripted_source_that_is_none_is_named(given: str) -> None:
    assert rate_from("2.5") == 2.5
    with pytest.raises(ServebookError, match=f"SERVEBOOK_SCRIPTED_RATE is '{given}'"):
        rate_from(given)


async def test_a_busy_generator_gets_more_processes_or_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.bench.sweep.spread", made_up(busy=0.9))
    server = Server("x", "m", {}, load_settings())
    monkeypatch.setattr("servebook.bench.results.os.sched_getaffinity", lambda _: {0, 2})
    with pytest.raises(BenchError, match="90% of a core in each of 1 processes"):
        await sweep(find_path("sse"), server, Workload(), ServiceLevel(), most=4)  # one caller cannot be shared out
    monkeypatch.setattr("servebook.bench.sweep.spread", made_up(busy=0.9, alone=0.5))
    found = await sweep(find_path("sse"), server, Workload(), ServiceLevel(), most=4)
    shares = [(point.processes, round(point.generator_share, 2)) for point in found.points]
    assert shares[0] == (1, 0.5)
    assert set(shares[1:]) == {(2, 0.45)}
    monkeypatch.setattr("servebook.bench.results.os.sched_getaffinity", lambda _: {2})
    with pytest.raises(BenchError, match="90% of a core in each of 1 processes"):
        await sweep(find_path("sse"), server, Workload(), ServiceLevel(), most=4)


class Busy(ProcessTree):
    """That of a server whose load generator, this process, takes nine tenths of a core."""

    def cpu(self) -> CpuSeconds:
        return super().cpu().model_copy(update={"client": 0.9 * perf_counter()})


async def test_a_busy_generator_of_one_arm_gets_more_processes_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.bench.arms.spread", made_up(busy=0.9))
    monkeypatch.setattr("servebook.bench.generators.os.sched_getaffinity", lambda _: {0, 2})
    wants, heard = Workload(max_tokens=8, block_seconds=0.05, rounds=1), list[int]()

    async def compared(callers: int) -> Comparison:
        busy = replace(arm(Source(0.01)), tree=Busy(os.getpid()))
        return await compare_unhindered("x", busy, arm(Source(0.01)), callers, wants, lambda n, _: heard.append(n))

    found = await compared(2)
    assert [(side.processes, round(side.generator_share, 2)) for side in (found.arm, found.reference)] == [
        (2, 0.45)
    ] * 2
    assert heard == [1, 2, 1, 2, 3, 4], "the first block of the busy arm ended it, and it began anew"
    heard.clear()
    busy = replace(arm(Source(0.01)), tree=Busy(os.getpid()))
    await compare_unhindered("x", arm(Source(0.01)), busy, 2, wants, lambda n, _: heard.append(n))
    assert heard == [1, 2, 1, 2, 3, 4], (
        "the reference comes first, and its pair is made whole: both arms drew as many jobs"
    )
    assert report.ratios([found])[1][0][-1] == "45 in each of 2"
    with pytest.raises(BusyGenerator, match="of a core in each of 1 processes"):
        await compared(1)  # cannot be shared out
    monkeypatch.setattr("servebook.bench.generators.os.sched_getaffinity", lambda _: {2})
    with pytest.raises(BusyGenerator, match="of a core in each of 1 processes"):
        await compared(2)


def a_generator_too_busy_for(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are measured at once, and well, but for this one; nothing is started."""
    found = uvloop.run(a_run()).control[0]

    async def cell(self: Run, name: str, *_: Any) -> Comparison:
        if name == step:
            raise BusyGenerator("The load generator takes 90% of a core in each of 1 processes.")
        return found

    monkeypatch.setattr(Run, "compare", cell)
    monkeypatch.setattr(Run, "keep", lambda self, name, serve: Server(name, "m", {}, self.settings))


def test_a_step_whose_generator_is_too_busy_is_left_out_and_the_run_stays_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_generator_too_busy_for("grpc @8", monkeypatch)
    output = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["bench", "grpc", "-c", "1", "-c", "8", "-c", "32", "--output", str(output)])
    assert "  left out: The load generator takes 90% of a core" in done.output
    assert "the run is good" in done.output
    assert "Left out, as the load generator would have measured itself: grpc @8.\n" in done.output
    assert done.exit_code == 1
    assert load_results(output).done == ["control @1", "grpc @1", "grpc @32"]


def test_a_control_whose_generator_is_too_busy_ends_the_run_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_generator_too_busy_for("control @1", monkeypatch)
    done = CliRunner().invoke(app, ["bench", "grpc", "-c", "1", "--output", str(tmp_path / "bench.json")])
    assert isinstance(done.exception, BusyGenerator)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_each_path_is_compared_with_one_that_asks_for_the_same(path: ServingPath) -> None:
    against = find_path(path.against)
    assert against.instance in ("vllm", "gateway")
    assert against.chat == path.chat


def test_an_unknown_path_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(BenchError, match="Choose from sse"):
        find_path("carrier-pigeon")


MEASURED: dict[float, Results] = {}


async def a_run(slower: float = 1.0) -> Results:
    """A copy of a finished run with one comparison; its control is `slower` than its reference."""
    if slower not in MEASURED:
        MEASURED[slower] = await measured(slower)
    return MEASURED[slower].model_copy(deep=True)


async def measured(slower: float) -> Results:
    """Such a run, which takes seconds."""
    wants = Workload(max_tokens=8, block_seconds=0.05, rounds=1)
    results = new_results("full", "smollm2", "cpu")
    results.control = [await compare("control @1", arm(Source(0.01 * slower)), arm(Source(0.01)), 1, wants)]
    if slower == 1.0:  # what this machine does meanwhile is not under test
        for part in (results.control[0].tokens_per_s, results.control[0].ttft_p50, results.control[0].itl_p50):
            assert part
            part.value = 1.01
    wants = Workload(max_tokens=8, block_seconds=0.05, rounds=3)
    results.engine = [await compare("grpc @1", arm(Source(0.002)), arm(Source(0.02)), 1, wants)]
    results.wire = [WireCost(path="sse", bytes_per_token=250)]
    results.wire += [WireCost(path="grpc", bytes_per_token=40)]
    return results


async def test_the_report_judges_claims_and_lists_ratios() -> None:
    results = await a_run()
    verdicts = {verdict.claim: verdict.answer for verdict in (claim.judge(results) for claim in report.CLAIMS)}
    assert verdicts["grpc, tokens/s at 1 ≥ 1"] == "met"
    assert verdicts["grpc, bytes per token ≤ 0.2"] == "met"
    assert verdicts["triton, tokens/s at 8 ≥ 0.97"] == "not measured"
    text = report.markdown([results])
    assert "| grpc, bytes per token ≤ 0.2 | 0.16, counted | met |" in text
    assert results.machine.cpu in text


async def test_cpu_is_judged_by_the_bound_for_the_messages_that_were_sent() -> None:
    """One bound is for a message a token, and one for where the server lets tokens wait for each other."""
    run = await a_run()
    run.protocol = []
    for callers, merged, cpu in ((8, 1.0, 0.1), (32, 1.0, 0.55), (64, 1.7, 0.45)):
        each = run.engine[0].model_copy(deep=True, update={"concurrency": callers})
        each.arm.path, each.arm.summary.tokens_per_message = "grpc", merged
        each.front_cpu = Estimate(value=cpu, low=cpu, high=cpu, pairs=6)
        (run.merging if merged > 1 else run.protocol).append(each)

    def verdicts() -> list[tuple[str, str]]:
        found = {claim.text: claim.judge(run) for claim in report.CLAIMS}
        return [
            found[f"grpc, server CPU per token {where} (scripted)"][1:]
            for where in ("at 32, a message a token", "where it merges")
        ]

    assert verdicts() == [("0.550 [0.550, 0.550], 6 pairs", "met"), ("0.450 [0.450, 0.450], 6 pairs", "missed")]
    run.protocol[1].arm.summary.tokens_per_message = 1.7  # at 32 it merges, too: nothing shows the first
    assert [answer for _, answer in verdicts()] == ["not measured", "missed"]
    for each in (*run.protocol, *run.merging):
        each.arm.summary.tokens_per_message = 1.0
    assert [answer for _, answer in verdicts()] == ["met", "not measured"]


def test_the_plan_has_what_the_claims_ask_for() -> None:
    """A full run leaves none "not measured"."""
    asked = [claim.text for claim in report.CLAIMS if re.search(r"tokens/s|TTFT|ITL", claim.text)]
    assert len(asked) > 20
    for text in asked:
        path, callers = re.match(r"(.*?), .* at (\d+)", text).groups()  # type: ignore[union-attr]
        path = {"the article's gateway": "gateway-article"}.get(path, path)
        assert f"{path} @{callers}" in FULL.steps, text
    assert "grpc, tokens/s at 64" in asked
    assert {"scripted grpc @32", "merging grpc @32"} <= set(FULL.steps), "its CPU, with a message a token and without"


async def test_what_merges_is_measured_by_sources_of_a_rate_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen, found = start(QUICK, load_settings(), tmp_path / "bench.json"), list[str](), (await a_run()).engine[0]
    run.plan = Plan("one", Workload(), (), (), merging=FULL.merging, workloads=FULL.workloads)

    async def cell(self: Run, name: str, path: ServingPath, against: ServingPath, callers: int, up: Any) -> Comparison:
        assert self.plan.workload_of(name).max_tokens == 48
        seen.extend(f"{each.name} on {up(each).name}" for each in (path, against))
        return found

    monkeypatch.setattr(Run, "compare", cell)
    monkeypatch.setattr(Run, "keep", lambda self, name, serve: Server(name, "m", {}, self.settings))
    await run.all()
    assert seen == ["grpc on grpc-scripted-190", "sse on vllm-scripted-190"]
    there = load_results(tmp_path / "bench.json")
    assert (there.done, len(there.merging), there.merging_rate, there.protocol) == (["merging grpc @32"], 1, 190, [])


def test_a_source_gets_its_rate_and_a_gateway_one_of_that_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, dict[str, str]] = {}

    def serve(name: str, *, instance: str, settings: Settings, spec: ServerSpec, engine_url: str = "") -> Server:
        seen[instance] = dict(spec.env(settings, print)) | {"behind": engine_url}
        return Server(instance, "m", {"http": "127.0.0.1:9"}, settings)

    monkeypatch.setattr("servebook.bench.protocol.serve", serve)
    serve_scripted(find_path("grpc"), load_settings())
    serve_scripted(find_path("gateway"), load_settings(), 190.0)
    assert seen == {
        "grpc-scripted": {"behind": ""},
        "vllm-scripted-190": {"SERVEBOOK_SCRIPTED_RATE": "190", "behind": ""},
        "gateway-scripted-190": {"behind": "http://127.0.0.1:9"},
    }


@pytest.mark.parametrize("scripted", [False, True])
def test_a_run_ends_the_vllm_that_it_started_for_a_gateway(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scripted: bool
) -> None:
    """As a run does that goes on at a gateway's step; and that vLLM's work counts as the gateway's."""
    up: list[str] = []

    def serve(path: ServingPath, settings: Settings, rate: float | None = None) -> Server:
        names = [scripted_instance(each, rate) if scripted else each for each in ("vllm", path.instance)]
        up.extend(name for name in names if name not in up)  # a gateway brings its vLLM
        return MagicMock(stop=lambda: up.remove(names[1]))

    monkeypatch.setattr(ServingPath, "serve", serve)
    monkeypatch.setattr("servebook.bench.run.serve_scripted", serve)
    monkeypatch.setattr("servebook.launch.status", lambda settings: [{"name": name, "pid": 1} for name in up])
    run = start(custom(["gateway"], [1], Workload(), scripted), load_settings(), tmp_path / "bench.json")
    start_of = run.up_scripted if scripted else run.up
    start_of(gateway := find_path("gateway"))
    assert run.behind(gateway, start_of) == [run.servers[up[0]]]
    run.end_all()
    assert up == []


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ("grpc --max-tokens 1500", 2290),
        ("rest-chat --turns 8 --prompt-tokens 1000 --max-tokens 100", 1000 + 8 * 150 + 7 * 15),
    ],
)
def test_answers_that_the_engine_has_no_room_for_are_refused_before_it_starts(words: str, tokens: int) -> None:
    done = CliRunner().invoke(app, ["bench", *words.split()])
    assert isinstance(done.exception, ServebookError)
    assert f"take {tokens} tokens, and the engine has room for 2048" in str(done.exception)


async def test_a_guard_that_did_not_measure_every_front_is_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    there = new_results("guard", "m", "cpu")
    there.done = guard.PLAN.steps[1:]
    monkeypatch.setattr(guard, "start", lambda *_: MagicMock(all=AsyncMock(return_value=there)))
    with pytest.raises(BenchError, match=re.escape(f"would have measured itself: {guard.PLAN.steps[0]}.")):
        await guard.measure(load_settings())


async def test_rows_of_another_rate_are_told_apart() -> None:
    run = await a_run()
    run.protocol = [run.engine[0].model_copy(deep=True, update={"concurrency": 32})]
    before = report.section(run)
    run.merging = [run.protocol[0].model_copy(deep=True, update={"workload": Workload(max_tokens=48)})]
    head, rows = report.protocol_costs(run)
    assert [row[head.index("callers")] for row in rows] == ["32", "32 at 190/s"]
    said = (
        "The last rows are those of 190 tokens a second for each stream, which a server may merge, and of answers of 48"
    )
    assert said in report.section(run)
    assert said not in before


async def test_one_table_on_top_has_every_path_on_every_engine() -> None:
    fast, slow = await a_run(), await a_run()
    for run, speed in ((fast, 2000.0), (slow, 20.0)):
        run.control[0].reference.summary.tokens_per_s = speed
    fast.engine = []
    slow.engine[0].tokens_per_s = Estimate(value=1.5, low=1.4, high=1.6, pairs=6)
    fast.protocol = [slow.engine[0].model_copy(update={"concurrency": callers}) for callers in (64, 8)]
    fast.protocol[0].front_cpu = Estimate(value=0.25, low=0.2, high=0.3, pairs=6)
    head, rows = report.overview([fast, slow])
    assert [column.split(", ")[-1] for column in head[1:3]] == ["20 tokens/s", "2000 tokens/s"]
    ratio = "1.50 [1.40, 1.60]"
    assert rows == [("sse", f"{ratio} @1", "–", f"{ratio} @64", "0.25 [0.20, 0.30]", "250", "–")]


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most"),
    [
        (0.88, 0.92, "missed", "met"),
        (1.01, 1.20, "met", "missed"),
        (0.99, 1.20, "undecided", "undecided"),
        (0.90, 1.00, "undecided", "met"),
        (1.00, 1.20, "met", "undecided"),
        (None, None, "undecided", "undecided"),
    ],
)
def test_the_whole_interval_decides(low: float | None, high: float | None, at_least: str, at_most: str) -> None:
    """A value on the right side is not enough: it is 1.1 in each case. The bound itself is still on the right side."""
    found, results = Estimate(value=1.1, low=low, high=high, pairs=6), new_results("full", "m", "cpu")
    answers = [report.Claim("x", lambda _: found, 1.0, side).judge(results).answer for side in (True, False)]
    assert answers == [at_least, at_most]


async def test_the_report_says_how_many_requests_failed() -> None:
    run = await a_run()
    sent = " + ".join(str(side.summary.requests) for side in (run.engine[0].arm, run.engine[0].reference))
    assert f"| {sent} |" in report.section(run)
    run.engine[0].arm.summary.failed, run.engine[0].reference.summary.failed = {"busy": 2}, {"busy": 1, "late": 1}
    assert f"| {sent}, 4 failed |" in report.section(run)


async def test_a_control_is_judged_on_latency_and_a_run_on_its_generator() -> None:
    results = await a_run()
    assert "good" in report.control_line(results)
    results.engine[0].arm.cpu_per_1000.client = (
        1000 * (GENERATOR_LIMIT + 0.01) / results.engine[0].arm.summary.tokens_per_s
    )
    assert "VOID" in report.control_line(results), "a generator above its limit measures itself"
    results.merging, results.engine = results.engine, []
    assert "VOID" in report.control_line(results), "whatever it measured"
    results = await a_run()
    found = results.control[0].ttft_p50 = Estimate(value=1.04, pairs=2)
    assert "undecided: more pairs" in report.control_line(results), (
        "tokens/s are the same, and the first of them comes 4 % later"
    )
    found.low, found.high = 1.02, 1.06
    assert judge_control(results.control[0]) == "undecided", "it may be 2 %"
    found.low = 1.035
    assert "VOID" in report.control_line(results)
    found.value, found.low, found.high = 0.95, 0.9, 0.96
    assert "VOID" in report.control_line(results)


def test_the_report_is_the_checkouts_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "checkout/notebooks"
    elsewhere.mkdir(parents=True)
    monkeypatch.setattr("servebook.bench.cli.ROOT", checkout)
    monkeypatch.chdir(elsewhere)
    done = CliRunner().invoke(app, ["bench", "--report"])
    assert done.output == f"{checkout}/BENCHMARKS.md is written.\n"
    assert (checkout / "BENCHMARKS.md").read_text() == report.markdown(stored())
    assert not list(elsewhere.iterdir())


def test_the_page_is_that_of_the_stored_results() -> None:
    assert (ROOT / "BENCHMARKS.md").read_text() == report.markdown(stored()), "servebook bench --report writes it"


async def test_the_chapter_shows_each_stored_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU's, too, once there is one: here it is the CPU's, with another name."""
    cpu = stored()[0]
    gpu = cpu.model_copy(update={"machine": cpu.machine.model_copy(update={"device": "gpu"})})
    drawn, shown = MagicMock(), MagicMock()
    space = {"stored": lambda: [cpu, gpu], "full": False, "report": report, "pictures": drawn, "display": shown}
    texts, pictured = ["s6-load", "s6-claims", "s9-article"], ["s6-throughput", "s6-latency", "s9-stored"]
    await cells.run("08", [*texts, *pictured, "s7-stored", "s10-check-run"], space | {"Markdown": str, "MIB": 2**20})
    names = ["stored 1, cpu", "stored 2, gpu"]
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said if line.startswith("stored")] == names * len(texts)
    titles = [call.kwargs["title"] for call in drawn.mock_calls]
    shapes = ["Every path @ callers", "TTFT against vLLM's SSE", "triton", "kserve"]
    assert sorted(titles) == sorted(f"{shape} ({name})" for shape in shapes for name in names)
    tables = [call.args[0] for call in shown.mock_calls]
    assert [table.partition(":\n\n| ")[0] for table in tables] == names * 2


async def test_a_run_that_is_not_good_is_not_reported() -> None:
    results = await a_run(slower=3.0)
    assert results.verdict == "undecided", "two pairs say nothing for sure, however far off"
    with pytest.raises(BenchError, match="not good"):
        report.markdown([results])
    with pytest.raises(BenchError, match="no stored results"):
        report.markdown([])


async def test_results_survive_the_way_to_disk_and_fit_their_schema(tmp_path: Path) -> None:
    results = await a_run()
    results.save(tmp_path / "run.json")
    assert load_results(tmp_path / "run.json").engine[0].name == "grpc @1"
    jsonschema.validate(json.loads((tmp_path / "run.json").read_text()), Results.model_json_schema())
    other = results.model_dump_json().replace('"format":3', '"format":2')
    for no_result in (b"{}", b"\xff\xfe", other.encode()):
        (tmp_path / "run.json").write_bytes(no_result)
        with pytest.raises(BenchError, match="no result of this version"):
            load_results(tmp_path / "run.json")
    with pytest.raises(BenchError, match="cannot be read"):
        load_results(tmp_path / "nothing.json")


def test_stored_results_can_be_read_and_are_good() -> None:
    for results in stored():
        assert results.verdict == "good"
        assert results.plan == "full"
        assert set(results.done) <= set(FULL.steps)
        for missing in set(FULL.steps) - set(results.done):
            assert re.search(rf"this run does not have: .*{missing}[,.]", report.section(results))


SHARES = {"a tenth": 1 / 10, "a fifth": 1 / 5, "a quarter": 1 / 4, "a third": 1 / 3, "two fifths": 2 / 5, "half": 1 / 2}


def share(value: float) -> str:
    """The nearest one in words."""
    return min(SHARES, key=lambda each: abs(SHARES[each] - value))


def listed(values: Iterable[object]) -> str:
    """As a sentence has them: "1, 2 and 3"."""
    *others, last = [str(each) for each in values] or ["none"]
    return f"{', '.join(others)} and {last}" if others else last


def text_of(place: str) -> str:
    """All of a file of the bench, or of a cell: `08 quiz`."""
    if place.endswith(".toml"):
        return (ROOT / "src/servebook/bench" / place).read_text()
    number, name = place.split()
    (notebook,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return next("".join(each["source"]) for each in json.loads(notebook.read_text())["cells"] if each["id"] == name)


def test_sentences_about_the_stored_run_have_its_figures() -> None:
    """Where a new run is stored, those that are to be written anew are named, each as it is to be."""
    run, loads = stored()[0], (1, 8, 32, 64)
    cells = {(each.arm.path, each.concurrency): each for each in run.protocol}
    ratios = {cell: each.front_cpu for cell, each in cells.items() if each.front_cpu}
    ms = {(each.server, each.encoding, each.tensor_bytes // MIB): each.median_ms for each in run.tensors}
    behind = {each.concurrency: 100 - 100 * each.tokens_per_s.value for each in run.engine if each.arm.path == "triton"}

    def micros(sides: Iterable[ArmResult]) -> str:
        return listed(f"{1e3 * (side.cpu_per_1000.front or 0):,.0f}" for side in sides)

    def rust(*callers: int) -> str:
        return share(median(ratios[path, each].value for path in ("rust-sse", "rust-grpc") for each in callers))

    def grpc_is(verdict: str, one: str = "") -> str:
        def judged(found: Estimate) -> str:
            return "undecided" if not found.leaves_out(1) else "dearer" if found.value > 1 else "cheaper"

        return listed(n if n > 1 else f"one {one}" for n in loads if judged(ratios["grpc", n]) == verdict)

    def faster(server: str) -> float:
        return ms[server, "JSON list", 15] / ms[server, "HTTP binary", 15]

    many, tenth = rust(32, 64), share(1 - ratios["grpc", 32].value)
    python, rusts = (micros(getattr(cells["rust-sse", n], side) for n in loads) for side in ("reference", "arm"))
    typed = round(ms["kserve", "gRPC typed", 15] / ms["kserve", "JSON base64", 15])
    times = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}.get(typed, typed)
    table = (
        ("choose.toml", f"no code of yours, and {many} of the CPU (chapter 07)"),
        (
            "choose.toml",
            f"dearer with {grpc_is('dearer', 'caller')}, {tenth} cheaper with {grpc_is('cheaper')}, "
            f"undecided with {grpc_is('undecided')}",
        ),
        ("choose.toml", f"{behind[8]:.0f} to {behind[32]:.0f} % behind with many streams on shared cores"),
        ("07 s8-explain", f"{python} µs a token for Python, **{rusts}** for Rust, which with many streams is {many}."),
        (
            "08 s7-about",
            f"gRPC was dearer with {grpc_is('dearer', 'stream')}, {tenth} cheaper with {grpc_is('cheaper')}, "
            f"and undecided with {grpc_is('undecided')}.",
        ),
        ("08 s7-about", f"are each at {rust(1)} (one stream) to {many} (many) of Python's"),
        (
            "08 s9-about",
            f"not for 4 MiB: {ms['triton', 'HTTP binary', 4]:.0f} and {ms['triton', 'gRPC raw', 4]:.0f} ms in this run",
        ),
        ("08 s9-about", f"slower than base64, in KServe about {times} times."),
        # Of Triton's the tens: what is more than 80 times is called so.
        (
            "08 quiz",
            f"{faster('triton') // 10 * 10:.0f} times in Triton, {faster('kserve'):.0f} times in KServe's SDK.",
        ),
    )
    assert not [each for each in table if each[1] not in text_of(each[0])]


def test_each_step_has_the_rounds_that_the_plan_gives_it() -> None:
    steps = ("control @1", "control @32", "grpc @1", "rest @32", "scripted grpc @32")
    assert [FULL.workload_of(step).rounds for step in steps] == [24, 8, 6, 3, 3]
    assert (FULL.workload_of("grpc @1").max_tokens, FULL.workload_of("scripted grpc @32").max_tokens) == (32, 16)
    assert len(FULL) == len(set(FULL.steps))


@pytest.mark.parametrize(
    "change",
    [
        {"paths": ["triton"]},
        {"loads": [1, 8]},
        {"wants": Workload(max_tokens=200)},
        {"wants": Workload(rate=2.0)},
        {"scripted": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_of_another_custom_plan_is_not_continued(tmp_path: Path, change: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"paths": ["grpc"], "loads": [1], "wants": Workload(), "scripted": False}
    settings, output = load_settings(), tmp_path / "bench.json"
    run = start(custom(**asked), settings, output)
    with run.measured("grpc @1"):
        pass
    assert start(custom(**asked), settings, output).results.done == ["grpc @1"]
    plan = custom(**asked | change)
    with pytest.raises(BenchError, match=f"with plan '{run.plan.name}', and this one has '{plan.name}'"):
        start(plan, settings, output)


def test_neither_is_that_of_other_engine_arguments_nor_a_finished_one(tmp_path: Path) -> None:
    plain, output = load_settings(engine_args=""), tmp_path / "bench.json"
    run = start(QUICK, plain, output)
    with run.measured("control @8"):
        pass
    with pytest.raises(BenchError, match="with engine_args '', and this one has '--dtype float16'"):
        start(QUICK, load_settings(engine_args="--dtype float16"), output)
    run.results.finished = now()
    run.results.save(output)
    with pytest.raises(BenchError, match="a finished run"):
        start(QUICK, plain, output)


@pytest.mark.parametrize("other", [{"served_name": "another"}, {"device": "gpu"}], ids=["model", "machine"])
async def test_a_finished_run_is_shown_of_this_model_and_machine_only(tmp_path: Path, other: dict[str, str]) -> None:
    settings, output = load_settings(device="cpu", served_name="one"), tmp_path / "bench.json"
    run = start(QUICK, settings, output)
    run.results.finished = now()
    run.results.save(output)
    assert (await finished(QUICK, settings, output)).finished == run.results.finished
    with pytest.raises(BenchError, match=r"holds a run (with model 'one'|of another machine).*\n.*remove this one"):
        await finished(QUICK, settings.model_copy(update=other), output)


def test_neither_is_one_at_another_rate_of_the_scripted_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "bench.json"
    monkeypatch.setattr("servebook.bench.results.SCRIPTED_RATE", 190.123456)
    run = start(QUICK, load_settings(), output)
    with run.measured("control @8"):
        pass
    assert start(QUICK, load_settings(), output).results.done, "its own rate, as the file has it"
    monkeypatch.setattr("servebook.bench.results.SCRIPTED_RATE", 20.0)
    with pytest.raises(BenchError, match=r"with scripted_rate 190\.12, and this one has 20\.0"):
        start(QUICK, load_settings(), output)


@pytest.mark.parametrize(("rate", "callers"), [("0.5", "512"), ("20", "25"), ("1000", "1")])
def test_a_rate_of_the_scripted_source_gives_callers_within_bounds(rate: str, callers: str) -> None:
    asked = "from servebook.bench.run import SCRIPTED_CALLERS; print(SCRIPTED_CALLERS)"
    there = os.environ | {"SERVEBOOK_SCRIPTED_RATE": rate}
    assert subprocess.check_output([sys.executable, "-c", asked], env=there, text=True).strip() == callers


async def test_the_guard_judges_by_its_own_rate_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SCRIPTED_RATE", 190.0)
    monkeypatch.setattr(guard, "start", lambda *_: pytest.fail("nothing is to be started"))
    with pytest.raises(BenchError, match="those of 20 tokens a second, and SERVEBOOK_SCRIPTED_RATE is 190"):
        await guard.measure(load_settings())


def test_a_file_that_cannot_be_written_is_found_out_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("no folder")
    for refuse in (require_sweep, lambda output: start(QUICK, load_settings(), output)):
        with pytest.raises(BenchError, match=r"cannot be written: .*\n→ Name another file"):
            refuse(tmp_path / "note" / "bench.json")
    start(QUICK, load_settings(), tmp_path / "new" / "bench.json")
    assert not list((tmp_path / "new").iterdir()), "nothing is measured, and nothing left"


def test_a_cost_is_told_apart_into_requests_and_tokens_with_its_error() -> None:
    """Simulated: a request costs 900 µs, a token 60; the truth is within two errors about as often as it should be."""
    draw, held, runs = np.random.default_rng(2), np.zeros(2), 2000
    requests, lengths = [50] * 12, [8, 24, 64] * 4
    tokens = [50 * length for length in lengths]
    for _ in range(runs):
        true = np.array([50 * (900 + 60 * length) for length in lengths]) * 1e-6
        request, request_error, token, token_error = fit(requests, tokens, list(true + draw.normal(0, 0.004, 12)))
        held += (abs(request - 900) < 2 * request_error, abs(token - 60) < 2 * token_error)
    assert held / runs == pytest.approx(0.927, abs=0.02), "what two standard errors hold with ten degrees of freedom"
    exact = fit(requests, tokens, [50e-6 * (900 + 60 * length) for length in lengths])
    assert exact == pytest.approx((900, 0, 60, 0), abs=1e-6)
    with pytest.raises(ValueError, match="2 blocks are too few"):
        fit([1, 1], [2, 2], [3, 3])


def test_a_core_is_full_when_its_busiest_process_has_used_it_up() -> None:
    cost = Cost(
        path="gateway",
        callers=25,
        processes=2,
        busiest=0.5,
        request_us=640,
        request_error=9,
        token_us=180,
        token_error=3,
    )
    assert cost.core_full_at(32) == pytest.approx(10_000), "200 µs a token, shared by two processes"
    assert cost.core_full_at(8) < cost.core_full_at(1000)
    assert str(cost) == "gateway: 640 ± 9 µs a request, 180 ± 3 µs a token; processes: 2"


async def test_bytes_are_counted_with_their_framing() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    there = Server("x", "m", {"http": f"127.0.0.1:{port}"}, load_settings())
    async with counted(there) as (seen, (proxy,)):
        host, seen_port = seen.http.split(":")
        reader, writer = await asyncio.open_connection(host, int(seen_port))
        writer.write(b"12345")
        assert await reader.read(100) == b"12345"
        writer.close()
    server.close()
    assert proxy.bytes == 10


async def test_tokens_that_all_came_at_once_have_no_price() -> None:
    @asynccontextmanager
    async def opened(_: Server) -> AsyncIterator[Source]:
        yield Source(0, merged=64)

    path = replace(find_path("sse"), open=opened)
    with pytest.raises(BenchError, match="40 tokens came in 1 messages, and 8 in 1"):
        await wire_cost(path, Server("x", "m", {}, load_settings()))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.93, 1.07, "as before"),
        (1.12, 1.30, "dearer"),
        (0.70, 0.88, "cheaper"),
        (0.95, 1.20, "undecided"),
        (None, None, "undecided"),
    ],
)
def test_the_guard_is_red_only_where_a_whole_interval_is(low: float | None, high: float | None, verdict: str) -> None:
    assert guard.judge(Estimate(value=2, low=low and 2 * low, high=high and 2 * high, pairs=6), stored=2) == verdict


async def test_the_guard_compares_with_what_it_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(guard.STORED.read_text()).keys() == set(guard.OURS)
    monkeypatch.setattr(guard, "STORED", tmp_path / "guard.json")
    found = (await a_run()).engine[0]
    found.arm.path, found.front_cpu = "grpc", Estimate(value=0.8, low=0.78, high=0.82, pairs=6)
    guard.store([found])
    assert json.loads(guard.STORED.read_text()) == {"grpc": 0.8}
    assert guard.verdicts([found])[1][0][-1] == "as before"
    found.front_cpu = Estimate(value=1.2, low=1.1, high=1.3, pairs=6)
    assert guard.verdicts([found])[1][0][-1] == "dearer"
    found.arm.path = "new"
    assert guard.verdicts([found])[1][0][-1] == "not stored"


def test_vllms_benchmark_ends_with_a_cross_check_that_is_cancelled() -> None:
    there = Server("vllm", "smollm2", {"http": "127.0.0.1:9"}, load_settings())

    def its_process() -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE and started(process)]

    def started(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return process.cmdline()[2:5] == ["vllm.entrypoints.cli.main", "bench", "serve"]
        return False

    async def cancelled() -> None:
        task = asyncio.create_task(crosscheck._vllm_bench(there, [Job("Once", 4)], 1))
        await asyncio.to_thread(eventually, its_process, "vLLM's benchmark")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not its_process()

    uvloop.run(cancelled())  # as the command line has it


def test_the_command_line_knows_its_ways() -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["bench", "--schema"])
    assert json.loads(shown.stdout)["title"] == "Results"
    missing = runner.invoke(app, ["bench", "carrier-pigeon"])
    assert "There is no path 'carrier-pigeon'" in str(missing.exception)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--scripted", "a run without PATH takes no --scripted"),
        ("--rate 5", "a run without PATH takes no --rate"),
        ("-c 32 --full", "a run without PATH takes no --concurrency"),
        ("--rounds 3", "a run without PATH takes no --rounds"),
        ("--store", "a run without PATH takes no --store"),
        ("grpc --full", "a run of PATH takes no --full"),
        ("grpc --ttft-ms 5", "a run of PATH takes no --ttft-ms"),
        ("grpc --rate 5 -c 8", "--rate takes no --concurrency"),
        ("sse --sweep --force", "--sweep takes no --force"),
        ("sse --sweep --rate 5", "--sweep takes no --rate"),
        ("--guard --output x.json", "--guard takes no --output"),
        ("grpc --guard", "--guard takes no PATH"),
        ("--report --guard", "--guard takes no --report"),
        ("grpc --rate nan", "Invalid value for '--rate'"),
        ("grpc --rate inf", "less than or equal to 10000"),
        ("grpc --prompt-tokens 1000001", "less than or equal to 1000000"),
        ("grpc --max-tokens 1000001", "less than or equal to 1000000"),
        ("grpc --shared-prefix 1000001", "less than or equal to 1000000"),
        ("grpc --rounds 1001", "less than or equal to 1000"),
        ("grpc --turns 1001", "less than or equal to 1000"),
        ("sse --sweep --ttft-ms 0", "greater than or equal to 0.01"),
        ("sse --sweep --tpot-ms inf", "less than or equal to 3600000"),
    ],
)
def test_an_option_without_an_effect_or_a_meaning_is_refused(
    words: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for starts in ("bench.run.start", "bench.cli.saturate", "bench.guard.measure"):
        monkeypatch.setattr(f"servebook.{starts}", lambda *_: pytest.fail("nothing is to be started"))
    refused = CliRunner().invoke(app, ["bench", *words.split()], env={"COLUMNS": "200", "TERM": "dumb"})
    assert refused.exit_code == 2, refused.output
    assert what in refused.output


@pytest.mark.parametrize(
    "words",
    [
        *("--quick", "--full --force --output x.json", "grpc --quick --shared-prefix 0", "grpc -c 4 -c 32 --scripted"),
        *("grpc --rate 5 --rounds 2 --force", "sse --sweep -c 64 --ttft-ms 500 --shared-prefix 9 --output x.json"),
    ],
)
def test_an_option_with_an_effect_is_taken(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def began(*_: Any) -> None:
        raise BenchError("It began.")

    for starts in ("bench.run.start", "bench.cli.saturate"):
        monkeypatch.setattr(f"servebook.{starts}", began)
    assert str(CliRunner().invoke(app, ["bench", *words.split()]).exception) == "It began."


@pytest.mark.parametrize(
    ("code", "problem"),
    [(1, "failed: one / two"), (0, "counts 3 tokens, and 4 were asked for")],
    ids=["fails", "counts"],
)
async def test_a_cross_check_that_fails_has_a_remedy(code: int, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(words: list[str], **_: Any) -> Any:
        result = Path(words[words.index("--result-dir") + 1]) / words[words.index("--result-filename") + 1]
        result.write_text('{"total_output_tokens": 3}')
        return nullcontext(Mock(returncode=code, communicate=lambda: (b"one\ntwo\n", None)))

    @asynccontextmanager
    async def here(_: Server) -> AsyncIterator[Source]:
        yield Source(0)

    monkeypatch.setattr(subprocess, "Popen", made)
    monkeypatch.setattr(crosscheck, "find_path", lambda _: replace(find_path("sse"), open=here))
    monkeypatch.setattr(workload, "completions", lambda *_, **__: iter([Job("Once", 4)] * 4))
    with pytest.raises(BenchError, match=problem) as failed:
        await crosscheck.cross_check(Server("vllm", "m", {"http": "x"}, load_settings()), Workload(), 1, 1, 7)
    assert "servebook logs" in failed.value.remedy


def test_a_picture_tells_the_pairs_of_an_interval_that_begins_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(pictures, "picture", lambda _, text: told.append(text))
    found = Estimate(value=0.5, low=0.0, high=1.0, pairs=6, each=[0.5] * 6)
    pictures.forest({"gateway": found}, xlabel="ms", title="More", line=0)
    assert "gateway 0.50 [0.00, 1.00], 6 pairs" in told[0]
