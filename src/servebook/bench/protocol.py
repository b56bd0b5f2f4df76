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
SENTENCE = " The quick brown fox jumps over the lazy dog and runs along the river."
"""What it says, over and over."""
# Blocks as large as a CPU's, on a GPU too: a cache of its small ones is a million objects, made at each start.
WORDS = "--distributed-executor-backend servebook.bench.scripted.ScriptedExecutor --block-size 128"
"""With these an engine has the scripted source (`bench.scripted`) for a model."""


def serve_scripted(path: ServingPath, settings: Settings) -> Server:
    """Start a path's server, as an instance of its own, with the scripted source (`bench.scripted`) for a model; a
    server in front of vLLM gets such a vLLM.

    Raises:
        LaunchError: it cannot start.
    """
    spec = path.spec or find_server(path.server)
    instance = f"{path.instance}-scripted"
    if not spec.has_engine:
        # Not above: this module is imported in engines, too, and protobuf bears KServe's and Triton's only apart.
        from servebook.bench.paths import find_path

        url = serve_scripted(find_path("sse"), settings).url
        return serve(path.server, instance=instance, settings=settings, spec=spec, engine_url=url)
    scripted = settings.model_copy(update={"engine_args": f"{settings.engine_args} {WORDS}"})
    # Without a model it takes a fraction of the memory that the launcher would ask for.
    return serve(path.server, instance=instance, settings=scripted, spec=replace(spec, has_engine=False))
