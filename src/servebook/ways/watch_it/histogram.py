"""A quantile from a histogram's buckets, as Prometheus reckons it."""

from __future__ import annotations

import math
from collections.abc import Mapping


def quantile(share: float, buckets: Mapping[float, float]) -> float:
    """The value below which `share` (above 0, up to 1) of the observations lie; NaN where there are none, or no bounds.

    `buckets` maps each upper bound to the number of observations up to it; the last bound is infinity. Within a bucket
    the observations count as evenly spread: what comes out is a guess inside the right bucket. Above the last finite
    bound nothing is known, and that bound is the answer: Prometheus' `histogram_quantile`, described at
    https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile.
    """
    if len(buckets) < 2:  # nothing is known of the values; with labels there is no bucket before the first of them
        return math.nan
    bounds = sorted(buckets)
    wanted = share * buckets[bounds[-1]]
    if not wanted:
        return math.nan
    lower, below = 0.0, 0.0
    for upper in bounds:
        if buckets[upper] >= wanted:
            break
        lower, below = upper, buckets[upper]
    if math.isinf(upper):
        return lower
    return lower + (upper - lower) * (wanted - below) / (buckets[upper] - below)
