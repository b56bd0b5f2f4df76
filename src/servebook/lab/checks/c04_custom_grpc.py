"""Checks of lab 04: a changed contract, servicers that learners wrote, a client with a deadline, an interceptor."""

from __future__ import annotations

import ast
import importlib.resources
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import requests
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servebook.bearer import bearer
from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.learner_server.judge import GATHERED, USED_UP, StreamWatch, own_server, written
from servebook.lab.learner_server.run import OwnServer
from servebook.lab.rest import RELIABLE, accepted, asked_to_continue, context_length, key_of, not_full, reply_of, sends
from servebook.lab.submission import Causes, Submission
from servebook.lab.taps.http import Tap
from servebook.lab.taps.sse import streamed_text
from servebook.launch import Server
from servebook.processes import wait_until
from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc

Field = descriptor_pb2.FieldDescriptorProto
INTEGERS = {
    getattr(Field, f"TYPE_{name}{bits}") for name in ("INT", "UINT", "SINT", "FIXED", "SFIXED") for bits in (32, 64)
}
WRAPPERS = {f".google.protobuf.{name}Value" for name in ("Int32", "Int64", "UInt32", "UInt64")}
"""Messages of the standard library that hold one whole number, and know whether it was given."""
SECONDS = 60
"""For one call; the engine of a full room is slow."""
BESIDE_SECONDS = 10
"""How long a second call may take to the engine, while a first one waits for it."""
FROM_ENGINE = "the text does not come from the engine"
ANEW = "number the messages of each stream from 0: count in the handler, not in the class"
WHY = 'the engine says why: "length" or "stop" in the finish_reason of its last chunk'


def compiled(proto: Path) -> descriptor_pb2.FileDescriptorProto:
    """What protoc reads in the file.

    Raises:
        NotYet: protoc refuses it.
    """
    standard = importlib.resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.binpb"
        argv = ["-I", str(proto.parent.resolve()), "-I", str(standard), f"--descriptor_set_out={out}"]
        argv = [sys.executable, "-P", "-m", "grpc_tools.protoc", *argv, str(proto.resolve())]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise NotYet("a file that protoc takes", done.stderr.strip()[-300:], "protoc names the line and its fault")
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]


def is_whole_number(field: descriptor_pb2.FieldDescriptorProto) -> bool:
    """Whether a field holds a whole number, as itself or in a wrapper."""
    return field.type in INTEGERS or field.type_name in WRAPPERS


def has_presence(field: descriptor_pb2.FieldDescriptorProto) -> bool:
    """Whether a field of proto3 tells zero from nothing: optional, one of several, or a message."""
    return field.HasField("oneof_index") or field.type == Field.TYPE_MESSAGE


