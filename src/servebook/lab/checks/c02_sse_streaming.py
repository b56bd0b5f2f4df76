"""Checks of lab 02: server-sent events by hand and by SDK, the time to the first token, counting, stopping."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any

import requests

from servebook.errors import ServebookError
from servebook.lab.feedback import NotYet, require
from servebook.lab.rest import key_of, sends, sends_key, through
from servebook.lab.submission import Submission
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import content_of, events_of, streamed_text, text_of

KOREAN = {"structured_outputs": {"choice": ["안녕하세요, 반갑습니다"]}}
"""Forces text of several bytes a character, and often several tokens a character, out of an English model."""

RELIABLE = {"temperature": 0, "ignore_eos": True}
"""Left to itself the model may stop after a word, or before it."""

ENOUGH_CHARS = 20
"""Longer than any piece that the model sends at once."""


@cache
def korean_stream(url: str, key: str, model: str) -> bytes:
    """The bytes of one real chat stream with characters of several bytes; asked for once."""
    question = {"role": "user", "content": "Say hello in Korean."}
    answer = requests.post(
        f"{url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": model, "messages": [question], "max_tokens": 40, "stream": True, **KOREAN},
        timeout=30,
    )
    answer.raise_for_status()
    return answer.content


def check_02_1(submission: Submission) -> None:
    """A parser of events: real bytes of the engine in every cut, and what else the standard allows."""
    parse_sse, vllm = submission.function("parse_sse"), submission.server("vllm")
    wire = korean_stream(vllm.url, key_of(vllm), vllm.model)
    real = [event.removeprefix("data: ") for event in wire.decode().split("\n\n") if event]

    def parsed(cut: list[bytes], causes: dict[type[BaseException], str]) -> Any:
        return submission.run(lambda: list(parse_sse(iter(cut))), causes)

    split_character = "a cut may go through a character: decode whole lines, not the pieces as they come"
    cuts: list[tuple[str, list[bytes], dict[type[BaseException], str]]] = [
        ("one event a piece, as it mostly comes", [event + b"\n\n" for event in wire.split(b"\n\n") if event], {}),
        ("all in one piece", [wire], {}),
        (
            "seven bytes a piece",
            [wire[i : i + 7] for i in range(0, len(wire), 7)],
            {UnicodeDecodeError: split_character},
        ),
        ("one byte a piece", [wire[i : i + 1] for i in range(len(wire))], {UnicodeDecodeError: split_character}),
    ]
    for name, cut, causes in cuts:
        got = parsed(cut, {**causes, ValueError: "a piece need not be an event: gather bytes until a line is whole"})
        cause = "yield the text after `data:` of every event, [DONE] too, in order"
        if any(not isinstance(item, str) for item in got):
            cause = "yield the data as text: reading JSON is the caller's business"
        elif "".join(got).count("data:"):
            cause = "the field's name `data:` belongs to the wire, not to the event"
        elif "\ufffd" in "".join(got):
            cause = split_character
        elif any("\n" in item for item in got):
            cause = "an event's data ends with the event: begin with none after the empty line"
        elif got == real[:-1]:
            cause = "[DONE] is an event like the others here; what it means is the caller's business"
        elif len(got) < len(real):
            cause = "a piece is not an event: one may hold several, and an event may come in several"
        elif len(got) > len(real):
            cause = "a piece is not an event, and an empty line is not one either"
        require(got == real, f"{len(real)} events, {name}: {real[-2][:60]} … {real[-1]}", got, cause)
    cases = [
        (
            "line ends of CR LF",
            b"data: one\r\n\r\ndata: two\r\n\r\n",
            ["one", "two"],
            "a line may end in \\r\\n: take both off",
        ),
        (
            "a comment that keeps the line alive",
            b": ping\n\ndata: one\n\n",
            ["one"],
            "a line that begins with a colon is a comment, and an event without data is none",
        ),
        ("other fields", b"event: token\nid: 7\ndata: one\n\n", ["one"], "only the data field is asked for"),
        ("no blank after the colon", b"data:one\n\n", ["one"], "one blank after the colon may be there, or not"),
        (
            "blanks of the data's own",
            b"data:  one \n\n",
            [" one "],
            "only the first blank after the colon belongs to the wire: do not strip the rest",
        ),
        (
            "data in two lines",
            b"data: one\ndata: two\n\n",
            ["one\ntwo"],
            "an event ends at the empty line: its data lines are joined with a line feed",
        ),
    ]
    for name, sent, right, cause in cases:
        got = parsed([sent[:9], sent[9:]], {Exception: cause})
        require(got == right, f"{right!r} from {name}: {sent!r}", got, cause)
    seen: list[int] = []

    def watched() -> Iterator[bytes]:
        for number, event in enumerate((b"data: one\n\n", b"data: two\n\n", b"data: three\n\n")):
            seen.append(number)
            yield event

    submission.run(lambda: next(iter(parse_sse(watched()))))
    require(
        len(seen) <= 2,
        "the first event, as soon as it is whole",
        "nothing before the stream had ended",
        "events are gathered first: yield each one where it ends",
    )


def check_02_2(submission: Submission) -> None:
    """Pieces of text as they come, by plain HTTP."""
    stream_text, vllm = submission.function("stream_text"), submission.server("vllm")
    key, prompt = key_of(vllm), "Once upon a time"
    first_read, early = threading.Event(), threading.Event()

    def hold(chunks: Iterator[bytes], _: Exchange) -> Iterator[bytes]:
        """Let no more through than three events until the learner's code has yielded text."""
        for number, event in enumerate(events_of(chunks)):
            if number == 3 and first_read.wait(3):
                early.set()
            yield event

    with Tap(vllm.url, hold) as tap:

        def read() -> list[Any]:
            pieces = []
            for piece in stream_text(tap.url, key, vllm.model, prompt, 12):
                pieces.append(piece)
                first_read.set()
            return pieces

        pieces, (exchange, *_) = through(
            tap,
            submission,
            read,
            {
                ValueError: "not every line is JSON: empty lines part the events, and the last one is [DONE]",
                TypeError: "yield the pieces, or return an iterator of them",
                KeyError: "each API has its own place for the text: choices[0].text, or choices[0].delta.content",
            },
        )
        sends_key(exchange, key)
        sends(
            exchange,
            {"stream": "the server streams only when the request's JSON says so; stream=True for requests is not that"},
            stream=True,
            model=vllm.model,
            max_tokens=12,
        )
        right = streamed_text(exchange)
        got = "".join(map(str, pieces))
        cause = "yield the text of each event, and nothing else"
        if "data:" in got or '"choices"' in got:
            cause = "these are the lines of the wire: read the JSON after `data: ` and take the text out of it"
        elif got == "None" + right or (right and got.replace("None", "") == right):
            cause = "some events carry no text: leave those out"
        elif "".join(got.split()) == "".join(right.split()):
            cause = "blanks and line feeds are part of the text: do not strip it"
        elif right.startswith(got) or right.endswith(got):
            cause = "a piece is lost at the end or at the beginning"
        require(got == right, right, got, cause)
        require(
            early.is_set(),
            "the first piece while the server is still sending",
            "the first piece only after the last event",
            "the answer is read whole before the first piece goes out: requests reads it all unless "
            "stream=True is given to post, and a list that is filled first comes too late as well",
        )


