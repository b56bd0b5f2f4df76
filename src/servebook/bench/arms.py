"""Two arms compared in one run: blocks interleaved (ABBA), ratios from neighbours, and a control that can void it all.

Server A and server B are never under load at the same time, but always within seconds of each other, so
that a machine that warms up, slows down or is disturbed does so to both.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from servebook.bench import workload
from servebook.bench.generators import GENERATOR_LIMIT, spread, twice
from servebook.bench.load import BenchError, Job, Load, Send, ask, closed_loop, open_loop
from servebook.bench.paths import PATHS, ServingPath
from servebook.bench.resources import CpuSeconds, ProcessTree, engines_up
from servebook.bench.stats import Estimate, Summary, difference, ratio, summarize
from servebook.launch import Server

CONTROL_LIMIT = 0.03
"""How far the A/A control may be from 1 in a run that is good."""

ORDER = ("ABBA", "BAAB")
"""The order within one round; every second round begins with the other arm."""

WAVES = 3
"""Requests for each caller in one block, at least: the first come all at once, as they seldom do in life."""


class Workload(BaseModel):
    """What one request asks for, and how long a block lasts."""

    prompt_tokens: int = Field(default=40, ge=10, le=1_000_000, description="About; the exact number is the server's.")
    max_tokens: int = Field(default=48, ge=2, le=1_000_000, description="Of an answer, on average.")
    block_seconds: float = Field(default=3.0, gt=0, description="Aimed at, by the number of requests in a block.")
    rounds: int = Field(
        default=3, ge=1, le=1000, description="Of four blocks each: two pairs; three rounds give an interval."
    )
    shared_prefix_tokens: int = Field(
        default=0, ge=0, le=1_000_000, description="Before every prompt, the same: a system prompt."
    )
    turns: int = Field(
        default=1, ge=1, le=1000, description="Of a chat: each but the first has those before it in its prompt."
    )
    rate: float | None = Field(default=None, gt=0, description="Open loop: requests a second, begun at random times.")


class ArmResult(BaseModel):
    """What one arm showed over all of its blocks."""

    path: str
    summary: Summary
    cpu_per_1000: CpuSeconds = Field(description="CPU seconds per 1,000 output tokens.")
    memory_mib: float | None = Field(description="PSS of all of the server's processes; None if it runs elsewhere.")
    block_tokens_per_s: list[float] = Field(description="In the order in which the blocks were run.")
    processes: int = Field(default=1, description="Of the load generator.")

    @property
    def generator_share(self) -> float:
        """How much of a core each process of the load generator took, on average; at 1 it measures itself."""
        return self.cpu_per_1000.client * self.summary.tokens_per_s / 1000 / self.processes


class Comparison(BaseModel):
    """An arm against its reference at one load. Ratios are arm / reference."""

    name: str
    concurrency: int = Field(description="Callers, each with one request in flight; 0 in an open loop.")
    engines_up: int = Field(description="Engines in memory during the measurement; only one at a time had work.")
    workload: Workload
    arm: ArmResult
    reference: ArmResult
    tokens_per_s: Estimate = Field(description="Ratio; above 1 the arm is faster.")
    ttft_p50: Estimate = Field(description="Ratio; below 1 the arm is faster.")
    ttft_p50_ms: Estimate = Field(description="Difference in milliseconds; below 0 the arm is faster.")
    itl_p50: Estimate | None = Field(description="Ratio; None where an arm does not stream.")
    front_cpu: Estimate | None = Field(description="Ratio of CPU per token outside the engine; None if not seen.")


class Block(NamedTuple):
    """One block of one arm."""

    load: Load
    cpu: CpuSeconds


@dataclass
class Arm:
    """A path to a server that is up, with its endless supply of fresh jobs.

    `processes` are those of the load generator: this one, or so many others, each with connections of its own.
    """

    path: ServingPath
    server: Server
    send: Send
    tree: ProcessTree
    jobs: Iterator[Job]
    blocks: list[Block] = field(default_factory=list)
    processes: int = 1

    @property
    def generator_share(self) -> float:
        """How much of a core each process of the load generator took in the last block; 0 before the first."""
        return max((cpu.client / load.seconds / self.processes for load, cpu in self.blocks[-1:]), default=0.0)

    async def warm_up(self, concurrency: int) -> float:
        """One request per caller; returns the seconds that they took."""
        return (await closed_loop(self.send, workload.take(self.jobs, concurrency), concurrency)).seconds

    async def block(self, concurrency: int, count: int, rate: float | None, seed: int) -> Block:
        """Run one block of `count` jobs and keep it; in an open loop `seed` draws their times."""
        if self.processes == 1:
            jobs = workload.take(self.jobs, count)
            before = self.tree.cpu()
            load = await (open_loop(self.send, jobs, rate, seed) if rate else closed_loop(self.send, jobs, concurrency))
            spent = self.tree.cpu() - before
        else:
            begun: list[CpuSeconds] = []
            asked = (self.path, self.server, self.jobs, concurrency, rate, count, self.processes, seed)
            load = await spread(*asked, lambda: begun.append(self.tree.cpu()))
            spent = (self.tree.cpu() - begun[0]).model_copy(update={"client": load.cpu})
        block = Block(load, spent)
        self.blocks.append(block)
        return block

    def result(self) -> ArmResult:
        """All blocks together."""
        loads = [block.load for block in self.blocks]
        summary = summarize(*loads)
        cpu = CpuSeconds(
            front=_sum([block.cpu.front for block in self.blocks]),
            engine=_sum([block.cpu.engine for block in self.blocks]),
            client=sum(block.cpu.client for block in self.blocks),
        )
        return ArmResult(
            path=self.path.name,
            summary=summary,
            cpu_per_1000=cpu.per_1000(summary.output_tokens),
            memory_mib=self.tree.memory_mib(),
            block_tokens_per_s=[load.output_tokens / load.seconds for load in loads],
            processes=self.processes,
        )


def require_turns(path: ServingPath, wants: Workload) -> None:
    """Refuse what would be found out only after servers have started.

    Raises:
        BenchError: several turns are wanted of a path whose requests carry one.
    """
    if wants.turns > 1 and not path.history:
        able = ", ".join(each.name for each in PATHS.values() if each.history)
        raise BenchError(f"{path.name} has no second turn: a request carries none before it.", f"Choose from {able}.")


def jobs_for(path: ServingPath, wants: Workload, seed: int) -> Iterator[Job]:
    """Endless jobs for a path.

    Raises:
        BenchError: several turns are wanted of a path whose requests carry one.
    """
    require_turns(path, wants)
    make = workload.chats if path.chat else workload.completions
    first = workload.prefix(wants.shared_prefix_tokens)
    for job in make(wants.prompt_tokens, wants.max_tokens, seed):
        yield job._replace(prompt=first + job.prompt, turns=wants.turns)


@asynccontextmanager
async def open_arm(
    path: ServingPath, server: Server, wants: Workload, seed: int, behind: Sequence[Server] = ()
) -> AsyncIterator[Arm]:
    """Connect to `server` over `path`; a first request shows that it answers. CPU of the servers `behind` it counts."""
    jobs = jobs_for(path, wants, seed)
    async with path.open(server) as send:
        await ask(send, next(jobs))
        yield Arm(path, server, send, ProcessTree(server.pid, *(other.pid for other in behind)), jobs)


async def compare(
    name: str,
    arm: Arm,
    reference: Arm,
    concurrency: int,
    wants: Workload,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure `arm` against `reference` in interleaved blocks; `on_block` hears of each that is done."""
    arm.blocks, reference.blocks = [], []
    await arm.warm_up(concurrency or 1)
    seconds = await reference.warm_up(concurrency or 1)
    if wants.rate:
        count = max(2, round(wants.rate * wants.block_seconds / wants.turns))
    else:
        count = concurrency * max(WAVES, round(wants.block_seconds / seconds))
    order = [letter for number in range(wants.rounds) for letter in ORDER[number % 2]]
    for done, letter in enumerate(order, start=1):
        # Neighbours, one of each arm, draw the same times.
        await (arm if letter == "B" else reference).block(concurrency, count, wants.rate, seed=(done + 1) // 2)
        on_block(done, len(order))
    return _comparison(name, arm, reference, concurrency, wants)


class _TooBusy(Exception):
    """A pair of blocks ends a comparison: the load generator was above GENERATOR_LIMIT."""


async def compare_unhindered(
    name: str, arm: Arm, reference: Arm, concurrency: int, wants: Workload, on_block: Callable[[int, int], None]
) -> Comparison:
    """`compare`, with as many processes of the load generator as it takes, the same number for both arms.

    A pair of blocks in which the generator was too busy ends it, and with twice the processes it begins anew.

    Raises:
        BusyGenerator: there cannot be more processes.
    """

    def share() -> float:
        return max(arm.generator_share, reference.generator_share)

    def watch(done: int, total: int) -> None:
        on_block(done, total)
        if done % 2 == 0 and share() > GENERATOR_LIMIT:  # not between the two: both arms take jobs of the same lengths
            raise _TooBusy

    while True:
        try:
            return await compare(name, arm, reference, concurrency, wants, watch)
        except _TooBusy:
            arm.processes = reference.processes = twice(arm.processes, concurrency, share())


def _comparison(name: str, arm: Arm, reference: Arm, concurrency: int, wants: Workload) -> Comparison:
    of_arm, of_reference = [
        [(summarize(block.load), block.cpu.per_1000(block.load.output_tokens)) for block in side.blocks]
        for side in (arm, reference)
    ]

    def both(read: Callable[[Summary], float]) -> tuple[list[float], list[float]]:
        return [read(summary) for summary, _ in of_arm], [read(summary) for summary, _ in of_reference]

    fronts = [[cpu.front or 0.0 for _, cpu in side] for side in (of_arm, of_reference)]
    streams = arm.path.streams and reference.path.streams
    return Comparison(
        name=name,
        concurrency=concurrency,
        engines_up=engines_up(),
        workload=wants,
        arm=arm.result(),
        reference=reference.result(),
        tokens_per_s=ratio(*both(lambda summary: summary.tokens_per_s)),
        ttft_p50=ratio(*both(lambda summary: summary.ttft_ms.p50)),
        ttft_p50_ms=difference(*both(lambda summary: summary.ttft_ms.p50)),
        itl_p50=ratio(*both(lambda summary: summary.itl_ms.p50 if summary.itl_ms else math.nan)) if streams else None,
        front_cpu=ratio(*fronts) if all(map(all, fronts)) else None,
    )


def off_by(control: Comparison) -> float:
    """How far an A/A control is from 1, in tokens/s, TTFT or ITL, whichever is furthest: 0.03 is 3 %."""
    found = (control.tokens_per_s, control.ttft_p50, control.itl_p50)
    return max(abs(each.value - 1) for each in found if each)


Verdict = Literal["good", "undecided", "void"]


def judge_control(control: Comparison) -> Verdict:
    """What an A/A control says of its run.

    "good" within CONTROL_LIMIT; beyond it "void" if an interval is, whole, and else "undecided": such pairs show what a
    restless machine does, and not whether it favours one side. Windows of 2 pairs out of good runs are off by more
    than the limit every second time, of 6 pairs every third.
    """
    if off_by(control) <= CONTROL_LIMIT:
        return "good"
    sure = any(
        each.low > 1 + CONTROL_LIMIT or each.high < 1 - CONTROL_LIMIT
        for each in (control.tokens_per_s, control.ttft_p50, control.itl_p50)
        if each and each.low is not None and each.high is not None
    )
    return "void" if sure else "undecided"


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
