"""A right capstone of a third build: aiohttp on both sides, started by a script of the shell."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web
from prometheus_client import CollectorRegistry, Counter, generate_latest

LIMITS = {"prompt": 1000, "max_tokens": 256}
SESSION = web.AppKey("session", ClientSession)
PLACES = web.AppKey("places", asyncio.Semaphore)
AWAY = (ClientError, TimeoutError)

registry = CollectorRegistry()
ANSWERS = Counter("service_requests", "Answers.", ["status"], registry=registry)
TOKENS = Counter("service_generated_tokens", "Tokens.", registry=registry)


def refuse(status: int, why: str, **about: Any) -> web.Response:
    """An error in JSON."""
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return web.json_response({"error": why, **about}, status=status, headers=headers)


@web.middleware
async def door(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
    """The key, then a place; and the count."""
    if request.path != "/generate":
        return await handler(request)
    shown = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
    places = request.app[PLACES]
    if not hmac.compare_digest(shown, b"Bearer " + os.environb[b"SERVICE_KEY"]):
        response: web.StreamResponse = refuse(401, "who are you?")
    elif places.locked():
        response = refuse(429, "no place is free")
    else:
        async with places:
            response = await handler(request)
    ANSWERS.labels(response.status).inc()
    return response


def checked(body: Any) -> web.Response | None:
    """A refusal where the body is outside of the limits."""
    for field, most in LIMITS.items():
        value = body.get(field) if isinstance(body, dict) else None
        right_kind = type(value) is (str if field == "prompt" else int)
        size = len(value) if isinstance(value, str) else int(value or 0) if right_kind else 0
        if not right_kind or not 1 <= size <= most:
            too_long = field == "prompt" and size > most
            return refuse(413 if too_long else 422, f"{field} has to be within its limit", field=field, limit=most)
    return None


async def generate(request: web.Request) -> web.StreamResponse:
    """Whole, or piece by piece."""
    try:
        body = await request.json()
    except ValueError:
        body = None
    if refusal := checked(body):
        return refusal
    wanted = {"model": os.environ["ENGINE_MODEL"], "temperature": 0} | {name: body[name] for name in LIMITS}
    session = request.app[SESSION]
    if not body.get("stream"):
        try:
            async with session.post("/v1/completions", json=wanted, raise_for_status=True) as answer:
                told = await answer.json()
        except AWAY:
            return refuse(503, "no engine")
        TOKENS.inc(told["usage"]["completion_tokens"])
        return web.json_response({"text": told["choices"][0]["text"], "tokens": told["usage"]["completion_tokens"]})
    wanted |= {"stream": True, "stream_options": {"include_usage": True}}
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    try:
        async with session.post("/v1/completions", json=wanted, raise_for_status=True) as answer:
            await response.prepare(request)
            async for event in read(answer.content):
                # Raises where the caller has gone; the `async with` then hangs up on the engine.
                await response.write(b"data: " + event + b"\n\n")
    except ConnectionResetError:
        pass
    except AWAY:
        if not response.prepared:
            return refuse(503, "no engine")
    return response


async def read(lines: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The engine's events as ours."""
    async for line in lines:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            yield data
        elif data:
            event = json.loads(data)
            if event.get("usage"):
                TOKENS.inc(event["usage"]["completion_tokens"])
            for choice in event["choices"]:
                yield json.dumps({"text": choice["text"]}, ensure_ascii=False).encode()


async def is_there(session: ClientSession) -> bool:
    """Whether the engine is ready."""
    try:
        async with session.get("/health", timeout=ClientTimeout(2)) as answer:
            return answer.status == 200
    except AWAY:
        return False


async def health(request: web.Request) -> web.Response:
    """As the engine is."""
    return web.Response(status=200 if await is_there(request.app[SESSION]) else 503)


async def metrics(request: web.Request) -> web.Response:
    """For Prometheus."""
    return web.Response(body=generate_latest(registry), content_type="text/plain")


async def opened(app: web.Application) -> AsyncIterator[None]:
    """A session towards the engine, and the places."""
    headers = {"Authorization": f"Bearer {os.environ['ENGINE_KEY']}"}
    timeout, connector = ClientTimeout(total=60, connect=2), TCPConnector(limit=0, force_close=True)
    async with ClientSession(
        os.environ["ENGINE_URL"], headers=headers, timeout=timeout, connector=connector
    ) as session:
        app[SESSION], app[PLACES] = session, asyncio.Semaphore(int(os.environ["CAPACITY"]))
        yield


def main() -> None:
    """Serve until a signal comes."""
    app = web.Application(middlewares=[door])
    app.cleanup_ctx.append(opened)
    app.router.add_post("/generate", generate)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), print=None)


if __name__ == "__main__":
    main()
