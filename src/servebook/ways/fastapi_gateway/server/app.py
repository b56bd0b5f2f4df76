"""Puts the gateway together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware

from servebook.ways.asgi import BodyLimit, CancelOnDisconnect, HeadAsGet
from servebook.ways.fastapi_gateway.server import chat
from servebook.ways.fastapi_gateway.server.auth import KeyFirst
from servebook.ways.fastapi_gateway.server.config import Config
from servebook.ways.fastapi_gateway.server.engine import Engine
from servebook.ways.fastapi_gateway.server.errors import GatewayError, add_error_handlers, body_refused, documented
from servebook.ways.fastapi_gateway.server.limits import Places
from servebook.ways.fastapi_gateway.server.telemetry import Metrics, Telemetry

PAGE = Path(__file__).with_name("page")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SWAGGER = "vllm/entrypoints/serve/instrumentator/static"
"""vLLM ships Swagger UI's files; from there the documentation works without a CDN."""


def create_app(config: Config) -> FastAPI:
    """The gateway as an ASGI application; its connections to the engine live as long as its lifespan."""

    tracing = None
    if config.traces_endpoint:
        from servebook.ways.fastapi_gateway.server.tracing import Tracing  # half a second that others need not spend

        tracing = Tracing(config.traces_endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Engine(config) as app.state.engine:
            if tracing:
                tracing.follow(app.state.engine.session)
            yield
        if tracing:
            tracing.close()

    app = FastAPI(
        title="servebook gateway",
        summary="A small chat API in front of vLLM.",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.config = config
    app.state.places = Places(config.max_concurrent)
    app.state.metrics = metrics = Metrics()
    app.include_router(chat.router)
    add_operations(app)
    add_page(app)
    add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(CancelOnDisconnect, reader_seconds=config.reader_seconds)
    app.add_middleware(BodyLimit, limit=config.max_body_bytes, refuse=body_refused)
    if config.key:
        app.add_middleware(KeyFirst, key=config.key, routes=chat.router.routes)
    app.add_middleware(HeadAsGet)
    if config.cors_origins:
        # A browser says its origin without the slash that its address bar shows.
        origins = [origin.rstrip("/") for origin in config.cors_origins]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["POST"], allow_headers=["*"])
    app.add_middleware(Telemetry, metrics=metrics)
    if tracing:
        app.add_middleware(tracing.middleware)
    return app


def add_operations(app: FastAPI) -> None:
    """What a load balancer and a monitoring system ask for."""

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """Whether this process is alive."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"], responses=documented(503))
    async def readyz(request: Request) -> dict[str, str]:
        """Whether requests can be answered: asks the engine."""
        if not await request.app.state.engine.healthy():
            raise GatewayError(503, "engine_unavailable", "The engine is not ready.", retry_after=5)
        return {"status": "ready"}

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def add_page(app: FastAPI) -> None:
    """The chat page at `/` and the API's documentation at `/docs`; neither asks anyone but us for anything."""
    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})

    spec = find_spec("vllm")  # not an import: that would load torch
    files = Path(spec.origin).parents[1] / SWAGGER if spec and spec.origin else None
    if not files or not files.is_dir():
        return  # without documentation rather than without a gateway: vLLM may move its files
    app.mount("/swagger", StaticFiles(directory=files))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/swagger/swagger-ui-bundle.js",
            swagger_css_url="/swagger/swagger-ui.css",
            swagger_favicon_url="/page/icon.svg",
        )
