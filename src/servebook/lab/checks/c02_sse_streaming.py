"""Checks of lab 02: server-sent events by hand and by SDK, the time to the first token, counting, stopping."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any

import requests
from openai import OpenAI

from servebook.bearer import bearer
from servebook.errors import ServebookError
from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.rest import (
    RELIABLE,
    asked,
    asked_to_continue,
    key_of,
    sends,
    sends_key,
    sends_question,
    text_to_its_end,
    through,
)
from servebook.lab.submission import LIMIT_SECONDS, Causes, Submission
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import content_of, events_of, streamed_text, text_of
from servebook.processes import wait_until

KOREAN = {"structured_outputs": {"choice": ["안녕하세요, 반갑습니다"]}}
"""Forces text of several bytes a character, and often several tokens a character, out of an English model."""
CHAT = "/v1/chat/completions"
CHAT_API = "that is the other API: this exercise is a chat, client.chat.completions.create"


@cache
def korean_stream(url: str, key: str, model: str) -> bytes:
    """The bytes of one real chat stream with characters of several bytes; asked for once."""
    question = {"role": "user", "content": "Say hello in Korean."}
    answer = requests.post(
        f"{url}/v1/chat/completions",
        auth=bearer(key),
        json={"model": model, "messages": [question], "max_tokens": 40, "stream": True, **KOREAN},
        timeout=30,
    )
    answer.raise_for_status()
    return answer.content


SPLIT = "a cut may go through a character: decode whole lines, not the pieces as they come"
BOTH = "a line may end in \\r\\n: take both off"
ALLOWED: list[tuple[str, list[bytes], list[str], str]] = [
    ("line ends of CR LF", [b"data: one\r\n\r\ndata: two\r\n\r\n"], ["one", "two"], BOTH),
    (
        "a comment that keeps the line alive",
        [b": ping\n\n", b"data: one\n\n"],
        ["one"],
        "a line that begins with a colon is a comment, and an event without data is none",
    ),
    ("other fields", [b"event: tok", b"en\nid: 7\ndata: one\n\n"], ["one"], "only the data field is asked for"),
    ("no space after the colon", [b"data:one\n\n"], ["one"], "one space after the colon may be there, or not"),
    (
        "spaces of the data's own",
        [b"data:  one", b" \n\n"],
        [" one "],
        "only the first space after the colon belongs to the wire: do not strip the rest",
    ),
    (
        "data in two lines",
        [b"data: one\nda", b"ta: two\n\n"],
        ["one\ntwo"],
        "an event ends at the empty line: its data lines are joined with a line feed",
    ),
    (
        "cuts between CR and LF",
        [b"data: one\r", b"\ndata: two\r\n\r", b"\n"],
        ["one\ntwo"],
        "a cut may go between \\r and \\n: a line is whole when its \\n has come, and not before",
    ),
    (
        "an empty data line and another one",
        [b"data:\ndata: one\n\n"],
        ["\none"],
        "an empty data line is one of the event's lines too: gather them in a list, and ask whether that holds any",
    ),
    (
        "a field whose name only begins with data",
        [b"database: x\ndata: one\n\n"],
        ["one"],
        "a field's name ends at the colon: `database:` is another field",
    ),
    (
        "`data:` in a comment and in the data",
        [b": data: old\ndata:data: at\n\n"],
        ["data: at"],
        "`data:` is the field's name only where the line begins with it: take it off there, once, with removeprefix",
    ),
    (
        "an event whose empty line never comes",
        [b"data: one\n\ndata: two\n"],
        ["one"],
        "an event is whole at its empty line: what the stream leaves unfinished is dropped",
    ),
    (
        "U+2028, U+0085 and a form feed in the text",
        ["data: a\u2028b\u0085c\x0cd\n\n".encode()],
        ["a\u2028b\u0085c\x0cd"],
        "only \\n ends a line here: str.splitlines cuts at other characters too, such as U+2028",
    ),
]


BYTES = 'what arrives is bytes: compare it with b"data:", or decode a whole line first'


def check_02_1(submission: Submission) -> None:
    """A parser of events: real bytes of the engine in every cut, and what else the standard allows."""
    parse_sse, vllm = submission.function("parse_sse"), submission.server("vllm")
    wire = korean_stream(vllm.url, key_of(vllm), vllm.model)
    real = [event.removeprefix("data: ") for event in wire.decode().split("\n\n") if event]

    def parsed(cut: list[bytes], causes: Causes) -> list[Any]:
        found: list[Any] = submission.run(lambda: list(parse_sse(iter(cut))), causes)
        return found

    line = {ValueError: "a piece need not be an event: gather bytes until a line is whole"}
    cuts: list[tuple[str, list[bytes], Causes]] = [
        ("one event a piece, as it mostly comes", [event + b"\n\n" for event in wire.split(b"\n\n") if event], {}),
        ("all in one piece", [wire], {}),
        ("seven bytes a piece", [wire[i : i + 7] for i in range(0, len(wire), 7)], {UnicodeDecodeError: SPLIT}),
        ("one byte a piece", [wire[i : i + 1] for i in range(len(wire))], {UnicodeDecodeError: SPLIT}),
    ]
    for name, cut, causes in cuts:
        kinds = {(TypeError, "bytes"): BYTES, TypeError: "write a generator: it yields the data of each event"}
        got = parsed(cut, {**causes, **line, **kinds})
        text = "".join(map(str, got))
        judge(
            real,
            got,
            (
                any(not isinstance(item, str) for item in got),
                "yield the data as text: reading JSON is the caller's business",
            ),
            ("data:" in text, "the field's name `data:` belongs to the wire, not to the event"),
            ("\ufffd" in text, SPLIT),
            (lambda got, right: [*map(_ascii, got)] == [*map(_ascii, right)], SPLIT),
            (
                lambda got, right: [item.removesuffix("\n") for item in got] == right,
                "the line feed at an event's end is the wire's: it stands between two data lines, and nowhere else",
            ),
            ("\n" in text, "an event's data ends with the event: begin with none after the empty line"),
            (got == real[:-1], "[DONE] is an event like the others here; what it means is the caller's business"),
            (len(got) < len(real), "a piece is not an event: one may hold several, and an event may come in several"),
            (len(got) > len(real), "a piece is not an event, and an empty line is not one either"),
            otherwise="yield the text after `data:` of every event, [DONE] too, in order",
            expected=f"{len(real)} events, {name}: {real[-2][:60]} … {real[-1]}",
        )
    for name, cut, right, cause in ALLOWED:
        got = parsed(cut, {Exception: cause})
        require(got == right, f"{right!r} from {name}: {b' | '.join(cut)!r}", got, cause)
    taken: list[bytes] = []

    def watched() -> Iterator[bytes]:
        for event in (b"data: one\n\n", b"data: two\n\n", b"data: three\n\n"):
            taken.append(event)
            yield event

    submission.run(lambda: next(iter(parse_sse(watched()))))
    require(
        len(taken) == 1,
        "the first event, as soon as it is whole",
        f"nothing before {len(taken)} events had come",
        "events are gathered first: yield each one where it ends"
        if len(taken) == 3
        else "each event comes one piece late: its empty line ends it, do not wait for what follows",
    )


def _ascii(text: str) -> bytes:
    return text.encode("ascii", "ignore")


def check_02_2(submission: Submission) -> None:
    """Pieces of text as they come, by plain HTTP."""
    stream_text, vllm = submission.function("stream_text"), submission.server("vllm")
    key, prompt = key_of(vllm), "Bread is made of flour and"
    first_read, early = threading.Event(), threading.Event()

    def hold(chunks: Iterator[bytes], _: Exchange) -> Iterator[bytes]:
        """Let no more through than three events, and never the end, until the learner's code has yielded text."""
        held = False
        for number, event in enumerate(events_of(chunks)):
            if not held and (number == 3 or b"[DONE]" in event):
                held = True
                if wait_until(first_read.is_set, 3):
                    early.set()
            yield event

    def read(*args: Any) -> list[Any]:
        pieces = []
        for piece in stream_text(*args):
            pieces.append(piece)
            first_read.set()
        return pieces

    causes: Causes = {
        ValueError: "not every line is JSON: empty lines part the events, and the last one is [DONE]",
        (TypeError, "bytes"): BYTES,
        TypeError: "yield the pieces, or return an iterator of them",
        KeyError: "each API has its own place for the text: choices[0].text, or choices[0].delta.content",
    }
    with Tap(vllm.url, hold, RELIABLE) as tap:
        pieces, made = through(tap, submission, read, tap.url, key, vllm.model, prompt, 12, causes=causes)
        exchange = asked_to_continue(made)
        sends_key(exchange, key)
        sdk = [name for name in exchange.headers if name.lower().startswith("x-stainless-")]
        by_hand = "that is the OpenAI SDK: this exercise asks over plain HTTP, to see what the SDK does for you"
        require(not sdk, "a request without the SDK's own headers", ", ".join(sdk), by_hand)
        in_json = "the server streams only when the request's JSON says so; stream=True for requests is not that"
        sends(exchange, {"stream": in_json}, stream=True, model=vllm.model, prompt=prompt, max_tokens=12)
        right, got = text_to_its_end(exchange), "".join(map(str, pieces))
        judge(
            right,
            got,
            (
                "data:" in got or '"choices"' in got,
                "these are the lines of the wire: read the JSON after `data: ` and take the text out of it",
            ),
            (bool(right) and got.replace("None", "") == right, "some events carry no text: leave those out"),
            (
                "".join(got.split()) == "".join(right.split()),
                "spaces and line feeds are part of the text: take none away, and add none",
            ),
            (not got, "no text was yielded: is an error swallowed, or is every line left out?"),
            (right.startswith(got) or right.endswith(got), "a piece is lost at the end or at the beginning"),
            (bool(pieces) and pieces[-1] == right, "each piece has all the text so far: yield only what is new"),
            otherwise="yield the text of each event, and nothing else",
        )
        require(
            early.is_set(),
            "the first piece while the server is still sending",
            "the first piece only after the last event",
            "the answer is read whole before the first piece goes out: requests reads it all unless "
            "stream=True is given to post, and a list that is filled first comes too late as well",
        )


