"""Runs the gateway: `python -m servebook.ways.fastapi_gateway.server --http-port 8080 --upstream http://127.0.0.1:8000`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
import uvicorn

from servebook.engine.arguments import KEEP_ALIVE_SECONDS
from servebook.errors import ServebookError
from servebook.numbers import MOST_PORT
from servebook.settings import load_settings, url_of
from servebook.ways.asgi import Protocol
from servebook.ways.fastapi_gateway.server.app import create_app
from servebook.ways.fastapi_gateway.server.config import Config


def main(
    upstream: Annotated[str, typer.Option(help="vLLM's root URL.")],
    host: str = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=1, max=MOST_PORT)] = 8080,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests at a time; beyond, 503.")] = 128,
    otlp_traces_endpoint: Annotated[str | None, typer.Option(help="Where spans go, by OTLP over gRPC.")] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="An origin whose pages may call; repeatable.")] = None,
) -> None:
    """Serve until a signal comes. Callers must show SERVEBOOK_API_KEY, where it is set."""
    settings = load_settings(host=host)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = Config(
        url_of(upstream),
        settings.key,
        max_concurrent=max_concurrent,
        cors_origins=tuple(cors_origin or ()),
        traces_endpoint=otlp_traces_endpoint,
    )
    uvicorn.run(
        create_app(config),
        host=host,
        port=http_port,
        access_log=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        loop="uvloop",
        http=Protocol,
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except ServebookError as error:
        sys.exit(f"servebook: {error}")
