"""A tap on the wire: relays HTTP between a learner's code and a real server, and notes what passes.

Checks judge by what was really said, not by what the code looks like. No answer is altered; a `filter` may hold it
back or cut it into other pieces, as any network may. `more` may add to requests, for an answer that can be relied on.
Where the server itself has gone, a check cannot judge, and the tap says so.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from servebook.errors import ServebookError
from servebook.lab.feedback import NotYet

TIMEOUT_SECONDS = 60
MOST_BYTES = 64 * 2**20
"""Of a request's body: far beyond any that a lab asks for."""
LINE_BYTES = 1024
"""Of a line between a body's chunks."""
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "date", "server"}


@dataclass
class Exchange:
    """One request and its answer; times are of `time.monotonic()`."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    """The request's JSON, None where it has none."""
    started: float
    status: int = 0
    answer: bytes = b""
    """What the server has sent so far, decoded from chunks."""
    ended: float | None = None
    """When the whole answer was relayed."""
    left: float | None = None
    """When the client hung up before that."""
    lost: bool = False
    """Whether the server could not be reached, or was gone in the midst of its answer."""
    marks: dict[str, float] = field(default_factory=dict)
    """Times that a filter has noted."""
    done: threading.Event = field(default_factory=threading.Event)
    client: socket.socket | None = None

    def json(self) -> Any:
        """The answer as JSON, None where it is none."""
        with suppress(ValueError):
            return json.loads(self.answer)
        return None

    def events(self) -> list[Any]:
        """The JSON of every server-sent event so far, without the closing [DONE]."""
        data = [line[5:].strip() for line in self.answer.split(b"\n") if line.startswith(b"data:")]
        return [json.loads(item) for item in data if item != b"[DONE]"]

    def client_gone(self) -> bool:
        """Whether the client has closed its end."""
        if self.client is None:
            return True
        readable, _, _ = select.select([self.client], [], [], 0)
        try:
            return bool(readable) and self.client.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True


