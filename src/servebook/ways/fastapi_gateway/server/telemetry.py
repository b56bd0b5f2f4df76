"""What an operator sees: request ids, one log line per request, metrics. Never what was said."""

from __future__ import annotations

import logging
import re
import time
import uuid

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("servebook.ways.fastapi_gateway.server")

SAFE_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
CLIENT_CLOSED = 499
"""nginx's status for a caller who left before the end of the answer."""
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The gateway's Prometheus metrics, one registry per application."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "gateway_requests", "Requests; status 499: the caller left.", ["path", "status"], registry=registry
        )
        self.running = Gauge("gateway_requests_running", "Requests under way.", registry=registry)
        self.seconds = Histogram(
            "gateway_request_seconds", "From request to last byte.", ["path"], buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "gateway_time_to_first_token_seconds",
            "From the engine's acceptance to the first text of a stream.",
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter("gateway_tokens", "Tokens of finished answers.", ["kind"], registry=registry)
        self.broken_streams = Counter(
            "gateway_broken_streams", "Streams that ended in an error event.", ["code"], registry=registry
        )

    def count(self, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of one finished answer."""
        self.tokens.labels("prompt").inc(prompt_tokens)
        self.tokens.labels("completion").inc(completion_tokens)


class Telemetry:
    """ASGI middleware, outside all but `Traced`: gives each request an id, counts it and logs it when it ends.

    A caller's X-Request-ID is kept where it is short and plain, so that ids can follow a request through
    several services; otherwise one is made.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if SAFE_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_CLOSED
        complete = False

        async def observe(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        started = time.monotonic()
        self.metrics.running.inc()
        try:
            await self.app(scope, receive, observe)
        except Exception:
            status, complete = 500, True
            raise
        finally:
            self.metrics.running.dec()
            seconds = time.monotonic() - started
            status = status if complete else CLIENT_CLOSED
            # The route, not the path: whatever callers make up must not become a label or a log line.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            log.info("%s %s %d %.0f ms id=%s", scope["method"], path, status, 1000 * seconds, request_id)
