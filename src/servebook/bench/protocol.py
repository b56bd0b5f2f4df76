"""The protocol arm: servers around the scripted token source, so that what is left is the cost of the protocol."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from servebook.errors import ServebookError
from servebook.launch import Server, find_server, serve
from servebook.settings import Settings

if TYPE_CHECKING:
    from servebook.bench.paths import ServingPath

RATE_VARIABLE = "SERVEBOOK_SCRIPTED_RATE"
DEFAULT_RATE = 20.0


def rate_from(given: str) -> float:
    """A rate as the variable has it.

    Raises:
        ServebookError: it is not one.
    """
    try:
        rate = float(given)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ServebookError(
            f"{RATE_VARIABLE} is {given!r}, and not how many tokens a second the scripted source gives.",
            f"Set it to a number above 0, or unset it: then it is {DEFAULT_RATE:g}.",
        )
    return rate


SCRIPTED_RATE = rate_from(os.environ.get(RATE_VARIABLE) or str(DEFAULT_RATE))
"""Tokens a second for each stream: what the engine of a 2-core machine gives to each of 25. One H200 gives the bundled
model's 190 to each of 32, which takes more cores."""
MERGING_RATE = 190.0
"""That rate of one H200: at it our own gRPC server has several tokens in a message (3.2 with 32 callers on two cores,
measured by hand: BENCHMARKS.md), and at DEFAULT_RATE one, as tokens are further apart than it lets a stream wait."""
SENTENCE = " The quick brown fox jumps over the lazy dog and runs along the river."
"""What it says, over and over."""
# Blocks as large as a CPU's, on a GPU too: a cache of its small ones is a million objects, made at each start.
WORDS = "--distributed-executor-backend servebook.bench.scripted.ScriptedExecutor --block-size 128"
"""With these an engine has the scripted source (`bench.scripted`) for a model."""


def scripted_instance(instance: str, rate: float | None = None) -> str:
    """The name of a server around the scripted source; `rate` where that has another than SCRIPTED_RATE."""
    return f"{instance}-scripted" + (f"-{rate:g}" if rate else "")


def serve_scripted(path: ServingPath, settings: Settings, rate: float | None = None) -> Server:
    """Start a path's server, as an instance of its own, with the scripted source (`bench.scripted`) for a model; a
    server in front of vLLM gets such a vLLM. `rate` is in tokens a second for each stream; else it is SCRIPTED_RATE.

    Raises:
        LaunchError: it cannot start.
    """
    spec = path.spec or find_server(path.server)
    instance = scripted_instance(path.instance, rate)
    if not spec.has_engine:
        # Not above: this module is imported in engines, too, and protobuf bears KServe's and Triton's only apart.
        from servebook.bench.paths import find_path

        url = serve_scripted(find_path("sse"), settings, rate).url
        return serve(path.server, instance=instance, settings=settings, spec=spec, engine_url=url)
    scripted = settings.model_copy(update={"engine_args": f"{settings.engine_args} {WORDS}"})
    own = {RATE_VARIABLE: f"{rate:g}"} if rate else {}
    # Without a model it takes a fraction of the memory that the launcher would ask for.
    around = replace(spec, has_engine=False, env=lambda *asked: {**spec.env(*asked), **own})
    return serve(path.server, instance=instance, settings=scripted, spec=around)