TOLERANCE = 0.25
"""Seconds."""


RIVERS = "Name three rivers."
RIVERS_TOKENS = 32
"""Enough for several events: a busy engine may put several tokens into one."""


def check_02_3(submission: Submission) -> None:
    """Time to the first token and in all, over a line with known delays."""
    timed, vllm = submission.function("timed"), submission.server("vllm")
    lateness: list[float] = []

    def nap(seconds: float) -> None:
        began = time.monotonic()
        time.sleep(seconds)
        lateness.append(time.monotonic() - began - seconds)

    def slow(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        """0.5 s before the answer begins, 0.9 s more before its first text, 0.5 s to the next, 0.6 s before its end.

        More before the first text where the answer began late: else who starts the clock then would get the time until
        then, which is another mistake.
        """
        nap(0.5)
        for event in events_of(chunks):
            for mark, seconds in (("text", 0.9), ("more", 0.5)):
                if content_of(event) and mark not in exchange.marks:
                    begun_after = exchange.marks.get("first", time.monotonic()) - asked_at[0]
                    nap(max(seconds, begun_after + 2 * TOLERANCE) if mark == "text" else seconds)
                    exchange.marks[mark] = time.monotonic()
                    break
            if content_of(event):
                exchange.marks["last"] = time.monotonic()
            if b"[DONE]" in event:
                nap(0.6)
            yield event

    asked_at: list[float] = []

    def ask(client: OpenAI) -> Any:
        asked_at[:] = [time.monotonic()]  # not when the request arrives: the SDK takes its time as well
        return timed(client, vllm.model, RIVERS, RIVERS_TOKENS)

    began = time.monotonic()
    while True:
        tried = time.monotonic()
        lateness.clear()
        with Tap(vllm.url, slow, RELIABLE) as tap:
            client = OpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0)
            got, made = through(
                tap, submission, ask, client, causes={TypeError: "not every event has text: the first was never noted"}
            )
            exchange = asked(made, CHAT, CHAT_API)
            sends(
                exchange,
                {"stream": "without stream=True there is no first token to see: all come at once"},
                stream=True,
                model=vllm.model,
                max_tokens=RIVERS_TOKENS,
            )
            sends_question(exchange, RIVERS)
            tap.settle()
        keep = "keep the model, the prompt and max_tokens as given"
        require("text" in exchange.marks, "an answer with text", "none", keep)
        first = exchange.marks["text"] - asked_at[0]
        whole = (exchange.ended or time.monotonic()) - asked_at[0]
        try:
            ttft, total = (float(value) for value in got)
        except (TypeError, ValueError):
            two = "return two numbers: seconds to the first token, seconds in all"
            raise NotYet(_seconds(first, whole), got, two) from None
        lag = exchange.started - asked_at[0]  # somewhere in between the learner's clock was taken

        def fits(got: float, right: float, lag: float = lag) -> bool:
            return right - lag - TOLERANCE < got < right + TOLERANCE

        on_time = fits(ttft, first) and fits(total, whole)
        if on_time or max(lateness) < 0.02:
            break  # else this machine was too busy to time anything on it: once more
        now = time.monotonic()
        if now - began + now - tried > LIMIT_SECONDS:
            raise ServebookError(
                "This machine is too busy to judge times on it.", "End what else runs, then check again."
            )
    _judge_times(exchange, asked_at[0], (first, whole), (ttft, total), fits)


