"""One load by several processes of the load generator, which begin together; and how many of them a load takes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError

import uvloop

from servebook.bench import workload
from servebook.bench.load import DEADLINE_SECONDS, BenchError, Job, Load, closed_loop, open_loop
from servebook.bench.paths import ServingPath, find_path
from servebook.launch import Server
from servebook.processes import die_with_parent

GENERATOR_LIMIT = 0.6
"""Which part of a core each process of the load generator may take before it is in the way of what it measures."""

BARRIER_SECONDS = 120.0
WITHOUT_CAUSE = (BrokenBarrierError, BrokenProcessPool)
"""What a part says that waited in vain for another one, or was ended."""


class BusyGenerator(BenchError):
    """The load generator would measure itself, in as many processes as there may be."""


def twice(processes: int, callers: int, share: float) -> int:
    """How many processes are tried next for a load whose generator took `share` of a core in each of `processes`.

    Raises:
        BusyGenerator: this machine has too few cores for more, or there are too few `callers` (0: an open loop).
    """
    cores = len(os.sched_getaffinity(0))
    if 2 * processes > min(cores, callers or cores):
        raise BusyGenerator(
            f"The load generator takes {share:.0%} of a core in each of {processes} processes: it would measure "
            "itself.",
            f"Use {'fewer callers' if callers else 'a lower rate'}, or a machine with more cores.",
        )
    return 2 * processes


async def spread(
    path: ServingPath,
    server: Server,
    jobs: Iterator[Job],
    callers: int,
    rate: float | None,
    count: int,
    processes: int,
    seed: int,
    all_here: Callable[[], object] = lambda: None,
) -> Load:
    """One load by so many processes: each has its part of the callers, of the rate and of the `count` jobs.

    In an open loop `rate` is in requests a second, `seed` draws their times, and `callers` is 0. Each process warms up
    with a request for each of its callers; when all have, `all_here` is called, and then they begin.
    """
    sizes = [callers // processes + (number < callers % processes) for number in range(processes)]
    asked = [
        (
            path.name,
            server,
            workload.take(jobs, size or 1),
            workload.take(jobs, max(1, count * size // callers if callers else count // processes)),
            size,
            rate and rate / processes,
            seed * processes + number,
        )
        for number, size in enumerate(sizes)
    ]
    if processes == 1:
        return await _part(*asked[0], all_here)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1, timeout=BARRIER_SECONDS)
    with ProcessPoolExecutor(processes, context, _meet_at, (barrier,)) as pool:
        loop = asyncio.get_running_loop()
        parts = [loop.run_in_executor(pool, _in_process, each) for each in asked]
        try:
            await asyncio.to_thread(barrier.wait, DEADLINE_SECONDS + BARRIER_SECONDS)  # they start and warm up first
            all_here()
            await asyncio.to_thread(barrier.wait)
        except BrokenBarrierError:
            pass  # a part has failed, and says why
        except BaseException:
            barrier.abort()  # else the parts wait for this process until their time is up
            raise
        ended = await asyncio.gather(*parts, return_exceptions=True)
    errors = [each for each in ended if isinstance(each, BaseException)]
    # Who was waiting for a part that failed says only that: the part itself says why.
    for error in sorted(errors, key=lambda each: isinstance(each, WITHOUT_CAUSE)):
        if isinstance(error, WITHOUT_CAUSE):
            raise BenchError(
                f"The load generator's {processes} processes were not all ready within {BARRIER_SECONDS:.0f} s of each "
                "other, or one was ended.",
                "Try again when less else runs here; if memory is short, Linux ends processes: see `servebook doctor`.",
            ) from None
        raise error
    loads = [each for each in ended if isinstance(each, Load)]
    samples = [sample for load in loads for sample in load.samples]
    # The clock is the machine's, the same for each process.
    seconds = max(sample.ended for sample in samples) - min(sample.due for sample in samples)
    failed = sum((load.failed for load in loads), Counter())
    return Load(samples, seconds, sum(load.cpu for load in loads), failed, sum(load.unsent for load in loads))


async def _part(
    path: str,
    server: Server,
    first: Sequence[Job],
    jobs: Sequence[Job],
    callers: int,
    rate: float | None,
    seed: int,
    all_here: Callable[[], object],
) -> Load:
    async with find_path(path).open(server) as send:
        await closed_loop(send, first, len(first))
        all_here()
        return await (open_loop(send, jobs, rate, seed) if rate else closed_loop(send, jobs, callers))


_barrier: Barrier


def _in_process(asked: tuple[str, Server, list[Job], list[Job], int, float | None, int]) -> Load:
    try:
        return uvloop.run(_part(*asked, all_here=_meet))
    except BaseException:
        _barrier.abort()  # else the others wait for this one until their time is up
        raise


def _meet() -> None:
    """Wait until all have warmed up, and then until who started them has read the server's CPU."""
    _barrier.wait()
    _barrier.wait()


def _meet_at(barrier: Barrier) -> None:
    """What each process is told at its start: where all wait for each other, so that no part begins early.

    It ends with who started it: one that is killed cannot tell it to.
    """
    global _barrier
    die_with_parent()
    _barrier = barrier
