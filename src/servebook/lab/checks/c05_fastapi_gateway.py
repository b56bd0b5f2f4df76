"""Checks of lab 05: gateways that learners wrote, run as servers, between a real client and the real engine."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import requests

from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.learner_server.judge import GATHERED, USED_UP, StreamWatch, own_server
from servebook.lab.learner_server.run import OwnServer
from servebook.lab.rest import RELIABLE, accepted, context_length, reply_of, sends, sends_question, text_to_its_end
from servebook.lab.submission import Submission
from servebook.lab.taps.http import Exchange, Tap, answering
from servebook.launch import Server
from servebook.processes import wait_until

ASK = {"message": "Name three colours.", "max_tokens": 11}
SECONDS = 60
"""For one answer; the engine of a full room is slow."""
FROM_ENGINE = "the answer does not come from the engine"
AN_OBJECT = "the reply is an object of the SDK: its text is in message.content"


class Caller:
    """Calls a learner's server, and gives up where neither it nor the engine does anything any more."""

    def __init__(self, submission: Submission, server: OwnServer, tap: Tap) -> None:
        self.submission, self.server, self.tap = submission, server, tap

    def post(self, path: str, body: dict[str, Any] | None = None, **more: Any) -> requests.Response:
        """POST to the learner's server.

        Raises:
            NotYet: it does not answer.
        """
        never = "the server takes the call and never answers"
        call = partial(requests.post, self.server.url + path, json=body or ASK, timeout=SECONDS, **more)
        try:
            answer: requests.Response = self.submission.run(
                call,
                {
                    requests.ConnectionError: "the server breaks the call off",
                    requests.Timeout: never,
                    TimeoutError: never,
                },
                lambda: self.tap.busy() or self.server.working(),
            )
        except NotYet as fault:
            raise NotYet(f"an answer to POST {path}", fault.got, fault.cause) from None
        return answer


def body_of(answer: requests.Response) -> Any:
    """The JSON of an answer, or its text where it is none."""
    try:
        return answer.json()
    except ValueError:
        return answer.text


def no_text(body: Any) -> bool:
    """Whether the `response` of an answer is something else than text."""
    return isinstance(body, dict) and not isinstance(body.get("response", ""), str)


def answers_200(answer: requests.Response) -> None:
    """Require success; only an answer without it is read."""
    if answer.status_code == 200:
        return
    try:
        said = answer.text[:200]
    except requests.RequestException:
        said = "(broken off)"
    raise NotYet("200", f"{answer.status_code} {said}", STATUS.get(answer.status_code, "the handler fails"))


def wait_for(tap: Tap, count: int, answer: Future[requests.Response], cause: str) -> None:
    """Wait until the learner's server has sent `count` requests to the engine.

    Raises:
        NotYet: it answered instead, or sends nothing, for this cause.
    """
    if wait_until(lambda: len(tap.exchanges) >= count or answer.done(), 20) and len(tap.exchanges) >= count:
        return
    if answer.done():
        reply = answer.result()
        answers_200(reply)
        raise NotYet("a request to the engine", f"{reply.status_code} {reply.text[:200]}", FROM_ENGINE)
    raise NotYet(f"{count} requests to the engine at once", f"{len(tap.exchanges)}", cause)


def asks_engine(exchange: Exchange, vllm: Server) -> None:
    """Require that what the gateway was asked reaches the engine: message, tokens and model, by the chat API."""
    accepted(exchange)
    path = exchange.path.endswith("/chat/completions")
    require(path, "a chat request to the engine", exchange.path, "the message goes to the chat API")
    sends(exchange, max_tokens=ASK["max_tokens"], model=vllm.model)
    sends_question(exchange, ASK["message"], "the person's message is the last one")