def _judge_times(
    exchange: Exchange,
    asked_at: float,
    right: tuple[float, float],
    got: tuple[float, float],
    fits: Callable[[float, float], bool],
) -> None:
    """Judge both times, to the first token and in all; `fits` says whether one is near enough to the right one."""
    (first, whole), (ttft, total) = right, got
    expected, shown = _seconds(first, whole), f"({ttft:.2f}, {total:.2f})"
    begun = exchange.marks["first"]
    late = "the clock started too late: create() returns only when the answer begins, so start it before the call"
    judge(
        first,
        ttft,
        (_near(ttft / 1000, first), "these are milliseconds"),
        (_near(ttft, whole) and _near(total, first), "the two times are the wrong way round"),
        (
            ttft > whole + TOLERANCE and _near(total - ttft, whole - first),
            "that is what the clock shows: subtract what it showed at the asking",
        ),
        (_near(ttft, whole), "the first time was taken at the end, or the list was gathered first"),
        (
            ttft < TOLERANCE,
            "hardly any time: is the clock started anew, or one that stands still while code waits, as process_time?",
        ),
        (
            _near(ttft, begun - asked_at),
            "the first event carries the role and no text yet: wait for one with content",
        ),
        (_near(ttft, exchange.marks["text"] - begun), late),
        (
            exchange.marks.get("more", math.inf) - TOLERANCE < asked_at + ttft < exchange.marks["last"] + TOLERANCE,
            "that is a later text: keep the first one's time",
        ),
        otherwise="take the clock before the call, and at the first text",
        fits=fits,
        expected=expected,
        shown=shown,
    )
    judge(
        whole,
        total,
        (_near(total / 1000, whole), "these are milliseconds"),
        (_near(total, whole - first), "the whole time begins at the asking, not at the first token"),
        (_near(total, first), "the total ends when the stream has ended: read it to its end"),
        otherwise="the total ends when the stream has ended, and begins where the first time begins",
        fits=fits,
        expected=expected,
        shown=shown,
    )


