"""Our FastAPI gateway: its own small chat API, as SSE and as one JSON answer; and the article's version of it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from servebook.bench.load import BenchError, Job, Message, Send
from servebook.bench.paths.openai_rest import check, http_session, sse_events, turns
from servebook.engine.model import model_path
from servebook.launch import Server, find_server
from servebook.launch.probes import http_ok
from servebook.launch.table import Endpoints
from servebook.settings import Settings, url_of


def _body(job: Job) -> dict[str, Any]:
    return {"message": job.prompt, "history": turns(job), "max_tokens": job.max_tokens, "temperature": 0}


@asynccontextmanager
async def stream(server: Server) -> AsyncIterator[Send]:
    """`POST /chat/stream`: an event for each piece of text, then one with finish reason and usage, then `[DONE]`."""
    async with http_session(server.url, server.settings.key) as session:

        async def send(job: Job) -> AsyncIterator[Message]:
            body = _body(job)
            async with session.post("/chat/stream", json=body) as response:
                await check(response)
                async for data in sse_events(response):
                    if data == b"[DONE]":
                        return
                    if data.startswith(b"event: error"):
                        raise BenchError(f"The stream ended in an error: {data.decode()}", "See the gateway's log.")
                    event = orjson.loads(data)
                    usage = event.get("usage") or {}
                    yield Message(
                        event["text"],
                        event.get("finish_reason"),
                        usage.get("prompt_tokens"),
                        usage.get("completion_tokens"),
                    )

        yield send


@asynccontextmanager
async def whole(server: Server) -> AsyncIterator[Send]:
    """`POST /chat`: the answer as one JSON object."""
    async with http_session(server.url, server.settings.key) as session:

        async def send(job: Job) -> AsyncIterator[Message]:
            body = _body(job)
            async with session.post("/chat", json=body) as response:
                await check(response)
                answer = orjson.loads(await response.read())
            usage = answer["usage"]
            yield Message(
                answer["response"], answer["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"]
            )

        yield send


def _article(settings: Settings, _: Path, needs: dict[str, Endpoints]) -> list[str]:
    return [
        *(sys.executable, "-m", "servebook.ways.fastapi_gateway.mistake", "--http-port", "{http}"),
        *("--upstream", url_of(needs["vllm"]["http"])),
    ]


ARTICLE = replace(find_server("gateway"), argv=_article, ready=lambda at: http_ok(at["http"], "/healthz"))
"""How the article's gateway is started: in front of the same vLLM."""


@asynccontextmanager
async def article(server: Server) -> AsyncIterator[Send]:
    """The article's `POST /chat`, which tells no usage: tokens are counted by tokenizing the text again."""
    tokenizer = Tokenizer.from_file(str(model_path(server.settings) / "tokenizer.json"))
    async with http_session(server.url, server.settings.key) as session:

        async def send(job: Job) -> AsyncIterator[Message]:
            async with session.post("/chat", json={"message": job.prompt, "max_tokens": job.max_tokens}) as response:
                await check(response)
                answer = orjson.loads(await response.read())
            yield Message(answer["response"], output_tokens=len(tokenizer.encode(answer["response"]).ids))

        yield send
