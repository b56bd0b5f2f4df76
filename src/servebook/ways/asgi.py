"""What each HTTP server of ours needs around its application: for callers who leave, endless bodies, other dialects."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
from httptools import HttpRequestParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from servebook.ways.limits import BODY_SECONDS, READER_SECONDS, LimitExceeded

LINE_ENDS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""Unicode's line ends, as JSON may write them: some clients cut server-sent events at them (`str.splitlines`)."""

MOST_HEAD = 64 * 1024
"""Bytes of a request's head, beyond those that come with its first: the parser copies a long one again and again."""


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

    A longer one is answered 413, one that does not arrive within `seconds` 408, and one that `check` finds to ask for
    too much (LimitExceeded) 400, by what `refuse` makes of the scope, the status and the reason.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        refuse: Callable[[Scope, int, str], ASGIApp],
        seconds: float = BODY_SECONDS,
        check: Callable[[bytes], None] | None = None,
    ) -> None:
        self.app = app
        self.limit = limit
        self.refuse = refuse
        self.seconds = seconds
        self.check = check

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
        try:
            if self.check:
                self.check(body)
        except LimitExceeded as error:
            await self.refuse(scope, 400, f"{error}.")(scope, receive, send)
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
    """uvicorn's HTTP/1.1, for clients that it fails, and for those who would hold its connections.

    Java's HttpClient offers to go on in HTTP/2 (`Upgrade: h2c`) with every request. A server may ignore that and
    answer as ever; uvicorn takes the body for the other protocol's and loses it (its issue 2722).
    nginx speaks HTTP/1.0 upstream by default, which knows no chunks: there the end of the connection ends a body.

    A head has MOST_HEAD bytes and BODY_SECONDS from its first one. What is sent may be read slowly, but the
    connection is cut when nothing of it was taken for READER_SECONDS: uvicorn would keep it for as long as its buffer
    is not empty. Of the requests that come before an answer (pipelining) a small one waits, and what else
    comes is dropped: the connection ends with its answer, and the client asks again on another. uvicorn would stop
    reading at the first, and not see who leaves.
    """

    quiet: asyncio.TimerHandle | None = None
    """Until somebody has to ask, or to ask on."""
    head: int | None = None
    """Bytes of the head that is on its way, without those that came with its first."""
    look: asyncio.TimerHandle | None = None
    taken: int | None = None
    """Bytes that the reader had taken at the last look, where something waited; or, negative, those that waited."""
    answered: RequestResponseCycle | None = None
    """The request that has its answer made now, or had one last."""
    full = False
    """Whether what comes is dropped."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.expect(self.timeout_keep_alive)
        self.look_at_the_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in filter(None, (self.quiet, self.look)):
            timer.cancel()
        if self.answered and not self.answered.response_complete:
            self.answered.disconnected = True
            self.answered.message_event.set()
        super().connection_lost(exc)

    def expect(self, seconds: float) -> None:
        """Hang up unless a request's head begins, or is whole, in time."""
        if self.quiet:
            self.quiet.cancel()
        self.quiet = self.loop.call_later(seconds, self.hang_up)

    @property
    def answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def hang_up(self) -> None:
        if self.answering:
            self.drop_the_rest()
        else:
            self.transport.close()

    def drop_the_rest(self) -> None:
        """Read on, to see who leaves, but end the connection with the answer that is being made."""
        self.full = True
        self.cycle.keep_alive = False

    def look_at_the_reader(self) -> None:
        """Cut the connection if something waits for its reader, and nothing was taken since the last look.

        With a reset: else the kernel keeps for minutes what nobody reads.
        """
        connection = self.transport.get_extra_info("socket")
        waits = self.transport.get_write_buffer_size() > 0
        taken = (bytes_acked(connection) or -self.transport.get_write_buffer_size()) if waits else None
        if waits and taken == self.taken:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        self.taken = taken
        self.look = self.loop.call_later(READER_SECONDS, self.look_at_the_reader)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.answered = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self.full:
            return
        if self.head is not None:
            if self.head > MOST_HEAD:
                if self.answering:
                    self.drop_the_rest()
                else:
                    self.send_400_response(f"The request's head is longer than {MOST_HEAD} bytes.")
                return
            self.head += len(data)  # which may hold the head's end: looked at when more comes
        self.received = data
        super().data_received(data)
        if not self.quiet and not self.answering:
            self.expect(self.timeout_keep_alive)  # which uvicorn's own timer, ended by any byte, would not

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self.full:
            self.head = 0
            self.expect(BODY_SECONDS)

    def on_body(self, body: bytes) -> None:
        if self.full:
            return
        if self.pipeline and len(self.cycle.body) + len(body) > HIGH_WATER_LIMIT:
            self.pipeline.clear()
            self.cycle = self.answered  # type: ignore[assignment]
            self.drop_the_rest()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.full:
            super().on_message_complete()

    def _should_upgrade(self) -> bool:
        # Where it does, uvicorn begins no request, and calls the next method. CONNECT would be an offer again when it
        # is read anew: uvicorn refuses it.
        return bool(self.parser.get_method() != b"CONNECT")

    def handle_websocket_upgrade(self) -> None:
        """Read the request again, without the offer."""
        if self.full:
            return
        upgrade: Any = sys.exception()  # its argument says where in the data the head ends
        rest = self.received[upgrade.args[0] :]
        kept = [(name, value) for name, value in self.headers if name not in (b"upgrade", b"connection")]
        words = b",".join(value for name, value in self.headers if name == b"connection").lower().split(b",")
        if b"close" in map(bytes.strip, words):
            kept.append((b"connection", b"close"))
        head = b"".join(b"%s: %s\r\n" % header for header in kept)
        version = self.scope["http_version"].encode()
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self.data_received(
            b"%s %s HTTP/%s\r\n%s\r\n%s" % (self.scope["method"].encode(), self.url, version, head, rest)
        )

    def on_headers_complete(self) -> None:
        self.head = None
        if self.quiet:
            self.quiet.cancel()
            self.quiet = None
        if self.full:
            return
        if self.pipeline:
            self.drop_the_rest()
            return
        super().on_headers_complete()
        if self.pipeline:
            self.flow.resume_reading()
        if self.scope["http_version"] == "1.0" and self.cycle:
            self.cycle.send = partial(until_the_end, self.cycle)  # type: ignore[method-assign]


def bytes_acked(connection: socket.socket) -> int:
    """Bytes of a TCP connection that have arrived at its other end: `tcp_info.tcpi_bytes_acked`, a u64 at byte 120.

    0 where the kernel does not say, as in some sandboxes.
    """
    try:
        return int.from_bytes(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)[120:], sys.byteorder)
    except OSError:
        return 0


async def until_the_end(cycle: RequestResponseCycle, message: Any) -> None:
    """Send a response without chunks; what it says of its length stands."""
    cycle.chunked_encoding = False
    cycle.expected_content_length = len(message.get("body", b""))
    await RequestResponseCycle.send(cycle, message)
