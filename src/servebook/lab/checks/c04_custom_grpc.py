"""Checks of lab 04: a changed contract, a servicer that learners wrote, a client with a deadline."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import requests
from google.protobuf import descriptor_pb2

from servebook.lab.feedback import NotYet, StillOpen, require
from servebook.lab.learner_server.judge import StreamWatch, blank, own_server
from servebook.lab.learner_server.run import OwnServer
from servebook.lab.rest import accepted, answer_to, context_length, key_of, not_full, sends
from servebook.lab.submission import Submission
from servebook.lab.taps.http import Tap
from servebook.lab.taps.sse import streamed_text
from servebook.launch import Server
from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc

Field = descriptor_pb2.FieldDescriptorProto
INTEGERS = {Field.TYPE_INT32, Field.TYPE_INT64, Field.TYPE_UINT32, Field.TYPE_UINT64}
SECONDS = 60
"""For one call; the engine of a full room is slow."""


def compiled(proto: Path) -> descriptor_pb2.FileDescriptorProto:
    """What protoc reads in the file.

    Raises:
        NotYet: protoc refuses it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.binpb"
        words = ["-I", str(proto.parent.resolve()), f"--descriptor_set_out={out}", str(proto.resolve())]
        done = subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *words], capture_output=True, text=True)
        if done.returncode:
            raise NotYet("a file that protoc takes", done.stderr.strip()[-300:], "protoc names the line and its fault")
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]


def check_04_1(submission: Submission) -> None:
    """Old fields stay, the new ones are new, and what is gone is reserved."""
    file = Path("lab.proto")
    if not file.is_file():
        raise NotYet("the file lab.proto", "none", "run the cell that writes it (its first line is %%writefile)")
    if blank(submission) in file.read_text():
        raise StillOpen
    proto = compiled(file)
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
        at = {field.number: field for field in messages[message].field}
        field = at.get(number)
        require(
            field is not None and (field.name, field.type, field.label) == (name, kind, Field.LABEL_OPTIONAL),
            f"{message}: {name} = {number}, as it was",
            f"{field.name} = {number}, changed" if field else f"nothing with the number {number}",
            "old clients send this number with this type: neither ever changes",
        )
    request = {field.name: field for field in messages["GenerateRequest"].field}
    seed = request.get("seed")
    require(seed is not None, "a field seed in GenerateRequest", sorted(request), "the new field is missing")
    assert seed
    require(
        seed.number != 3,
        "seed with a number that was never given out",
        "seed = 3",
        "3 was temperature's: the temperature that an old client sends would be read as a seed",
    )
    require(seed.type in INTEGERS, "seed as a whole number", seed, "a seed is a whole number: int64")
    require(
        seed.proto3_optional,
        "a seed of 0 told apart from no seed",
        "a plain field: both look the same",
        "put optional in front: then HasField knows",
    )
    require(
        "temperature" not in request,
        "GenerateRequest without temperature",
        "it is still there",
        "take the field out, and keep its number and name from being used again",
    )
    reserved = messages["GenerateRequest"]
    require(
        any(span.start <= 3 < span.end for span in reserved.reserved_range),
        "the number 3 reserved",
        "it may be given out again",
        "whoever adds a field next year sees a free 3: write reserved 3;",
    )
    require(
        "temperature" in reserved.reserved_name,
        'the name "temperature" reserved',
        "it may be used again",
        'JSON and code go by names: write reserved "temperature"; too',
    )
    new = [field for field in messages["Token"].field if field.number not in (1, 2)]
    require(
        any(field.type in INTEGERS and field.label == Field.LABEL_REPEATED for field in new),
        "token ids in Token: several whole numbers",
        [f"{field.name} = {field.number}" for field in new],
        "a piece of text may hold several tokens: a repeated field",
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
        grpc.StatusCode.UNKNOWN: "the handler raised: its error stands above",
        grpc.StatusCode.UNIMPLEMENTED: f"the class has no method {method} of its own",
        grpc.StatusCode.DEADLINE_EXCEEDED: "the handler never ends",
    }.get(code, "this call was in order")
    return NotYet(f"{method} ends with OK", f"{code.name}: {details[:200]}", cause)


