"""Looks at a working engine through its Prometheus page: its steps, its batch, its queue, its blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from servebook.errors import ServebookError
from servebook.ways.metrics import families, page_text

T = TypeVar("T")

EVERY_SECONDS = 0.02
"""Between two looks: each costs the server a page, and the engine computes on the same cores."""

SAMPLES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "usage": "vllm:kv_cache_usage_perc",
    "steps": "vllm:iteration_tokens_total_count",
    "tokens": "vllm:iteration_tokens_total_sum",
    "preemptions": "vllm:num_preemptions_total",
    "hits": "vllm:prefix_cache_hits_total",
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
}
"""Which sample of the page is which field of a `Look`."""


@dataclass(frozen=True)
class Look:
    """What the page said at one moment; `at` is in seconds of `time.perf_counter`.

    Now: requests `running` (in the batch) and `waiting` (in the queue), and `usage`, the part of the KV blocks that is
    held, 0 to 1. Since the engine started: its `steps` that gave somebody a token; the `tokens` computed in them, those
    of a prompt counted in the step that ends it; `preemptions`; prompt tokens found in the prefix cache (`hits`); and
    tokens `drafted` and `accepted` by speculative decoding, 0 where there is none.
    """

    at: float
    running: int = 0
    waiting: int = 0
    usage: float = 0.0
    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    hits: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Cache:
    """The KV cache of an engine: `blocks` of `block_size` tokens; in `bytes`, 0 where the engine chose itself."""

    blocks: int
    block_size: int
    bytes: int


@dataclass(frozen=True)
class Stretch:
    """Steps in a row that were alike: numbers `first` to `last`, tokens per step, requests in batch and queue."""

    first: int
    last: int
    tokens: float
    running: int
    waiting: int


def look(url: str, key: str | None = None) -> Look:
    """Read the page of the vLLM server at `url` once. The values of several engines behind it are summed.

    Raises:
        ServebookError: the page cannot be read, or is not that of a vLLM server.
    """
    page, at = page_text(url, key), time.perf_counter()
    lines = page.splitlines()
    values = {
        # The few lines that are wanted: parsing the whole page would take as long as a step of the engine.
        field: [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        for field, name in SAMPLES.items()
    }
    if not any(values.values()):
        said = f"{url} says nothing of an engine's work."
        raise ServebookError(said, "Is it a vLLM server, without --disable-log-stats?")
    found = {field: sum(each) for field, each in values.items()}
    usage = found.pop("usage")
    return Look(at, usage=usage, **{field: round(value) for field, value in found.items()})


def cache_of(url: str, key: str | None = None) -> Cache:
    """The KV cache of the vLLM server at `url`, as its own page has it.

    Raises:
        ServebookError: the page cannot be read, or is not that of a vLLM server.
    """
    for family in families(page_text(url, key)):
        if family.name == "vllm:cache_config_info":
            labels = family.samples[0].labels
            size = labels["kv_cache_memory_bytes"]
            return Cache(int(labels["num_gpu_blocks"]), int(labels["block_size"]), 0 if size == "None" else int(size))
    raise ServebookError(f"{url} says nothing of a KV cache.", "Is it a vLLM server?")


async def watch(url: str, *work: Coroutine[object, object, T], key: str | None = None) -> tuple[list[T], list[Look]]:
    """Do all of `work` at once, and look again and again until it is done: the results, and the looks.

    The first look is before the work, the last one after it.
    """
    try:
        looks = [await asyncio.to_thread(look, url, key)]
    except BaseException:
        for each in work:
            each.close()  # else Python complains that nobody has awaited it
        raise
    tasks = [asyncio.ensure_future(each) for each in work]
    doing = asyncio.gather(*tasks)
    try:
        while not doing.done():
            looks.append(await asyncio.to_thread(look, url, key))
            await asyncio.wait([doing], timeout=EVERY_SECONDS)
        looks.append(await asyncio.to_thread(look, url, key))
    finally:
        for task in tasks:  # where one of them or a look fails, or the caller is cancelled
            task.cancel()
        await asyncio.gather(doing, *tasks, return_exceptions=True)
    return await doing, looks


def stretches(looks: Sequence[Look]) -> Iterator[Stretch]:
    """The steps that the looks saw, numbered from the first look; alike neighbours are one stretch.

    An engine that takes several steps between two looks shows their mean.
    """
    row: Stretch | None = None
    for before, now in pairwise(looks):
        if now.steps == before.steps:
            continue
        tokens = (now.tokens - before.tokens) / (now.steps - before.steps)
        first = before.steps - looks[0].steps + 1
        if row and (row.tokens, row.running, row.waiting) == (tokens, now.running, now.waiting):
            first = row.first
        elif row:
            yield row
        row = Stretch(first, now.steps - looks[0].steps, tokens, now.running, now.waiting)
    if row:
        yield row
