"""What stands between a learner's code and a server, without an engine."""

from __future__ import annotations

import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from unittest.mock import Mock

import grpc
import numpy as np
import pytest
import requests
from smg_grpc_proto import vllm_engine_pb2 as pb
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from servebook.errors import ServebookError
from servebook.lab.checks import c03_triton_grpc, c07_vllm_native_grpc, c08_measure
from servebook.lab.checks.c03_triton_grpc import LeaveWatch
from servebook.lab.checks.c07_vllm_native_grpc import HOLD_AT, held_for_abort, ids_of, left_alone, messages_of
from servebook.lab.checks.c10_scale_out import LONG, keep_at_work
from servebook.lab.feedback import NotYet
from servebook.lab.learner_server.judge import StreamWatch
from servebook.lab.manifest import find_exercise
from servebook.lab.submission import Submission
from servebook.lab.taps.grpc import Call, GrpcTap, Lost
from servebook.lab.taps.http import Tap
from servebook.lab.taps.triton import Stream, cut, is_final, text_of

SAYS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"


@contextmanager
def server_that_says(answer: bytes | None) -> Iterator[str]:
    """The address of a server that says this to one caller, and hangs up; None: nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) if answer else socket.socket() as listener:
        if answer:

            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

            threading.Thread(target=serve, daemon=True).start()
        else:
            listener.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def find_fault(tap: Tap | GrpcTap, call: Callable[[], object]) -> None:
    """A check: calls a learner's code, and finds fault with what comes of it."""
    with tap:
        call()
        raise NotYet("no error", "an error", "your code raised this error")


@pytest.mark.parametrize("answer", [None, SAYS], ids=["refused", "broken off"])
def test_a_server_that_has_gone_is_no_learners_fault(answer: bytes | None) -> None:
    with server_that_says(answer) as address:
        tap = Tap(f"http://{address}")

        def ask() -> None:
            with suppress(requests.RequestException):
                requests.get(tap.url, timeout=10)

        with pytest.raises(ServebookError, match="does not answer"):
            find_fault(tap, ask)


def test_a_grpc_server_that_has_gone_is_no_learners_fault() -> None:
    with server_that_says(None) as address:
        tap = GrpcTap(address)

        def ask() -> None:
            with suppress(grpc.RpcError), grpc.insecure_channel(tap.address) as channel:
                channel.unary_unary("/a.Service/Method", None, None)(b"", timeout=10)

        with pytest.raises(ServebookError, match="does not answer"):
            find_fault(tap, ask)