ONE_AT_A_TIME = "something lets one call through at a time: a lock, a semaphore of one, or a pool of one thread"
BLOCKED = "the first request blocks the event loop: await an asynchronous client, or let a plain `def` run in a thread"
STATUS = {
    404: "no handler at this path",
    405: "the handler is there, but not for POST",
    422: "the handler does not take the body that is sent: {message, max_tokens}",
    499: "a caller who waits gets the whole answer: stop only for one who has left",
    500: "the handler raised: its error is the last line under `got`",
    504: "a caller who waits gets the whole answer, however long the engine takes",
}


def check_05_1(submission: Submission) -> None:
    """While one answer is on its way, the gateway takes other calls."""
    vllm = submission.server("vllm")
    release = threading.Event()

    def hold(chunks: Iterator[bytes], _: Exchange) -> Iterator[bytes]:
        release.wait(30)
        yield from chunks

    with (
        Tap(vllm.url, hold) as tap,
        own_server(submission, "chat.py", tap, vllm) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        caller = Caller(submission, server, tap)
        try:
            first = pool.submit(caller.post, "/chat")
            wait_for(tap, 1, first, BLOCKED)
            try:
                alive = requests.get(f"{server.url}/healthz", timeout=10).status_code
            except requests.RequestException:
                alive = 0
            require(
                alive == 200,
                "GET /healthz → 200 while a chat waits for the engine",
                "no answer within 10 s" if not alive else f"{alive}",
                BLOCKED if not alive else "leave /healthz as it is",
            )
            second = pool.submit(caller.post, "/chat")
            wait_for(tap, 2, second, ONE_AT_A_TIME)
        finally:
            release.set()
        answers = [first.result(), second.result()]
        tap.settle()
        for exchange in tap.exchanges:
            asks_engine(exchange, vllm)
        for answer in answers:
            answers_200(answer)
        right = sorted(reply_of(exchange) for exchange in tap.exchanges)
        bodies = [body_of(answer) for answer in answers]
        judge(
            right,
            bodies,
            (any(map(no_text, bodies)), AN_OBJECT),
            otherwise="answer {response: the text of the reply}",
            expected={"response": right[0]},
            shown=bodies[0],
            fits=lambda got, right: sorted(body["response"] for body in got) == right,
        )


def check_05_2(submission: Submission) -> None:
    """Events as they come, a proper end, and an engine that stops when the caller leaves."""
    vllm = submission.server("vllm")
    watch = StreamWatch()

    with (
        Tap(vllm.url, watch.hold, RELIABLE) as tap,
        own_server(submission, "stream.py", tap, vllm) as server,
    ):
        caller = Caller(submission, server, tap)
        with caller.post("/chat/stream", stream=True) as answer:
            kind = answer.headers.get("content-type", "")
            answers_200(answer)
            media = "say media_type='text/event-stream', or browsers take it for plain text"
            right = "200 text/event-stream"
            require(kind.startswith("text/event-stream"), right, f"{answer.status_code} {kind}", media)
            lines = []
            try:
                for line in answer.iter_lines():
                    if line.startswith(b"data:"):
                        watch.first_read.set()
                    lines.append(line.decode(errors="replace"))
            except requests.RequestException:
                lines.append("(broken off)")
        raised = "(broken off)" in lines
        require(bool(tap.exchanges), "a request to the engine", lines[:3], STATUS[500] if raised else FROM_ENGINE)
        exchange = tap.exchanges[0]
        asks_engine(exchange, vllm)
        sends(exchange, {"stream": "the engine must stream too: stream=True"}, stream=True)
        data = [line.removeprefix("data:").removeprefix(" ") for line in lines if line.startswith("data:")]
        shown = " | ".join([*lines[:4], "…", *lines[-3:]])
        judge(
            "[DONE]",
            data[-1] if data else None,
            (raised, STATUS[500]),
            (not data, "an event is a line that begins with `data:`, and an empty one after it"),
            otherwise="without an end of its own a reader cannot tell a finished stream from a broken one",
            expected="data: [DONE] as the last event",
            shown=shown,
        )
        texts = []
        for item in data[:-1]:
            try:
                texts.append(json.loads(item)["text"])
            except (ValueError, TypeError, LookupError):
                cause = "each event is JSON with the field text: json.dumps also escapes line feeds, which end a line"
                raise NotYet('data: {"text": "…"}', f"data: {item}", cause) from None
        ends = sum(
            line == "" and before.startswith("data:") for before, line in zip(lines, [*lines[1:], "…"], strict=True)
        )
        two = "an event ends with an empty line: two line feeds"
        require(ends >= len(data), "an empty line after each event", shown, two)
        got, whole = "".join(map(str, texts)), text_to_its_end(exchange)
        judge(
            whole,
            got,
            (bool(texts) and texts[-1] == whole, "each event has all the text so far: send only what is new"),
            (
                "".join(got.split()) == "".join(whole.split()),
                "spaces and line feeds are part of the text: do not strip it",
            ),
            (got.replace("None", "") == whole, "an event without text has content None: leave it out"),
            otherwise="each piece of text once, in order",
        )
        early = "the first event while the engine is still writing"
        require(watch.early.is_set(), early, "the first event only after the last token", GATHERED)
        watch.leaving.set()
        with caller.post("/chat/stream", {**ASK, "max_tokens": 60}, stream=True) as answer:
            _begins(answer)
        wait_until(lambda: len(tap.exchanges) >= 2, 20)
        tap.settle()
        require(
            tap.exchanges[-1].left is not None,
            "the engine's stream closed when the caller leaves",
            f"{len(tap.exchanges[-1].events())} events, all read from the engine for nobody",
            "the handler's end must end the engine's stream too: read it in the generator itself, in an `async with` "
            "(a plain generator is only asked no more when its caller leaves: nothing closes it, nor its `with`)",
        )


def _begins(answer: requests.Response) -> None:
    """Read a later stream to its first event.

    Raises:
        NotYet: it has none, though the stream before was in order.
    """
    answers_200(answer)
    try:
        first = next((line for line in answer.iter_lines() if line.startswith(b"data:")), None)
    except requests.RequestException:
        first = None
    require(first is not None, "a second stream like the first", "it ends before its first event", USED_UP)


def check_05_3(submission: Submission) -> None:
    """A handler that does not stream: stopped when the caller leaves, and only then."""
    vllm = submission.server("vllm")
    leaving = threading.Event()

    def hold(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        """5 s for the caller who waits, 4 s for the one who leaves, if they do not: no fixed time is right for both.

        None for the one who comes after them.
        """
        if not leaving.is_set():
            time.sleep(5)
        elif exchange is tap.exchanges[1]:
            wait_until(exchange.client_gone, 4)
        if exchange.client_gone():
            exchange.left = time.monotonic()
            raise BrokenPipeError
        yield from chunks

    with Tap(vllm.url, hold) as tap, own_server(submission, "leave.py", tap, vllm) as server:
        caller = Caller(submission, server, tap)
        answer = caller.post("/chat")
        answers_200(answer)
        require(bool(tap.exchanges), "a request to the engine", answer.text[:200], FROM_ENGINE)
        asks_engine(tap.exchanges[0], vllm)
        judge(
            {"response": reply_of(tap.exchanges[0])},
            body_of(answer),
            (lambda got, _: "response" not in got, "answer {response: the text of the reply}"),
            (lambda got, _: no_text(got), AN_OBJECT),
            otherwise="a caller who waits gets the whole answer: stop only for one who has left",
        )
        leaving.set()
        body = json.dumps(ASK).encode()
        head = (
            f"POST /chat HTTP/1.1\r\nHost: lab\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        host, port = server.address.split(":")
        try:
            with socket.create_connection((host, int(port))) as leaver:
                leaver.sendall(head.encode() + body)
                wait_until(lambda: len(tap.exchanges) >= 2, 20)
                time.sleep(1)  # a caller's patience
        except OSError as error:
            cause = "the server has ended, or hangs up"
            raise NotYet("a server that takes a second call", f"the connection failed: {error}", cause) from None
        require(len(tap.exchanges) >= 2, "a request to the engine", "none within 20 s", "ask the engine at once")
        tap.settle()
        require(
            tap.exchanges[1].left is not None,
            "the engine's work cancelled within 3 s after the caller has left",
            "the engine answered, for nobody",
            "FastAPI does not cancel a handler that returns its answer whole: watch request.is_disconnected() "
            "beside the call, and cancel the call",
        )
        answer = caller.post("/chat")
        try:
            answers_200(answer)
        except NotYet as fault:
            others = "who leaves ends their own call alone: the client, and what else others need, stays as it was"
            raise NotYet("200 for the next caller", fault.got, others) from None


def check_05_4(submission: Submission) -> None:
    """What goes wrong at the engine has a status of its own."""
    vllm = submission.server("vllm")
    release = threading.Event()

    def hold(chunks: Iterator[bytes], _: Exchange) -> Iterator[bytes]:
        release.wait(10)
        yield from chunks

    def ask(caller: Caller, right: int, what: str, body: dict[str, Any] | None = None) -> requests.Response:
        answer = caller.post("/chat", body)
        status = answer.status_code
        judge(
            right,
            status,
            (
                (right, status) == (504, 200),
                "the answer was waited for all the same: the time-out is the client's, in upstream.py; leave it alone",
            ),
            (
                (right, status) == (400, 200) and caller.tap.exchanges[-1].status == 200,
                "the engine did not refuse, as it was asked for something else: hand max_tokens on as it comes",
            ),
            (status == 200, "programs read the status, not the text: raise HTTPException(status_code=…)"),
            ((right, status) == (504, 503), "APITimeoutError is a kind of APIConnectionError: it goes first"),
            (
                status == 500 and right != 200,
                "500 says that the gateway itself is at fault: the error is not caught, or another one was raised "
                "meanwhile (a header's value is text)",
            ),
            (right == 200, STATUS.get(status, "this request is in order")),
            otherwise="each kind of error has its class: see the table in the brief",
            expected=f"{right}: {what}",
            shown=f"{status} {answer.text[:200]}",
        )
        return answer

    with Tap(vllm.url) as tap, own_server(submission, "errors.py", tap, vllm) as server:
        caller = Caller(submission, server, tap)
        answer = ask(caller, 200, "an answer")
        require(bool(tap.exchanges), "a request to the engine", answer.text, FROM_ENGINE)
        asks_engine(tap.exchanges[0], vllm)
        text = reply_of(tap.exchanges[0])
        judge({"response": text}, body_of(answer), otherwise="answer with the reply's text")
        # That it refuses this one nobody knows without asking it; not many more, as a room counts them beforehand.
        ask(caller, 400, "the engine refuses the arguments", {**ASK, "max_tokens": context_length(vllm) + 1})
        tap.close()
        answer = ask(caller, 503, "nobody answers where the engine should be")
        require(
            "retry-after" in answer.headers,
            "503 with the header Retry-After",
            dict(answer.headers),
            "tell clients when to come again: headers={'Retry-After': '5'}",
        )
    with Tap(vllm.url, hold) as slow, own_server(submission, "errors.py", slow, vllm, timeout=1) as server:
        caller = Caller(submission, server, slow)
        ask(caller, 504, "the engine is too slow")
        release.set()
        with answering(500) as broken:
            slow.target = urlsplit(broken)
            answer = caller.post("/chat")
            require(
                answer.status_code >= 500,
                "a status from 500 on, where the engine says 500",
                f"{answer.status_code} {answer.text[:200]}",
                "the engine's own fault is called the caller's: of what it answers, only BadRequestError is a 400"
                if answer.status_code >= 400
                else "the engine's own fault looks like an answer: let what you have no status for go on",
            )
