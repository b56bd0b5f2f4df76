"""A right capstone of another build: Starlette and httpx, one ASGI middleware, and a watch that asks for the engine."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from hmac import compare_digest

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SHOWN = sha256(f"Bearer {os.environ['SERVICE_KEY']}".encode()).digest()
CAPACITY = int(os.environ["CAPACITY"])
KEY = {"Authorization": f"Bearer {os.environ['ENGINE_KEY']}"}
engine = httpx.AsyncClient(
    base_url=os.environ["ENGINE_URL"], headers=KEY, timeout=httpx.Timeout(60, connect=2), limits=httpx.Limits()
)
answered: Counter[int] = Counter()
written = 0
ready = False


def refusal(status: int, why: str) -> JSONResponse:
    """An error; one that passes by itself says when."""
    return JSONResponse({"error": why}, status, {"Retry-After": "2"} if status in (429, 503) else None)


class Door:
    """Everything that comes before the work: the key, the places, the count of answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.at_work = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered[message["status"]] += 1
            await send(message)

        given = dict(scope["headers"]).get(b"authorization", b"")
        if not compare_digest(sha256(given).digest(), SHOWN):
            return await refusal(401, "show the key")(scope, receive, counted)
        if self.at_work == CAPACITY:
            return await refusal(503, "all places are taken")(scope, receive, counted)
        self.at_work += 1
        try:
            return await self.app(scope, receive, counted)
        finally:
            self.at_work -= 1


def fault_of(body: object) -> str:
    """What is wrong with a body, "" for nothing."""
    if not isinstance(body, dict):
        return "the body is a JSON object"
    prompt, tokens = body.get("prompt"), body.get("max_tokens")
    if not isinstance(prompt, str) or not 1 <= len(prompt) <= 1000:
        return "prompt is a text of 1 to 1000 characters"
    if type(tokens) is not int or not 1 <= tokens <= 256:
        return "max_tokens is a whole number from 1 to 256"
    return "" if isinstance(body.get("stream", False), bool) else "stream is true or false"


async def generate(request: Request) -> Response:
    """Always a stream from the engine: a whole answer is one that is gathered."""
    try:
        body = await request.json()
    except ValueError:
        body = None
    if fault := fault_of(body):
        return refusal(422, fault)
    pieces = ask(body["prompt"], body["max_tokens"])
    try:
        first = await anext(pieces)
    except httpx.HTTPError:
        return refusal(503, "the engine does not answer")
    if body.get("stream"):
        return StreamingResponse(events(first, pieces), media_type="text/event-stream")
    try:
        everything = [first, *[piece async for piece in pieces]]
    except httpx.HTTPError:
        return refusal(503, "the engine went away")
    return JSONResponse({"text": "".join(text for text, _ in everything), "tokens": everything[-1][1]})


async def ask(prompt: str, max_tokens: int) -> AsyncIterator[tuple[str, int]]:
    """The engine's pieces, each with the tokens that were written up to there."""
    global written
    body = {"model": os.environ["ENGINE_MODEL"], "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    count = 0
    async with engine.stream("POST", "/v1/completions", json=body | options) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                now = event["usage"]["completion_tokens"]
                written += now - count
                count = now
                yield "".join(choice["text"] for choice in event["choices"]), count


async def events(first: tuple[str, int], pieces: AsyncIterator[tuple[str, int]]) -> AsyncIterator[str]:
    """Server-sent events; an engine that goes away ends them without [DONE]."""
    yield f"data: {json.dumps({'text': first[0]})}\n\n"
    try:
        async for text, _ in pieces:
            yield f"data: {json.dumps({'text': text})}\n\n"
    except httpx.HTTPError:
        yield f"data: {json.dumps({'error': 'the engine went away'})}\n\n"
    else:
        yield "data: [DONE]\n\n"


async def health(request: Request) -> Response:
    """What the watch saw last."""
    return PlainTextResponse("ready") if ready else refusal(503, "the engine is not ready")


async def metrics(request: Request) -> Response:
    """Prometheus' text, by hand."""
    lines = [f'service_requests_total{{status="{status}"}} {count}' for status, count in answered.items()]
    return PlainTextResponse("\n".join([*lines, f"service_generated_tokens_total {written}", ""]))


@asynccontextmanager
async def watching(app: Starlette) -> AsyncIterator[None]:
    """Ask for the engine four times a second."""

    async def watch() -> None:
        global ready
        while True:
            try:
                ready = (await engine.get("/health", timeout=2)).status_code == 200
            except httpx.HTTPError:
                ready = False
            await asyncio.sleep(0.25)

    task = asyncio.create_task(watch())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


routes = [
    Route("/generate", generate, methods=["POST"]),
    Route("/health", health),
    Route("/metrics", metrics),
]

if __name__ == "__main__":
    app = Door(Starlette(routes=routes, lifespan=watching))
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="info")
