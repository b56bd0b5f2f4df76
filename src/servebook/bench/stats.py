"""Percentiles of a load, and ratios between arms with their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, Field

from servebook.bench.load import Load

RESAMPLES = 4000


class Percentiles(BaseModel):
    """Milliseconds below which half, nine tenths and 99 hundredths of the values lie."""

    p50: float
    p90: float
    p99: float


class Summary(BaseModel):
    """What one load showed."""

    requests: int
    output_tokens: int
    seconds: float = Field(description="From the first send to the last arrival.")
    tokens_per_s: float
    requests_per_s: float
    tokens_per_message: float = Field(description="1 where no tokens were merged; all of them without streaming.")
    ttft_ms: Percentiles = Field(description="From the moment the request was due to its first text.")
    itl_ms: Percentiles | None = Field(description="Between messages with text; None without streaming.")
    tpot_ms: Percentiles | None = Field(description="Per request: time after the first message / tokens after it.")


class Estimate(BaseModel):
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
        output_tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        requests_per_s=len(samples) / seconds,
        tokens_per_message=tokens / sum(len(sample.arrivals) for sample in samples),
        ttft_ms=percentiles([sample.ttft for sample in samples]),
        itl_ms=percentiles(gaps) if gaps else None,
        tpot_ms=percentiles([sample.tpot for sample in samples]) if gaps else None,
    )


def ratio(arm: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Median of arm / reference over blocks that were measured in pairs, side by side in time.

    What disturbs both blocks of a pair (the machine's clock) drops out of their ratio, and what disturbs one block
    (a neighbour on the machine) out of the median. The interval is a percentile bootstrap over the pairs.

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
    pairs = compare(arm, reference)
    draws = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    low, high = np.percentile(np.median(pairs[draws], axis=1), (2.5, 97.5))
    return Estimate(value=float(np.median(pairs)), low=float(low), high=float(high))