class Locked(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # at run time it takes none
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header 'x'")

        return grpc.unary_unary_rpc_method_handler(refuse)


def test_a_call_that_triton_locks_is_the_learners_own_doing() -> None:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, [Locked()])
        tap = GrpcTap(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        server.start()

        def ask() -> None:
            with pytest.raises(grpc.RpcError, match="restricted"), grpc.insecure_channel(tap.address) as channel:
                channel.unary_unary("/a.Service/Method", None, None)(b"", timeout=10)

        with pytest.raises(NotYet):
            find_fault(tap, ask)
        server.stop(None).wait()


def test_a_caller_who_leaves_is_the_learners_own_doing() -> None:
    left = threading.Event()

    def hold(chunks: Iterator[bytes], _: object) -> Iterator[bytes]:
        yield next(chunks)
        left.wait(10)
        yield from chunks

    with server_that_says(SAYS + b"5\r\nagain\r\n0\r\n\r\n") as address:
        tap = Tap(f"http://{address}", hold)

        def leave() -> None:
            requests.get(tap.url, stream=True, timeout=10).close()
            left.set()
            tap.settle()

        with pytest.raises(NotYet):
            find_fault(tap, leave)


def test_a_caller_who_leaves_before_the_answer_is_left_by_the_tap_too() -> None:
    """A server that goes on computing for nobody is seen only where its own caller leaves it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(10)
        with Tap(f"http://127.0.0.1:{silent.getsockname()[1]}") as tap:
            with socket.create_connection(("127.0.0.1", int(tap.url.rpartition(":")[2]))) as caller:
                caller.sendall(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")
                upstream, _ = silent.accept()
            with upstream:
                upstream.settimeout(10)
                while upstream.recv(65536):
                    pass
        tap.settle(10)
    assert tap.exchanges[0].left is not None
    assert not tap.exchanges[0].lost


def test_a_short_stream_is_held_at_its_end() -> None:
    """A busy engine merges tokens: so few pieces come that no place among them is late enough."""
    events = [b'data: {"choices": [{"text": "a"}]}\n\n', b"data: [DONE]\n\n"]
    watch = StreamWatch()
    watch.first_read.set()
    assert list(watch.hold(iter(events), Mock())) == events
    assert watch.early.is_set()
    watch.leaving.set()
    gone = iter([False, True])
    exchange = Mock(client_gone=lambda: next(gone))
    assert list(watch.hold(iter(events), exchange)) == events
    assert next(gone, None) is None, "it was asked again at the end, until the client had gone"


def test_a_fast_engine_outruns_nobody_who_leaves_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many responses come until then; who stays is seen."""
    monkeypatch.setattr(c03_triton_grpc, "text_of", str)
    monkeypatch.setattr(c03_triton_grpc, "is_final", lambda _: False)
    stream, leave = Stream(Mock()), LeaveWatch(lambda text: len(text) >= 2)
    for _ in range(100):
        leave.watch("x", stream)
        stream.responses.append("x")
    assert not leave.overrun.is_set()
    monkeypatch.setattr(c03_triton_grpc, "LEAVE_SECONDS", 0.2)
    stream.call.done.is_set.return_value = False  # type: ignore[attr-defined]
    with pytest.raises(Lost):
        leave.watch("x", stream)
    assert leave.overrun.is_set()


def two_ids(count: int) -> Iterator[bytes]:
    """So many messages of vLLM's, and the last one."""
    for _ in range(count):
        yield pb.GenerateResponse(chunk=pb.GenerateStreamChunk(token_ids=[1, 2])).SerializeToString()
    yield pb.GenerateResponse(complete=pb.GenerateComplete(finish_reason="length")).SerializeToString()


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 4], [7]])
def test_chunks_are_cut_to_one_size_whatever_the_engine_made(sizes: list[int]) -> None:
    """And the last message has those of the last chunk, as vLLM's has."""
    ids, call = iter(range(7)), Call("Generate")
    made = [[next(ids) for _ in range(size)] for size in sizes]
    last = pb.GenerateComplete(finish_reason="length", output_ids=made[-1], completion_tokens=len(made[-1]))
    call.responses = [
        *(pb.GenerateResponse(chunk=pb.GenerateStreamChunk(token_ids=each)).SerializeToString() for each in made),
        pb.GenerateResponse(complete=last).SerializeToString(),
    ]
    *chunks, end = messages_of(call)
    assert [list(each.chunk.token_ids) for each in chunks] == [[0, 1], [2, 3], [4, 5], [6]]
    assert [each.chunk.completion_tokens for each in chunks] == [2, 2, 2, 1]
    assert (list(end.complete.output_ids), end.complete.completion_tokens) == ([6], 1)
    assert ids_of(call) == list(range(7))


def triton_response(text: str, **parameters: bool) -> service_pb2.ModelStreamInferResponse:
    """One of Triton's, with a text."""
    response = service_pb2.ModelStreamInferResponse()
    for name, value in parameters.items():
        response.infer_response.parameters[name].bool_param = value
    response.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    response.infer_response.raw_output_contents.append(serialize_byte_tensor(np.array([text.encode()], object)).item())
    return response


@pytest.mark.parametrize("begins", [True, False])
def test_a_text_is_cut_into_responses_of_which_the_last_is_final(begins: bool) -> None:
    parts = list(cut(triton_response("Bread is made 빵 of fl", triton_final_response=True), begins))
    assert [text_of(part) for part in parts] == [*[""] * begins, "Bread is", " made 빵 ", "of fl"]
    assert [is_final(part) for part in parts] == [False] * (len(parts) - 1) + [True]


def test_what_has_no_text_is_not_cut() -> None:
    error = service_pb2.ModelStreamInferResponse(error_message="no such model")
    empty = triton_response("")
    assert [*cut(error, True), *cut(empty, True)] == [error, empty]


def test_a_fast_engine_outruns_nobody_who_leaves_vllm() -> None:
    call, passed, waits = Call("Generate"), 0, []

    def has_left() -> bool:
        waits.append(passed)
        return True

    call.done = Mock(is_set=has_left)
    for _ in left_alone(two_ids(100), call):
        passed += 1
    assert waits == [HOLD_AT]


