"""Bytes on the wire, counted by a TCP proxy between client and server: framing, headers and all."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from pydantic import BaseModel, Field

from servebook.bench import workload
from servebook.bench.load import BenchError, ask
from servebook.bench.paths import ServingPath
from servebook.launch import Server

SHORT, LONG = 8, 40
"""Answers in tokens; their difference in bytes is what the tokens between them cost."""


class WireCost(BaseModel):
    """What one path puts on the wire, both directions together."""

    path: str
    bytes_per_token: float = Field(description="Slope between an answer of 8 tokens and one of 40.")


class CountingProxy:
    """Forwards connections to one address and counts what passes."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
        self.bytes = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self.host, self.port)
        for ends in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self.forward(*ends))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                self.bytes += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def counted(server: Server) -> AsyncIterator[tuple[Server, list[CountingProxy]]]:
    """`server` as seen through a proxy for each of its endpoints."""
    proxies = {kind: CountingProxy(address) for kind, address in server.endpoints.items()}
    listeners = {kind: await asyncio.start_server(proxy.connect, "127.0.0.1", 0) for kind, proxy in proxies.items()}
    at = {kind: f"127.0.0.1:{each.sockets[0].getsockname()[1]}" for kind, each in listeners.items()}
    try:
        yield dataclasses.replace(server, endpoints=at), list(proxies.values())
    finally:
        for listener in listeners.values():
            listener.close()


async def wire_cost(path: ServingPath, server: Server) -> WireCost:
    """Measure one path; the first request, which opens the connection, is not counted.

    Of a stream a token is a message with text: one that holds several, as a busy server's may, would hide what the
    others cost.

    Raises:
        BenchError: the server put as many tokens into a message as there were.
    """
    make = workload.chats if path.chat else workload.completions
    async with counted(server) as (seen, proxies), path.open(seen) as send:
        await ask(send, next(make(40, SHORT)))
        sizes: list[tuple[int, int]] = []
        for seed, length in enumerate((SHORT, LONG), start=1):
            before = sum(proxy.bytes for proxy in proxies)
            sample = await ask(send, next(make(40, length, seed))._replace(max_tokens=length))
            tokens = len(sample.arrivals) if path.streams else sample.output_tokens
            sizes.append((tokens, sum(proxy.bytes for proxy in proxies) - before))
    (short, few), (long, many) = sizes
    if short >= long:
        raise BenchError(
            f"{path.name}: {LONG} tokens came in {long} messages, and {SHORT} in {short}.",
            "Measure it while nothing else runs, or with a slower source.",
        )
    return WireCost(path=path.name, bytes_per_token=(many - few) / (long - short))