def _seconds(first: float, whole: float) -> str:
    """What is expected of the two times, in words."""
    return f"({first:.2f}, {whole:.2f}) seconds, give or take {TOLERANCE}"


def _near(got: float, right: float) -> bool:
    return abs(got - right) < TOLERANCE


def check_02_4(submission: Submission) -> None:
    """Tokens as the server counts them; chunks are something else."""
    counted, vllm = submission.function("counted"), submission.server("vllm")
    unasked = "chunk.usage is None in every event but the last: ask before you read"
    causes: Causes = {
        IndexError: "the event with the usage has an empty list of choices",
        AttributeError: unasked,
        TypeError: "a delta's content may be None, and chunk.usage is None in every event but the last",
    }
    with Tap(vllm.url) as tap:
        client = OpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0)
        for extra, max_tokens in ((KOREAN, 40), ({"ignore_eos": True}, 5)):
            request: dict[str, Any] = {
                "model": vllm.model,
                "messages": [{"role": "user", "content": "Say hello."}],
                "max_tokens": max_tokens,
                "extra_body": extra,
            }
            got, made = through(tap, submission, partial(counted, client, **request), causes=causes)
            exchange = asked(made, CHAT, CHAT_API)
            sends(exchange, {"stream": "this one streams: pass stream=True"}, stream=True)
            _judge_count(exchange, got)


