"""The load generator: sends jobs over one path, in a closed or an open loop, and notes when each message came."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from servebook.errors import ServebookError

MAX_CONCURRENCY = 64


class BenchError(ServebookError):
    """A measurement that cannot be made, or must not be believed."""


class Job(NamedTuple):
    """One request: a prompt (of a completion, or the user's message of a chat) and how many tokens to ask for."""

    prompt: str
    max_tokens: int


class Message(NamedTuple):
    """What one message on the wire told: some text and, in the last one or two, how the request ended.

    A message is not a token: a server merges tokens when its reader is slow. `output_tokens` is the
    request's total, from the server's usage or from counted token ids.
    """

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None


Send = Callable[[Job], AsyncIterator[Message]]
"""How a path sends a job: one message at a time as they come; one in all where the path does not stream."""


@dataclass
class Sample:
    """One finished request; times are `time.perf_counter()` seconds.

    `due` is when the request should have been sent (open loop) or was sent (closed loop). TTFT counts
    from there: a client that is late sending must not make the server look fast.
    """

    due: float
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    ended: float = 0.0

    @property
    def ttft(self) -> float:
        """Seconds to the first message with text."""
        return self.arrivals[0] - self.due

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first message; NaN for a request that came in one message."""
        if len(self.arrivals) < 2:
            return float("nan")
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring messages with text: the inter-token latency that a reader sees."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass
class Load:
    """The outcome of one run of the generator: the samples, and the seconds from first send to last arrival."""

    samples: list[Sample]
    seconds: float

    @property
    def output_tokens(self) -> int:
        return sum(sample.output_tokens for sample in self.samples)


async def ask(send: Send, job: Job, due: float | None = None) -> Sample:
    """Send one job and read its answer to the end.

    Raises:
        BenchError: the answer came without text, or the path did not say how many tokens it held.
    """
    sample = Sample(perf_counter() if due is None else due)
    pieces = []
    async for message in send(job):
        if message.text:
            sample.arrivals.append(perf_counter())
            pieces.append(message.text)
        sample.finish_reason = message.finish_reason or sample.finish_reason
        sample.prompt_tokens = message.prompt_tokens or sample.prompt_tokens
        sample.output_tokens = message.output_tokens or sample.output_tokens
    sample.ended = perf_counter()
    sample.text = "".join(pieces)
    if not sample.arrivals or not sample.output_tokens:
        raise BenchError(
            f"An answer came with {len(sample.arrivals)} messages of text and {sample.output_tokens} counted tokens.",
            "See the server's log (`servebook logs NAME`): a measured request must end well.",
        )
    return sample


async def closed_loop(send: Send, jobs: Iterable[Job], concurrency: int) -> Load:
    """`concurrency` callers, each sending its next job when its last one has ended.

    Raises:
        BenchError: `concurrency` is not within 1 and 64, or a request failed.
    """
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise BenchError(f"Concurrency {concurrency} is not within 1 and {MAX_CONCURRENCY}.", "Choose one that is.")
    queue: Iterator[Job] = iter(jobs)
    samples: list[Sample] = []

    async def caller() -> None:
        for job in queue:
            samples.append(await ask(send, job))  # noqa: PERF401 (the callers share the list)

    started = perf_counter()
    await _all(caller() for _ in range(concurrency))
    return Load(samples, max(sample.ended for sample in samples) - started)


async def open_loop(send: Send, jobs: Iterable[Job], rate: float, seed: int = 0) -> Load:
    """Jobs sent at random times, `rate` a second on average (a Poisson process), whether or not others have ended.

    Raises:
        BenchError: a request failed.
    """
    draw = random.Random(seed)
    samples: list[Sample] = []

    async def later(job: Job, due: float) -> None:
        await asyncio.sleep(due - perf_counter())
        samples.append(await ask(send, job, due))

    started = due = perf_counter()
    calls = []
    for job in jobs:
        calls.append(later(job, due))
        due += draw.expovariate(rate)
    await _all(calls)
    return Load(samples, max(sample.ended for sample in samples) - started)


async def _all(calls: Iterable[asyncio._CoroutineLike[None]]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for call in calls:
                group.create_task(call)
    except* BenchError as errors:
        raise errors.exceptions[0] from None
    except* Exception as errors:
        first = errors.exceptions[0]
        raise BenchError(
            f"A request failed: {type(first).__name__}: {first}.", "See the server's log (`servebook logs NAME`)."
        ) from first
