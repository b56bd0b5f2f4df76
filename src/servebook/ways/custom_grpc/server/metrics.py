"""What the server tells Prometheus; vLLM adds its own metrics (`vllm:…`) to the same page."""

from __future__ import annotations

import asyncio
from functools import cache

from prometheus_client import Counter, Gauge, Histogram

LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

SERVING = Gauge("servebook_grpc_serving", "1 while the port serves, else 0", multiprocess_mode="livemax")
OPEN_CALLS = Gauge(
    "servebook_grpc_open_calls", "Calls that were admitted and have not ended", multiprocess_mode="livesum"
)
CALLS = Counter("servebook_grpc_calls", "Calls that ended", ["method", "code"])
TOKENS = Counter("servebook_grpc_tokens", "Tokens of calls that ended", ["kind"])
FIRST_TOKEN = Histogram(
    "servebook_grpc_time_to_first_token_seconds", "From a call's arrival to its first message", buckets=LATENCY_BUCKETS
)
DURATION = Histogram("servebook_grpc_call_seconds", "From a call's arrival to its end", buckets=LATENCY_BUCKETS)


@cache
def _tasks() -> Gauge:
    return Gauge("servebook_grpc_asyncio_tasks", "Tasks on the event loop: without calls, always the same few")


def watch_tasks() -> None:
    """Count the tasks of the running event loop whenever somebody asks; of one front, not of several."""
    loop = asyncio.get_running_loop()
    _tasks().set_function(lambda: len(asyncio.all_tasks(loop)))
