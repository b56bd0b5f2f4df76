"""The life of a server: the engine starts, the port opens, calls are served; then it drains, and ends."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import psutil

from servebook.engine.arguments import engine_args
from servebook.processes import is_tracker
from servebook.settings import in_address
from servebook.ways.custom_grpc.server import metrics
from servebook.ways.custom_grpc.server.calls import Calls
from servebook.ways.custom_grpc.server.health import Health
from servebook.ways.custom_grpc.server.servicer import LLMServicer
from servebook.ways.custom_grpc.server.transport import Tls, make_server, show_metrics

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from servebook.ways.custom_grpc.server.inputs import Inputs

WATCH_SECONDS = 0.2
SETTLE_SECONDS = 0.1
"""How long a server that ends waits for the calls that gRPC had taken and not handed over yet, and for last words that
are on their way out."""

log = logging.getLogger("servebook.ways.custom_grpc.server")


def start_engine(words: list[str]) -> tuple[AsyncLLM, Inputs]:
    """Import vLLM and load the model; takes some seconds, in a thread, so that signals and callers are heard."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from servebook.ways.custom_grpc.server.inputs import Inputs

    engine = AsyncLLM.from_engine_args(engine_args(words))
    return engine, Inputs.of(engine)


async def serve(options: argparse.Namespace, start: Callable[[], tuple[AsyncLLM, Inputs]]) -> None:
    """Start the engine by `start` in a thread, open the port, serve until SIGTERM or SIGINT, drain, stop.

    The port opens while the model is loaded, and health says NOT_SERVING until it is. One of several fronts opens it
    last: what it could not serve yet is for the others.

    Raises:
        LaunchError: a port is taken.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)

    calls, health = Calls(options.max_calls), Health()
    servicer = LLMServicer(calls)
    tls = Tls(options.tls_cert, options.tls_key, options.tls_client_ca) if options.tls_cert else None
    shared = options.fronts > 1
    address = f"{in_address(options.host)}:{options.grpc_port}"

    async def listen() -> grpc.aio.Server:
        server = make_server(address, servicer, health, options.key, tls, shared)
        if not shared:  # else the process that keeps the fronts adds their figures up
            metrics.watch_tasks()
            show_metrics(options.metrics_port)
        await server.start()
        where = {"host": options.host, "port": options.grpc_port, "tls": tls is not None}
        log.info("listening", extra={"fields": where})
        return server

    health.say(serving=False)
    starting = asyncio.create_task(asyncio.to_thread(start))
    stopping = asyncio.create_task(stop.wait())
    server = None
    if not shared:
        begun = asyncio.create_task(engine_process())
        await asyncio.wait({begun, starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if begun.done():
            try:
                server = await listen()
            except BaseException:
                kill_children()
                raise
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        kill_children()
        log.info("stopped")
        os._exit(0)
    engine, inputs = await starting
    try:
        await engine.get_supported_tasks()  # the first answer of the engine: from here on its death is noticed, too
        servicer.attach(engine, inputs)
        gc.collect()
        gc.freeze()  # what the start left is not searched again and again
        health.say(serving=True)
        server = server or await listen()
        metrics.SERVING.set(1)  # not before: the launcher takes it for the word that the port is open
        log.info("ready")
        await watch(engine, stop, health, calls)
        log.info("draining", extra={"fields": {"open_calls": calls.open}})
        health.say(serving=False)
        metrics.SERVING.set(0)
        await drain(server, calls, options.grace)
    finally:
        engine.shutdown()
    log.info("stopped")


async def engine_process() -> None:
    """Wait until EngineCore has a process: it may be a fork of this one, and must not find gRPC's threads there."""
    while not multiprocessing.active_children():  # noqa: ASYNC110  # nobody tells of it
        await asyncio.sleep(WATCH_SECONDS)


def kill_children() -> None:
    """End an engine that is half up: it cannot be shut down, and its thread cannot be cancelled."""
    for process in psutil.Process().children(recursive=True):
        if not is_tracker(process.pid):
            process.kill()


async def watch(engine: AsyncLLM, stop: asyncio.Event, health: Health, calls: Calls) -> None:
    """Wait for `stop`; meanwhile end what nobody reads, and say so when the engine dies.

    The server stays up to answer until somebody restarts it.
    """
    alive = True
    while not stop.is_set():
        if alive and engine.errored:
            alive = False
            metrics.SERVING.set(0)
            health.say(serving=False)
            log.error("engine died")
        calls.end_unread()
        try:
            await asyncio.wait_for(stop.wait(), WATCH_SECONDS)
        except TimeoutError:
            continue


async def drain(server: grpc.aio.Server, calls: Calls, seconds: float) -> None:
    """Refuse new calls, and wait `seconds` at most for the open ones: health watchers never end."""
    grace = asyncio.create_task(server.stop(seconds))
    while not grace.done():
        none_open = asyncio.create_task(calls.none_open.wait())
        await asyncio.wait({grace, none_open}, return_when=asyncio.FIRST_COMPLETED)
        none_open.cancel()
        await asyncio.wait({grace}, timeout=SETTLE_SECONDS)
        if not calls.open:
            break
    await server.stop(0)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "event": record.getMessage()}
        return json.dumps(line | getattr(record, "fields", {}))


def set_up_log() -> None:
    """One JSON object a line, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