def check_04_1(submission: Submission) -> None:
    """Old fields stay, the new ones are new, and what is gone is reserved."""
    proto = compiled(written(submission, "lab.proto"))
    messages = {message.name: message for message in proto.message_type}
    methods = [(m.name, m.server_streaming) for service in proto.service for m in service.method]
    require(
        proto.package == "lab.v1" and methods == [("Generate", False), ("StreamGenerate", True)],
        "package lab.v1 with Generate and StreamGenerate as they were",
        f"package {proto.package}, {methods}",
        "the path of a call is package, service and method: to rename one is to break every client",
    )
    kept = [
        ("GenerateRequest", 1, "prompt", Field.TYPE_STRING),
        ("GenerateRequest", 2, "max_tokens", Field.TYPE_INT32),
        ("Token", 1, "text", Field.TYPE_STRING),
        ("Token", 2, "is_finished", Field.TYPE_BOOL),
    ]
    for message, number, name, kind in kept:
        require(message in messages, f"message {message}", sorted(messages), "messages keep their names")
        field = {field.number: field for field in messages[message].field}.get(number)
        require(
            field is not None and (field.name, field.type, field.label) == (name, kind, Field.LABEL_OPTIONAL),
            f"{message}: {name} = {number}, as it was",
            f"{field.name} = {number}, changed" if field else f"nothing with the number {number}",
            "old clients send this number with this type: neither ever changes",
        )
    asked = messages["GenerateRequest"]
    request = {field.name: field for field in asked.field}
    seed = request.get("seed")
    require(seed is not None, "a field seed in GenerateRequest", sorted(request), "the new field is missing")
    assert seed
    gone = any(span.start <= 3 < span.end for span in asked.reserved_range)
    needs = [
        (
            seed.number != 3,
            "seed with a number that was never given out",
            "seed = 3",
            "3 was temperature's: the temperature that an old client sends would be read as a seed",
        ),
        (
            is_whole_number(seed) and seed.label != Field.LABEL_REPEATED,
            "seed as a whole number",
            seed,
            "a seed is one whole number: int64",
        ),
        (
            has_presence(seed),
            "a seed of 0 told apart from no seed",
            "a plain field: both look the same",
            "put optional in front: then HasField knows",
        ),
        (
            "temperature" not in request,
            "GenerateRequest without temperature",
            "it is still there",
            "take the field out, and keep its number and name from being used again",
        ),
        (
            gone,
            "the number 3 reserved",
            "it may be given out again",
            "whoever adds a field next year sees a free 3: write reserved 3;",
        ),
        (
            "temperature" in asked.reserved_name,
            'the name "temperature" reserved',
            "it may be used again",
            'JSON and code go by names: write reserved "temperature"; too',
        ),
    ]
    for need in needs:
        require(*need)
    new = [field for field in messages["Token"].field if field.number not in (1, 2)]
    several = [field for field in new if field.type in INTEGERS and field.label == Field.LABEL_REPEATED]
    judge(
        True,
        bool(several),
        (any(is_whole_number(field) for field in new), "a piece of text may hold several tokens: a repeated field"),
        (not new, "the new field is missing in Token"),
        otherwise="token ids are whole numbers: a repeated field of an integer type",
        expected="token ids in Token: several whole numbers",
        shown=[f"{field.name} = {field.number}" for field in new],
    )


@contextmanager
def calling(server: OwnServer) -> Iterator[llm_pb2_grpc.LLMServiceStub]:
    """A stub for the learner's server."""
    with grpc.insecure_channel(server.address) as channel:
        yield llm_pb2_grpc.LLMServiceStub(channel)


def failed(error: grpc.RpcError, method: str) -> NotYet:
    """Feedback for a call that should have gone well."""
    code, details = error.code(), error.details() or ""
    cause = {
        grpc.StatusCode.UNKNOWN: "the handler raised: its error is the last line under `got`",
        grpc.StatusCode.UNIMPLEMENTED: f"the class has no method {method} of its own",
        grpc.StatusCode.DEADLINE_EXCEEDED: "the handler never ends",
        grpc.StatusCode.CANCELLED: "the handler ended its own call",
    }.get(code, "this call was in order")
    return NotYet(f"{method} ends with OK", f"{code.name}: {details[:200]}", cause)