def check_04_2(submission: Submission) -> None:
    """Messages as they come, numbered, the last one marked; a cancelled call stops the engine."""
    vllm = submission.server("vllm")
    watch = StreamWatch()

    with (
        Tap(vllm.url, watch.hold) as tap,
        own_server(submission, "service.py", tap, vllm) as server,
        calling(server) as stub,
    ):
        request = llm_pb2.StreamGenerateRequest(prompt="Once upon a time", max_tokens=11)
        messages = []
        try:
            for message in stub.StreamGenerate(request, timeout=SECONDS):
                messages.append(message)
                watch.first_read.set()
        except grpc.RpcError as error:
            for exchange in tap.exchanges:
                accepted(exchange)
            raise failed(error, "StreamGenerate") from None
        shown = [f"{m.sequence}: {m.text!r}{' finished' if m.is_finished else ''}" for m in messages]
        require(bool(tap.exchanges), "a request to the engine", shown, "the text does not come from the engine")
        exchange = tap.exchanges[0]
        accepted(exchange)
        sends(
            exchange,
            {"stream": "the engine must stream too: stream=True"},
            stream=True,
            prompt=request.prompt,
            max_tokens=request.max_tokens,
        )
        right, got = streamed_text(exchange), "".join(message.text for message in messages)
        if got != right:
            cause = "the text of each chunk goes into one message, once"
            if messages and messages[-1].text == right:
                cause = "each message has all the text so far: send only what is new"
            elif right.startswith(got):
                cause = "the last chunk has text too: send it before you end"
            raise NotYet(right, got, cause)
        finished = [message.is_finished for message in messages]
        require(
            finished[-1] and not any(finished[:-1]),
            "is_finished in the last message, and in no other",
            shown[-3:] if not any(finished[:-1]) else shown,
            "without it a client cannot tell the end from a broken stream"
            if not any(finished)
            else "is_finished says that nothing comes any more",
        )
        require(
            messages[-1].finish_reason == llm_pb2.FINISH_REASON_LENGTH,
            "finish_reason FINISH_REASON_LENGTH in the last message (max_tokens ended it)",
            llm_pb2.FinishReason.Name(messages[-1].finish_reason),
            'the engine says why: "length" or "stop" in the finish_reason of its last chunk',
        )
        numbers = [message.sequence for message in messages]
        require(
            numbers == list(range(len(messages))),
            "sequence 0, 1, 2 … without gaps",
            numbers,
            "number the messages, from 0",
        )
        require(
            watch.early.is_set(),
            "the first message while the engine is still writing",
            "the first message only after the last token",
            "everything is gathered before it goes out: send inside the loop over the engine's stream",
        )
        watch.leaving.set()
        call = stub.StreamGenerate(
            llm_pb2.StreamGenerateRequest(prompt="One, two, three, four,", max_tokens=60), timeout=SECONDS
        )
        next(iter(call))
        call.cancel()  # type: ignore[no-untyped-call]
        tap.settle()
        require(
            tap.exchanges[-1].left is not None,
            "the engine's stream closed when the call is cancelled",
            f"{len(tap.exchanges[-1].events())} events, all read from the engine for nobody",
            "the handler's end must end the engine's stream too: read it in the handler itself, in an `async with`",
        )


def check_04_3(submission: Submission) -> None:
    """Each fault has its status, and what is refused never reaches the engine."""
    vllm = submission.server("vllm")
    code = grpc.StatusCode

    def ask(stub: llm_pb2_grpc.LLMServiceStub, right: grpc.StatusCode, what: str, word: str = "", **fields: Any) -> Any:
        try:
            answer = stub.Generate(llm_pb2.GenerateRequest(**fields), timeout=SECONDS)
            got, details = code.OK, repr(answer.text)
        except grpc.RpcError as error:
            answer, got, details = None, error.code(), error.details() or ""
        cause = "see the table in the brief"
        if right is code.OK and got is code.INVALID_ARGUMENT and "max_tokens" not in fields:
            cause = "max_tokens was not given, which is allowed: ask HasField before you look at it"
        elif right is code.OK:
            cause = "this request is in order"
        elif got is code.OK:
            cause = "programs read the status, not the text: await context.abort(…) ends the call with one"
        elif got is code.UNKNOWN:
            cause = "an error that the handler does not catch becomes UNKNOWN, which tells a client nothing"
        elif right is code.UNAVAILABLE:
            cause = "the engine is away, not the argument wrong: UNAVAILABLE tells clients to try again"
        elif got in (code.INTERNAL, code.UNAVAILABLE):
            cause = f"{got.name} says that the server is at fault, and clients may try again: here the caller is"
        require(got is right, f"{right.name}: {what}", f"{got.name}: {details[:200]}", cause)
        require(word in details, f"a message that names {word}", details, "tell the caller which field to mend")
        return answer

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, never listening: connections are refused
        with Tap(vllm.url) as tap, own_server(submission, "status.py", tap, vllm) as server, calling(server) as stub:
            ask(stub, code.INVALID_ARGUMENT, "an empty prompt", "prompt", prompt="", max_tokens=4)
            ask(stub, code.INVALID_ARGUMENT, "max_tokens 0", "max_tokens", prompt="Hello", max_tokens=0)
            require(
                not tap.exchanges,
                "no request to the engine for what is refused",
                f"{len(tap.exchanges)}",
                "check the arguments first",
            )
            answer = ask(stub, code.OK, "a request in order", prompt="Hello", max_tokens=4)
            require(
                bool(tap.exchanges), "a request to the engine", answer.text, "the text does not come from the engine"
            )
            accepted(tap.exchanges[0])
            text = answer_to(tap.exchanges[0])["choices"][0]["text"]
            require(answer.text == text, text, answer.text, "the text of the response is the engine's")
            # Not many more: a room counts tokens as asked for, before the engine refuses them.
            more = context_length(vllm) + 1
            ask(stub, code.INVALID_ARGUMENT, "more tokens than the model has room for", prompt="Hello", max_tokens=more)
            tap.close()
            ask(stub, code.UNAVAILABLE, "nobody answers where the engine should be", prompt="Hello", max_tokens=4)
            ask(stub, code.UNAVAILABLE, "the same, max_tokens not given", prompt="Hello")


