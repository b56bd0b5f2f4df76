"""Checks of lab 05: gateways that learners wrote, run as servers, between a real client and the real engine."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import requests

from servebook.lab.feedback import NotYet, require
from servebook.lab.learner_server.judge import StreamWatch, own_server
from servebook.lab.learner_server.run import OwnServer
from servebook.lab.rest import accepted, answer_to, sends
from servebook.lab.submission import Submission
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import streamed_text

ASK = {"message": "Name three colours.", "max_tokens": 11}
SECONDS = 60
"""For one answer; the engine of a full room is slow."""


def post(server: OwnServer, path: str, body: dict[str, Any] | None = None, **more: Any) -> requests.Response:
    """POST to the learner's server.

    Raises:
        NotYet: it does not answer.
    """
    try:
        return requests.post(server.url + path, json=body or ASK, timeout=SECONDS, **more)
    except requests.RequestException as error:
        raise NotYet(
            f"an answer to POST {path}", type(error).__name__, "the server takes the call and never answers"
        ) from None


def wait_for(tap: Tap, count: int, answer: Future[requests.Response]) -> None:
    """Wait until the learner's server has sent `count` requests to the engine.

    Raises:
        NotYet: it answered instead, or sends nothing.
    """
    deadline = time.monotonic() + 10
    while len(tap.exchanges) < count:
        if answer.done():
            reply = answer.result()
            got = f"{reply.status_code} {reply.text[:200]}"
            require(reply.status_code == 200, "200", got, STATUS.get(reply.status_code, "the handler fails"))
            raise NotYet("a request to the engine", got, "the answer does not come from the engine")
        if time.monotonic() > deadline:
            raise NotYet(f"{count} requests to the engine at once", f"{len(tap.exchanges)}", BLOCKED)
        time.sleep(0.02)


BLOCKED = "the first request blocks the event loop: await an asynchronous client, or let a plain `def` run in a thread"
STATUS = {
    404: "no handler at this path",
    405: "the handler is there, but not for POST",
    422: "the handler does not take the body that is sent: {message, max_tokens}",
    500: "the handler raised: its last error stands above",
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
        try:
            first = pool.submit(post, server, "/chat")
            wait_for(tap, 1, first)
            try:
                alive = requests.get(f"{server.url}/healthz", timeout=3).status_code
            except requests.RequestException:
                alive = 0
            require(
                alive == 200,
                "GET /healthz → 200 while a chat waits for the engine",
                "no answer within 3 s" if not alive else f"{alive}",
                BLOCKED if not alive else "leave /healthz as it is",
            )
            second = pool.submit(post, server, "/chat")
            wait_for(tap, 2, second)
        finally:
            release.set()
        answers = [first.result(), second.result()]
        tap.settle()
        for exchange in tap.exchanges:
            accepted(exchange)
            require(
                exchange.path.endswith("/chat/completions"),
                "a chat request to the engine",
                exchange.path,
                "the message goes to the chat API",
            )
            sends(exchange, {}, max_tokens=ASK["max_tokens"], model=vllm.model)
            said = exchange.body["messages"][-1]
            require(said["content"] == ASK["message"], ASK["message"], said, "the person's message is the last one")
        right = sorted(answer_to(exchange)["choices"][0]["message"]["content"] for exchange in tap.exchanges)
        bodies = [answer.json() for answer in answers]
        got = sorted(body.get("response", "") for body in bodies if isinstance(body, dict))
        require(got == right, {"response": right[0]}, bodies[0], "answer {response: the text of the reply}")


def check_05_2(submission: Submission) -> None:
    """Events as they come, a proper end, and an engine that stops when the caller leaves."""
    vllm = submission.server("vllm")
    watch = StreamWatch()

    with Tap(vllm.url, watch.hold) as tap, own_server(submission, "stream.py", tap, vllm) as server:
        with post(server, "/chat/stream", stream=True) as answer:
            kind = answer.headers.get("content-type", "")
            got = f"{answer.status_code} {kind}"
            if answer.status_code != 200:
                raise NotYet("200 text/event-stream", got, STATUS.get(answer.status_code, "the handler fails"))
            require(
                kind.startswith("text/event-stream"),
                "200 text/event-stream",
                got,
                "say media_type='text/event-stream', or browsers take it for plain text",
            )
            lines = []
            try:
                for line in answer.iter_lines():
                    if line.startswith(b"data:"):
                        watch.first_read.set()
                    lines.append(line.decode())
            except requests.RequestException:
                lines.append("(broken off)")
        require(bool(tap.exchanges), "a request to the engine", lines[:3], "the answer does not come from the engine")
        exchange = tap.exchanges[0]
        accepted(exchange)
        sends(
            exchange, {"stream": "the engine must stream too: stream=True"}, stream=True, max_tokens=ASK["max_tokens"]
        )
        data = [line.removeprefix("data:").removeprefix(" ") for line in lines if line.startswith("data:")]
        shown = " | ".join([*lines[:4], "…", *lines[-3:]])
        require(
            bool(data) and data[-1] == "[DONE]",
            "data: [DONE] as the last event",
            shown,
            "without an end of its own a reader cannot tell a finished stream from a broken one",
        )
        texts = []
        for item in data[:-1]:
            try:
                texts.append(json.loads(item)["text"])
            except (ValueError, TypeError, LookupError):
                cause = "each event is JSON with the field text: json.dumps also escapes line feeds, which end a line"
                raise NotYet('data: {"text": "…"}', f"data: {item}", cause) from None
        require(
            lines.count("") >= len(data) - 1,
            "an empty line after each event",
            shown,
            "an event ends with an empty line: two line feeds",
        )
        right = streamed_text(exchange)
        require("".join(map(str, texts)) == right, right, "".join(map(str, texts)), "each piece of text once, in order")
        require(
            watch.early.is_set(),
            "the first event while the engine is still writing",
            "the first event only after the last token",
            "everything is gathered before it goes out: yield inside the loop over the engine's stream",
        )
        watch.leaving.set()
        with post(server, "/chat/stream", {**ASK, "max_tokens": 60}, stream=True) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 5
        while len(tap.exchanges) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        tap.settle()
        require(
            tap.exchanges[-1].left is not None,
            "the engine's stream closed when the caller leaves",
            f"{len(tap.exchanges[-1].events())} events, all read from the engine for nobody",
            "the handler's end must end the engine's stream too: read it in the generator itself, in an `async with`",
        )


def check_05_3(submission: Submission) -> None:
    """A handler that does not stream: stopped when the caller leaves, and only then."""
    vllm = submission.server("vllm")
    leaving = threading.Event()

    def hold(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        """An engine that takes its time: 1.5 s, or until its caller leaves, 4 s at most."""
        deadline = time.monotonic() + 4
        if not leaving.is_set():
            time.sleep(1.5)
        while leaving.is_set() and not exchange.client_gone() and time.monotonic() < deadline:
            time.sleep(0.02)
        if exchange.client_gone():
            exchange.left = time.monotonic()
            raise BrokenPipeError
        yield from chunks

    with Tap(vllm.url, hold) as tap, own_server(submission, "leave.py", tap, vllm) as server:
        answer = post(server, "/chat")
        got = f"{answer.status_code} {answer.text[:200]}"
        require(
            answer.status_code == 200, "200 for a caller who waits", got, STATUS.get(answer.status_code, "it fails")
        )
        require(bool(tap.exchanges), "a request to the engine", got, "the answer does not come from the engine")
        sends(tap.exchanges[0], {}, max_tokens=ASK["max_tokens"])
        right = answer_to(tap.exchanges[0])["choices"][0]["message"]["content"]
        require(
            answer.json() == {"response": right},
            {"response": right},
            answer.text,
            "a caller who waits gets the whole answer: stop only for one who has left",
        )
        leaving.set()
        body = json.dumps(ASK).encode()
        head = (
            f"POST /chat HTTP/1.1\r\nHost: lab\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(head.encode() + body)
            deadline = time.monotonic() + 10
            while len(tap.exchanges) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(1)  # a caller's patience
        require(len(tap.exchanges) == 2, "a request to the engine", "none within 10 s", "ask the engine at once")
        tap.settle()
        require(
            tap.exchanges[1].left is not None,
            "the engine's work cancelled within 3 s after the caller has left",
            "the engine answered, for nobody",
            "FastAPI does not cancel a handler that returns its answer whole: watch request.is_disconnected() "
            "beside the call, and cancel the call",
        )


def check_05_4(submission: Submission) -> None:
    """What goes wrong at the engine has a status of its own."""
    vllm = submission.server("vllm")
    release = threading.Event()

    def hold(chunks: Iterator[bytes], _: Exchange) -> Iterator[bytes]:
        release.wait(20)
        yield from chunks

    def ask(server: OwnServer, right: int, what: str, body: dict[str, Any] | None = None) -> requests.Response:
        answer = post(server, "/chat", body)
        got = f"{answer.status_code} {answer.text[:200]}"
        cause = "each kind of error has its class: see the table in the brief"
        if answer.status_code == 200 != right:
            cause = "programs read the status, not the text: raise HTTPException(status_code=…)"
        elif right == 504 and answer.status_code == 503:
            cause = "APITimeoutError is a kind of APIConnectionError: it goes first"
        elif answer.status_code == 500:
            cause = "this error is not caught: 500 says that the gateway itself is at fault"
        require(answer.status_code == right, f"{right}: {what}", got, cause)
        return answer

    with Tap(vllm.url) as tap, own_server(submission, "errors.py", tap, vllm) as server:
        answer = ask(server, 200, "an answer")
        require(bool(tap.exchanges), "a request to the engine", answer.text, "the answer does not come from the engine")
        accepted(tap.exchanges[0])
        text = answer_to(tap.exchanges[0])["choices"][0]["message"]["content"]
        require(answer.json() == {"response": text}, {"response": text}, answer.text, "answer with the reply's text")
        ask(server, 400, "the engine refuses the arguments", {**ASK, "max_tokens": -1})
        tap.close()
        answer = ask(server, 503, "nobody answers where the engine should be")
        require(
            "retry-after" in answer.headers,
            "503 with the header Retry-After",
            dict(answer.headers),
            "tell clients when to come again: headers={'Retry-After': '5'}",
        )
    with Tap(vllm.url, hold) as slow, own_server(submission, "errors.py", slow, vllm, timeout=1) as server:
        ask(server, 504, "the engine is too slow")
        release.set()
