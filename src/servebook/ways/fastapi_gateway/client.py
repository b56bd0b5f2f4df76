"""Clients of the gateway's chat API, made with httpx: the prompt is a message, which the model's template surrounds."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse, connect_sse

from servebook.settings import url_of
from servebook.ways.client import Answer, Piece

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)
"""None of the client's own, where httpx has 100: the gateway is the one to say no, and it does so at once."""

NO_GATEWAY = "no answer of the gateway's; another server, or a proxy before it, is at this address"


class GatewayClient:
    """A client of the gateway at `url` ("http://host:port"); use it in a `with` block, from any number of threads.

    `sampling` are fields of the body: `max_tokens`, `temperature`, `system`, `history`. Errors are `httpx.HTTPError`,
    also that of a stream which breaks off.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.client = httpx.Client(base_url=url_of(url), headers=key_header(api_key), limits=LIMITS)

    def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:
        """Return the whole answer; `timeout` bounds each wait for bytes, in seconds."""
        body = {"message": prompt} | sampling
        return read_answer(accepted(self.client.post("/chat", json=body, timeout=timeout)))

    def stream(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Generator[Piece]:
        """Yield what is new as it comes; leaving the loop, or closing the generator, closes the connection."""
        body = {"message": prompt} | sampling
        with connect_sse(self.client, "POST", "/chat/stream", json=body, timeout=timeout) as events:
            if not events.response.is_success:
                events.response.read()
            accepted(events.response)
            ended = False
            for event in events.iter_sse():
                if ended and event.data == "[DONE]":
                    return
                yield (piece := read_piece(event))
                ended = bool(piece.finish_reason)
        raise httpx.RemoteProtocolError("the stream ended without [DONE]")

    def __enter__(self) -> GatewayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()


class GatewayAioClient:
    """The same for asyncio; use it in an `async with` block."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.client = httpx.AsyncClient(base_url=url_of(url), headers=key_header(api_key), limits=LIMITS)

    async def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:  # noqa: ASYNC109
        """Return the whole answer; cancelling the task closes the connection."""
        body = {"message": prompt} | sampling
        return read_answer(accepted(await self.client.post("/chat", json=body, timeout=timeout)))

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
            if not events.response.is_success:
                await events.response.aread()
            accepted(events.response)
            ended = False
            async for event in events.aiter_sse():
                if ended and event.data == "[DONE]":
                    return
                yield (piece := read_piece(event))
                ended = bool(piece.finish_reason)
        raise httpx.RemoteProtocolError("the stream ended without [DONE]")

    async def __aenter__(self) -> GatewayAioClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()


def key_header(api_key: str | None) -> dict[str, str]:
    """How the key travels."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def accepted(response: httpx.Response) -> httpx.Response:
    """The same response, where it is a success.

    Raises:
        httpx.HTTPStatusError: it is none; with the gateway's own words, where it was the gateway that refused.
    """
    if response.is_success:
        return response
    try:
        said = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        said = NO_GATEWAY
    raise httpx.HTTPStatusError(
        f"{response.status_code} {response.reason_phrase} from {response.url}: {said}",
        request=response.request,
        response=response,
    )


def read_answer(response: httpx.Response) -> Answer:
    """What `/chat` answers.

    Raises:
        httpx.RemoteProtocolError: it is something else.
    """
    try:
        found = response.json()
        usage = found["usage"]
        return Answer(found["response"], usage["completion_tokens"], usage["prompt_tokens"], found["finish_reason"])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise httpx.RemoteProtocolError(NO_GATEWAY) from None


def read_piece(event: ServerSentEvent) -> Piece:
    """What an event of `/chat/stream` brings: the last one counts all tokens.

    Raises:
        httpx.RemoteProtocolError: it tells of an error, or is something else.
    """
    try:
        found = event.json()
        error = found["error"]["message"] if event.event == "error" else None
        if error is None:
            usage = found.get("usage") or {}
            return Piece(found["text"], usage.get("completion_tokens", 0), found.get("finish_reason"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise httpx.RemoteProtocolError(NO_GATEWAY) from None
    raise httpx.RemoteProtocolError(error)
