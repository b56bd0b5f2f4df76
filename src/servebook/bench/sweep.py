"""One path from one caller to saturation, and past it in an open loop: where the knee is, and what users feel."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from servebook.bench import workload
from servebook.bench.arms import WAVES, Workload, jobs_for
from servebook.bench.generators import GENERATOR_LIMIT, spread, twice
from servebook.bench.load import MAX_CONCURRENCY, BenchError
from servebook.bench.paths import ServingPath
from servebook.bench.report import Row, Rows, generator_share, percentiles_ms
from servebook.bench.results import Machine, now, require_writable, this_machine
from servebook.bench.stats import ServiceLevel, Summary, goodput, summarize
from servebook.launch import Server
from servebook.whole import write_whole

GAIN = 1.05
"""Twice the callers for less than this many times the tokens/s: the path is saturated."""

SHARES = (0.5, 0.8, 1.0, 1.2)
"""Of the requests a second at saturation: the rates of the open loop."""

OPEN_SECONDS = 10.0

FRONTS_GIVE = 2.5
"""Times one front's tokens/s at its knee: what is asked of four fronts before one engine, and was not measured yet."""


class Point(BaseModel):
    """One load of one path."""

    callers: int = Field(description="0 in an open loop.")
    rate: float | None = Field(
        default=None, description="Open loop: requests a second that were asked for; they come by chance."
    )
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


def load_sweep(path: Path) -> Sweep:
    """Read a file that `Sweep.save` wrote.

    Raises:
        BenchError: it is not there, or no sweep's.
    """
    try:
        return Sweep.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise BenchError(f"{path} is no sweep.", "Name a file that `servebook bench --sweep` wrote.") from None


def fronts_line(file_of_several: str, file_of_one: str) -> str:
    """What several fronts give at their knee, as a multiple of one front's tokens/s, beside FRONTS_GIVE.

    Raises:
        BenchError: a file is no sweep's, or the two are of different machines, workloads or sources.
    """
    fronts, one = load_sweep(Path(file_of_several)), load_sweep(Path(file_of_one))
    if any(getattr(fronts, same) != getattr(one, same) for same in ("machine", "workload", "scripted")):
        raise BenchError(
            "The two sweeps differ in more than their fronts.", "Measure both on one machine, with the same options."
        )
    ratio = fronts.knee.summary.tokens_per_s / one.knee.summary.tokens_per_s
    each = (
        f"{found.path} {found.knee.summary.tokens_per_s:,.0f} tokens/s at {found.knee.callers} callers"
        + ("" if found.saturated else " (the most that were tried)")
        for found in (fronts, one)
    )
    return f"{ratio:.2f} times, at least {FRONTS_GIVE:g} are asked: {'; '.join(each)}"


def require_sweep(path: Path) -> None:
    """Refuse to write a sweep over anything else, such as a run that took hours.

    Raises:
        BenchError: `path` cannot be written, or is there and is no sweep's file.
    """
    require_writable(path)
    if not path.exists():
        return
    try:
        load_sweep(path)
    except BenchError:
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
        BusyGenerator: the generator itself is the bottleneck, in as many processes as there are cores.
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

    async def measure(callers: int, rate: float | None, count: int) -> Point:
        nonlocal processes
        while True:
            seed = next(seeds)
            jobs = jobs_for(path, wants, seed)
            load = await spread(path, server, jobs, callers, rate, count, processes, seed)
            share = load.cpu / load.seconds / processes
            if share <= GENERATOR_LIMIT:
                break
            processes = twice(processes, callers, share)
        return Point(
            callers=callers,
            rate=rate,
            summary=summarize(load),
            goodput=goodput(load, level, rate),
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
        rate = share * capacity
        keep(await measure(0, rate, max(WAVES, round(rate * OPEN_SECONDS / wants.turns))))
    return found


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
                f"{point.callers} callers" if point.rate is None else f"{point.rate:.1f}/s asked for",
                str(each.requests),
                str(sum(each.failed.values())),
                f"{each.tokens_per_s:.0f}",
                *map(percentiles_ms, (each.ttft_ms, each.itl_ms, each.tpot_ms)),
                f"{each.requests_per_s:.1f}",
                f"{point.goodput:.1f}",
                generator_share(point.generator_share, point.processes),
            )
        )
    return head, rows
