"""`grpc.health.v1` for whoever asks or watches; without a key, so nobody must be able to turn it against the server."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servebook.protos.llm.v1 import llm_pb2
from servebook.ways.limits import READER_SECONDS

SERVICE = llm_pb2.DESCRIPTOR.services_by_name["LLMService"].full_name
NAMES = ("", SERVICE)
"""The whole server, and the service by name: one state for both."""
MAX_WATCHERS = 10
"""Of one connection; a client needs one. A bound for all together would be somebody's means to shut the others out."""
Answer = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says SERVING or NOT_SERVING.

    In place of grpc_health's own (1.81), which writes to a watcher under the lock that it needs to tell the others: one
    who does not read holds up all, and the server's end. And when one watcher leaves, it forgets the rest.
    """

    def __init__(self) -> None:
        self.state = Answer.NOT_SERVING
        self.changed = asyncio.Event()
        self.watchers: Counter[str] = Counter()
        """By connection: `ipv4:127.0.0.1:40312`."""

    def say(self, serving: bool) -> None:
        """Tell whoever asks or watches."""
        self.state = Answer.SERVING if serving else Answer.NOT_SERVING
        self.changed.set()
        self.changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        if request.service not in NAMES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"There is no service {request.service[:100]!r} here.")
        return Answer(status=self.state)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        peer = context.peer()
        if self.watchers[peer] >= MAX_WATCHERS:
            reason = f"{MAX_WATCHERS} calls of this connection watch already."
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        self.watchers[peer] += 1
        try:
            told = None
            while True:
                changed = self.changed
                state = self.state if request.service in NAMES else Answer.SERVICE_UNKNOWN
                if state != told:
                    async with asyncio.timeout(READER_SECONDS):
                        await context.write(Answer(status=state))
                    told = state
                await changed.wait()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"Nobody has read this for {READER_SECONDS:g} s.")
        finally:
            self.watchers[peer] -= 1
            self.watchers += Counter()  # without those that have none left
