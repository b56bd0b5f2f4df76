"""One path from one caller to saturation, and past it in an open loop: where the knee is, and what users feel."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError

import uvloop
from pydantic import BaseModel, Field, ValidationError

from servebook.bench import workload
from servebook.bench.arms import GENERATOR_LIMIT, WAVES, Workload, jobs_for
from servebook.bench.load import MAX_CONCURRENCY, BenchError, Load, closed_loop, open_loop
from servebook.bench.paths import ServingPath, find_path
from servebook.bench.report import Row, Rows, percentiles_ms
from servebook.bench.results import Machine, now, require_writable, this_machine
from servebook.bench.stats import ServiceLevel, Summary, goodput, summarize
from servebook.launch import Server
from servebook.processes import die_with_parent
from servebook.whole import write_whole

GAIN = 1.05
"""Twice the callers for less than this many times the tokens/s: the path is saturated."""

SHARES = (0.5, 0.8, 1.0, 1.2)
"""Of the requests a second at saturation: the rates of the open loop."""

OPEN_SECONDS = 10.0
BARRIER_SECONDS = 120.0


class Point(BaseModel):
    """One load of one path."""

    callers: int = Field(description="0 in an open loop.")
    rate: float | None = Field(default=None, description="Open loop: requests a second that were sent.")
    summary: Summary
    goodput: float = Field(description="Requests a second within the service level.")
    processes: int = Field(description="Of the load generator.")
    generator_share: float = Field(description="Of a core, in each of its processes.")


class Sweep(BaseModel):
    """A path under rising load."""

    path: str
    started: datetime
    machine: Machine
    scripted: bool = Field(description="The scripted token source instead of an engine.")
    workload: Workload
    level: ServiceLevel
    points: list[Point] = []

    @property
    def closed(self) -> list[Point]:
        return [point for point in self.points if point.callers]

    @property
    def knee(self) -> Point:
        """The fewest callers that get as many tokens/s as any, but for 5 %: from there on each only waits longer."""
        most = max(point.summary.tokens_per_s for point in self.closed)
        return next(point for point in self.closed if point.summary.tokens_per_s * GAIN >= most)

    @property
    def saturated(self) -> bool:
        """Whether more callers than at the knee were tried, and gained nothing."""
        return self.knee.callers < self.closed[-1].callers

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.model_dump_json(indent=1) + "\n")


def require_sweep(path: Path) -> None:
    """Refuse to write a sweep over anything else, such as a run that took hours.

    Raises:
        BenchError: `path` cannot be written, or is there and is no sweep's file.
    """
    require_writable(path)
    if not path.exists():
        return
    try:
        Sweep.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise BenchError(
            f"{path} is no sweep, and stays as it is.", "Name another file with --output, or remove this one."
        ) from None


async def sweep(
    path: ServingPath,
    server: Server,
    wants: Workload,
    level: ServiceLevel,
    most: int = MAX_CONCURRENCY,
    scripted: bool = False,
    on_point: Callable[[Sweep], None] = lambda found: None,
) -> Sweep:
    """Double the callers up to `most` or until two doublings in a row gain nothing, then send at fixed rates.

    `on_point` gets what there is so far, after each point.

    Raises:
        BenchError: the generator itself is the bottleneck, in as many processes as there are cores.
    """
    found = Sweep(
        path=path.name,
        started=now(),
        machine=this_machine("gpu" if server.settings.on_gpu else "cpu"),
        scripted=scripted,
        workload=wants,
        level=level,
    )
    seeds, callers, processes, flat = workload.seeds(), 1, 1, 0

    async def measure(callers: int, rate: float | None, requests: int) -> Point:
        nonlocal processes
        while True:
            load = await spread(path, server, wants, seeds, callers, rate, requests, processes)
            parts = min(processes, callers or processes)  # as `spread` has it
            share = load.cpu / load.seconds / parts
            if share <= GENERATOR_LIMIT:
                break
            if 2 * processes > found.machine.cores or parts < processes:
                raise BenchError(
                    f"The load generator takes {share:.0%} of a core in each of {parts} processes: it would "
                    "measure itself.",
                    "Use fewer callers, or a machine with more cores.",
                )
            processes *= 2
        return Point(
            callers=callers,
            rate=rate,
            summary=summarize(load),
            goodput=goodput(load, level),
            processes=processes,
            generator_share=share,
        )

    def keep(point: Point) -> Point:
        found.points.append(point)
        on_point(found)
        return point

    before = keep(await measure(1, None, WAVES))
    while flat < 2 and 2 * callers <= most:
        callers *= 2
        point = keep(await measure(callers, None, WAVES * callers))
        flat = flat + 1 if point.summary.tokens_per_s < GAIN * before.summary.tokens_per_s else 0
        before = point
    capacity = max(point.summary.requests_per_s for point in found.closed)
    for share in SHARES:
        keep(await measure(0, share * capacity, max(WAVES, round(share * capacity * OPEN_SECONDS))))
    return found


async def spread(
    path: ServingPath,
    server: Server,
    wants: Workload,
    seeds: Iterator[int],
    callers: int,
    rate: float | None,
    requests: int,
    processes: int,
) -> Load:
    """One load, by so many processes: each has its part of the callers, of the rate and of the requests."""
    parts = min(processes, callers or processes)
    sizes = [callers // parts + (number < callers % parts) for number in range(parts)]
    asked = [
        (path.name, server, wants, next(seeds), size, rate and rate / parts, max(1, requests // parts))
        for size in sizes
    ]
    if parts == 1:
        return await _part(*asked[0])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parts, context, _meet_at, (context.Barrier(parts, timeout=BARRIER_SECONDS),)) as pool:
        loop = asyncio.get_running_loop()
        ended = await asyncio.gather(
            *(loop.run_in_executor(pool, _in_process, each) for each in asked), return_exceptions=True
        )
    errors = [each for each in ended if isinstance(each, BaseException)]
    # Who was waiting for a part that failed says only that: the part itself says why.
    for error in sorted(errors, key=lambda each: isinstance(each, BrokenBarrierError)):
        raise error
    loads = [each for each in ended if isinstance(each, Load)]
    samples = [sample for load in loads for sample in load.samples]
    # The clock is the machine's, the same for each process.
    seconds = max(sample.ended for sample in samples) - min(sample.due for sample in samples)
    return Load(samples, seconds, sum(load.cpu for load in loads), sum((load.failed for load in loads), Counter()))


async def _part(
    path: str,
    server: Server,
    wants: Workload,
    seed: int,
    callers: int,
    rate: float | None,
    requests: int,
    all_here: Callable[[], object] = lambda: None,
) -> Load:
    jobs = jobs_for(find_path(path), wants, seed)
    async with find_path(path).open(server) as send:
        await closed_loop(send, workload.take(jobs, callers or 1), callers or 1)
        all_here()
        if rate:
            return await open_loop(send, workload.take(jobs, requests), rate, seed)
        return await closed_loop(send, workload.take(jobs, requests), callers)


_barrier: Barrier


def _in_process(asked: tuple[str, Server, Workload, int, int, float | None, int]) -> Load:
    try:
        return uvloop.run(_part(*asked, all_here=_barrier.wait))
    except BaseException:
        _barrier.abort()  # else the others wait for this one until their time is up
        raise


def _meet_at(barrier: Barrier) -> None:
    """What each process is told at its start: where all wait for each other, so that no part begins early.

    It ends with who started it: one that is killed cannot tell it to.
    """
    global _barrier
    die_with_parent()
    _barrier = barrier


def table(found: Sweep) -> Rows:
    """Head and rows: a point a line."""
    head = (
        *("load", "requests", "failed", "tokens/s", "TTFT p50 / p90 / p99, ms", "ITL p50 / p90 / p99, ms"),
        *("TPOT p50 / p90 / p99, ms", "requests/s", "good requests/s", "generator, % of a core"),
    )
    rows: list[Row] = []
    for point in found.points:
        each = point.summary
        rows.append(
            (
                f"{point.callers} callers" if point.rate is None else f"{point.rate:.1f}/s sent",
                str(each.requests),
                str(sum(each.failed.values())),
                f"{each.tokens_per_s:.0f}",
                *map(percentiles_ms, (each.ttft_ms, each.itl_ms, each.tpot_ms)),
                f"{each.requests_per_s:.1f}",
                f"{point.goodput:.1f}",
                f"{100 * point.generator_share:.0f}"
                + (f" in each of {point.processes}" if point.processes > 1 else ""),
            )
        )
    return head, rows
