"""What each HTTP server of ours needs around its application: for callers who leave, endless bodies, other dialects."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
from httptools import HttpRequestParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from servebook.ways.limits import BODY_SECONDS, READER_SECONDS

LINE_ENDS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""Unicode's line ends, as JSON may write them: some clients cut server-sent events at them (`str.splitlines`)."""


class CancelOnDisconnect:
    """ASGI middleware that cancels the application when its caller disconnects, or stops reading.

    FastAPI notices a disconnect only where it streams; a handler that waits for the engine's whole answer
    would wait on, and the engine would compute for nobody. Here a task of its own reads what the server
    receives, ahead of the application, and so sees `http.disconnect` when it comes. What is cancelled closes
    its request to vLLM, and vLLM aborts it. After the answer's last byte nothing is cancelled: servers say
    `http.disconnect` then too, and what is left may be a background task.

    `reader_seconds` is how long a caller may leave a full socket unread before they count as gone.
    What is read ahead is bounded by `BodyLimit`, which must be outside of this.
    """

    def __init__(self, app: ASGIApp, reader_seconds: float = READER_SECONDS) -> None:
        self.app = app
        self.reader_seconds = reader_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        answered = False
        with anyio.CancelScope() as request:

            async def read_ahead() -> None:
                while (message := await receive())["type"] != "http.disconnect":
                    messages.put_nowait(message)
                if answered:  # nobody has left; who waits for the end of the answer hears of it
                    messages.put_nowait(message)
                else:
                    request.cancel()

            async def watch_and_send(message: Message) -> None:
                nonlocal answered
                unread = loop.call_later(self.reader_seconds, request.cancel)
                try:
                    await send(message)
                finally:
                    unread.cancel()
                answered = message["type"] == "http.response.body" and not message.get("more_body", False)

            reading = asyncio.create_task(read_ahead())
            try:
                await self.app(scope, messages.get, watch_and_send)
            finally:
                reading.cancel()


class BodyLimit:
    """ASGI middleware that reads a request's body before the application does, up to `limit` bytes.

    A longer one is answered 413, one that does not arrive within `seconds` 408, by what `refuse` makes of the
    scope, the status and the reason.
    """

    def __init__(
        self, app: ASGIApp, limit: int, refuse: Callable[[Scope, int, str], ASGIApp], seconds: float = BODY_SECONDS
    ) -> None:
        self.app = app
        self.limit = limit
        self.refuse = refuse
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = b""
        more = True
        try:
            with anyio.fail_after(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.limit:
                        reason = f"The request's body is longer than {self.limit} bytes."
                        await self.refuse(scope, 413, reason)(scope, receive, send)
                        return
        except TimeoutError:
            reason = f"The request's body took longer than {self.seconds:g} s."
            await self.refuse(scope, 408, reason)(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)


class HeadAsGet:
    """ASGI middleware that answers HEAD, which monitors send, as GET; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}  # a copy: by its own the server knows to leave the body out
        try:
            await self.app(as_get, receive, send)
        finally:
            if "route" in as_get:  # for who counts, outside of this
                scope["route"] = as_get["route"]


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, for two kinds of client that it fails.

    Java's HttpClient offers to go on in HTTP/2 (`Upgrade: h2c`) with every request. A server may ignore that and
    answer as ever; uvicorn takes the body for the other protocol's and loses it (its issue 2722).
    nginx speaks HTTP/1.0 upstream by default, which knows no chunks: there the end of the connection ends a body.
    """

    def data_received(self, data: bytes) -> None:
        self.received = data
        super().data_received(data)

    def _should_upgrade(self) -> bool:
        # Where it does, uvicorn begins no request, and calls the next method. CONNECT would be an offer again when it
        # is read anew: uvicorn refuses it.
        return bool(self.parser.get_method() != b"CONNECT")

    def handle_websocket_upgrade(self) -> None:
        """Read the request again, without the offer."""
        upgrade: Any = sys.exception()  # its argument says where in the data the head ends
        rest = self.received[upgrade.args[0] :]
        kept = [(name, value) for name, value in self.headers if name not in (b"upgrade", b"connection")]
        head = b"".join(b"%s: %s\r\n" % header for header in kept)
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self.data_received(b"%s %s HTTP/1.1\r\n%s\r\n%s" % (self.scope["method"].encode(), self.url, head, rest))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0" and self.cycle:
            self.cycle.send = partial(until_the_end, self.cycle)  # type: ignore[method-assign]


async def until_the_end(cycle: RequestResponseCycle, message: Any) -> None:
    """Send a response without chunks; what it says of its length stands."""
    cycle.chunked_encoding = False
    cycle.expected_content_length = len(message.get("body", b""))
    await RequestResponseCycle.send(cycle, message)