class Listener(ThreadingHTTPServer):
    """Has room for a crowd that comes at one moment; with the default of 5 some would wait a second for another try."""

    request_queue_size = 128


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The URL of a server that answers everything with this status, as one does that has a fault or is not ready."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b'{"error": "not now"}'
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            """Be silent."""

    with Listener(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def body_of(handler: BaseHTTPRequestHandler) -> bytes:
    """A request's body, which comes whole or in chunks.

    Raises:
        ValueError: its length is no number, it is no chunks, or more than MOST_BYTES.
    """
    coding = handler.headers.get("Transfer-Encoding", "").strip().lower()
    if coding not in ("", "chunked"):
        raise ValueError(f"a body in the coding {coding!r}")
    if not coding:
        length = int(handler.headers.get("Content-Length") or 0)
        if not 0 <= length <= MOST_BYTES:
            raise ValueError(f"a body of {length} bytes")
        return handler.rfile.read(length)
    body = bytearray()
    while size := int(handler.rfile.readline(LINE_BYTES).partition(b";")[0], 16):
        if not 0 < size <= MOST_BYTES - len(body):
            raise ValueError(f"a chunk of {size} bytes")
        body += handler.rfile.read(size)
        if handler.rfile.readline(LINE_BYTES) != b"\r\n":
            raise ValueError("a chunk of another size than it says")
    while handler.rfile.readline(LINE_BYTES).strip():
        pass  # what may follow the last chunk, as headers do
    return bytes(body)


Filter = Callable[[Iterator[bytes], Exchange], Iterator[bytes]]


def said(message: Mapping[str, Any]) -> Any:
    """The text of a chat message, which may be sent in parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return content
    return "".join(str(part.get("text")) for part in content if isinstance(part, dict))


@contextmanager
def noting_loss(exchange: Exchange) -> Iterator[None]:
    """Mark the exchange as lost where the server cannot be reached, or breaks its answer off.

    Raises:
        OSError: it does; or it takes too long, which may be what it was asked for.
    """
    try:
        yield
    except TimeoutError:
        raise
    except (OSError, http.client.IncompleteRead) as error:
        exchange.lost = True
        raise ConnectionError from error


def not_lost(lost: bool) -> None:
    """Raise ServebookError if a server was lost: what learners' code makes of that says nothing about the code."""
    if lost:
        raise ServebookError(
            "The server cannot serve, or does not answer.",
            "See `servebook status`; the notebook's set-up cell starts what is not up.",
        )


class Tap:
    """Relays to the server at `target` (a URL) while the `with` block lasts.

    `more` is added to the JSON of each request on its way, such as {"temperature": 0}. Without `port` a free one is
    taken.

    Attributes:
        url: where the learner's code is to connect to.
        exchanges: every request so far, in the order of arrival.
        most_at_once: how many requests were under way together at most.
    """

    def __init__(
        self, target: str, filter: Filter | None = None, more: Mapping[str, Any] | None = None, port: int = 0
    ) -> None:
        self.target = urlsplit(target)
        self.more = more
        self.filter = filter or (lambda chunks, _: chunks)
        self.exchanges: list[Exchange] = []
        self.most_at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()
        tap = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Without this a small chunk waits for the acknowledgement of the one before it (about 40 ms).
            disable_nagle_algorithm = True

            def relay(self) -> None:
                tap._relay(self)

            do_GET = do_POST = do_DELETE = do_PUT = relay

            def log_message(self, *_: Any) -> None:
                """Be silent."""

        self._server = Listener(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Tap:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="tap", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(error, NotYet):
            not_lost(any(exchange.lost for exchange in self.exchanges))

    def close(self) -> None:
        """Take no more connections: whoever comes now is refused."""
        self._server.shutdown()
        self._server.server_close()

    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._under_way > 0

    def settle(self, seconds: float = 60) -> None:
        """Wait until no request is under way."""
        deadline = time.monotonic() + seconds
        for exchange in list(self.exchanges):
            exchange.done.wait(max(0, deadline - time.monotonic()))

    def _relay(self, handler: BaseHTTPRequestHandler) -> None:
        try:
            raw = body_of(handler)
        except ValueError as error:
            with suppress(OSError):  # it may have hung up in the midst of it
                handler.send_error(400, f"The body of this request cannot be read: {error}")
            return
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = None
        if self.more and isinstance(body, dict):
            raw = json.dumps({**body, **self.more}).encode()
        exchange = Exchange(
            handler.command, handler.path, dict(handler.headers), body, time.monotonic(), client=handler.connection
        )
        with self._lock:
            self.exchanges.append(exchange)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            self._forward(handler, raw, exchange)
        except OSError:
            # Either end has hung up: the client on purpose, or the server because it is gone.
            exchange.left = exchange.left or time.monotonic()
            handler.close_connection = True
        finally:
            with self._lock:
                self._under_way -= 1
            exchange.client = None
            exchange.done.set()

    def _forward(self, handler: BaseHTTPRequestHandler, raw: bytes, exchange: Exchange) -> None:
        upstream = self._connect()
        try:
            headers = {k: v for k, v in handler.headers.items() if k.lower() not in HOP_BY_HOP | {"accept-encoding"}}
            with noting_loss(exchange):
                upstream.request(handler.command, self.target.path + handler.path, raw or None, headers)
            self._await_answer(upstream.sock, exchange)
            with noting_loss(exchange):
                answer = upstream.getresponse()
            exchange.status = answer.status

            def read() -> bytes:
                with noting_loss(exchange):
                    return answer.read1(65536)

            def chunks() -> Iterator[bytes]:
                while chunk := read():
                    exchange.answer += chunk
                    yield chunk

            paced = self.filter(chunks(), exchange)
            if first := next(paced, b""):
                exchange.marks.setdefault("first", time.monotonic())
            handler.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_BY_HOP:
                    handler.send_header(name, value)
            handler.send_header("Connection", "close")  # with the tap its connections are gone too
            # In chunks only where the server would: whoever reads a socket by hand need not know of them else.
            length = answer.getheader("Content-Length")
            chunked = length is None and handler.request_version != "HTTP/1.0"
            if length is not None:
                handler.send_header("Content-Length", length)
            elif chunked:
                handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            piece: bytes | None = first
            while piece:
                if exchange.client_gone():
                    raise BrokenPipeError
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                piece = next(paced, None)
            handler.wfile.write(b"0\r\n\r\n" if chunked else b"")
            exchange.ended = time.monotonic()
        finally:
            upstream.close()

    @staticmethod
    def _await_answer(upstream: socket.socket, exchange: Exchange) -> None:
        """Return when the server answers; hang up on it at once if the client does so first, as on a wire.

        Raises:
            OSError: the client has hung up, or the server has not answered for a minute.
        """
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not select.select([upstream], [], [], 0.02)[0]:
            if exchange.client_gone():
                raise BrokenPipeError
            if time.monotonic() > deadline:
                raise TimeoutError

    def _connect(self) -> http.client.HTTPConnection:
        host, port = str(self.target.hostname), self.target.port
        if self.target.scheme == "https":
            return http.client.HTTPSConnection(
                host, port, timeout=TIMEOUT_SECONDS, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
