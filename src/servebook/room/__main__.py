"""Runs the front: `python -m servebook.room --http-port 8095 --upstream http://127.0.0.1:8000 --roll FILE`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from aiohttp import web

from servebook.errors import ServebookError
from servebook.numbers import HOUR_SECONDS, MOST_PORT
from servebook.room.front import Front
from servebook.room.keys import Roll
from servebook.room.limits import Limits
from servebook.settings import load_settings

SHUTDOWN_SECONDS = 5.0
"""What is running when SIGTERM comes has so long to end, unless `--drain-seconds` says more."""

AtLeastOne = Annotated[int, typer.Option(min=1)]


def main(
    upstream: Annotated[str, typer.Option(help="vLLM's root URL.")],
    roll: Annotated[Path, typer.Option(help="Where the digests of the learners' keys are kept.")],
    own_engine: Annotated[bool, typer.Option("--own-engine", help="It is this user's, started for this room.")] = False,
    host: str = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=1, max=MOST_PORT)] = 8095,
    places: AtLeastOne = Limits.places,
    learner_places: AtLeastOne = Limits.learner_places,
    requests_per_minute: AtLeastOne = Limits.learner_requests_per_minute,
    tokens_per_minute: AtLeastOne = Limits.learner_tokens_per_minute,
    drain_seconds: Annotated[  # not 0, which aiohttp takes for no limit
        float,
        typer.Option(
            min=0.1, max=HOUR_SECONDS, help="At SIGTERM, what is running has so long to end; when it has, all ends."
        ),
    ] = SHUTDOWN_SECONDS,
) -> None:
    """Serve until a signal comes. SERVEBOOK_API_KEY is the instructor's key; an engine that is not own has it too."""
    key = load_settings().key
    if not key:
        raise typer.BadParameter("set SERVEBOOK_API_KEY: it is the instructor's key")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    limits = Limits(
        places=places,
        learner_places=learner_places,
        learner_requests_per_minute=requests_per_minute,
        learner_tokens_per_minute=tokens_per_minute,
    )
    web.run_app(
        Front(upstream, key, Roll(roll), limits, own_engine=own_engine).app(),
        host=host,
        port=http_port,
        loop=uvloop.new_event_loop(),
        backlog=1024,
        access_log=None,
        handler_cancellation=True,  # a caller who leaves must not keep the engine at work
        shutdown_timeout=drain_seconds,
        print=lambda *_: None,
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except ServebookError as error:
        sys.exit(f"servebook: {error}")