def check_04_2(submission: Submission) -> None:
    """Messages as they come, numbered, the last one marked; others are served meanwhile; a cancelled call stops."""
    vllm = submission.server("vllm")
    watch = StreamWatch()
    watch.go_on.clear()

    with (
        Tap(vllm.url, watch.hold, RELIABLE) as tap,
        own_server(submission, "service.py", tap, vllm) as server,
        calling(server) as stub,
    ):

        def read(request: Any, messages: list[Any]) -> bool:
            """Read a stream, and ask for another one beside it; whether that was served meanwhile."""
            beside = True
            for message in stub.StreamGenerate(request, timeout=SECONDS):
                messages.append(message)
                watch.first_read.set()
                if len(messages) == 1:
                    wait_until(lambda: watch.early.is_set() or not tap.busy(), 20)
                    beside = watch.early.is_set() and _taken(stub, tap)
                    watch.go_on.set()
            return beside

        request = llm_pb2.StreamGenerateRequest(prompt="Once upon a time", max_tokens=11)
        messages: list[Any] = []
        try:
            beside = submission.run(
                lambda: read(request, messages),
                {TimeoutError: "the handler neither sends a message nor ends"},
                lambda: tap.busy() or server.working(),
            )
        except NotYet as fault:
            for exchange in tap.exchanges:
                accepted(exchange)
            error = fault.__cause__
            raise failed(error, "StreamGenerate") if isinstance(error, grpc.RpcError) else fault from None
        shown = [f"{m.sequence}: {m.text!r}{' finished' if m.is_finished else ''}" for m in messages]
        require(bool(tap.exchanges), "a request to the engine", shown, FROM_ENGINE)
        accepted(tap.exchanges[0])
        exchange = asked_to_continue(tap.exchanges[:1])
        engine = {"stream": "the engine must stream too: stream=True"}
        sends(exchange, engine, stream=True, prompt=request.prompt, max_tokens=request.max_tokens)
        # Without text where the last token, which is sampled, is a piece of a character.
        early = "the last chunk is a message too, with text or without: send it before you end"
        judge(
            streamed_text(exchange),
            "".join(message.text for message in messages),
            (not messages, "no message was sent: yield each one, or await context.write(…)"),
            (
                lambda _, right: messages[-1].text == right,
                "each message has all the text so far: send only what is new",
            ),
            (lambda got, right: right.startswith(got), early),
            otherwise="the text of each chunk goes into one message, once",
            fits=lambda got, right: bool(messages) and got == right,
        )
        finished = [message.is_finished for message in messages]
        chunks = sum(bool(event["choices"]) for event in exchange.events())
        unfinished = early if len(messages) < chunks else "without it a client cannot tell the end from a broken stream"
        require(
            finished[-1] and not any(finished[:-1]),
            "is_finished in the last message, and in no other",
            shown[-3:] if not any(finished[:-1]) else shown,
            "is_finished says that nothing comes any more" if any(finished) else unfinished,
        )
        require(
            messages[-1].finish_reason == llm_pb2.FINISH_REASON_LENGTH,
            "finish_reason FINISH_REASON_LENGTH in the last message (max_tokens ended it)",
            messages[-1].finish_reason,
            WHY,
        )
        require(
            not any(message.finish_reason for message in messages[:-1]),
            "a finish_reason in the last message, and in no other",
            [message.finish_reason for message in messages],
            "before its last chunk the engine has given none",
        )
        numbers = [message.sequence for message in messages]
        right = list(range(len(messages)))
        require(numbers == right, "sequence 0, 1, 2 … without gaps", numbers, ANEW)
        early = "the first message while the engine is still writing"
        require(watch.early.is_set(), early, "the first message only after the last token", GATHERED)
        require(
            beside,
            "a second call served while the first one waits for the engine",
            f"it had not reached the engine within {BESIDE_SECONDS} s",
            "the engine's stream blocks the event loop: read it with the asynchronous client and `async for`",
        )
        _judge_later_streams(stub, tap, watch, request)


def _judge_later_streams(
    stub: llm_pb2_grpc.LLMServiceStub, tap: Tap, watch: StreamWatch, request: llm_pb2.StreamGenerateRequest
) -> None:
    """A second stream, which ends where the engine says stop, and a third, whose caller cancels it."""
    try:
        tap.more = {"temperature": 0, "stop": [" "]}  # ends with the first word
        others = list(stub.StreamGenerate(request, timeout=SECONDS))
        require(bool(others), "a second stream like the first", "it ends without a message", USED_UP)
        numbers, last = [message.sequence for message in others], others[-1]
        require(numbers == list(range(len(others))), "sequence 0, 1, 2 … in a second stream too", numbers, ANEW)
        stopped = last.finish_reason == llm_pb2.FINISH_REASON_STOP
        require(stopped, "FINISH_REASON_STOP where the engine says stop", last.finish_reason, WHY)
        either = "a stream also ends where the engine says stop, before max_tokens: that message is the last"
        require(last.is_finished, "is_finished in the last message, where the engine says stop", last, either)
        tap.more = RELIABLE
        watch.leaving.set()
        call = stub.StreamGenerate(
            llm_pb2.StreamGenerateRequest(prompt="One, two, three, four,", max_tokens=60), timeout=SECONDS
        )
        first = next(iter(call), None)
    except grpc.RpcError as error:
        raise failed(error, "StreamGenerate") from None
    require(first is not None, "a second stream like the first", "it ends without a message", USED_UP)
    call.cancel()  # type: ignore[no-untyped-call]
    tap.settle()
    require(
        tap.exchanges[-1].left is not None,
        "the engine's stream closed when the call is cancelled",
        f"{len(tap.exchanges[-1].events())} events, all read from the engine for nobody",
        "the handler's end must end the engine's stream too: read it in the handler itself, in an `async with`",
    )