class Front(llm_pb2_grpc.LLMServiceServicer):
    """`StreamGenerate` in front of vLLM, for clients under check: notes their deadlines, and stops short if told to.

    `mode` is "whole", "slow" (falls silent after three messages) or "broken" (ends with UNAVAILABLE after three);
    `status` is what vLLM answered with.
    """

    def __init__(self, vllm: Server) -> None:
        self.vllm = vllm
        self.mode = "whole"
        self.status = 200
        self.deadlines: list[float | None] = []
        self.sent: list[str] = []
        self.cancelled = threading.Event()

    def StreamGenerate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Relay the engine's chunks."""
        remaining = context.time_remaining()
        # gRPC says "no deadline" with a time far beyond anybody's life.
        self.deadlines.append(remaining if remaining is not None and remaining < 1e6 else None)
        self.sent = []
        body = {"model": self.vllm.model, "prompt": request.prompt, "max_tokens": 8, "stream": True}
        with requests.post(
            f"{self.vllm.url}/v1/completions",
            headers={"Authorization": f"Bearer {key_of(self.vllm)}"},
            json=body | {"ignore_eos": True},
            stream=True,
            timeout=SECONDS,
        ) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    number, last = len(self.sent), bool(choice["finish_reason"])
                    if number == 3 and self.mode == "broken":
                        context.abort(grpc.StatusCode.UNAVAILABLE, "the engine has gone")
                    if number == 3 and self.mode == "slow":
                        ended = threading.Event()
                        context.add_callback(ended.set)
                        ended.wait(6)
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
    got = submission.run(lambda: ask_within(stub, prompt, 50.0), busy=lambda: True)
    require(bool(front.deadlines), "a call through the stub", got, "the text does not come from the server")
    require(
        front.deadlines[-1] is not None,
        "a call with a deadline",
        "a call without one",
        "the server must know until when to work: pass timeout= to the stub's method",
    )
    require(
        abs((front.deadlines[-1] or 0) - 50) < 5,
        "50 s left when the call arrives",
        f"{front.deadlines[-1]:.0f} s",
        "use the seconds that your function is given",
    )
    right = ("".join(front.sent), True)
    cause = "return the joined text, and True because the last message came"
    require(isinstance(got, tuple | list) and tuple(got) == right, right, got, cause)

    front.mode = "slow"
    slow_deadline = 2.5
    got = submission.run(
        lambda: ask_within(stub, prompt, slow_deadline),
        {grpc.RpcError: "the loop raises DEADLINE_EXCEEDED when the time is over: catch it, and keep what has come"},
        busy=lambda: True,
    )
    right = ("".join(front.sent[:3]), False)
    cause = "return what has come until then, and False"
    if isinstance(got, tuple | list) and len(got) == 2:
        if got[1] and got[0] != right[0]:
            cause = "your function waited on after its time: the deadline belongs to the call, as timeout="
        elif got[1]:
            cause = "the answer is not whole: without a message with is_finished it is cut off"
        elif right[0] and not got[0]:
            cause = "what came before the deadline is lost: gather it outside of the try"
    require(isinstance(got, tuple | list) and tuple(got) == right, right, got, cause)

    front.mode = "broken"

    def outcome() -> Any:
        try:
            return ask_within(stub, prompt, 50.0)
        except grpc.RpcError as error:
            return error.code()

    got = submission.run(outcome, busy=lambda: True)
    require(
        got is grpc.StatusCode.UNAVAILABLE,
        "UNAVAILABLE goes on to the caller",
        got,
        "only DEADLINE_EXCEEDED is an end of its own here: raise every other error again",
    )
