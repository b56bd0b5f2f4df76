"""What stands around our HTTP applications, on a real socket: other dialects, HEAD, bodies, callers who leave."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from itertools import pairwise

import pytest
import uvicorn
from desk import eventually
from fastapi import BackgroundTasks, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from servebook.processes import wait_until
from servebook.ways.asgi import LINE_ENDS, BodyLimit, CancelOnDisconnect, HeadAsGet, Protocol

H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
WEBSOCKET = "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"


LARGE = 2**23
ASKED, GONE = threading.Event(), threading.Event()
"""Whether a caller of /wait has come, and left."""


def refuse(_: Scope, status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A small application behind all that is tested here."""
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, str]:
        return {"body": (await request.body()).decode()}

    @app.get("/alive")
    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b"one ", b"two ", b"three"):
                yield piece

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.get("/much")
    async def much() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            while True:
                yield bytes(2**20)
                await asyncio.sleep(0)  # as for a token

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.get("/large")
    async def large() -> Response:
        return Response(bytes(LARGE))

    @app.get("/wait")
    async def wait() -> None:
        ASKED.set()
        try:
            await asyncio.Event().wait()
        finally:
            GONE.set()

    begun, may_end, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
    left: list[str] = []

    async def work() -> None:
        begun.set()
        try:
            await may_end.wait()
            left.append("done")
        except asyncio.CancelledError:
            left.append("cancelled")
            raise
        finally:
            ended.set()

    @app.get("/work")
    async def begin(tasks: BackgroundTasks) -> None:
        for each in (begun, may_end, ended):
            each.clear()
        tasks.add_task(work)

    @app.get("/worked")
    async def worked() -> str:
        await begun.wait()
        may_end.set()
        await ended.wait()
        return left.pop()

    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(BodyLimit, limit=100, refuse=refuse, seconds=60)
    app.add_middleware(HeadAsGet)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Protocol, log_level="error"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield int(listener.getsockname()[1])
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def talk(port: int, *packets: bytes) -> tuple[str, dict[str, str], bytes]:
    """Send packets one by one; the status line, the headers and all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in packets:
            connection.sendall(packet)
        got = b""
        while piece := connection.recv(4096):
            got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return status, dict(line.lower().split(": ", 1) for line in lines), body


def post(body: bytes, headers: str = "", version: str = "1.1") -> bytes:
    return f"POST /echo HTTP/{version}\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


LAST = post(b"last", "Connection: close\r\n")


@pytest.mark.parametrize("offer", ["", H2C, WEBSOCKET, H2C.replace("Upgrade, HTTP2-Settings", "upgrade")])
@pytest.mark.parametrize("cuts", [[], [10], [-5], [30, -7], [-1]])
def test_an_offer_to_upgrade_is_answered_as_if_it_were_not_there(port: int, offer: str, cuts: list[int]) -> None:
    whole = post(b"hello there", offer)
    places = [0, *(cut % len(whole) for cut in cuts), len(whole)]
    packets = [whole[start:end] for start, end in pairwise(places)]
    status, _, rest = talk(port, *packets, LAST)
    assert status == "HTTP/1.1 200 OK"
    first, _, second = rest.partition(b"HTTP/1.1 200 OK")
    assert json.loads(first) == {"body": "hello there"}
    assert second.endswith(b'{"body":"last"}'), "the connection serves the next request too"


def test_connect_is_refused(port: int) -> None:
    """It ends a head like an offer to upgrade, and could be read anew for ever."""
    assert talk(port, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n")[0] == "HTTP/1.1 400 Bad Request"


def test_an_offer_with_a_chunked_body_and_without_any(port: int) -> None:
    chunked = f"POST /echo HTTP/1.1\r\nHost: x\r\n{H2C}Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n".encode()
    assert b'{"body":"hi"}' in talk(port, chunked, LAST)[2]
    assert b'{"status":"alive"}' in talk(port, f"GET /alive HTTP/1.1\r\nHost: x\r\n{H2C}\r\n".encode(), LAST)[2]


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.binary(max_size=100))
def test_any_body_with_an_offer_arrives_as_it_is(port: int, body: bytes) -> None:
    text = body.decode(errors="replace")[:30].encode()
    _, _, answer = talk(port, post(text, H2C), LAST)
    assert json.loads(answer.partition(b"HTTP/1.1 200 OK")[0]) == {"body": text.decode()}


def test_http_1_0_gets_no_chunks(port: int) -> None:
    status, headers, body = talk(port, b"GET /stream HTTP/1.0\r\n\r\n")
    assert (status, body) == ("HTTP/1.1 200 OK", b"one two three")
    assert "transfer-encoding" not in headers
    assert headers["connection"] == "close"
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    _, headers, body = talk(port, post(b"x", version="1.0"))
    assert (headers["content-length"], body) == (str(len(body)), b'{"body":"x"}')
    assert talk(port, b"GET /nowhere HTTP/1.0\r\n\r\n")[0] == "HTTP/1.1 404 Not Found"


def test_an_offer_keeps_the_version_and_the_wish_to_close(port: int) -> None:
    _, headers, body = talk(port, f"GET /stream HTTP/1.0\r\n{H2C}\r\n".encode())
    assert "transfer-encoding" not in headers
    assert body == b"one two three"
    closing = H2C.replace("Connection: ", "Connection: close, ")
    assert talk(port, f"GET /alive HTTP/1.1\r\nHost: x\r\n{closing}\r\n".encode())[1]["connection"] == "close"


def test_offers_one_behind_the_other_are_not_read_without_end(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """Two are answered, and then the connection ends."""
    offers = f"GET /alive HTTP/1.1\r\nHost: x\r\n{H2C}\r\n".encode() * 400
    status, _, rest = talk(port, offers)
    assert status == "HTTP/1.1 200 OK"
    assert rest.count(b'{"status":"alive"}') == 2
    assert not caplog.records


@pytest.mark.parametrize("behind", [b"", post(b"x"), LAST + bytes(200_000), post(bytes(250_000))])
def test_who_leaves_is_noticed_also_with_another_request_behind(port: int, behind: bytes) -> None:
    ASKED.clear()
    GONE.clear()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        assert ASKED.wait(60)
        connection.sendall(behind)
    assert GONE.wait(60)


@pytest.fixture
def keep_alive(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how many seconds a connection may be idle."""

    def set_to(seconds: float) -> None:
        def made(self: Protocol, transport: asyncio.Transport) -> None:
            self.timeout_keep_alive = seconds  # type: ignore[assignment]
            connection_made(self, transport)

        monkeypatch.setattr(Protocol, "connection_made", made)

    connection_made = Protocol.connection_made
    return set_to


