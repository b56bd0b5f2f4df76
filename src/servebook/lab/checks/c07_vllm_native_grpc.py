"""Checks of lab 07: who is there, token ids in and out, text out of ids, a request that is aborted; and text alone."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from itertools import zip_longest
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from tokenizers import Tokenizer

from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.rest import NOT_THAT_SERVER, PASS_ON
from servebook.lab.submission import Causes, Submission
from servebook.lab.taps.grpc import GRACE_SECONDS, Call, Filter, GrpcTap
from servebook.processes import wait_until
from servebook.protos.vllm import inference_pb2 as text_pb
from servebook.protos.vllm.inference_pb2_grpc import InferenceStub
from servebook.ways.vllm_native_grpc.client import ENGINE, VllmGrpcClient
from servebook.ways.vllm_native_grpc.inference_client import REASONS

BROKEN = "\ufffd"
"""What a decoder writes in place of bytes that are no character."""
KOREAN = "안녕하세요, 세계 👋"
CHAT = "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n"
"""Every CPU's arithmetic ends this answer early."""
READ_ON = "ids that come after the abort were generated, too: read on to the end of the stream"
STATUS_CAUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: "the server read the request and refused it: its message names the field",
    grpc.StatusCode.UNIMPLEMENTED: "there is no such method: its name comes from the proto",
    grpc.StatusCode.NOT_FOUND: "health knows no service of that name",
}


@cache
def tokenizer_of(address: str) -> Tokenizer:
    """The tokenizer that the server at `address` hands out."""
    with VllmGrpcClient(address) as client:
        return client.tokenizer


@contextmanager
def tapped(
    submission: Submission, filter: Filter | None = None
) -> Iterator[tuple[GrpcTap, vllm_engine_pb2_grpc.VllmEngineStub]]:
    """A tap in front of the real server, and a stub that goes through it."""
    with GrpcTap(submission.server("vllm-grpc").grpc, filter) as tap, grpc.insecure_channel(tap.address) as channel:
        yield tap, vllm_engine_pb2_grpc.VllmEngineStub(channel)


def through(
    tap: GrpcTap,
    submission: Submission,
    method: str,
    function: Callable[..., Any],
    *args: Any,
    asks: Callable[[Call], None] = lambda _: None,
    causes: Causes | None = None,
) -> tuple[Any, Call]:
    """Run the learner's code against the tap; return its result and the one call of `method` that it made.

    `asks` looks at what was asked for, before anything that came of it counts.

    Raises:
        NotYet: there was no such call, the server refused it, or the code raised.
    """
    before = len(tap.calls)
    fault, result = None, None
    try:
        result = submission.call(function, *args, causes=causes, busy=tap.busy)
    except NotYet as error:
        fault = error
    made = [call for call in tap.calls[before:] if call.method == method]
    for call in made:
        wait_until(call.done.is_set, 2)  # the tap hears of the end a moment after the client
        asks(call)
        if call.code not in (None, grpc.StatusCode.OK):
            raise NotYet(
                f"{call.method} that the server accepts",
                f"{call.code.name}: {call.details[:200]}",
                STATUS_CAUSES.get(call.code, "the server refused the call"),
            )
    if fault:
        raise fault
    others = sorted({call.method for call in tap.calls[before:]} - {method})
    absent = f"you called {' and '.join(others)}, and this takes {method}" if others else NOT_THAT_SERVER
    require(
        len(made) == 1,
        f"one call of {method} on the server that was handed in",
        f"{len(made)} calls, and the result {result!r}"[:200],
        "ask once" if made else absent,
    )
    return result, made[0]


def messages_of(call: Call) -> list[pb.GenerateResponse]:
    """What a filter that cuts in pairs has passed on so far in a call of Generate."""
    return [pb.GenerateResponse.FromString(message) for message in in_pairs(iter(list(call.responses)), call)]


def ids_of(call: Call) -> list[int]:
    """The token ids that the server has generated so far; the last message of a stream only repeats some."""
    messages = messages_of(call)
    streamed = any(message.HasField("chunk") for message in messages)
    return [
        each for message in messages for each in (message.chunk.token_ids if streamed else message.complete.output_ids)
    ]


