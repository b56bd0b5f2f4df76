"""Clients of the gateway's chat API, made with httpx: the prompt is a message, which the model's template surrounds."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse, connect_sse

from servebook.ways.client import Answer, Piece

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)
"""None of the client's own, where httpx has 100: the gateway is the one to say no, and it does so at once."""


class GatewayClient:
    """A client of the gateway at `url` ("http://host:port"); use it in a `with` block, from any number of threads.

    `sampling` are fields of the body: `max_tokens`, `temperature`, `system`, `history`. Errors are `httpx.HTTPError`,
    also that of a stream which breaks off.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.client = httpx.Client(base_url=url, headers=key_header(api_key), limits=LIMITS)

    def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:
        """Return the whole answer; `timeout` bounds each wait for bytes, in seconds."""
        body = {"message": prompt} | sampling
        return read_answer(self.client.post("/chat", json=body, timeout=timeout).raise_for_status())

    def stream(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Generator[Piece]:
        """Yield what is new as it comes; leaving the loop, or closing the generator, closes the connection."""
        body = {"message": prompt} | sampling
        with connect_sse(self.client, "POST", "/chat/stream", json=body, timeout=timeout) as events:
            events.response.raise_for_status()
            for event in events.iter_sse():
                if event.data == "[DONE]":
                    return
                yield read_piece(event)
        raise httpx.RemoteProtocolError("the stream ended without [DONE]")

    def __enter__(self) -> GatewayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()


class GatewayAioClient:
    """The same for asyncio; use it in an `async with` block."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.client = httpx.AsyncClient(base_url=url, headers=key_header(api_key), limits=LIMITS)

    async def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:  # noqa: ASYNC109
        """Return the whole answer; cancelling the task closes the connection."""
        body = {"message": prompt} | sampling
        return read_answer((await self.client.post("/chat", json=body, timeout=timeout)).raise_for_status())

    async def stream(
        self,
        prompt: str,
        *,
        timeout: float = 60,  # noqa: ASYNC109
        **sampling: Any,
    ) -> AsyncGenerator[Piece]:
        """Yield what is new as it comes; to leave early, wrap it in `contextlib.aclosing`."""
        body = {"message": prompt} | sampling
        async with aconnect_sse(self.client, "POST", "/chat/stream", json=body, timeout=timeout) as events:
            events.response.raise_for_status()
            async for event in events.aiter_sse():
                if event.data == "[DONE]":
                    return
                yield read_piece(event)
        raise httpx.RemoteProtocolError("the stream ended without [DONE]")

    async def __aenter__(self) -> GatewayAioClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()


def key_header(api_key: str | None) -> dict[str, str]:
    """How the key travels."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def read_answer(response: httpx.Response) -> Answer:
    """What `/chat` answers."""
    found = response.json()
    usage = found["usage"]
    return Answer(found["response"], usage["completion_tokens"], usage["prompt_tokens"], found["finish_reason"])


def read_piece(event: ServerSentEvent) -> Piece:
    """What an event of `/chat/stream` brings: the last one counts all tokens.

    Raises:
        httpx.RemoteProtocolError: it tells of an error.
    """
    found = event.json()
    if event.event == "error":
        raise httpx.RemoteProtocolError(found["error"]["message"])
    usage = found.get("usage") or {}
    return Piece(found["text"], usage.get("completion_tokens", 0), found.get("finish_reason"))
