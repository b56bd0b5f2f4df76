"""The protocol arm: servers around the scripted token source, so that what is left is the cost of the protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from servebook.launch import Server, ServerSpec, find_server, serve
from servebook.launch.servers import Endpoints
from servebook.settings import Settings

SCRIPTED_RATE = 20.0
"""Tokens a second for each stream: what a 2-core machine's engine gives to each of 25."""


def scripted(server: str, rate: float = SCRIPTED_RATE) -> ServerSpec:
    """How to start `server` around the scripted source (`bench.scripted`) instead of an engine."""
    spec = find_server(server)

    def argv(settings: Settings, model: Path, needs: dict[str, Endpoints]) -> list[str]:
        python, dash_m, *words = spec.argv(settings, model, needs)
        return [python, dash_m, "servebook.bench.scripted", str(rate), *words]

    return replace(spec, argv=argv, has_engine=False)


def serve_scripted(server: str, settings: Settings, rate: float = SCRIPTED_RATE) -> Server:
    """Start `server` without an engine, as an instance of its own; a server in front of vLLM gets a scripted vLLM.

    Raises:
        LaunchError: it cannot start.
    """
    spec = find_server(server)
    if not spec.has_engine:
        upstream = serve_scripted("vllm", settings, rate)
        return serve(server, instance=f"{server}-scripted", settings=settings, engine_url=upstream.url)
    return serve(server, instance=f"{server}-scripted", settings=settings, spec=scripted(server, rate))
