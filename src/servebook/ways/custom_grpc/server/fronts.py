"""Several fronts over one engine: `python -m servebook.ways.custom_grpc.server --fronts N …`.

vLLM's own mechanism for several API servers: EngineCore serves N clients, and every front holds an `AsyncLLM` that is
one of them. What is added here is that a front can be replaced. EngineCore greets each client once, so a client that
comes later would wait for ever: this process stands between, keeps the greeting, and passes messages on, two for each
engine step and front. All fronts listen on the same port (SO_REUSEPORT): the kernel gives each new connection to one.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop
import zmq
from prometheus_client import CollectorRegistry, Gauge, multiprocess

from servebook.engine.arguments import engine_args
from servebook.errors import LaunchError
from servebook.processes import die_with_asker
from servebook.ways.custom_grpc.server.transport import show_metrics

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

    from vllm.config import VllmConfig

log = logging.getLogger("servebook.ways.custom_grpc.server")

ENGINE = (0).to_bytes(2, "little")
"""The ZMQ identity of vLLM's only engine."""
ADD, ABORT, DEAD = b"\x00", b"\x01", b"ENGINE_CORE_DEAD"
"""The first frame of messages to EngineCore, and the whole of its last one (`vllm.v1.engine`)."""
REMEMBERED = 10_000
"""Requests of one front, the newest, that end with it."""
GIVE_UP_DEATHS, GIVE_UP_SECONDS = 5, 20.0
"""So many deaths of fronts in so short a time are no accident."""


class Front:
    """A place for one front process after another; EngineCore sees one client that never left."""

    def __init__(self, index: int, context: zmq.Context[Any], folder: Path) -> None:
        self.index, self.context, self.folder = index, context, folder
        self.incarnation = 0
        self.from_engine, self.to_engine = context.socket(zmq.PULL), context.socket(zmq.ROUTER)
        for end in (self.from_engine, self.to_engine):
            end.setsockopt(zmq.RCVHWM, 0)
            end.setsockopt(zmq.SNDHWM, 0)
        self.output_address = self._bind(self.from_engine, "engine-out")
        self.input_address = self._bind(self.to_engine, "engine-in")
        self.requests: deque[str] = deque(maxlen=REMEMBERED)
        self.greeting: bytes | None = None
        self.process: ForkServerProcess | None = None

    def _bind(self, end: zmq.Socket[Any], name: str) -> str:
        address = f"ipc://{self.folder}/{name}-{self.index}"
        end.bind(address)
        return address

    def start(self, run: Callable[..., None], *arguments: Any) -> None:
        """Start a process that runs `run(*arguments, index, addresses)`, and greet it."""
        assert self.greeting is not None
        self.incarnation += 1
        addresses = {
            f"{way}_address": f"ipc://{self.folder}/front-{way}-{self.index}-{self.incarnation}"
            for way in ("input", "output")
        }
        # To the front this is the engine: it sends requests here, and has its outputs from here.
        self.requests_in, self.outputs = self.context.socket(zmq.DEALER), self.context.socket(zmq.PUSH)
        self.requests_in.setsockopt(zmq.IDENTITY, ENGINE)
        for end, address in zip((self.requests_in, self.outputs), addresses.values(), strict=True):
            end.setsockopt(zmq.RCVHWM, 0)
            end.setsockopt(zmq.SNDHWM, 0)
            end.setsockopt(zmq.LINGER, 0)
            end.connect(address)
        self.requests_in.send(self.greeting)
        self.asked = False
        self.process = multiprocessing.get_context("forkserver").Process(
            target=run, args=(*arguments, self.index, addresses), name=f"front-{self.index}"
        )
        self.process.start()

    def forget(self) -> None:
        """The process is gone: its requests must not cost the engine anything more."""
        if self.requests:
            self.to_engine.send_multipart([ENGINE, ABORT, msgspec.msgpack.encode(list(self.requests))])
        self.requests.clear()
        self.requests_in.close()
        self.outputs.close()

    def request(self) -> None:
        """Pass a message of the front's on."""
        kind, *data = self.requests_in.recv_multipart()
        self.asked = True
        if kind == ADD:
            self.requests.append(msgspec.msgpack.decode(data[0])[0])  # EngineCoreRequest is an array: its id is first
        self.to_engine.send_multipart([ENGINE, kind, *data])

    def output(self) -> None:
        """Pass a message of the engine's on, unless it is for the process that was here before."""
        frames = self.from_engine.recv_multipart(copy=False)
        if self.asked:
            self.outputs.send_multipart(frames, copy=False)


