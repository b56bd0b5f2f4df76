"""From a thread pool around `LLM` to `server/`, one idea at a time: each step changes a few lines of the one before.

Steps 1 to 4 share one engine: `with ladder() as steps` runs them, each on a port of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from servebook.engine.arguments import engine_env
from servebook.engine.start import WITH_ENGINE
from servebook.launch.child import Child, run_engine
from servebook.settings import Settings, load_settings

START_SECONDS = 300


@dataclass(frozen=True)
class Ladder:
    """Where the steps listen, as "host:port": `grpc[1]` is step 1; and the engine's metrics page."""

    grpc: dict[int, str]
    metrics: str


def where(child: Child) -> Ladder | None:
    """What `__main__` has printed; None until it has."""
    for line in child.said().splitlines():
        if line.startswith('{"steps":'):
            said = json.loads(line)
            return Ladder(dict(enumerate(said["steps"], 1)), said["metrics"])
    return None


@contextmanager
def ladder(settings: Settings | None = None) -> Iterator[Ladder]:
    """Run steps 1 to 4 over one engine in a process of its own, which takes some seconds to start.

    Raises:
        LaunchError: it did not start; the message has the end of its output.
    """
    settings = settings or load_settings()
    env = engine_env(settings) | {"SERVEBOOK_MODEL": settings.model}
    command = [*WITH_ENGINE, __name__]
    with run_engine(settings, command, where, name="the ladder", env=env, seconds=START_SECONDS) as child:
        steps = where(child)
        assert steps is not None
        yield steps
