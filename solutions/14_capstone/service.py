"""A model solution of the capstone: FastAPI, and httpx towards the engine."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import AsyncIterator
from typing import Annotated

import httpx
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest
from pydantic import BaseModel, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CAPACITY = int(os.environ["CAPACITY"])
SHOWN = f"Bearer {os.environ['SERVICE_KEY']}".encode()
LATER = {"Retry-After": "1"}

engine = httpx.AsyncClient(
    base_url=os.environ["ENGINE_URL"],
    headers={"Authorization": f"Bearer {os.environ['ENGINE_KEY']}"},
    timeout=httpx.Timeout(60, connect=2),  # and one try: the caller comes again when Retry-After says so
)
requests = Counter("service_requests", "Answers of POST /generate.", ["status"])
tokens = Counter("service_generated_tokens", "Tokens that were written.")
at_work = 0


class Ask(BaseModel):
    """What a caller may ask for."""

    prompt: Annotated[str, Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=256)]
    stream: bool = False


class Counted:
    """Counts each answer by its status.

    A class of its own, because what `@app.middleware("http")` wraps is not always told that its caller has left.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/generate":
                requests.labels(message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)


class Locked:
    """Refuses whoever does not show the key. Compared as bytes: a header may hold anything.

    No dependency, because FastAPI parses the body before it calls any.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["method"] == "POST":  # whatever a router makes of the path
            shown = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(shown, SHOWN):
                refusal = {"detail": "Show the key: Authorization: Bearer …"}
                app = JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})
        await app(scope, receive, send)


app = FastAPI()
app.add_middleware(Locked)
app.add_middleware(Counted)  # the last one added is the outermost: refusals count, too


async def place() -> AsyncIterator[None]:
    """One of CAPACITY; it is given back when the answer is sent, or its caller gone."""
    global at_work
    if at_work >= CAPACITY:
        raise HTTPException(429, f"{CAPACITY} callers are at work.", LATER)
    at_work += 1
    try:
        yield
    finally:
        at_work -= 1


@app.get("/health")
async def health() -> dict[str, str]:
    """Ready when the engine is."""
    try:
        (await engine.get("/health", timeout=2)).raise_for_status()
    except httpx.HTTPError:
        raise HTTPException(503, "The engine does not answer.", LATER) from None
    return {"status": "ok"}


@app.get("/metrics")
async def metrics() -> Response:
    """What has been done so far, for Prometheus."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.post("/generate", dependencies=[Depends(place)], response_model=None)
async def generate(ask: Ask) -> dict[str, str | int] | StreamingResponse:
    """The engine's greedy text, whole or piece by piece."""
    body = ask.model_dump() | {"model": os.environ["ENGINE_MODEL"], "temperature": 0}
    if ask.stream:
        body["stream_options"] = {"include_usage": True}
    try:
        answer = await engine.send(engine.build_request("POST", "/v1/completions", json=body), stream=ask.stream)
        answer.raise_for_status()
    except httpx.HTTPError:
        raise HTTPException(503, "The engine does not answer.", LATER) from None
    if ask.stream:
        return StreamingResponse(events(answer), media_type="text/event-stream")
    told = answer.json()
    tokens.inc(told["usage"]["completion_tokens"])
    return {"text": told["choices"][0]["text"], "tokens": told["usage"]["completion_tokens"]}


async def events(answer: httpx.Response) -> AsyncIterator[str]:
    """Server-sent events. When the caller leaves this is cancelled, and lets go of the engine."""
    try:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                yield "data: [DONE]\n\n"
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if event.get("usage"):
                    tokens.inc(event["usage"]["completion_tokens"])
                for choice in event["choices"]:
                    yield f"data: {json.dumps({'text': choice['text']})}\n\n"
    except httpx.HTTPError:
        yield f"data: {json.dumps({'error': 'The engine went away.'})}\n\n"
    finally:
        await answer.aclose()


uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")