class Fronts:
    """The engine's process, N fronts, and what goes between them."""

    def __init__(self, options: argparse.Namespace, words: list[str]) -> None:
        self.options, self.words = options, words
        self.scratch = tempfile.TemporaryDirectory(prefix="servebook-fronts-", ignore_cleanup_errors=True)
        self.folder = Path(self.scratch.name)
        self.serving = self.stopping = self.engine_dead = False
        self.deaths: deque[float] = deque(maxlen=GIVE_UP_DEATHS)
        self.metrics = self.folder / "metrics"
        self.metrics.mkdir()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.metrics)  # for the fronts: each writes its own files there
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, str(self.metrics))  # type: ignore[no-untyped-call]
        self.alive = Gauge("servebook_grpc_fronts", "Front processes that are up", registry=registry)
        self.registry = registry

    def run(self) -> None:
        """Start everything, replace fronts that die, and end in order at SIGTERM or SIGINT.

        Raises:
            LaunchError: the port is taken, or fronts end as fast as they are started.
        """
        reserved = reserve(self.options.host, self.options.grpc_port)
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self.stop)
        # Fronts are forked from a process that has imported vLLM, but has no threads and no sockets yet.
        multiprocessing.set_forkserver_preload(
            [
                "servebook.ways.custom_grpc.server.serving",
                "servebook.ways.custom_grpc.server.inputs",
                "vllm.v1.engine.async_llm",
            ]
        )
        forkserver.ensure_running()  # it imports while the engine starts
        from vllm.v1.engine.utils import EngineZmqAddresses, launch_core_engines
        from vllm.v1.executor import Executor

        arguments = engine_args(self.words)
        arguments._api_process_count, arguments._api_process_rank = self.options.fronts, -1
        config = arguments.create_engine_config()
        os.register_at_fork(after_in_child=reserved.close)  # it ends with this process, and not with the engine
        context: zmq.Context[Any] = zmq.Context()
        self.fronts = [Front(index, context, self.folder) for index in range(self.options.fronts)]
        addresses = EngineZmqAddresses(
            inputs=[front.input_address for front in self.fronts],
            outputs=[front.output_address for front in self.fronts],
        )
        executor = Executor.get_class(config)
        with launch_core_engines(config, executor, not arguments.disable_log_stats, addresses) as launched:
            self.engine = launched.engine_manager
        self.serving = True
        try:
            show_metrics(self.options.metrics_port, self.registry)
            for front in self.fronts:
                _, front.greeting = front.to_engine.recv_multipart()
                front.start(run_front, self.options, config)
            self.relay(config)
        finally:
            self.end()
            reserved.close()

    def relay(self, config: VllmConfig) -> None:
        """Pass messages on until it is time to stop."""
        engines = self.engine.sentinels()
        while not self.stopping:
            poller = zmq.Poller()
            handlers: dict[Any, Callable[[], None]] = {}
            for front in self.fronts:
                if front.process:
                    handlers |= {front.requests_in: front.request, front.from_engine: front.output}
            for end in handlers:
                poller.register(end, zmq.POLLIN)
            for sentinel in [front.process.sentinel for front in self.fronts if front.process]:
                poller.register(sentinel, zmq.POLLIN)
            for sentinel in [] if self.engine_dead else engines:
                poller.register(sentinel, zmq.POLLIN)
            self.alive.set(sum(front.process.is_alive() for front in self.fronts if front.process))
            changed = False
            while not self.stopping and not changed:
                for end, _ in poller.poll(1000):
                    if end in handlers:
                        handlers[end]()
                    else:
                        changed = True
            if not self.stopping:
                self.look_after(config)

    def look_after(self, config: VllmConfig) -> None:
        """Replace each front that died; tell all of them if the engine did."""
        if not self.engine_dead and self.engine.finished_procs():
            self.engine_dead = True
            log.error("engine died")
            for front in self.fronts:
                if front.process:
                    front.outputs.send(DEAD)
        for front in self.fronts:
            if front.process is None or front.process.is_alive():
                continue
            multiprocess.mark_process_dead(front.process.pid, str(self.metrics))  # type: ignore[no-untyped-call]
            log.error("front died", extra={"fields": {"front": front.index, "exit": front.process.exitcode}})
            self.deaths.append(time.monotonic())
            if len(self.deaths) == GIVE_UP_DEATHS and self.deaths[-1] - self.deaths[0] < GIVE_UP_SECONDS:
                raise LaunchError(
                    f"{GIVE_UP_DEATHS} fronts ended within {GIVE_UP_SECONDS:.0f} s.", "See the log above."
                )
            front.forget()
            front.process = None
            if not self.engine_dead:
                front.start(run_front, self.options, config)

    def stop(self, *_: object) -> None:
        """End in order, soon; at once while the engine starts."""
        if not self.serving:
            raise SystemExit
        self.stopping = True

    def end(self) -> None:
        """Let the fronts drain while their answers still pass, then end the engine."""
        running = [(front, front.process) for front in self.fronts if front.process]
        for _, process in running:
            process.terminate()
        deadline = time.monotonic() + self.options.grace + 2
        poller = zmq.Poller()
        handlers = {front.requests_in: front.request for front, _ in running}
        handlers |= {front.from_engine: front.output for front, _ in running}
        for end in handlers:
            poller.register(end, zmq.POLLIN)
        while any(process.is_alive() for _, process in running) and time.monotonic() < deadline:
            for end, _ in poller.poll(50):
                handlers[end]()
        for _, process in running:
            process.kill()
        self.engine.shutdown()
        self.scratch.cleanup()
        log.info("stopped")


def reserve(host: str, port: int) -> socket.socket:
    """Hold `port` for the fronts; nobody else may have it, and this socket itself takes no connection.

    Raises:
        LaunchError: it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            alone.bind((host, port))  # without SO_REUSEPORT: fails where any server listens
            alone.listen()
        except OSError as error:
            raise LaunchError(f"Cannot listen on {host}:{port}: {error}", "Choose another port.") from None
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # Connections of a server that has ended are there for a minute. Afterwards it would let others bind, too.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((host, port))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return held


def run_front(options: argparse.Namespace, config: VllmConfig, index: int, addresses: dict[str, str]) -> None:
    """One front, in a process of its own: the same server, with an `AsyncLLM` that is one client of several."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from servebook.ways.custom_grpc.server.inputs import Inputs
    from servebook.ways.custom_grpc.server.serving import serve, set_up_log

    die_with_asker(signal.SIGTERM)
    set_up_log()
    config.parallel_config._api_process_rank = index

    def start() -> tuple[AsyncLLM, Inputs]:
        engine = AsyncLLM.from_vllm_config(
            config, client_addresses=addresses, client_count=options.fronts, client_index=index
        )
        return engine, Inputs.of(engine)

    uvloop.run(serve(options, start))
