"""One load by several processes of the load generator, which begin together; and how many of them a load takes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from servebook.bench import workload
from servebook.bench.load import BenchError, Job, Load, closed_loop, open_loop
from servebook.bench.paths import ServingPath, find_path
from servebook.launch import Server
from servebook.processes import die_with_parent

Asked = tuple[str, Server, list[Job], list[Job], int, float | None, int]
"""Of `_part`: path, server, its jobs to warm up and to measure, callers, rate and seed."""

GENERATOR_LIMIT = 0.6
"""Which part of a core each process of the load generator may take before it is in the way of what it measures."""


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

    Raises:
        BenchError: every request of a process failed, or it was ended.
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
    pipes = [context.Pipe() for _ in asked]
    parts = [
        context.Process(target=_in_process, args=(theirs, each)) for (_, theirs), each in zip(pipes, asked, strict=True)
    ]
    try:
        for part, (_, theirs) in zip(parts, pipes, strict=True):
            part.start()
            theirs.close()  # here: so that the pipe ends with the part
        await asyncio.gather(*(_hear(ours) for ours, _ in pipes))  # they start and warm up first
        all_here()
        loads: list[Load] = await asyncio.gather(*(_hear(ours, "go") for ours, _ in pipes))
    finally:
        for part in parts:
            if part.pid:
                part.kill()
                part.join()
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


async def _hear(end: Connection, told: str = "") -> Any:
    """What a process says next, once it is `told` that.

    Raises:
        BenchError: it failed, or was ended.
    """
    try:
        if told:
            end.send(told)
        said = await asyncio.to_thread(end.recv)
    except (EOFError, OSError):
        raise BenchError(
            "A process of the load generator was ended.",
            "If memory is short, Linux ends processes: see `servebook doctor`.",
        ) from None
    if isinstance(said, BaseException):
        raise said
    return said


def _in_process(end: Connection, asked: Asked) -> None:
    """A part in a process of its own: says "ready", waits for who started it, and sends its load or what went wrong."""

    def meet() -> None:
        end.send("ready")
        end.recv()

    die_with_parent()
    with suppress(OSError, EOFError, KeyboardInterrupt):  # nobody hears it any more
        try:
            end.send(uvloop.run(_part(*asked, meet)))
        except Exception as error:
            end.send(error)
