"""Percentiles of a load, and ratios between arms with their confidence intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, Field

from servebook.bench.load import Load

CONFIDENCE = 0.95


class Percentiles(BaseModel):
    """Milliseconds below which half, nine tenths and 99 hundredths of the values lie."""

    p50: float
    p90: float
    p99: float


class Summary(BaseModel):
    """What one load showed."""

    requests: int = Field(description="That ended well.")
    output_tokens: int
    failed: dict[str, int] = Field(default={}, description="Requests that were refused or broke off, by cause.")
    seconds: float = Field(description="From the first send to the last arrival.")
    tokens_per_s: float
    requests_per_s: float
    tokens_per_message: float = Field(description="1 where no tokens were merged; all of them without streaming.")
    ttft_ms: Percentiles = Field(description="From the moment the request was due to its first text.")
    itl_ms: Percentiles | None = Field(description="Between messages with text; None without streaming.")
    tpot_ms: Percentiles | None = Field(
        description="Per request: time after the first message / tokens after the first."
    )


class ServiceLevel(BaseModel):
    """What a user must get for a request to count as a good one."""

    ttft_ms: float = Field(default=1000, gt=0, description="To the first text, at most.")
    tpot_ms: float = Field(default=100, gt=0, description="Per token after that, at most: ten tokens a second.")


class Estimate(BaseModel):
    """A value with its 95 % confidence interval, and what it was made of."""

    value: float
    low: float | None = Field(default=None, description="None: five pairs or fewer, which can give no interval.")
    high: float | None = Field(default=None, description="None where low is.")
    pairs: int = Field(description="Blocks measured side by side; 0: counted, not sampled.")
    each: list[float] = Field(default=[], description="Every pair's own value; empty where a run did not keep them.")

    def __str__(self) -> str:
        return self.text(3)

    def text(self, digits: int) -> str:
        """The value with its interval in brackets, or with the number of pairs where they are too few for one."""
        value = f"{self.value:.{digits}f}"
        if self.low is None or self.high is None:
            return f"{value} ({self.pairs} pairs)"
        return f"{value} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def leaves_out(self, value: float) -> bool:
        """Whether there is an interval, and `value` is outside of it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """Of values in seconds; NaN is left out.

    Raises:
        ValueError: there is no value.
    """
    values = np.asarray(seconds, dtype=float)
    values = values[~np.isnan(values)]
    if not values.size:
        raise ValueError("no values")
    p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)) * 1e3)
    return Percentiles(p50=p50, p90=p90, p99=p99)


def summarize(*loads: Load) -> Summary:
    """One summary of several loads of the same arm, as if they were one."""
    samples = [sample for load in loads for sample in load.samples]
    seconds = sum(load.seconds for load in loads)
    tokens = sum(load.output_tokens for load in loads)
    gaps = [gap for sample in samples for gap in sample.gaps]
    return Summary(
        requests=len(samples),
        failed=sum((load.failed for load in loads), Counter()),
        output_tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        requests_per_s=len(samples) / seconds,
        tokens_per_message=tokens / sum(len(sample.arrivals) for sample in samples),
        ttft_ms=percentiles([sample.ttft for sample in samples]),
        itl_ms=percentiles(gaps) if gaps else None,
        tpot_ms=percentiles([sample.tpot for sample in samples]) if gaps else None,
    )


def goodput(load: Load, level: ServiceLevel, rate: float | None = None) -> float:
    """Requests a second that kept the service level; a failed one did not, and a whole answer has no TPOT to keep.

    Of an open loop at `rate` it is their share of all that were to be sent: its last answers come when nothing is sent
    any more.
    """
    good = sum(sample.ttft * 1e3 <= level.ttft_ms and not sample.tpot * 1e3 > level.tpot_ms for sample in load.samples)
    return rate * good / (len(load.samples) + load.failed.total() + load.unsent) if rate else good / load.seconds


def ratio(arm: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Median of arm / reference over blocks that were measured in pairs, side by side in time.

    What disturbs both blocks of a pair (the machine's clock) drops out of their ratio, and what disturbs one block
    (a neighbour on the machine) out of the median. The interval is that of the sign test, which assumes nothing about
    the noise but that one pair tells nothing about the next (`outer_rank`).

    Raises:
        ValueError: the blocks are no pairs, or there are none.
    """
    return _estimate(np.divide, arm, reference)


def difference(arm: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Median of arm - reference, in the unit of the values; the rest as in `ratio`."""
    return _estimate(np.subtract, arm, reference)


def _estimate(compare: np.ufunc, arm: Sequence[float], reference: Sequence[float]) -> Estimate:
    if len(arm) != len(reference) or not arm:
        raise ValueError(f"{len(arm)} blocks of the arm and {len(reference)} of the reference are no pairs")
    pairs: list[float] = compare(arm, reference).tolist()
    ordered, rank = sorted(pairs), outer_rank(len(pairs))
    low, high = (ordered[rank - 1], ordered[-rank]) if rank else (None, None)
    return Estimate(value=float(np.median(pairs)), low=low, high=high, pairs=len(pairs), each=pairs)


def outer_rank(pairs: int) -> int:
    """Which of the smallest and of the largest pairs bound the 95 % interval of the median; 0: none does.

    Each pair lies above the true median or below it, like a coin. That all of six fall on one side happens in 1 of 32
    cases, so the smallest and the largest of six hold the median in 97 % of all. Of five they would in 94 %, so five
    give no interval; of 24, the seventh from either end will do.
    """
    rank, outside = 0, 1
    while 2 * outside / 2**pairs <= 1 - CONFIDENCE:
        rank += 1
        outside += math.comb(pairs, rank)
    return rank
