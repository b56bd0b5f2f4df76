"""The table of servers: how each is started, when it is ready, what it says on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from servebook.engine import engine_argv
from servebook.errors import LaunchError
from servebook.settings import Settings

Endpoints = Mapping[str, str]

ENGINE_PHASES = {
    "starting the engine": "Initializing a V1 LLM engine",
    "loading weights": "Starting to load model",
    "warming up": "Loading weights took",
    "opening the port": "init engine",
}
"""What a reader sees while waiting, and the words in vLLM's log that begin it."""


@dataclass(frozen=True)
class ServerSpec:
    """One kind of server.

    `argv` gives the command; the word `"{http}"` (or another kind of port) stands for the port chosen
    at start. `ready` asks the server itself. `needs` names the servers that must be up before.
    """

    name: str
    about: str
    ports: tuple[str, ...]
    argv: Callable[[Settings, Path, dict[str, Endpoints]], list[str]]
    ready: Callable[[Endpoints], bool]
    phases: Mapping[str, str]
    has_engine: bool = True
    needs: tuple[str, ...] = ()


def http_ok(address: str, path: str, timeout: float = 2.0) -> bool:
    """Whether GET answers 200. Readiness needs no client library, so the launcher stays light to import."""
    try:
        with urlopen(Request(f"http://{address}{path}"), timeout=timeout) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _vllm(settings: Settings, model: Path, _: dict[str, Endpoints]) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"),
        *("--host", settings.host, "--port", "{http}"),
        "--disable-uvicorn-access-log",
        *engine_argv(settings, model),
    ]


SERVERS: dict[str, ServerSpec] = {
    spec.name: spec
    for spec in (
        ServerSpec(
            name="vllm",
            about="vLLM's OpenAI server",
            ports=("http",),
            argv=_vllm,
            ready=lambda at: http_ok(at["http"], "/health"),
            phases=ENGINE_PHASES,
        ),
    )
}


def find_server(name: str) -> ServerSpec:
    """The spec of `name`.

    Raises:
        LaunchError: no such server; the message lists them.
    """
    try:
        return SERVERS[name]
    except KeyError:
        raise LaunchError(f"There is no server {name!r}.", f"Choose from {', '.join(SERVERS)}.") from None