def _taken(stub: llm_pb2_grpc.LLMServiceStub, tap: Tap) -> bool:
    """Whether a call reaches the engine, or ends without; how soon the engine answers is not the learner's matter."""
    before = len(tap.exchanges)
    call: Any = stub.StreamGenerate(llm_pb2.StreamGenerateRequest(prompt="Hello", max_tokens=2), timeout=SECONDS)
    try:
        return wait_until(lambda: len(tap.exchanges) > before or call.done(), BESIDE_SECONDS)
    finally:
        call.cancel()


def check_04_3(submission: Submission) -> None:
    """Each fault has its status, and what is refused never reaches the engine."""
    vllm = submission.server("vllm")
    code = grpc.StatusCode

    def ask(right: grpc.StatusCode, what: str, word: str = "", **fields: Any) -> Any:
        def call() -> tuple[Any, grpc.StatusCode, str]:
            try:
                answer = stub.Generate(llm_pb2.GenerateRequest(**fields), timeout=SECONDS)
            except grpc.RpcError as error:
                return None, error.code(), error.details() or ""
            return answer, code.OK, repr(answer.text)

        endless = {TimeoutError: "the handler never ends"}
        answer, got, details = submission.run(call, endless, lambda: tap.busy() or server.working())
        judge(
            right,
            got,
            (
                right is code.OK and got is code.INVALID_ARGUMENT and "max_tokens" not in fields,
                "max_tokens was not given, which is allowed: ask HasField before you look at it",
            ),
            (
                got is code.UNKNOWN and any(word in details for word in ("serialized_response", "SerializeToString")),
                "the handler returns no GenerateResponse",
            ),
            (
                got is code.UNKNOWN and not details.startswith("Unexpected"),  # so gRPC begins where a handler raised
                "abort was given a code that gRPC does not know: it takes grpc.StatusCode.…, no number",
            ),
            (
                got is code.UNKNOWN,
                "an error that the handler does not catch becomes UNKNOWN, which tells a client nothing",
            ),
            (got is code.UNIMPLEMENTED, "the class has no method Generate of its own"),
            (right is code.OK, "this request is in order"),
            (got is code.OK, "programs read the status, not the text: await context.abort(…) ends the call with one"),
            (
                right is code.UNAVAILABLE,
                "the engine is away, not the argument wrong: UNAVAILABLE tells clients to try again",
            ),
            (
                got in (code.INTERNAL, code.UNAVAILABLE),
                f"{got.name} says that the server is at fault, and clients may try again: here the caller is",
            ),
            otherwise="see the table in the brief",
            expected=f"{right.name}: {what}",
            shown=f"{got.name}: {details[:200]}",
        )
        require(word in details.lower(), f"a message that names {word}", details, "tell the caller which field to mend")
        return answer

    with (
        socket.socket() as nobody,
        Tap(vllm.url) as tap,
        own_server(submission, "status.py", tap, vllm) as server,
        calling(server) as stub,
    ):
        nobody.bind(("127.0.0.1", 0))  # bound, never listening: connections are refused
        ask(code.INVALID_ARGUMENT, "an empty prompt", "prompt", prompt="", max_tokens=4)
        ask(code.INVALID_ARGUMENT, "max_tokens 0", "max_tokens", prompt="Hello", max_tokens=0)
        ask(code.INVALID_ARGUMENT, "max_tokens -3", "max_tokens", prompt="Hello", max_tokens=-3)
        none = "no request to the engine for what is refused"
        require(not tap.exchanges, none, f"{len(tap.exchanges)}", "check the arguments first")
        cases: tuple[dict[str, Any], ...] = ({"max_tokens": 4}, {})
        for fields in cases:
            before = len(tap.exchanges)
            what = "a request in order" if fields else "a request without max_tokens"
            answer = ask(code.OK, what, prompt="Hello", **fields)
            require(len(tap.exchanges) > before, "a request to the engine", answer.text, FROM_ENGINE)
            accepted(tap.exchanges[-1])
            exchange = asked_to_continue(tap.exchanges[before:])
            sends(exchange, prompt="Hello", **fields)
            judge(reply_of(exchange), answer.text, otherwise="the text of the response is the engine's")
        # Not many more: a room counts tokens as asked for, before the engine refuses them.
        more = context_length(vllm) + 1
        ask(code.INVALID_ARGUMENT, "more tokens than the model has room for", prompt="Hello", max_tokens=more)
        tap.close()
        ask(code.UNAVAILABLE, "nobody answers where the engine should be", prompt="Hello", max_tokens=4)
        ask(code.UNAVAILABLE, "the same, max_tokens not given", prompt="Hello")


