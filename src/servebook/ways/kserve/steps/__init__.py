"""From a predictor that blocks to `server/`, one idea at a time: each step changes a few lines of the one before.

No step has an engine: each hands on to one that speaks OpenAI's API. `with ladder(upstream) as steps` runs them all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from servebook.launch.child import Child, run_child
from servebook.launch.probes import http_ok

START_SECONDS = 120


def where(child: Child) -> list[str]:
    """The addresses that `__main__` has printed, as "host:port"; none before."""
    said = next((line for line in child.said().splitlines() if line.startswith('["127.')), "[]")
    return [str(each) for each in json.loads(said)]


@contextmanager
def ladder(upstream: str) -> Iterator[list[str]]:
    """Run steps 0 to 3 and give their URLs; `upstream` is what stands before `/v1` at the engine.

    Raises:
        LaunchError: they did not start; the message has the end of their output.
    """

    def ready(child: Child) -> bool:
        steps = where(child)
        return bool(steps) and all(http_ok(step, "/v2/health/ready") for step in steps)

    words = [sys.executable, "-m", __name__, upstream]
    with run_child(words, ready, name="the ladder", seconds=START_SECONDS) as child:
        yield [f"http://{step}" for step in where(child)]
