"""vLLM's own OpenAI server over HTTP: completions and chat, as one JSON answer or as SSE.

aiohttp and orjson, not the OpenAI SDK: the SDK builds a pydantic object per chunk, and on two cores the
generator's CPU would be taken from the server that it measures.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from servebook.bench.load import DEADLINE_SECONDS, BenchError, Job, Message, Send
from servebook.launch import Server
from servebook.ways.limits import POOL_IDLE_SECONDS


@asynccontextmanager
async def http_session(base_url: str, key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session in which the load decides how many connections are open."""
    async with aiohttp.ClientSession(
        base_url,
        # A POST that meets the moment in which the server closes the connection is lost.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=POOL_IDLE_SECONDS),
        timeout=aiohttp.ClientTimeout(total=DEADLINE_SECONDS),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    ) as session:
        yield session


async def sse_events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The `data:` of each event, as soon as its blank line has come."""
    rest = b""
    async for data in response.content.iter_any():
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            yield event.removeprefix(b"data: ")


async def check(response: aiohttp.ClientResponse) -> None:
    """Refuse to measure an error.

    Raises:
        BenchError: with the status and the beginning of the body.
    """
    if response.status != 200:
        raise BenchError(f"HTTP {response.status}: {(await response.text())[:300]}", "See the server's log.")


def turns(job: Job) -> list[dict[str, str]]:
    """The messages before a chat's, as OpenAI's API and our gateway have them."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, job.history, strict=False)]


def _body(model: str, job: Job, chat: bool) -> dict[str, Any]:
    prompt = {"messages": [*turns(job), {"role": "user", "content": job.prompt}]} if chat else {"prompt": job.prompt}
    return {"model": model, "max_tokens": job.max_tokens, "temperature": 0} | prompt


def _route(chat: bool, prefix: str) -> str:
    return f"{prefix}/v1/chat/completions" if chat else f"{prefix}/v1/completions"


@asynccontextmanager
async def rest(server: Server, chat: bool = False) -> AsyncIterator[Send]:
    """The whole answer as one JSON object."""
    async with http_session(server.url, server.settings.key) as session:

        async def send(job: Job) -> AsyncIterator[Message]:
            async with session.post(_route(chat, ""), json=_body(server.model, job, chat)) as response:
                await check(response)
                answer = orjson.loads(await response.read())
            choice, usage = answer["choices"][0], answer["usage"]
            text = choice["message"]["content"] if chat else choice["text"]
            yield Message(text, choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])

        yield send


@asynccontextmanager
async def sse(server: Server, chat: bool = False, prefix: str = "", model: str = "") -> AsyncIterator[Send]:
    """Server-sent events. Usage is asked for once, in the last event, as a plain client does: it costs least.

    `prefix` and `model` are for a server that has the same API under a path and a model name of its own.
    """
    async with http_session(server.url, server.settings.key) as session:

        async def send(job: Job) -> AsyncIterator[Message]:
            body = _body(model or server.model, job, chat) | {"stream": True, "stream_options": {"include_usage": True}}
            async with session.post(_route(chat, prefix), json=body) as response:
                await check(response)
                async for data in sse_events(response):
                    if data == b"[DONE]":
                        return
                    event = orjson.loads(data)
                    if "error" in event:
                        raise BenchError(f"The stream ended in an error: {event['error']}", "See the server's log.")
                    if choices := event["choices"]:
                        text = choices[0]["delta"].get("content") if chat else choices[0]["text"]
                        yield Message(text or "", choices[0].get("finish_reason"))  # the Rust front end sends no nulls
                    elif usage := event.get("usage"):
                        yield Message("", None, usage["prompt_tokens"], usage["completion_tokens"])

        yield send
