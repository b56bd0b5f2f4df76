"""Spans for OpenTelemetry, where the operator asks for them: what the gateway did, as a part of its caller's trace."""

from __future__ import annotations

from types import SimpleNamespace

import aiohttp
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract, inject
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Tracing:
    """A span for each request goes to the OTLP/gRPC receiver at `endpoint`; `close` sends what is left."""

    def __init__(self, endpoint: str) -> None:
        self.provider = TracerProvider(resource=Resource.create({"service.name": "gateway"}), shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, insecure=True)))

    def middleware(self, app: ASGIApp) -> Traced:
        return Traced(app, self.provider.get_tracer(__name__))

    def follow(self, session: aiohttp.ClientSession) -> None:
        """Let each request of `session` carry the span under way, as its header `traceparent`."""
        hook = aiohttp.TraceConfig()

        async def add_header(_: object, __: SimpleNamespace, params: aiohttp.TraceRequestStartParams) -> None:
            inject(params.headers)

        hook.on_request_start.append(add_header)
        hook.freeze()
        session.trace_configs.append(hook)

    def close(self) -> None:
        self.provider.shutdown()


class Traced:
    """ASGI middleware: a span for each request, from its beginning to the last byte; never what was said.

    The caller's `traceparent`, where there is one, names the span that ours belongs to.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parent = extract(Headers(scope=scope))
        with self.tracer.start_as_current_span("gateway", parent, SpanKind.SERVER) as span:

            async def observe(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            try:
                await self.app(scope, receive, observe)
            finally:  # those that fail, or whose callers leave, are looked for by their route, too
                span.set_attribute("http.route", getattr(scope.get("route"), "path", "other"))