def check_02_3(submission: Submission) -> None:
    """Time to the first token and in all, over a line with known delays."""
    timed, vllm = submission.function("timed"), submission.server("vllm")
    from openai import OpenAI

    lateness: list[float] = []

    def nap(seconds: float) -> None:
        began = time.monotonic()
        time.sleep(seconds)
        lateness.append(time.monotonic() - began - seconds)

    def slow(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        """0.5 s before the answer begins, 0.9 s more before its first text, 0.6 s before its end."""
        nap(0.5)
        for event in events_of(chunks):
            if content_of(event) and "text" not in exchange.marks:
                nap(0.9)
                exchange.marks["text"] = time.monotonic()
            if b"[DONE]" in event:
                nap(0.6)
            yield event

    asked: list[float] = []

    def ask(client: OpenAI) -> Any:
        asked[:] = [time.monotonic()]  # not when the request arrives: the SDK takes its time as well
        return timed(client, vllm.model, "Count to five.", 8)

    tolerance = 0.25
    for _ in range(4):
        lateness.clear()
        with Tap(vllm.url, slow, RELIABLE) as tap:
            client = OpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0)
            got, (exchange, *_) = through(tap, submission, partial(ask, client))
            streams = "without stream=True there is no first token to see: all come at once"
            sends(exchange, {"stream": streams}, stream=True)
            tap.settle()
        keep = "keep the model, the prompt and max_tokens as given"
        require("text" in exchange.marks, "an answer with text", "none", keep)
        first = exchange.marks["text"] - asked[0]
        whole = (exchange.ended or time.monotonic()) - asked[0]
        right = f"({first:.2f}, {whole:.2f}) seconds, give or take {tolerance}"
        try:
            ttft, total = (float(value) for value in got)
        except (TypeError, ValueError):
            raise NotYet(right, got, "return two numbers: seconds to the first token, seconds in all") from None
        on_time = abs(ttft - first) < tolerance and abs(total - whole) < tolerance
        if on_time or max(lateness) < 0.02:
            break  # else this machine was too busy to time anything on it: once more
    else:
        raise ServebookError("This machine is too busy to judge times on it.", "End what else runs, then check again.")
    shown = f"({ttft:.2f}, {total:.2f})"
    faults = [
        (abs(ttft / 1000 - first) < tolerance, "these are milliseconds"),
        (abs(ttft - whole) < tolerance, "the first time was taken at the end, or the list was gathered first"),
        (
            abs(ttft - (exchange.marks["first"] - asked[0])) < tolerance,
            "the first event carries the role and no text yet: wait for one with content",
        ),
        (
            abs(ttft - (exchange.marks["text"] - exchange.marks["first"])) < tolerance,
            "the clock started too late: create() returns only when the answer begins, so start it before the call",
        ),
    ]
    cause = next((text for holds, text in faults if holds), "take the clock before the call, and at the first text")
    require(abs(ttft - first) < tolerance, right, shown, cause)
    require(
        abs(total - whole) < tolerance,
        right,
        shown,
        "the total ends when the stream has ended, and begins where the first time begins",
    )


