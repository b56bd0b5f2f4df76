"""What every call has in common: a place in the bounded queue, an id, a status, metrics and one line of log."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc

from servebook.ways.custom_grpc.server import metrics
from servebook.ways.custom_grpc.server.errors import queue_full, refusal_for
from servebook.ways.limits import READER_SECONDS
from servebook.ways.pace import Pace

PACE = Pace(per_second=1500, most_seconds=0.025, free=8)
"""A message costs the server's one event loop 0.05 to 0.1 ms, however many tokens are in it; and 40 messages a second
are more than anybody reads."""

LATE_SECONDS = 0.05
"""So near to its deadline a cancelled call has passed it: at the client, whose clock began earlier."""

ABORT_SECONDS = 1.0
"""How long a call that nobody reads is held open for its status to go out."""

log = logging.getLogger("servebook.ways.custom_grpc.server")


@dataclass
class Call:
    """One call's account. The id is made here: one that a client chose could be another client's."""

    method: str
    id: str = field(default_factory=lambda: uuid4().hex)
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    arrived: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    max_tokens: int = 0
    writing_since: float | None = None
    unread: bool = False
    constraint: str = ""
    """The request's field that says which form the text must have."""

    def saw_first_token(self) -> None:
        """Note the time to first token, in seconds."""
        self.first_token = time.monotonic() - self.arrived
        metrics.FIRST_TOKEN.observe(self.first_token)


class Calls:
    """The calls that are open. At most `limit` are admitted, to the engine or its queue; others are being refused."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open = 0
        self.admitted: dict[str, Call] = {}
        self.none_open = asyncio.Event()
        self.none_open.set()

    @asynccontextmanager
    async def admit(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Call]:
        """Frame one call: admit it, turn whatever is raised inside into its status, account for it at the end.

        A refusal ends the call through `context.abort`. Cancellation passes through, for the engine to see.
        """
        call = Call(method)
        code = grpc.StatusCode.OK
        request_id = ("x-request-id", call.id)
        context.set_trailing_metadata((request_id,))
        self.enter()
        try:
            if len(self.admitted) >= self.limit:
                raise queue_full(self.limit)
            self.admitted[call.id] = call
            metrics.OPEN_CALLS.inc()
            yield call
        except asyncio.CancelledError:
            if call.unread:
                code = grpc.StatusCode.RESOURCE_EXHAUSTED
                # It waits for the reader, as all that is written does; gRPC keeps it for one who reads on after all.
                with suppress(TimeoutError):
                    async with asyncio.timeout(ABORT_SECONDS):
                        reason = f"Nobody has read this stream for {READER_SECONDS:g} s."
                        await context.abort(code, reason, (request_id,))
                raise
            late = (left := context.time_remaining()) is not None and left <= LATE_SECONDS
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            refusal = refusal_for(error, call.id, call.constraint)
            code = refusal.code
            if code is grpc.StatusCode.INTERNAL:
                # Type and place, not the message: it may quote the prompt.
                place = traceback.format_tb(error.__traceback__)
                log.error("failed", extra={"fields": {"id": call.id, "error": type(error).__name__, "at": place}})
            await context.abort(code, str(refusal), (request_id, refusal.trailer()))
        finally:
            if self.admitted.pop(call.id, None):  # not there if it was refused
                metrics.OPEN_CALLS.dec()
            self.leave()
            self.account(call, code)

    def hold_seconds(self, call: Call, sent: int) -> float:
        """How long `call` waits after a message of `sent` tokens: 0 unless many calls are open."""
        return PACE.hold_seconds(self.open, sent, call.max_tokens - call.completion_tokens)

    def end_unread(self) -> None:
        """End the calls whose callers have stopped reading: they would keep their places for ever.

        To be called now and then. Each is cancelled once: another time would cut the engine's abort short.
        """
        late = time.monotonic() - READER_SECONDS
        for call in self.admitted.values():
            if call.task and not call.unread and call.writing_since and call.writing_since < late:
                call.unread = True
                call.task.cancel()

    def enter(self) -> None:
        self.open += 1
        self.none_open.clear()

    def leave(self) -> None:
        self.open -= 1
        if not self.open:
            self.none_open.set()

    def account(self, call: Call, code: grpc.StatusCode) -> None:
        """Metrics, and one line of log: sizes and times, never text."""
        seconds = time.monotonic() - call.arrived
        metrics.CALLS.labels(call.method, code.name).inc()
        metrics.TOKENS.labels("prompt").inc(call.prompt_tokens)
        metrics.TOKENS.labels("completion").inc(call.completion_tokens)
        metrics.DURATION.observe(seconds)
        fields = {
            "id": call.id,
            "method": call.method,
            "code": code.name,
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
            "first_token_seconds": round(call.first_token, 4) if call.first_token is not None else None,
            "seconds": round(seconds, 4),
        }
        log.info("call", extra={"fields": fields})