@pytest.mark.parametrize("begun", [b"GET /alive HT", b"GET /alive HTTP/1.1\r\nHost: x\r\n\r\nGET /ali"])
def test_a_head_that_does_not_end_is_given_up(
    port: int, begun: bytes, keep_alive: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before a connection that is idle."""
    keep_alive(600)
    monkeypatch.setattr("servebook.ways.asgi.BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(begun)
        while connection.recv(4096):
            pass


@pytest.mark.parametrize(("idle", "begun", "late"), [(600, 0.1, b"GET /ali"), (0.3, 600, b"\r\n")])
def test_what_comes_after_an_answer_does_not_keep_a_connection_for_ever(
    port: int,
    idle: float,
    begun: float,
    late: bytes,
    keep_alive: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uvicorn's own timer of an idle connection ends with its first byte."""
    keep_alive(idle)
    monkeypatch.setattr("servebook.ways.asgi.BODY_SECONDS", begun)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"GET /alive HTTP/1.1\r\nHost: x\r\n\r\n")
        got = b""
        while not got.endswith(b'{"status":"alive"}'):
            got += connection.recv(4096)
        connection.sendall(late)
        assert not connection.recv(4096)


def test_a_head_that_does_not_end_leaves_the_answer_before_it_alone(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.ways.asgi.BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\nGET /ali")
        began, got = time.monotonic(), 0
        while time.monotonic() - began < 0.5 or got < 2**24:
            got += len(piece := connection.recv(2**20))
            assert piece


def test_nobody_looks_at_the_reader_of_a_connection_that_has_ended(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be looked at, and kept, for ever."""
    monkeypatch.setattr("servebook.ways.asgi.READER_SECONDS", 0.05)
    looked, ended = list[Protocol](), list[Protocol]()

    def noted(self: Protocol) -> None:
        looked.append(self)
        look(self)

    def connection_lost(self: Protocol, error: Exception | None) -> None:
        lost(self, error)
        ended.append(self)

    look, lost = Protocol.look_at_the_reader, Protocol.connection_lost
    monkeypatch.setattr(Protocol, "look_at_the_reader", noted)
    monkeypatch.setattr(Protocol, "connection_lost", connection_lost)
    with socket.create_connection(("127.0.0.1", port), timeout=60):
        eventually(lambda: len(looked) > 1, "a second look")
    eventually(lambda: set(looked) <= set(ended), "its end")
    before = len(looked)
    assert not wait_until(lambda: len(looked) > before, 0.5)


def test_a_head_that_is_too_long_is_refused(port: int) -> None:
    """Piece by piece: what comes at once was read already."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET /alive HTTP/1.1\r\nHost: x\r\n")
        with suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"a: " + b"b" * 2**16 + b"\r\n")
        with suppress(ConnectionResetError):  # what it had not read when it closed
            assert connection.recv(4096).startswith(b"HTTP/1.1 400 Bad Request")
            assert not connection.recv(4096)