PIECES = (" there", " was", " a", " fox", ".")


class Front(llm_pb2_grpc.LLMServiceServicer):
    """`StreamGenerate` in front of vLLM, for clients under check: notes their deadlines, and stops short if told to.

    `mode` is "whole", or what happens after three messages: "slow" (silence), "short" (the end, with OK) or "broken"
    (UNAVAILABLE). These three are PIECES, and at once: no deadline is to be met by an engine. `status` is what vLLM
    answered with.
    """

    def __init__(self, vllm: Server) -> None:
        self.vllm = vllm
        self.mode = "whole"
        self.status = 200
        self.deadlines: list[float | None] = []
        self.sent: list[str] = []
        self.cancelled = threading.Event()

    def StreamGenerate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Relay the engine's chunks, or send PIECES."""
        remaining = context.time_remaining()
        # gRPC says "no deadline" with a time far beyond anybody's life.
        self.deadlines.append(remaining if remaining is not None and remaining < 1e6 else None)
        self.sent = []
        for number, text in enumerate(PIECES if self.mode != "whole" else ()):
            if number == 3 and self.mode == "broken":
                context.abort(grpc.StatusCode.UNAVAILABLE, "the engine has gone")
            if number == 3 and self.mode == "short":
                return
            if number == 3:
                ended = threading.Event()
                context.add_callback(ended.set)
                wait_until(ended.is_set, 6)
            self.sent.append(text)
            yield llm_pb2.StreamGenerateResponse(text=text, sequence=number, is_finished=number == len(PIECES) - 1)
        if self.mode != "whole":
            return
        body = {"model": self.vllm.model, "prompt": request.prompt, "max_tokens": 8, "stream": True}
        with requests.post(
            f"{self.vllm.url}/v1/completions",
            auth=bearer(key_of(self.vllm)),
            json=body | {"ignore_eos": True},
            stream=True,
            timeout=SECONDS,
        ) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    number, last = len(self.sent), bool(choice["finish_reason"])
                    self.sent.append(choice["text"])
                    yield llm_pb2.StreamGenerateResponse(text=choice["text"], sequence=number, is_finished=last)