def in_pairs(messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
    """A filter: two ids a chunk, and those of the last once more in the last message.

    So vLLM does it for a reader who is a little slower than the engine. Its own chunks hold one id on an idle machine
    and many on a busy one, and what a learner is told must not depend on that.
    """
    if call.method != "Generate":
        yield from messages
        return
    chunk = pb.GenerateResponse()
    ids: list[int] = []
    last: list[int] = []

    def pairs(most_left: int) -> Iterator[bytes]:
        while len(ids) > most_left:
            last[:], ids[:] = ids[:2], ids[2:]
            chunk.chunk.token_ids[:] = last
            chunk.chunk.completion_tokens = len(last)
            yield chunk.SerializeToString()

    for raw in messages:
        message = pb.GenerateResponse.FromString(raw)
        if message.HasField("chunk"):
            chunk = message
            ids += message.chunk.token_ids
            yield from pairs(1)
            continue
        yield from pairs(0)
        if last and message.complete.output_ids:
            message.complete.output_ids[:] = last
            message.complete.completion_tokens = len(last)
        yield message.SerializeToString()
    yield from pairs(0)


def delayed(messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
    """A filter: two ids a chunk, and two chunks are always under way, as on a long line."""
    line: deque[bytes] = deque()
    for message in in_pairs(messages, call):
        line.append(message)
        if call.method != "Generate" or len(line) > 2:
            yield line.popleft()
    yield from line


def asks(ids: list[int], max_tokens: int) -> Callable[[Call], None]:
    """Looks at a GenerateRequest: these ids, this limit, and an id of its own."""

    def look(call: Call) -> None:
        request = pb.GenerateRequest.FromString(call.requests[0]) if call.requests else pb.GenerateRequest()
        kind = request.WhichOneof("input")
        require(
            kind == "tokenized",
            "a request with tokenized=pb.TokenizedInput(input_ids=…)",
            f"a request with {kind or 'neither ids nor text'}",
            "the prompt travels as token ids here: a router tokenizes once, and no engine again",
        )
        sent = list(request.tokenized.input_ids)
        require(sent == ids, f"input_ids {ids}", f"input_ids {sent}", "the ids are those of the prompt, all of them")
        limit = request.sampling_params.max_tokens if request.sampling_params.HasField("max_tokens") else None
        require(
            limit == max_tokens,
            f"max_tokens {max_tokens} in sampling_params",
            f"max_tokens {limit}",
            "nothing sets a limit for you here: without one the engine goes on to the end of its context"
            if limit is None
            else PASS_ON,
        )
        require(
            bool(request.request_id),
            "a request_id",
            "none",
            "the server knows a request by the id that you give it: make one that nobody can guess, with uuid",
        )

    return look


def limited(filter: Filter, limit: int) -> Filter:
    """The same filter, ended where a request without a limit would run on for minutes."""

    def paced(messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
        for number, message in enumerate(filter(messages, call)):
            if call.method == "Generate" and number > limit:
                return
            yield message

    return paced


class WarmingUp(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
    """A server whose process answers while its engine is not ready; the model is that of the real one."""

    def __init__(self, info: pb.GetModelInfoResponse) -> None:
        self.info = info

    def GetModelInfo(self, request: Any, context: grpc.ServicerContext) -> pb.GetModelInfoResponse:
        """The real server's answer."""
        return self.info

    def HealthCheck(self, request: Any, context: grpc.ServicerContext) -> pb.HealthCheckResponse:
        """Not yet."""
        return pb.HealthCheckResponse(healthy=False, message="warming up")


@contextmanager
def another_server(servicer: WarmingUp | None) -> Iterator[grpc.Channel]:
    """A channel to a server that warms up, or with None to one that has no service at all."""
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        if servicer:
            vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(servicer, server)
            health = HealthServicer()
            health.set("", health_pb2.HealthCheckResponse.SERVING)
            health.set(ENGINE, health_pb2.HealthCheckResponse.NOT_SERVING)
            health_pb2_grpc.add_HealthServicer_to_server(health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield channel
        finally:
            server.stop(GRACE_SECONDS).wait()


def check_07_1(submission: Submission) -> None:
    """The real server, one that warms up, none, and one that is no vLLM."""
    who, server = submission.function("who"), submission.server("vllm-grpc")
    with VllmGrpcClient(server.grpc) as client:
        info = client.model_info()
    right = {"serving": True, "model": info.served_model_name, "context": info.max_context_length}
    with GrpcTap(server.grpc) as tap, grpc.insecure_channel(tap.address) as channel:
        got, _ = through(tap, submission, "GetModelInfo", who, channel)
        _same(right, got)
        require(
            any(tap.of(method) for method in ("Check", "HealthCheck", "Watch")),
            "a call of health",
            f"only {', '.join(call.method for call in tap.calls)}",
            "whether the engine serves is for health to say",
        )
    with another_server(WarmingUp(info)) as channel:
        got = submission.call(who, channel)
        require(
            not (isinstance(got, dict) and got.get("serving")),
            "serving False: the process answers, its engine warms up",
            got,
            'the service "" is the process; the engine is the service "vllm.grpc.engine.VllmEngine"',
        )
        _same(right | {"serving": False}, got)
    with grpc.insecure_channel("127.0.0.1:1") as channel:  # nobody listens on it
        unavailable = "UNAVAILABLE says that nobody answers: catch grpc.RpcError, and return None for this code"
        got = submission.call(who, channel, causes={grpc.RpcError: unavailable})
        require(got is None, "None where nobody answers", got, unavailable)

    def outcome() -> Any:
        try:
            return who(channel)
        except grpc.RpcError as error:
            return error.code()

    with another_server(None) as channel:
        got = submission.run(outcome)
        require(
            got is grpc.StatusCode.UNIMPLEMENTED,
            "UNIMPLEMENTED goes on to the caller: somebody is there, who is no vLLM",
            got,
            "only UNAVAILABLE stands for nobody: raise every other error again",
        )


def _same(right: dict[str, Any], got: Any) -> None:
    require(isinstance(got, dict) and got.keys() == right.keys(), right, got, "return a dict with these three names")
    causes = {
        "serving": "True if health says SERVING, else False",
        "model": "the name that callers use is served_model_name",
        "context": "max_context_length is the room for prompt and answer together",
    }
    for name, value in right.items():
        same = got[name] == value and isinstance(got[name], type(value))  # SERVING is 1 too, and no bool
        require(same, f"{name}: {value!r}", f"{name}: {got[name]!r}", causes[name])


def check_07_2(submission: Submission) -> None:
    """One answer that its limit ends, one that ends by itself, in messages of two tokens."""
    ask, tokenizer = submission.function("ask"), tokenizer_of(submission.server("vllm-grpc").grpc)
    with tapped(submission, limited(in_pairs, 80)) as (tap, stub):
        for prompt, max_tokens in (("The capital of France is", 7), (CHAT, 60)):
            given = tokenizer.encode(prompt).ids
            limit = asks(given, max_tokens)
            got, call = through(tap, submission, "Generate", ask, stub, tokenizer, prompt, max_tokens, asks=limit)
            _judge_answer(given, call, got, tokenizer)


def _judge_answer(prompt: list[int], call: Call, got: Any, tokenizer: Tokenizer) -> None:
    """The four fields of an answer; its text may also be made as 07.4 makes it, after the prompt and never broken."""
    ids, last = ids_of(call), messages_of(call)[-1].complete
    again = [*ids, *last.output_ids]
    right = {
        "text": tokenizer.decode(ids),
        "prompt_tokens": len(prompt),
        "completion_tokens": len(ids),
        "finish_reason": last.finish_reason,
    }
    named = isinstance(got, dict) and got.keys() == right.keys()
    require(named, right, got, "return a dict with these four names")
    known: dict[str, tuple[list[tuple[Any, str]], str]] = {
        "text": (
            [
                (
                    tokenizer.decode(again),
                    "the last message repeats ids that came in a chunk: take those of the chunks only",
                ),
                (
                    tokenizer.decode(ids, skip_special_tokens=False),
                    "special tokens are for the model, not for people: tokenizer.decode leaves them out",
                ),
                (tokenizer.decode(ids).strip(), "the text was trimmed: a leading space is part of it"),
            ],
            "decode all ids together; a chunk may hold several",
        ),
        "completion_tokens": (
            [
                (len(again), "the last message repeats ids that came in a chunk: count those of the chunks only"),
                (
                    last.completion_tokens,
                    "in a stream this field counts the tokens of its own message: count the ids yourself",
                ),
            ],
            "count token ids: a chunk may hold several",
        ),
        "prompt_tokens": ([], "as many as the ids that you sent"),
        "finish_reason": ([], 'the last message has it in complete.finish_reason: "length" or "stop"'),
    }

    # A token may hold a blank and a part of the character after it: who never breaks one keeps back both.
    whole = next(ids[:end] for end in range(len(ids), -1, -1) if not tokenizer.decode(ids[:end]).endswith(BROKEN))

    def same_text(got: str, alone: str) -> bool:
        in_place = tokenizer.decode([*prompt, *ids]).removeprefix(tokenizer.decode(prompt))
        return got in (alone, in_place) or any(got == _text(tokenizer, each, prompt, got) for each in (ids, whole))

    for name, value in right.items():
        mistakes, otherwise = known[name]
        judge(
            value,
            got[name],
            *((got[name] == wrong, cause) for wrong, cause in mistakes),
            otherwise=otherwise,
            expected=f"{name}: {value!r}",
            shown=f"{name}: {got[name]!r}",
            fits=same_text if name == "text" else None,
        )


STREAMS = {
    "Korean and an emoji": KOREAN,
    "a family, which is three emojis joined": "The 👨‍👩‍👧 is here",
    "letters with accents, and Chinese": "naïve café 日本語 ok",
    "plain English": "The capital of France is Paris.",
}


def check_07_3(submission: Submission) -> None:
    """Text as early as it is whole, and never a broken character; on streams of the model's own token ids."""
    detokenize, tokenizer = submission.function("detokenize"), tokenizer_of(submission.server("vllm-grpc").grpc)
    cases = [(what, tokenizer.encode(f"{text}<|im_end|>").ids) for what, text in STREAMS.items()]
    cases.append(("Korean, cut off by max_tokens inside a character", tokenizer.encode(KOREAN).ids[:10]))
    for what, ids in cases:
        pieces: list[str] = []
        seen: list[str] = []

        def stream(ids: list[int] = ids, pieces: list[str] = pieces, seen: list[str] = seen) -> Iterator[int]:
            for each in ids:
                yield each
                seen.append("".join(pieces))

        def read(stream: Any = stream, pieces: list[str] = pieces) -> None:
            for piece in detokenize(tokenizer, stream()):
                if not isinstance(piece, str):
                    raise NotYet("pieces of text", piece, "yield strings, not ids or None")
                pieces.append(piece)

        no_list = "the ids come one by one and have no length: take them with for"
        kinds = {
            (TypeError, r"len\(\)|subscriptable"): no_list,
            TypeError: "write a generator: it yields pieces of text",
        }
        submission.run(read, kinds)
        _judge_text(tokenizer, ids, pieces, what)
        for number, text in enumerate(seen, 1):
            so_far = tokenizer.decode(ids[:number])
            due = "" if so_far.endswith(BROKEN) else so_far
            require(
                len(text) >= len(due),
                f"{due!r} after {number} ids of {len(ids)} ({what})",
                f"{text!r}",
                "everything is gathered before it goes out: yield what is whole before you take the next id"
                if not seen[-2]
                else "what is whole goes out at once: wait only while the last character lacks bytes",
            )


def _text(tokenizer: Tokenizer, ids: list[int], prompt: Sequence[int], got: str) -> str:
    """The text of `ids`: alone, or following `prompt`, where Llama's tokenizer and its like keep a blank in front."""
    following = tokenizer.decode([*prompt, *ids]).removeprefix(tokenizer.decode(prompt)).rstrip(BROKEN)
    return following if got == following else tokenizer.decode(ids).rstrip(BROKEN)


def _judge_text(tokenizer: Tokenizer, ids: list[int], pieces: list[str], what: str, prompt: Sequence[int] = ()) -> None:
    right = _text(tokenizer, ids, prompt, "".join(pieces))
    judge(
        right,
        "".join(pieces),
        (
            lambda got, _: got == tokenizer.decode(ids, skip_special_tokens=False).rstrip(BROKEN),
            "special tokens such as <|im_end|> are for the model, not for people: leave them out",
        ),
        (lambda got, right: got.rstrip(BROKEN) == right, "what is still broken when the stream ends is left out"),
        (
            lambda got, _: BROKEN in got,
            "a token may hold only a part of a character: keep its id back until the bytes are whole",
        ),
        (
            lambda got, right: len(got) > len(right) and right == pieces[-1],
            "each piece has all the text so far: yield only what is new",
        ),
        (
            lambda got, right: len(got) < len(right),
            "characters are lost: the ids that you keep back are decoded together with the next ones",
        ),
        otherwise="the pieces together are the text, each character once",
        expected=f"{right!r} ({what})",
        shown=repr("".join(pieces)),
    )


HOLD_AT = 8
"""The message that waits for a reader: the first character is whole by then."""
LEAVE_SECONDS = 3.0
"""How long messages are held back for a reader who leaves or aborts: an engine may be faster than that."""


def left_alone(messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
    """A filter: two ids a chunk, and the eighth message waits for its reader to leave."""
    for number, message in enumerate(in_pairs(messages, call)):
        if call.method == "Generate" and number == HOLD_AT:
            wait_until(call.done.is_set, LEAVE_SECONDS)
        yield message


def check_07_4(submission: Submission) -> None:
    """Korean as it comes from the engine, in chunks of two tokens; who stops reading, ends the call."""
    stream_text, tokenizer = submission.function("stream_text"), tokenizer_of(submission.server("vllm-grpc").grpc)
    first_read, early = threading.Event(), threading.Event()

    def hold(messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
        """The eighth message waits for a reader."""
        for number, message in enumerate(in_pairs(messages, call)):
            if call.method == "Generate" and number == HOLD_AT and wait_until(first_read.is_set, 3):
                early.set()
            yield message

    ids = tokenizer.encode("Say hello: ").ids
    sampling = pb.SamplingParams(temperature=0, max_tokens=60, choice=pb.ChoiceConstraint(choices=[KOREAN]))
    with tapped(submission, limited(hold, 60)) as (tap, stub):

        def read(ids: list[int], sampling: pb.SamplingParams) -> list[str]:
            pieces: list[str] = []
            for piece in stream_text(stub, tokenizer, ids, sampling):
                if not isinstance(piece, str):
                    raise NotYet("pieces of text", piece, "yield strings: step() gives None where no text is whole yet")
                pieces.append(piece)
                if piece:
                    first_read.set()
            return pieces

        generator: Causes = {TypeError: "write a generator: it yields pieces of text"}
        asked = asks(ids, sampling.max_tokens)
        pieces, call = through(
            tap, submission, "Generate", read, list(ids), deepcopy(sampling), asks=asked, causes=generator
        )
        request = pb.GenerateRequest.FromString(call.requests[0])
        require(
            request.stream,
            "a request with stream=True",
            "stream is not set",
            "without it the server answers in one message, when all is done",
        )
        require(
            request.sampling_params == sampling,
            "the sampling parameters that your function is given",
            str(request.sampling_params),
            "pass them on as they are",
        )
        firsts = tokenizer.decode([each for message in messages_of(call) for each in message.chunk.token_ids[:1]])
        cause = "a chunk may hold several ids: decode all of them"
        require("".join(pieces).rstrip(BROKEN) != firsts.rstrip(BROKEN), KOREAN, "".join(pieces), cause)
        _judge_once(tokenizer, call, pieces, ids)
        _judge_text(tokenizer, ids_of(call), pieces, "Korean from the engine", ids)
        require(
            early.is_set(),
            "the first character while the engine is still writing",
            "the first character only after the last token",
            "everything is gathered before it goes out: yield inside the loop over the call",
        )
        # An answer whose last id is text: the last message has it once more.
        short = pb.SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
        pieces, second = through(tap, submission, "Generate", read, list(ids), short, asks=asks(ids, 7))
        _judge_once(tokenizer, second, pieces, ids)
        _judge_text(tokenizer, ids_of(second), pieces, "an answer that its limit ends", ids)

    with tapped(submission, limited(left_alone, 60)) as (tap, stub):

        def leave() -> None:
            pieces = stream_text(
                stub, tokenizer, list(ids), pb.SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
            )
            next(pieces)
            pieces.close()

        _, third = through(tap, submission, "Generate", leave, asks=asks(ids, 400))
        wait_until(third.done.is_set, 3)
        require(
            third.left is not None,
            "the call cancelled when the reader leaves after one piece",
            f"{len(third.responses)} messages, and the engine goes on for nobody",
            "let the call end with your generator: no list of it, no thread; call.cancel() in a finally makes it sure",
        )
        _own_ids(call, third)


def _judge_once(tokenizer: Tokenizer, call: Call, pieces: list[str], prompt: Sequence[int]) -> None:
    """Not the last ids a second time, which read as text or as broken characters."""
    ids, got = ids_of(call), "".join(pieces).rstrip(BROKEN)
    right = _text(tokenizer, ids, prompt, got)
    wrong = tokenizer.decode([*ids, *messages_of(call)[-1].complete.output_ids]).rstrip(BROKEN)
    twice = "the last message repeats ids that came in a chunk: take those of the chunks only"
    require(got == right or got != wrong, repr(right), repr(got), twice)


UNLIKE = 10
"""In so many places, at least, ids differ that nobody can guess; those of a counter or a clock of seconds in fewer."""
CLOCK = re.compile(r"(.*\d{6})\d+\n\1\d+")
"""Two ids that end in a number with the same beginning, as a clock of nanoseconds has it."""


def _own_ids(call: Call, other: Call, secret: bool = False) -> None:
    first, second = (pb.GenerateRequest.FromString(each.requests[0]).request_id for each in (call, other))
    unlike = sum(a != b for a, b in zip_longest(first, second))
    judge(
        True,
        first != second and (not secret or (unlike >= UNLIKE and not CLOCK.fullmatch(f"{first}\n{second}"))),
        (first == second, "make a new one for each call, such as str(uuid.uuid4())"),
        otherwise="whoever sees one of these ids can guess the next, and abort it: str(uuid.uuid4()) is random",
        expected="a request_id of its own for each request" + (", that nobody can guess" if secret else ""),
        shown=f"{first!r} and {second!r}",
    )


def held_for_abort(aborted: Callable[[], object], wanted: int, in_time: threading.Event) -> Filter:
    """The filter `delayed`; once so many ids have passed, the next message waits for an Abort: `in_time` if it comes.

    That is as good as one that stops the engine: a fast one may have come to its end by then.
    """

    def paced(messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
        passed, held = 0, False
        for message in delayed(messages, call):
            if passed >= wanted and not held:
                held = True
                if wait_until(lambda: aborted() or call.done.is_set(), LEAVE_SECONDS) and aborted():
                    in_time.set()
            if call.method == "Generate":
                passed += len(pb.GenerateResponse.FromString(message).chunk.token_ids)
            yield message

    return paced


def check_07_5(submission: Submission) -> None:
    """Aborted by its id, read to the end, and the engine idle; and an answer that ends before it is enough."""
    read_until, server = submission.function("read_until"), submission.server("vllm-grpc")
    ids = tokenizer_of(server.grpc).encode("Once upon a time").ids
    sizes: list[int] = []
    in_time = threading.Event()

    def enough(so_far: list[int]) -> bool:
        sizes.append(len(so_far))
        return len(so_far) >= wanted

    held = held_for_abort(lambda: tap.of("Abort"), 5, in_time)
    with VllmGrpcClient(server.grpc) as outside, tapped(submission, held) as (tap, stub):
        before = outside.load().num_running_reqs
        calls = []
        for wanted, max_tokens in ((5, 500), (50, 6)):  # 500: an abort needs time to arrive
            sizes.clear()
            aborts = len(tap.of("Abort"))
            sampling = pb.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            limit = asks(ids, max_tokens)
            got, call = through(tap, submission, "Generate", read_until, stub, list(ids), sampling, enough, asks=limit)
            calls.append(call)
            if wanted < max_tokens:
                require(
                    bool(sizes) and sizes[0] < max_tokens,
                    "enough(ids so far) asked after each message",
                    f"asked with {sizes} ids",
                    "ask while the stream runs: afterwards the engine has done the work",
                )
                _judge_abort(tap, call, in_time.is_set())
            else:
                idle = len(tap.of("Abort")) == aborts
                require(idle, "no Abort: it was never enough", "an Abort", "abort only if it is enough")
            _judge_ids(call, got)
        first, second = calls
        _own_ids(first, second, secret=True)
        wait_until(lambda: outside.load().num_running_reqs <= before, 5)
        running = outside.load().num_running_reqs
        require(running <= before, "an engine at rest", f"{running} requests running", "something still generates")


def _judge_ids(call: Call, got: Any) -> None:
    came, last = ids_of(call), messages_of(call)[-1].complete
    judge(
        (came, last.finish_reason),
        tuple(got) if isinstance(got, list) else got,
        (not isinstance(got, tuple | list) or len(got) != 2, "return two things: the ids, and the finish reason"),
        (
            lambda got, _: list(got[0]) == [*came, *last.output_ids],
            "the last message repeats ids that came in a chunk: take those of the chunks only",
        ),
        (lambda got, _: list(got[0]) == came[: len(got[0])] and len(got[0]) < len(came), READ_ON),
        (
            lambda got, right: got[1] != right[1],
            "the server says why it ended, in complete.finish_reason of the last message",
        ),
        otherwise="return the ids, and finish_reason from complete",
        fits=lambda got, right: (list(got[0]), got[1]) == right,
    )


def _judge_abort(tap: GrpcTap, call: Call, in_time: bool) -> None:
    own = pb.GenerateRequest.FromString(call.requests[0]).request_id
    aborted = [each for abort in tap.of("Abort") for each in pb.AbortRequest.FromString(abort.requests[0]).request_ids]
    stopped = "leaving the loop ends your call; Abort ends the request, whoever reads it" if call.left else ""
    require(
        bool(aborted),
        f"Abort with the id {own}",
        f"no Abort, {len(ids_of(call))} ids from the engine",
        stopped or "call stub.Abort(pb.AbortRequest(request_ids=[…])) as soon as it is enough",
    )
    require(
        own in aborted,
        f"Abort with the id {own}",
        f"Abort with {', '.join(aborted)}",
        "Abort takes the id that your request was sent with; an unknown one is no error, and stops nothing",
    )
    reason = messages_of(call)[-1].complete.finish_reason
    require(bool(reason), "the stream read to its end after the Abort", "the call left before that", READ_ON)
    require(
        reason == "abort" or in_time,
        "the engine stopped: finish_reason abort",
        f"finish_reason {reason} after {len(ids_of(call))} ids",
        "abort while the stream runs, not after it",
    )


@contextmanager
def text_tap(submission: Submission, filter: Filter | None = None) -> Iterator[tuple[GrpcTap, InferenceStub]]:
    """A tap in front of the Rust front end, and a stub that goes through it."""
    with GrpcTap(submission.server("vllm-rs").grpc, filter) as tap, grpc.insecure_channel(tap.address) as channel:
        yield tap, InferenceStub(channel)


def asks_text(prompt: str, max_tokens: int | None = None) -> Callable[[Call], None]:
    """A judge of vllm.Inference's request: this text, greedy, and this limit where there is one."""

    def look(call: Call) -> None:
        request = text_pb.GenerateRequest.FromString(call.requests[0]) if call.requests else text_pb.GenerateRequest()
        require(request.text == prompt, f"text {prompt!r}", f"text {request.text!r}", "send the prompt as it stands")
        temperature = request.temperature if request.HasField("temperature") else None
        greedy = "greedy is temperature 0, and unset is not 0: it is the model's default"
        require(temperature == 0, "temperature 0", f"temperature {temperature}", greedy)
        limit = request.stopping.max_new_tokens
        require(
            max_tokens is None or limit == max_tokens,
            f"stopping with max_new_tokens {max_tokens}",
            f"max_new_tokens {limit}",
            "nothing sets a limit for you here: 0 or unset goes on to the end of the context",
        )

    return look


def check_07_6(submission: Submission) -> None:
    """An answer that its limit ends, and one that ends by itself; pieces of two tokens, and shown as they come."""
    stream_answer = submission.function("stream_answer")
    shown: list[str] = []
    early = threading.Event()

    def merged(messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
        """Every two messages with text become one, as for a slow reader; the fifth waits for the first to be shown."""
        held = text_pb.GenerateResponse()
        for number, raw in enumerate(messages):
            message = text_pb.GenerateResponse.FromString(raw)
            if call.method != "GenerateStream" or not message.outputs:
                yield raw
                continue
            if held.outputs:
                message.outputs[0].text = held.outputs[0].text + message.outputs[0].text
                message.outputs[0].num_tokens += held.outputs[0].num_tokens
            held = text_pb.GenerateResponse()
            if number % 2 and not message.outputs[0].HasField("finish_info"):
                held = message
                continue
            if number == 4 and wait_until(lambda: bool(shown), 3):
                early.set()
            yield message.SerializeToString()

    with text_tap(submission, merged) as (tap, stub):
        for prompt, max_tokens in (("The capital of France is", 7), (CHAT, 60)):
            shown.clear()
            limit = asks_text(prompt, max_tokens)
            show = shown.append
            got, call = through(
                tap, submission, "GenerateStream", stream_answer, stub, prompt, max_tokens, show, asks=limit
            )
            first, *rest = [text_pb.GenerateResponse.FromString(message) for message in call.responses]
            outputs = [output for message in rest for output in message.outputs]
            right = {
                "prompt_tokens": first.prompt_info.num_prompt_tokens,
                "completion_tokens": outputs[-1].finish_info.num_output_tokens,
                "finish_reason": REASONS[outputs[-1].finish_info.finish_reason],
            }
            text = "".join(output.text for output in outputs)
            judge(
                text,
                "".join(piece for piece in shown if isinstance(piece, str)),
                (not shown, "nothing was shown: call show with each piece"),
                otherwise="each message has only what is new: hand its text on as it is, once",
                expected=f"{text!r} shown",
            )
            named = isinstance(got, dict) and got.keys() == right.keys()
            require(named, right, got, "return a dict with these three names")
            causes = {
                "prompt_tokens": "the first message, which comes before any text, has it in prompt_info",
                "completion_tokens": "num_tokens counts the tokens of its own message, and a message may have several: "
                "finish_info has num_output_tokens, of the whole answer",
                "finish_reason": "the last output says it in finish_info.finish_reason, as a number of the enum: "
                'translate it to "length" or "stop"',
            }
            for name, value in right.items():
                require(got[name] == value, f"{name}: {value!r}", f"{name}: {got[name]!r}", causes[name])
    require(
        early.is_set(),
        "the first piece shown while the engine is still writing",
        "the first piece only at the end",
        "everything is gathered first: call show inside the loop over the call",
    )


def _allows_only(decoding: text_pb.Decoding, labels: list[str]) -> bool:
    """Whether this lets the model write each of the labels and nothing else, as a choice or as an expression."""
    if not decoding.HasField("regex"):
        return sorted(decoding.choice.choices) == sorted(labels)
    with suppress(re.error):
        others = ("", "other", *(f"{label}s" for label in labels), *(label[:-1] for label in labels))
        fits = [bool(re.fullmatch(decoding.regex, text)) for text in (*labels, *others)]
        return fits == [True] * len(labels) + [False] * len(others)
    return False


def check_07_7(submission: Submission) -> None:
    """Labels that the model would never write by itself, and a deadline."""
    classify = submission.function("classify")
    with text_tap(submission) as (tap, stub):
        for prompt, labels in (
            ("Is 'wonderful' praise or blame? It is ", ["praise", "blame"]),
            ("The capital of France is", ["zinc-40", "칭찬", "x y z"]),
        ):
            free = asks_text(prompt)
            got, call = through(tap, submission, "Generate", classify, stub, prompt, list(labels), asks=free)
            decoding = text_pb.GenerateRequest.FromString(call.requests[0]).decoding
            require(
                _allows_only(decoding, labels),
                f"decoding with choice {labels}",
                f"decoding with {str(decoding).strip() or 'no constraint'}",
                "the server is to allow nothing else: decoding=text_pb.Decoding(choice=text_pb.Choice(choices=…))",
            )
            text = text_pb.GenerateResponse.FromString(call.responses[0]).outputs[0].text
            cut = "a limit has cut the label, which may be many tokens long: leave max_new_tokens out, or give it room"
            require(text in labels, f"one of {labels} from the server", f"{text!r} from the server", cut)
            judge(
                text,
                got,
                (isinstance(got, int), "return the label itself, not its place"),
                otherwise="return the text of the first output, as it is: a label, whole",
            )
            require(
                call.timeout is not None and call.timeout < 61,  # on the wire it is rounded up
                "a deadline of at most 60 seconds",
                "none" if call.timeout is None else f"{call.timeout:.0f} seconds",
                "gRPC has no deadline by itself: give the call timeout=60",
            )
