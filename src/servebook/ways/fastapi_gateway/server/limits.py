"""How much the gateway takes: of one request, and of all together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from servebook.ways.fastapi_gateway.server.errors import GatewayError, error_response

MESSAGE_CHARS = 32_000
"""The longest message, in characters."""
HISTORY_TURNS = 50
MAX_TOKENS = 2_048
"""The longest answer that a caller may ask for, in tokens."""


class Slots:
    """Admits at most `limit` requests at a time and refuses the rest at once: a queue would only hide the load."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a slot.

        Raises:
            GatewayError: 503, all are taken.
        """
        if self.taken >= self.limit:
            raise GatewayError(503, "busy", "All places are taken; try again in a moment.", retry_after=1)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class BodyLimit:
    """ASGI middleware that reads a request's body before the application does, up to `limit` bytes.

    A longer one is answered 413, one that does not arrive within `seconds` 408.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float = 10) -> None:
        self.app = app
        self.limit = limit
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            with anyio.fail_after(self.seconds):
                first = await self.read(receive)
        except TimeoutError:
            late = GatewayError(408, "slow_request", f"The request's body took longer than {self.seconds:g} s.")
            await error_response(Request(scope), late)(scope, receive, send)
            return
        except GatewayError as error:
            await error_response(Request(scope), error)(scope, receive, send)
            return
        if first is None:
            return
        unread = [first]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)

    async def read(self, receive: Receive) -> Message | None:
        """The whole body as one message; None where the caller left before its end.

        Raises:
            GatewayError: 413, it is longer than the limit.
        """
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit:
                raise GatewayError(413, "too_large", f"The request's body is longer than {self.limit} bytes.")
        return {"type": "http.request", "body": body, "more_body": False}
