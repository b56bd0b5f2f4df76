"""What a server's front costs in CPU: so much for a request, and so much for each of its tokens."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, Field

from servebook.bench import workload
from servebook.bench.arms import Arm, Workload, jobs_for

LENGTHS = (8, 16, 32, 64)
"""Answers in tokens, on average: what differs between them is what tokens cost."""


class Cost(BaseModel):
    """CPU of all processes of a front, under one number of callers: with fewer, each wake-up serves fewer streams and a
    token costs more. Errors are standard errors of the fit."""

    path: str
    callers: int
    processes: int = Field(description="That did a tenth of the work or more, and may each have a core.")
    busiest: float = Field(description="The part of the work that the busiest process did.")
    request_us: float
    request_error: float
    token_us: float
    token_error: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.request_us:.0f} ± {self.request_error:.0f} µs a request, "
            f"{self.token_us:.0f} ± {self.token_error:.0f} µs a token; processes: {self.processes}"
        )

    def per_token_us(self, tokens: float) -> float:
        """What a token costs in answers of so many, among which what their request costs is spread."""
        return self.token_us + self.request_us / tokens

    def core_full_at(self, tokens: float) -> float:
        """Tokens a second, in answers of so many tokens, at which the busiest process has used up one core."""
        return 1e6 / self.busiest / self.per_token_us(tokens)


def fit(requests: list[int], tokens: list[int], seconds: list[float]) -> tuple[float, float, float, float]:
    """The line `CPU = request · requests + token · tokens` through blocks: both costs in µs, each before its error.

    Raises:
        ValueError: there are fewer than three blocks, so no error could be told.
    """
    if len(seconds) < 3:
        raise ValueError(f"{len(seconds)} blocks are too few for a line and its error")
    counts = np.asarray(requests, dtype=float)
    # Per request, so that a block with long answers does not rule the fit.
    x = np.column_stack([np.ones(len(counts)), np.asarray(tokens) / counts])
    y = 1e6 * np.asarray(seconds) / counts
    found, *_ = np.linalg.lstsq(x, y, rcond=None)
    spread = ((y - x @ found) ** 2).sum() / (len(y) - 2)
    request_error, token_error = np.sqrt(np.diag(spread * np.linalg.inv(x.T @ x)))
    return float(found[0]), float(request_error), float(found[1]), float(token_error)


async def fit_cost(arm: Arm, callers: int, rounds: int = 4) -> Cost:
    """Measure blocks of an answer for each caller, the lengths in turns, and fit the line; `arm.blocks` has them."""
    requests: list[int] = []
    tokens: list[int] = []
    seconds: list[float] = []
    spent = np.zeros(len(arm.tree.front))
    seeds = workload.seeds()
    await arm.warm_up(callers)
    for length in LENGTHS * rounds:
        arm.jobs = jobs_for(arm.path, Workload(max_tokens=length), next(seeds))
        before = np.array(arm.tree.by_process())
        load = (await arm.block(callers, callers, None, 0)).load
        took = np.array(arm.tree.by_process()) - before
        requests.append(len(load.samples))
        tokens.append(load.output_tokens)
        seconds.append(float(took.sum()))
        spent += took
    shares = spent / spent.sum()
    request, request_error, token, token_error = fit(requests, tokens, seconds)
    return Cost(
        path=arm.path.name,
        callers=callers,
        processes=int((shares >= 0.1).sum()),
        busiest=float(shares.max()),
        request_us=request,
        request_error=request_error,
        token_us=token,
        token_error=token_error,
    )
