"""The load generator: sends jobs over one path, in a closed or an open loop, and notes when each message came."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any, NamedTuple

from servebook.errors import ServebookError

MAX_CONCURRENCY = 512
DEADLINE_SECONDS = 600
"""Of one request: far beyond any that a run sends, so that what hangs ends the run and not the night."""

REFUSED_SECONDS = 0.1
"""How long a caller pauses who was refused; asking again at once, a few would use up the jobs of all."""
CAUSE_CHARACTERS = 200


class BenchError(ServebookError):
    """A measurement that cannot be made, or must not be believed."""


class Job(NamedTuple):
    """One request: a prompt (of a completion, or the user's message of a chat) and how many tokens to ask for.

    `history` has the messages before a chat's, the user's and the assistant's in turn; `turns` counts this message and
    those that are to follow.
    """

    prompt: str
    max_tokens: int
    history: tuple[str, ...] = ()
    turns: int = 1

    def next_turn(self, answer: str) -> Job:
        """What the same user asks next."""
        return Job("And then?", self.max_tokens, (*self.history, self.prompt, answer), self.turns - 1)


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
        """Seconds per output token after the first, as in `vllm bench serve`; NaN for what came in one message."""
        if len(self.arrivals) < 2 or self.output_tokens < 2:
            return float("nan")
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring messages with text: the inter-token latency that a reader sees."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass
class Load:
    """The outcome of one run of the generator.

    `seconds` go from first send to last arrival, `cpu` is what the generator itself took in that time; `failed`
    counts the requests that were refused or broke off, by cause, and `unsent` the turns that could not follow on those.
    """

    samples: list[Sample]
    seconds: float = 0.0
    cpu: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    unsent: int = 0

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
        BenchError: `concurrency` is not within 1 and 512, or every request failed.
    """
    if not 1 <= concurrency <= MAX_CONCURRENCY:
        raise BenchError(f"Concurrency {concurrency} is not within 1 and {MAX_CONCURRENCY}.", "Choose one that is.")
    queue: Iterator[Job] = iter(jobs)

    async def caller(load: Load) -> None:
        for job in queue:
            await _talk(send, job, load)

    return await _run(lambda load: (caller(load) for _ in range(concurrency)))


async def open_loop(send: Send, jobs: Iterable[Job], rate: float, seed: int = 0) -> Load:
    """Jobs begun at random times (a Poisson process), whether or not others have ended.

    `rate` is in requests a second, on average: jobs of several turns begin as much more seldom.

    Raises:
        BenchError: every request failed.
    """
    draw = random.Random(seed)

    async def later(load: Load, job: Job, due: float) -> None:
        await asyncio.sleep(due - perf_counter())
        await _talk(send, job, load, due)

    def calls(load: Load) -> Iterator[Coroutine[Any, Any, None]]:
        due = perf_counter()
        for job in jobs:
            yield later(load, job, due)
            due += draw.expovariate(rate / job.turns)

    return await _run(calls)


async def _talk(send: Send, job: Job, load: Load, due: float | None = None) -> None:
    """One conversation. A request that fails ends it, is counted, and the run goes on: a service must be able to."""
    while True:
        try:
            sample = await ask(send, job, due)
        except Exception as error:
            load.failed[_cause(error)] += 1
            load.unsent += job.turns - 1
            await asyncio.sleep(REFUSED_SECONDS)
            return
        load.samples.append(sample)
        if job.turns == 1:
            return
        job, due = job.next_turn(sample.text), None


REQUEST_ID = re.compile(r"(?<![\w-])[\w-]*[0-9a-f]{12}[\w-]*")
"""A word with as many hexadecimal digits in a row as a UUID ends with."""


def _cause(error: Exception) -> str:
    """What tells one kind of failure from another, without the ids of requests, which would make each its own kind."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    kind = f"{code().name}: {details()}" if callable(code) and callable(details) else f"{type(error).__name__}: {error}"
    return REQUEST_ID.sub("…", kind[: 5 * CAUSE_CHARACTERS])[:CAUSE_CHARACTERS]


async def _run(calls: Callable[[Load], Iterable[Coroutine[Any, Any, None]]]) -> Load:
    load, started, cpu = Load([]), perf_counter(), process_time()
    async with asyncio.TaskGroup() as group:
        for call in calls(load):
            group.create_task(call)
    if not load.samples:
        causes = ", ".join(f"{cause} ({count} times)" for cause, count in load.failed.most_common(3))
        raise BenchError(f"Every request failed: {causes}.", "See the server's log (`servebook logs NAME`).")
    load.seconds = max(sample.ended for sample in load.samples) - started
    load.cpu = process_time() - cpu
    return load