def check_04_4(submission: Submission) -> None:
    """The deadline is sent along, what came before it is kept, other errors pass."""
    ask_within, vllm = submission.function("ask_within"), submission.server("vllm")
    front = Front(vllm)  # type: ignore[abstract]  # Generate stays UNIMPLEMENTED
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        llm_pb2_grpc.add_LLMServiceServicer_to_server(front, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                _judge_client(submission, ask_within, llm_pb2_grpc.LLMServiceStub(channel), front)
        except NotYet:
            not_full(front.status)
            raise
        finally:
            server.stop(0.5).wait()  # at once, gRPC would print a "goaway", which nbgrader takes for a failure


def _judge_client(submission: Submission, ask_within: Any, stub: llm_pb2_grpc.LLMServiceStub, front: Front) -> None:
    prompt = "Once upon a time"

    def ask(seconds: float, cause: str = "") -> Any:
        causes: Causes = {grpc.RpcError: cause} if cause else {}
        got = submission.call(ask_within, stub, prompt, seconds, causes=causes, busy=lambda: True)
        return tuple(got) if isinstance(got, list) else got

    got = ask(50.0, "this call goes well: is it StreamGenerate, with the request as it stands?")
    require(bool(front.deadlines), "a call through the stub", got, "the text does not come from the server")
    left = front.deadlines[-1]
    judge(
        50.0,
        left,
        (left is None, "the server must know until when to work: pass timeout= to the stub's method"),
        otherwise="use the seconds that your function is given",
        expected="50 s left when the call arrives",
        shown="a call without a deadline" if left is None else f"{left:.0f} s",
        fits=lambda got, right: abs(got - right) < 20,
    )
    whole = "".join(front.sent)
    judge(
        (whole, True),
        got,
        (isinstance(got, str), "return two values: the text, and whether it is whole"),
        (lambda got, _: got[0] != whole, "join the text of all messages, the last one too"),
        otherwise="return the joined text, and True because the last message came",
        fits=_same_pair,
    )

    front.mode = "slow"
    got = ask(2.5, "the loop raises DEADLINE_EXCEEDED when the time is over: catch it, and keep what has come")
    judge(
        ("".join(front.sent[:3]), False),
        got,
        (
            lambda got, right: got[1] and got[0] != right[0],
            "your function waited on after its time: the deadline belongs to the call, as timeout=",
        ),
        (lambda got, _: got[1], "the answer is not whole: without a message with is_finished it is cut off"),
        (
            lambda got, right: right[0] and not got[0],
            "what came before the deadline is lost: gather it outside of the try",
        ),
        otherwise="return what has come until then, and False",
        fits=_same_pair,
    )

    front.mode = "short"
    short = ("".join(PIECES[:3]), False)
    judge(
        short,
        ask(50.0, "a call that ends with OK raises nothing"),
        (lambda got, _: got[1], "OK ends the call, not the answer: it is whole when a message has said is_finished"),
        otherwise="return what has come, and False: no message has said is_finished",
        expected=f"{short!r} for a stream that ends, with OK, before its last message",
        fits=_same_pair,
    )

    front.mode = "broken"

    def outcome() -> Any:
        try:
            return ask_within(stub, prompt, 50.0)
        except grpc.RpcError as error:
            return error.code()
        except NotImplementedError:
            raise
        except Exception as error:
            return error

    got = submission.run(outcome, busy=lambda: True)
    require(
        got is grpc.StatusCode.UNAVAILABLE,
        "UNAVAILABLE goes on to the caller",
        got,
        "only DEADLINE_EXCEEDED is an end of its own here: raise every other error again",
    )


def _same_pair(got: Any, right: tuple[str, bool]) -> bool:
    return bool(got == right and isinstance(got[1], bool))


def check_04_5(submission: Submission) -> None:
    """Calls with the key, without, and with wrong ones, of both shapes; and health, which nobody needs a key for."""
    vllm = submission.server("vllm")
    code, key = grpc.StatusCode, key_of(vllm)

    with (
        Tap(vllm.url) as tap,
        own_server(submission, "door.py", tap, vllm) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub, health = llm_pb2_grpc.LLMServiceStub(channel), health_pb2_grpc.HealthStub(channel)

        def ask(action: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
            def call() -> tuple[grpc.StatusCode, str]:
                try:
                    return code.OK, repr(action())
                except grpc.RpcError as error:
                    return error.code(), error.details() or ""

            endless = {TimeoutError: "the call never ends: does intercept_service return a handler?"}
            return submission.run(call, endless, lambda: tap.busy() or server.working())  # type: ignore[no-any-return]

        def generate(*metadata: tuple[str, str]) -> tuple[grpc.StatusCode, str]:
            request = llm_pb2.GenerateRequest(prompt="Hello", max_tokens=2)
            return ask(lambda: stub.Generate(request, timeout=SECONDS, metadata=metadata).text)

        def stream(*metadata: tuple[str, str]) -> tuple[grpc.StatusCode, str]:
            request = llm_pb2.StreamGenerateRequest(prompt="Hello", max_tokens=2)
            return ask(lambda: [each.text for each in stub.StreamGenerate(request, timeout=SECONDS, metadata=metadata)])

        right = ("authorization", f"Bearer {key}")
        wrong: dict[str, list[tuple[str, str]]] = {
            "no key": [],
            "a wrong key": [("authorization", "Bearer somebody-else's")],
            "the key and a letter more": [("authorization", f"Bearer {key}x")],
            "the key without Bearer": [("authorization", key)],
            "the key after another word": [("authorization", f"Basic {key}")],
            "Bearer and no key": [("authorization", "Bearer ")],
            "the key in another place": [("x-key", f"Bearer {key}")],
        }
        for method, call in {"Generate": generate, "StreamGenerate": stream}.items():
            for what, metadata in {"the key": [right], "the key beside others": [("x-request-id", "7"), right]}.items():
                _judge_door(code.OK, call(*metadata), f"{method} with {what}")
            before = len(tap.exchanges)
            for what, metadata in wrong.items():
                _judge_door(code.UNAUTHENTICATED, call(*metadata), f"{method} with {what}")
            require(
                len(tap.exchanges) == before,
                "no request to the engine for a caller without the key",
                len(tap.exchanges) - before,
                "the handler has run: return another one in its place",
            )
            require(before > 0, "a request to the engine", "none", FROM_ENGINE)
        check = health_pb2.HealthCheckRequest()
        _judge_door(code.OK, ask(lambda: health.Check(check, timeout=SECONDS).status), "a health check without a key")
        _judge_door(
            code.OK, ask(lambda: next(iter(health.Watch(check, timeout=10))).status), "a health watch without a key"
        )
        _judge_door(
            code.UNIMPLEMENTED,
            ask(
                lambda: channel.unary_unary("/llm.v1.LLMService/Sing", None, None)(
                    b"", timeout=SECONDS, metadata=(right,)
                )
            ),
            "a method that there is not, with the key",
        )
    require(
        _names(written(submission, "door.py").read_bytes(), "compare_digest"),
        "keys compared with hmac.compare_digest",
        "no compare_digest in door.py",
        "== ends at the first letter that differs: the time it takes tells how much of a guess was right",
    )


def _names(code: bytes, function: str) -> bool:
    """Whether the code has to do with a function of that name: not in a comment or a text, nor by an import alone."""
    nodes = [*ast.walk(ast.parse(code))]
    names = {function} | {node.asname for node in nodes if isinstance(node, ast.alias) and node.name == function}
    return any(
        (isinstance(node, ast.Name) and node.id in names) or (isinstance(node, ast.Attribute) and node.attr == function)
        for node in nodes
    )


def _judge_door(right: grpc.StatusCode, answer: tuple[grpc.StatusCode, str], what: str) -> None:
    code, (got, details) = grpc.StatusCode, answer
    shape = got in (code.INTERNAL, code.UNKNOWN) and "Stream" in what
    judge(
        right,
        got,
        ("health" in what, "a health check carries no key: let /grpc.health.v1.Health/ through"),
        (got is code.UNIMPLEMENTED, "no handler came back: return what continuation gives, awaited"),
        (
            right is code.UNAUTHENTICATED and got is code.OK,
            "this one got in: compare all of the value with `Bearer ` and the key",
        ),
        (shape, "a stream needs a handler of its own shape: grpc.unary_stream_rpc_method_handler"),
        (got is code.UNKNOWN, "your interceptor raised: its error is the last line under `got`"),
        (
            right is code.UNAUTHENTICATED,
            "a caller who has shown no key is UNAUTHENTICATED; PERMISSION_DENIED is for one who is known",
        ),
        (
            right is code.UNIMPLEMENTED,
            "for a method that there is not, continuation gives None: return that, gRPC knows what to say",
        ),
        otherwise="whoever has the key goes on as if nothing were there",
        expected=f"{right.name}: {what}",
        shown=f"{got.name}: {details[:200]}",
    )