def check_02_4(submission: Submission) -> None:
    """Tokens as the server counts them; chunks are something else."""
    counted, vllm = submission.function("counted"), submission.server("vllm")
    from openai import OpenAI

    with Tap(vllm.url) as tap:
        client = OpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0)
        for extra, max_tokens in ((KOREAN, 40), ({"ignore_eos": True}, 5)):
            request = {
                "model": vllm.model,
                "messages": [{"role": "user", "content": "Say hello."}],
                "max_tokens": max_tokens,
                "extra_body": extra,
            }

            def ask(request: dict[str, Any] = request) -> Any:
                return counted(client, **request)

            got, (exchange, *_) = through(
                tap,
                submission,
                ask,
                {
                    IndexError: "the event with the usage has an empty list of choices",
                    AttributeError: "chunk.usage is None in every event but the last: ask before you read",
                    TypeError: "chunk.usage is None in every event but the last: ask before you read",
                },
            )
            sends(exchange, {"stream": "this one streams: pass stream=True"}, stream=True)
            events = exchange.events()
            usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
            require(
                usage is not None,
                "an event with the usage",
                f"{len(events)} events, none with usage; and the result {got!r}"[:300],
                'chunks are not tokens; the server has counted: ask with stream_options={"include_usage": True}',
            )
            assert usage
            right = (streamed_text(exchange), usage["completion_tokens"])
            cause = "return the whole text and the number of tokens"
            if isinstance(got, tuple | list) and len(got) == 2:
                text, tokens = got
                if text != right[0]:
                    cause = "join the content of all events to the text; the one with the usage has none"
                elif tokens == usage["total_tokens"]:
                    cause = "total_tokens counts the prompt too"
                elif tokens in (
                    len(events),
                    len(events) - 1,
                    len([e for e in events if e["choices"]]),
                ) or tokens == len([e for e in events if any(text_of(c) for c in e["choices"])]):
                    cause = "that is the number of chunks: one may hold several tokens, or none"
                else:
                    cause = "take completion_tokens out of the usage that the server sends"
            require(isinstance(got, tuple | list) and tuple(got) == right, right, got, cause)


def check_02_5(submission: Submission) -> None:
    """Enough is enough: the stream is left, and with it the engine's work."""
    stream_until, vllm = submission.function("stream_until"), submission.server("vllm")
    from openai import OpenAI

    asked: list[Any] = []

    def enough(text: str) -> bool:
        asked.append(text)
        return len(text) >= ENOUGH_CHARS

    def hold(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        """Three events after the text was enough, or at the stream's end, wait for the client to leave.

        Neither events nor tokens tell when that is: digits are one character each, and a busy engine merges tokens.
        """
        text, after = "", 0
        for event in events_of(chunks):
            after += len(text) >= ENOUGH_CHARS
            if "waited" not in exchange.marks and (after == 3 or (after and b"[DONE]" in event)):
                naps = 0  # not a deadline: on a machine that is too busy for the client, naps take longer as well
                while not exchange.client_gone() and naps < 150:
                    time.sleep(0.02)
                    naps += 1
                exchange.marks["waited"] = time.monotonic()
            text += content_of(event)
            yield event

    with Tap(vllm.url, hold, RELIABLE) as tap:
        client = OpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0)
        got, made = through(
            tap, submission, lambda: stream_until(client, vllm.model, "Count from one to fifty, in words.", 50, enough)
        )
        exchange = made[-1]
        sends(
            exchange, {"stream": "what has come whole cannot be stopped: pass stream=True"}, stream=True, max_tokens=50
        )
        require(
            bool(asked), "enough(…) asked about the text", "never called", "the caller says what is enough: call enough"
        )
        require(
            all(isinstance(text, str) for text in asked) and all(b.startswith(a) for a, b in pairwise(asked)),
            "enough(…) asked about the text so far",
            asked[:6],
            "enough wants all the text so far, not the last piece alone",
        )
        returned_early = "waited" not in exchange.marks
        tap.settle()
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
    require(got == asked[-1], asked[-1], got, "return the text that was enough, with the piece that made it so")