@pytest.mark.parametrize("aborts", [True, False])
def test_a_fast_engine_outruns_no_abort(aborts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has come to its end already; the messages are held back."""
    monkeypatch.setattr(c07_vllm_native_grpc, "LEAVE_SECONDS", 0.2)
    came, in_time = threading.Event(), threading.Event()
    ids: list[int] = []
    for message in held_for_abort(came.is_set, 5, in_time)(two_ids(100), Call("Generate")):
        ids += pb.GenerateResponse.FromString(message).chunk.token_ids
        if aborts and len(ids) >= 5:
            came.set()
    assert in_time.is_set() is aborts


def test_a_replica_is_at_work_without_a_gap_on_a_fast_engine() -> None:
    told: list[str] = []

    class Answer:
        def __enter__(self) -> Answer:
            return self

        def __exit__(self, *_: object) -> None:
            told.append("closed")

        def iter_lines(self) -> Iterator[bytes]:
            told.append("read")
            yield from [b"data: {}", b""] * LONG
            told.append("over")

    def ask() -> Answer:
        told.append("asked")
        return Answer()

    keep_at_work(ask, LONG, lambda: None, lambda: told.count("over") == 2)  # type: ignore[arg-type]
    assert told[:7] == ["asked", "read", "asked", "over", "asked", "read", "over"]


@pytest.mark.parametrize(
    "framing", ["Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_answer_is_framed_as_the_server_does_it(framing: str, version: str) -> None:
    """A learner who reads a socket by hand meets chunks only where the server itself would send them."""
    with (
        server_that_says(f"HTTP/1.1 200 OK\r\n{framing}".encode()) as address,
        Tap(f"http://{address}") as tap,
        socket.create_connection(("127.0.0.1", int(tap.url.rsplit(":", 1)[1])), timeout=10) as caller,
    ):
        caller.sendall(f"GET / HTTP/{version}\r\nHost: lab\r\n\r\n".encode())
        head, _, body = caller.makefile("rb").read().partition(b"\r\n\r\n")
    in_chunks = "chunked" in framing and version == "1.1"
    assert (b"chunked" in head) is in_chunks
    assert (body == b"hello") is not in_chunks


def said_to(url: str, request: bytes) -> bytes:
    """What a server says to these bytes, until it hangs up."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as caller:
        caller.sendall(request)
        return caller.makefile("rb").read()


def test_a_body_in_chunks_is_read_and_goes_on() -> None:
    """requests sends so what it gets from a generator."""
    with (
        server_that_says(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as address,
        Tap(f"http://{address}") as behind,
        Tap(behind.url) as tap,
    ):
        assert requests.post(tap.url, data=iter([b'{"prompt": ', b'"sea"}']), timeout=10).ok
    assert tap.exchanges[0].body == behind.exchanges[0].body == {"prompt": "sea"}


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: many\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 99999999999\r\n\r\n",
        *(b"Transfer-Encoding: chunked\r\n\r\n" + chunks for chunks in (b"many\r\n", b"-1\r\n", b"1\r\nsea\r\n")),
        b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n",
    ],
)
def test_a_body_that_cannot_be_read_is_refused(body: bytes) -> None:
    with Tap("http://127.0.0.1:9") as tap:
        assert said_to(tap.url, b"POST / HTTP/1.1\r\nHost: lab\r\n" + body).startswith(b"HTTP/1.1 400 ")
    assert not tap.exchanges


def asked_as(name: str) -> Call:
    return Call("Generate", requests=[pb.GenerateRequest(request_id=name).SerializeToString()])


@pytest.mark.parametrize(
    ("first", "second"),
    [("1764437000123456789", "1764437003987644321"), ("lab-1764437000123456789", "lab-1764437003987644321")],
)
def test_nanoseconds_are_no_secret(first: str, second: str) -> None:
    with pytest.raises(NotYet, match="can guess the next"):
        c07_vllm_native_grpc._own_ids(asked_as(first), asked_as(second), secret=True)
    c07_vllm_native_grpc._own_ids(asked_as(first), asked_as(second))


def test_random_ids_are_a_secret() -> None:
    makers: list[Callable[[], object]] = [uuid.uuid4, lambda: secrets.token_urlsafe(16), lambda: secrets.randbits(128)]
    for make in makers:
        c07_vllm_native_grpc._own_ids(asked_as(f"{make()}"), asked_as(f"{make()}"), secret=True)


def test_sleeps_that_add_up_are_no_lack_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c08_measure, "LATE_SECONDS", 1.0)

    def open_loop(ask: Callable[[], object], at: list[float]) -> list[float | None]:
        with ThreadPoolExecutor(len(at)) as pool:
            for due in at:
                time.sleep(max(0, due))
                pool.submit(ask)
        return []

    with pytest.raises(NotYet, match="later and later"):
        c08_measure.check_08_5(Submission(find_exercise("08.5")[1], {"open_loop": open_loop}))