def _judge_count(exchange: Exchange, got: Any) -> None:
    events = exchange.events()
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
    require(
        usage is not None,
        "an event with the usage",
        f"{len(events)} events, none with usage; and the result {got!r}"[:300],
        'chunks are not tokens; the server has counted: ask with stream_options={"include_usage": True}',
    )
    assert usage
    chunks = {
        len(events),
        len(events) - 1,
        len([e for e in events if e["choices"]]),
        len([e for e in events if any(text_of(c) for c in e["choices"])]),
    }
    total = usage["total_tokens"]
    judge(
        (streamed_text(exchange), usage["completion_tokens"]),
        tuple(got) if isinstance(got, list) else got,
        (lambda got, right: len(got) == 2 and got == right[::-1], "the text comes first, then the number"),
        (
            lambda got, right: len(got) == 2 and got[0] != right[0],
            "join the content of all events to the text; the one with the usage has none",
        ),
        (lambda got, _: got[1] == total, "total_tokens counts the prompt too"),
        (
            lambda got, _: got[1] in chunks,
            "that is the number of chunks or of characters: a chunk may hold several tokens, or none",
        ),
        (lambda got, _: isinstance(got[1], int), "take completion_tokens out of the usage that the server sends"),
        otherwise="return the whole text and the number of tokens",
    )


def check_02_5(submission: Submission) -> None:
    """Enough is enough: the stream is left, and with it the engine's work; and once it never is."""
    stream_until, vllm = submission.function("stream_until"), submission.server("vllm")
    for wanted, max_tokens in ((20, 50), (10_000, 12), (6, 40)):
        asked_about: list[Any] = []

        def enough(text: Any, wanted: int = wanted, asked_about: list[Any] = asked_about) -> bool:
            asked_about.append(text)
            return len(text) >= wanted

        with Tap(vllm.url, _wait_for_the_end(wanted), RELIABLE) as tap:
            client = OpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0)
            question = "Count from one to fifty, in words."
            got, made = through(tap, submission, stream_until, client, vllm.model, question, max_tokens, enough)
            exchange = asked(made, CHAT, CHAT_API)
            whole = "what has come whole cannot be stopped: pass stream=True"
            sends(exchange, {"stream": whole}, stream=True, max_tokens=max_tokens)
            sends_question(exchange, question)
            returned_early = "waited" not in exchange.marks
            tap.settle()
        _judge_questions(asked_about)
        if wanted > 1000:
            judge(
                streamed_text(exchange),
                got,
                (got == "" or got is None, "it was never enough: all of the text is returned then"),
                (
                    lambda got, right: got.endswith(right),
                    "the text of an earlier call is in it: begin with an empty one",
                ),
                otherwise="it was never enough, so nothing ends the stream but its own end: return all of its text",
            )
            continue
        require(
            exchange.left is not None or returned_early,
            "a stream that its client leaves",
            f"{len(exchange.events())} events read to the end",
            "the text is cut, but the engine wrote all of it: leave the loop as soon as it is enough",
        )
        require(
            exchange.left is not None,
            "the connection closed within 3 s",
            "still open, and the engine still writing for nobody",
            "leaving the loop is not enough while something holds the stream: close it (`with`, or close())",
        )
        right = next((text for text in asked_about if len(text) >= wanted), asked_about[-1])
        judge(right, got, otherwise="return the text that was enough, with the piece that made it so")


def _wait_for_the_end(wanted: int) -> Callable[[Iterator[bytes], Exchange], Iterator[bytes]]:
    """A filter: three events after the text was enough, or at the stream's end, it waits for the client to leave.

    Neither events nor tokens tell when that is: digits are one character each, and a busy engine merges tokens.
    """

    def hold(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        text, after = "", 0
        for event in events_of(chunks):
            after += len(text) >= wanted
            if "waited" not in exchange.marks and (after == 3 or (after and b"[DONE]" in event)):
                naps = 0  # not a deadline: on a machine that is too busy for the client, naps take longer as well
                while not exchange.client_gone() and naps < 150:
                    time.sleep(0.02)
                    naps += 1
                exchange.marks["waited"] = time.monotonic()
            text += content_of(event)
            yield event

    return hold


def _judge_questions(asked_about: list[Any]) -> None:
    require(
        bool(asked_about),
        "enough(…) asked about the text",
        "never called",
        "the caller says what is enough: call enough",
    )
    require(
        all(isinstance(text, str) for text in asked_about)
        and all(later.startswith(earlier) for earlier, later in pairwise(asked_about)),
        "enough(…) asked about the text so far",
        asked_about[:6],
        "enough wants all the text so far, not the last piece alone",
    )
