"""One adapter per path: how a client of that path sends a job and reads the answer, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from servebook.bench.load import BenchError, Send
from servebook.bench.paths import openai
from servebook.launch import Server

Open = Callable[[Server], AbstractAsyncContextManager[Send]]


@dataclass(frozen=True)
class Path:
    """A way from a client to the engine.

    `against` names the path of vLLM's own server that it is compared with: the one that asks the engine for the
    same work. `cannot` lists what its answers do not carry, in the terms of the parity test.
    """

    name: str
    about: str
    server: str
    open: Open
    against: str = "sse"
    chat: bool = False
    streams: bool = True
    cannot: tuple[str, ...] = ()


def _openai(connect: Callable[..., AbstractAsyncContextManager[Send]], chat: bool) -> Open:
    return lambda server: connect(server.url, server.model, server.settings.key, chat=chat)


PATHS: dict[str, Path] = {
    path.name: path
    for path in (
        Path("sse", "vLLM's OpenAI server, completion as SSE", "vllm", _openai(openai.sse, chat=False)),
        Path("rest", "the same, one JSON answer", "vllm", _openai(openai.rest, chat=False), streams=False),
        Path(
            "sse-chat",
            "vLLM's OpenAI server, chat as SSE",
            "vllm",
            _openai(openai.sse, chat=True),
            against="sse-chat",
            chat=True,
        ),
        Path(
            "rest-chat",
            "the same, one JSON answer",
            "vllm",
            _openai(openai.rest, chat=True),
            against="sse-chat",
            chat=True,
            streams=False,
        ),
    )
}


def find_path(name: str) -> Path:
    """The path called `name`.

    Raises:
        BenchError: there is none; the message lists them.
    """
    try:
        return PATHS[name]
    except KeyError:
        raise BenchError(f"There is no path {name!r}.", f"Choose from {', '.join(PATHS)}.") from None
