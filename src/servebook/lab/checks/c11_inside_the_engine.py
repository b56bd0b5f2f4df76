"""Checks of lab 11: a line through real measurements, room in the cache, and what the prefix cache finds."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import cache
from math import ceil
from typing import Any

import numpy as np
import requests

from servebook.bearer import bearer
from servebook.lab.feedback import ROUNDED, judge
from servebook.lab.rest import key_of
from servebook.lab.submission import Submission
from servebook.ways.inside_the_engine.looks import cache_of

LENGTHS = (16, 96, 160, 256)


@cache
def measured(url: str, key: str, model: str) -> list[float]:
    """Seconds to the first token for fresh prompts of LENGTHS."""
    seconds = []
    for length in LENGTHS:
        started = time.perf_counter()
        requests.post(
            f"{url}/v1/completions",
            auth=bearer(key),
            json={"model": model, "prompt": [random.randrange(1000, 30_000) for _ in range(length)], "max_tokens": 1},
            timeout=60,
        ).raise_for_status()
        seconds.append(time.perf_counter() - started)
    return seconds


def check_11_1(submission: Submission) -> None:
    """What was measured on this machine, and a line that bends as long prompts do."""
    reading_cost, vllm = submission.function("reading_cost"), submission.server("vllm")
    bent = [0.02 + 0.001 * length + 1e-6 * length**2 for length in (10, 400, 500, 2000)]
    measurements = measured(vllm.url, key_of(vllm), vllm.model)
    for lengths, seconds in ((LENGTHS, measurements), ((10, 400, 500, 2000), bent)):
        _judge_cost(lengths, seconds, submission.call(reading_cost, list(lengths), list(seconds)))


def _judge_cost(lengths: Sequence[int], seconds: list[float], got: Any) -> None:
    x, y = np.array(lengths), np.array(seconds)
    slope, fixed = (float(each) for each in np.polyfit(x, y, 1))
    through_ends = (y[-1] - y[0]) / (x[-1] - x[0])
    through_zero = [(x @ y) / (x @ x), np.mean(y / x)]
    judge(
        {"fixed": fixed, "per_token": slope},
        got,
        (
            not isinstance(got, dict) or got.keys() != {"fixed", "per_token"},
            "return a dict with the names fixed and per_token",
        ),
        (
            lambda got, _: _near(got, {"fixed": slope, "per_token": fixed}),
            "the two are the wrong way round: polyfit gives the slope first",
        ),
        (
            lambda got, right: _near(got, {name: 1000 * value for name, value in right.items()}),
            "these are milliseconds; the brief asks for seconds",
        ),
        (
            lambda got, _: _same(got["per_token"], through_ends),
            "that is the line from the first point to the last: all points have their say",
        ),
        (
            lambda got, _: any(_same(got["per_token"], each) for each in through_zero),
            "this line goes through 0: a request costs something even without tokens, and that is fixed",
        ),
        (
            lambda got, _: any(_same(got["per_token"], each) for each in (1 / slope, np.polyfit(y, x, 1)[0])),
            "that is tokens per second: seconds are to follow from lengths, which come first",
        ),
        ROUNDED,
        (
            lambda got, _: _same(got["per_token"], slope),
            "the slope is right; fixed is where the line is at 0 tokens, its intercept",
        ),
        otherwise="per_token is the slope of the line, fixed its intercept: where it is at 0 tokens",
        expected=f"fixed {fixed:.6f} and per_token {slope:.8f}, for {list(lengths)} tokens and {seconds} s",
        fits=_near,
    )


def _same(got: float, right: float) -> bool:
    return bool(abs(got - right) <= 1e-6 * abs(right))


def _near(got: dict[str, float], right: dict[str, float]) -> bool:
    """The same, but for rounding: `fixed` may be a small difference of large numbers."""
    close = (abs(got[name] - value) <= 1e-6 * max(map(abs, right.values())) for name, value in right.items())
    return got.keys() == right.keys() and all(close) and _same(got["per_token"], right["per_token"])


def check_11_2(submission: Submission) -> None:
    """Caches of any size, and this engine's own, with lengths beside the edges of blocks."""
    room_for, vllm = submission.function("room_for"), submission.server("vllm")
    own = cache_of(vllm.url, key_of(vllm))
    size = own.block_size
    others = [(1000, 16, 100), (1001, 16, 100), (17, 16, 100), (15, 16, 100), (1001, 16, 96), (3, 16, 100)]
    cases = [*others, *((own.blocks, size, length) for length in (3 * size + 1, 2 * size, size // 2, 2 * size - 1))]
    for blocks, block_size, length in cases:
        _judge_room(blocks, block_size, length, submission.call(room_for, blocks, block_size, length))


def _judge_room(blocks: int, block_size: int, length: int, got: Any) -> None:
    each, one_more = ceil(length / block_size), length // block_size + 1
    by_tokens = [count * block_size // length for count in (blocks - 1, blocks)]
    right = (blocks - 1) // each
    judge(
        right,
        got,
        (got is None, "the function returns nothing: `return` is missing"),
        (right == 0 and got == 1, "not even one fits there: 0 is an answer, too"),
        (
            lambda got, right: got == ceil((blocks - 1) / each) != blocks // each,
            "half a request is none: round down",
        ),
        (
            lambda got, _: got == blocks // each,
            "one block is the engine's own: so many less one are for requests",
        ),
        (
            lambda got, _: one_more > each and got in ((blocks - 1) // one_more, blocks // one_more),
            "a request that fills its blocks to the last token needs no further one",
        ),
        (
            lambda got, _: got in by_tokens,
            "no two requests share a block: the rest of each one's last block stays empty",
        ),
        (
            lambda got, _: got == blocks // each - 1 != (blocks - 2) // each,
            "the engine keeps a block, and not the room of a request: take it off before you divide",
        ),
        (lambda got, _: got != int(got), "half a request is none: round down"),
        (lambda got, right: got > right, "so many do not fit: each needs whole blocks, rounded up"),
        (lambda got, right: got < right, "more fit than that"),
        otherwise="blocks that are there, less one, by the blocks that each request needs",
        expected=f"{right} for {blocks} blocks of {block_size}, {length} tokens each",
        fits=lambda got, right: got == right and not isinstance(got, bool),
    )


SHORTER = "either prompt may be the shorter one: look no further than it goes, as zip does"


def check_11_3(submission: Submission) -> None:
    """Prompts that part early, late, in the first block, never, and one that goes on."""
    remembered = submission.function("remembered")
    text = list(range(1000, 1100))
    other = [7] * 60
    cases = [
        (text, text[:40] + other, 16),
        (text, text, 16),
        (text, text + other, 16),
        (text[:64], text[:64], 16),
        (text, text[:64], 16),
        (text, [7, *text[1:]], 16),
        (text, [*text[:20], 7, *text[21:]], 16),
        (text, text[:5], 16),
        (text, text[:90], 128),
        (text, text[:33], 32),
        (text, text[:35] + other, 7),
    ]
    for first, second, size in cases:
        got = submission.call(
            remembered, list(first), list(second), size, causes={IndexError: SHORTER, (ValueError, "zip"): SHORTER}
        )
        _judge_memory(first, second, size, got)


def _judge_memory(first: list[int], second: list[int], size: int, got: Any) -> None:
    pairs = list(zip(first, second, strict=False))
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    equal = sum(a == b for a, b in pairs)
    blocks_alike = sum(first[at : at + size] == second[at : at + size] for at in range(0, len(second) - size, size))
    judge(
        min(same, len(second) - 1) // size * size,
        got,
        (got is None, "the function returns nothing: `return` is missing"),
        (lambda got, right: got * size == right, "that is blocks: the brief asks for the tokens in them"),
        (
            lambda got, _: got == same == len(second),
            "the last token of `second` is always computed anew, and the block that holds it with it",
        ),
        (lambda got, _: got in (same, same - 1), "only whole blocks are found: cut it down to them"),
        (
            lambda got, _: equal > same and got in (equal, equal // size * size, blocks_alike * size),
            "the first token that differs ends it: what stands behind is another text, though its tokens are equal",
        ),
        (lambda got, _: got == ceil(same / size) * size, "a block that is only partly the same is none"),
        (
            lambda got, right: got == right - size,
            "one block less than there is: only the one with the last token is computed anew",
        ),
        otherwise="the same beginning of both, without the last token, cut down to whole blocks",
        expected=f"for {len(second)} tokens, {same} of them the same as before, in blocks of {size}: "
        f"{min(same, len(second) - 1) // size * size}",
        fits=lambda got, right: got == right and not isinstance(got, bool),
    )