def test_a_body_that_comes_with_the_heads_end_is_no_head(port: int) -> None:
    whole = post(b"x" * 100_000)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(whole[:20])
        assert not select.select([connection], [], [], 0.1)[0], "it is read, and more is waited for"
        connection.sendall(whole[20:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 Request Entity Too Large")


def test_a_connection_may_stand_by_before_its_first_request(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a pool do; and one whose answer came before the body that nobody wanted."""
    monkeypatch.setattr("servebook.ways.asgi.BODY_SECONDS", 0.5)  # the time that this test has between two pieces
    early = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 105\r\n\r\n" + b"x" * 101
    for before, then in ((b"", b""), (early, b"late"), (b"\r\n", b"\r\n")):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(before)
            if before == early:
                assert connection.recv(4096).startswith(b"HTTP/1.1 413")
            connection.sendall(then)
            assert not select.select([connection], [], [], 0.8)[0], "it is not closed"
            connection.sendall(b"GET /alive HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b'{"status":"alive"}' in b"".join(iter(lambda: connection.recv(4096), b""))


def small_socket(port: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port))
    return connection


@pytest.mark.parametrize(("path", "kept"), [("/much", ""), ("/large", ""), ("/large", "Connection: close\r\n")])
def test_what_nobody_reads_is_not_kept(port: int, path: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.ways.asgi.READER_SECONDS", 0.1)
    with small_socket(port) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{kept}\r\n".encode())
        errors = select.poll()
        errors.register(connection, 0)
        assert errors.poll(60_000), "cut, though nothing was read"


def test_who_reads_slowly_gets_everything(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: there are many looks in between."""
    monkeypatch.setattr("servebook.ways.asgi.READER_SECONDS", 1)
    with small_socket(port) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got, began = 0, time.monotonic()
        while piece := connection.recv(LARGE // 50):
            got += len(piece)
            while time.monotonic() - began < 4 * got / LARGE:
                time.sleep(0.005)  # at a pace: four seconds for the whole
    assert got > LARGE


def test_what_comes_behind_does_not_end_the_answer(port: int) -> None:
    """However much it is."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        sending = threading.Thread(target=connection.sendall, args=(post(b"x" * 100_000) * 30,))
        sending.start()
        while sending.is_alive():
            assert connection.recv(2**20)
        sending.join()
        after = 0
        while after < 2**24:
            after += len(piece := connection.recv(2**20))
            assert piece


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_head_is_get_without_a_body(port: int, version: str) -> None:
    for path, status in (("/alive", "200 OK"), ("/stream", "200 OK"), ("/echo", "405 Method Not Allowed")):
        got = talk(port, f"HEAD {path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert (got[0], got[2]) == (f"HTTP/1.1 {status}", b"")


@pytest.mark.parametrize("kept", ["", "Connection: close\r\n"])
def test_what_is_left_to_do_after_the_answer_is_done(port: int, kept: str) -> None:
    """Nobody has left: the answer is complete, whether the connection stays or is closed."""
    begin = f"GET /work HTTP/1.1\r\nHost: x\r\n{kept}\r\n".encode()
    ask = b"GET /worked HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    if not kept:
        assert talk(port, begin, ask)[2].endswith(b'"done"')
    else:
        assert talk(port, begin)[0] == "HTTP/1.1 200 OK"
        assert talk(port, ask)[2] == b'"done"'


async def test_an_application_that_listens_after_its_answer_learns_that_it_is_out() -> None:
    heard: list[Message] = []
    out = asyncio.Event()

    async def receive() -> Message:
        await out.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if not message.get("more_body", True):
            out.set()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": False})
        heard.append(await receive())

    async with asyncio.timeout(5):
        await CancelOnDisconnect(application)({"type": "http"}, receive, send)
    assert heard == [{"type": "http.disconnect"}]


def test_a_body_beyond_the_limit_is_refused(port: int) -> None:
    status, _, body = talk(port, post(b"x" * 101, "Connection: close\r\n"))
    assert (status, json.loads(body)) == (
        "HTTP/1.1 413 Request Entity Too Large",
        {"error": "The request's body is longer than 100 bytes."},
    )


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_body_that_does_not_end_is_given_up() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def unreachable(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    app = BodyLimit(unreachable, limit=100, refuse=refuse, seconds=0.05)
    await app({"type": "http", "method": "POST", "path": "/", "headers": []}, never, send)
    assert sent[0]["status"] == 408


async def test_a_reader_who_never_reads_counts_as_gone() -> None:
    cancelled = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            cancelled.set()

    async def full(_: Message) -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(5):
        await CancelOnDisconnect(endless, reader_seconds=0.05)({"type": "http"}, never, full)
    assert cancelled.is_set()


@given(st.text())
def test_escaped_line_ends_are_the_same_text_on_one_line(text: str) -> None:
    data = json.dumps({"text": text}, ensure_ascii=False).translate(LINE_ENDS)
    assert json.loads(data) == {"text": text}
    assert len(data.splitlines()) == 1
