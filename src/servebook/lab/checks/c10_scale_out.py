"""Checks of lab 10: who got the work, a stream that breaks off, and a replica that leaves in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests

from servebook.bearer import bearer
from servebook.errors import ServebookError
from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.rest import accepted, context_length, key_of, sends, through
from servebook.lab.submission import Causes, Submission
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import events_of, streamed_text
from servebook.launch import Server
from servebook.processes import wait_until
from servebook.ways.metrics import metric
from servebook.ways.scale_out.client import RouterClient

FINISHED = "vllm:request_success_total"
EVENTS_BEFORE_CUT = {"broken": 3, "ended": 3, "broken early": 0}
"""How many events of a stream come through, by its fate."""
TRIES = 3
HOLD_SECONDS = 3.0
"""How long a replica is kept at work after its removal: longer than anybody would sleep at a guess."""
PATIENCE_SECONDS = 5.0
"""How long it is kept at work, once drain() was called, for a removal that does not come."""


def replicas_of(router: Server) -> tuple[RouterClient, list[str]]:
    """The router's management side, and its two replicas.

    Raises:
        ServebookError: there are not two of them at work.
    """
    client = RouterClient(router.url, router.metrics)
    healthy: list[str] = []

    def both() -> bool:
        healthy[:] = [url for url, well in client.replicas().items() if well]
        return len(healthy) == 2

    if not wait_until(both, 20):  # a busy one is left out for a while, until the router has asked it again
        raise ServebookError(
            f"The router has {len(healthy)} healthy replicas, and this check needs 2.",
            "Run the setup cell again: serve starts what is missing. After an add, wait a few seconds.",
        )
    return client, healthy


def complete(server: Server, url: str, **params: Any) -> None:
    """One completion by the router or the replica at `url`."""
    body = {"model": server.model, "prompt": "Once upon a time", "max_tokens": 2} | params
    requests.post(f"{url}/v1/completions", auth=bearer(key_of(server)), json=body, timeout=60).raise_for_status()


def until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Wait for `condition`.

    Raises:
        ServebookError: it did not come; `what` says which.
    """
    if not wait_until(condition, seconds):
        raise ServebookError(f"The check waited {seconds:.0f} s for {what}.", "See `servebook status`.")


def check_10_1(submission: Submission) -> None:
    """Requests that end for different reasons, straight at the replicas: the counters see what the router does not."""
    spread, router = submission.function("spread"), submission.server("router")
    _, replicas = replicas_of(router)
    called: list[bool] = []

    def asks(counts: list[int]) -> Callable[[], None]:
        @submission.lent
        def ask() -> None:
            if False in called:  # twice at once: neither could tell its own requests
                called.append(True)
                return
            called.append(False)
            before = [metric(replica, FINISHED) for replica in replicas]
            for replica, count in zip(replicas, counts, strict=True):
                for number in range(count):
                    by_itself = {"structured_outputs": {"choice": ["yes"]}, "max_tokens": 20}
                    complete(router, replica, **(by_itself if number % 2 else {}))
            # A counter follows its answer by a moment.
            until(
                lambda: [metric(r, FINISHED) - b for r, b in zip(replicas, before, strict=True)] == counts,
                "the replicas' counters",
            )
            called[called.index(False)] = True

        return ask

    asks([1, 1])()
    for counts in ([3, 1], [0, 2]):
        called.clear()
        before = {replica: metric(replica, FINISHED) for replica in replicas}
        ask = asks(counts)
        got = submission.call(spread, list(replicas), ask, busy=lambda: False in called)
        require(
            len(called) == 1,
            "one call of work()",
            f"{len(called)} calls",
            "the requests are made by work(): call it once, between the two looks",
        )
        _judge_spread(dict(zip(replicas, counts, strict=True)), got, before)


def _judge_spread(right: dict[str, int], got: Any, before: dict[str, float]) -> None:
    judge(
        right,
        got,
        (
            lambda got, right: got.keys() != right.keys() or any(isinstance(each, str) for each in got.values()),
            "return a dict: each replica's URL, and its number",
        ),
        (not isinstance(got, dict), "return a dict: each replica's URL, and its number"),
        (
            lambda got, right: got == {replica: before[replica] + right[replica] for replica in right},
            "that is everything since the replica started: take off what it had before",
        ),
        (lambda got, right: got == {replica: -count for replica, count in right.items()}, "later minus earlier"),
        (
            lambda got, _: not any(got.values()),
            "nothing moved: look once before and once after work(), at the replicas and not at the router",
        ),
        (lambda got, _: len(set(got.values())) == 1, "each replica has a page of its own: do not add them up"),
        (
            lambda got, right: sum(got.values()) < sum(right.values()),
            "a request that ended by itself is finished as well: add up all finished_reason",
        ),
        otherwise="the difference of two looks at each replica, before and after work()",
    )


NO_EVENT: Causes = {
    ValueError: "not every line is JSON: empty ones part the events, and the last is [DONE]; lines come as bytes, and "
    'bytes are equal to b"data: [DONE]" only',
    (TypeError, "bytes"): 'lines come as bytes: compare them with b"data: …", or decode them first',
}


def check_10_2(submission: Submission) -> None:
    """Streams that break, that just end, that never succeed, and one that the server refuses."""
    whole_text, router = submission.function("whole_text"), submission.server("router")
    _, replicas = replicas_of(router)
    body = {"model": router.model, "prompt": "Count: 1, 2, 3,", "max_tokens": 16, "temperature": 0}

    def run(fates: list[str], tries: int = TRIES, **params: Any) -> tuple[Any, list[Exchange]]:
        """What came of streams with these fates, one after the other; after them every stream is whole."""

        def fate(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
            number = tap.exchanges.index(exchange)
            mine = fates[number] if number < len(fates) else "whole"
            for count, event in enumerate(events_of(chunks)):
                if count == EVENTS_BEFORE_CUT.get(mine):
                    if mine == "ended":
                        return
                    raise ConnectionAbortedError
                yield event

        def outcome() -> Any:
            try:
                return whole_text(tap.url, body | params, tries)
            except NotImplementedError:
                raise
            except Exception as error:
                return error

        with Tap(router.url, fate, {"ignore_eos": True}) as tap:
            if not fates and not params:
                try:
                    return through(tap, submission, whole_text, tap.url, dict(body), TRIES, causes=NO_EVENT)
                except NotYet:
                    if tap.exchanges:  # what was asked for says more than the error that came of it
                        asks(tap.exchanges[0])
                    raise
            # Only after a cut is there a pause to make.
            causes: Causes = {TimeoutError: "ask again at once: no pause between the tries"} if fates else {}
            return submission.run(outcome, causes, tap.busy), tap.exchanges

    def asks(exchange: Exchange) -> None:
        sends(exchange, {"stream": "what is to be a stream has to be asked for: stream is true"}, **body, stream=True)

    text, (exchange, *more) = run([])
    asks(exchange)
    judge(
        streamed_text(exchange),
        text,
        (text is None, "the function returns nothing: `return` is missing"),
        (lambda got, right: got.strip() == right.strip(), "the text was trimmed: a leading space is part of it"),
        otherwise="join the text of all events",
    )
    require(not more, "one request, as nothing went wrong", f"{1 + len(more)} requests", "the answer was whole: stop")

    for how, seen in (
        ("broken", "the connection broke"),
        ("ended", "no data: [DONE] came"),
        ("broken early", "the connection broke before the first event"),
    ):
        text, made = run([how])
        sends(made[-1], {"prompt": "ask again from the start: the same prompt, without what has come"}, **body)
        _judge_second_try(how, seen, text, made)

    text, made = run(["broken"] * 2 * TRIES, tries=TRIES - 1)
    require(
        len(made) == TRIES - 1,
        f"{TRIES - 1} requests, as tries = {TRIES - 1}, and then an error",
        f"{len(made)} requests",
        "tries counts all requests, the first one too; then give up",
    )
    require(
        isinstance(text, Exception),
        "an error after the last try",
        text,
        "whoever gets this takes it for the answer: raise an error when the tries are used up",
    )

    text, made = run([], max_tokens=context_length(router, replicas[0]) + 1)
    require(
        isinstance(text, Exception),
        "an error for a request that the server refuses (400)",
        text,
        "a refusal has no text: raise_for_status() before you read",
    )
    require(
        len(made) == 1,
        "one request: the server refuses it (400)",
        f"{len(made)} requests",
        "a refusal would be the same again: only a stream that was cut is worth another try",
    )


def _judge_second_try(how: str, seen: str, text: Any, made: list[Exchange]) -> None:
    """Judge the text that came of a stream cut short and of what was asked after it."""
    anew = "half a stream is no answer: ask again from the start"
    early = "a connection may break before the first event, too: requests.ConnectionError"
    raised = {"broken": anew, "ended": anew, "broken early": early}
    ended = raised | {"ended": "a stream is whole when data: [DONE] has come; its mere end says nothing"}
    half, right = streamed_text(made[0]), streamed_text(made[-1])
    judge(
        (2, right),
        (len(made), text),
        (isinstance(text, Exception), raised[how]),
        (len(made) == 1, ended[how]),
        (len(made) > 2, "the second stream was whole: stop there"),
        (
            isinstance(text, str) and text != right and text.endswith(right) and text.startswith(half[:4]),
            "the first words are there twice: begin each try with an empty text",
        ),
        otherwise="return the text of the stream that was whole",
        expected=f"a second request after {seen}, and its text: {right!r}",
        shown=text,
    )


LONG = 1900
"""Tokens of a long request, where there is room for them; a fast engine needs less than HOLD_SECONDS."""
PROMPT_ROOM = 16
"""Tokens of the context that are left to the prompt."""


def keep_at_work(
    ask: Callable[[], requests.Response], tokens: int, began: Callable[[], object], over: Callable[[], bool]
) -> None:
    """Keep a replica at work until it is `over`, by streams of so many `tokens`: one is always not at its end.

    The second begins when a third of the first is read, and each other one when one has ended.
    """
    with ExitStack() as opened:
        answer, following = opened.enter_context(ask()), None
        while not over():
            for number, _ in enumerate(filter(None, answer.iter_lines())):
                began()
                if over():
                    return
                if number == tokens // 3 and not following:  # not later: a busy engine merges tokens
                    following = opened.enter_context(ask())
            answer, following = following or opened.enter_context(ask()), opened.enter_context(ask())


def check_10_3(submission: Submission) -> None:
    """A replica with a long request at work leaves; it comes back afterwards."""
    drain, router = submission.function("drain"), submission.server("router")
    client, replicas = replicas_of(router)
    leaving, kept = replicas
    tokens = min(LONG, context_length(router, leaving) - PROMPT_ROOM)

    began: list[float] = []
    ended: list[float] = []
    at_work = threading.Event()

    def removals() -> list[Exchange]:
        return [each for each in tap.exchanges if each.path.startswith("/remove_worker")]

    def over() -> bool:
        """Whether the replica was at work for long enough, on an engine of any speed; its work ends after that."""
        ends = [each.started + HOLD_SECONDS for each in removals()] or [each + PATIENCE_SECONDS for each in began]
        if ends and time.monotonic() > ends[0]:
            ended.append(time.monotonic())
        return bool(ended)

    def ask() -> requests.Response:
        body = {"model": router.model, "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
        url, auth = f"{leaving}/v1/completions", bearer(key_of(router))
        answer = requests.post(url, auth=auth, json=body | {"stream": True}, stream=True, timeout=60)
        answer.raise_for_status()
        return answer

    def leave() -> Any:
        began.append(time.monotonic())
        return drain(tap.url, leaving)

    def works() -> bool:
        """Whether a server is what the learner waits for: the router answers, or the replica has work, or says so."""
        states = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return tap.busy() or not finished.done() or any(metric(leaving, state) for state in states)

    with Tap(router.url) as tap, ThreadPoolExecutor(1) as pool:
        finished = pool.submit(keep_at_work, ask, tokens, at_work.set, over)
        try:
            until(lambda: at_work.is_set() or finished.done(), "a request at work")
            submission.run(leave, busy=works)
            still, stayed = not ended, list(client.replicas())
        except BaseException:
            ended.append(time.monotonic())  # the replica is kept at work for nobody any more
            raise
        finally:
            for replica in set(replicas) - set(client.replicas()):
                client.add(replica)
    require(
        bool(removals()),
        f"POST /remove_worker?url={leaving} to the router",
        [f"{each.method} {each.path}" for each in tap.exchanges] or "no request to the router",
        "as long as the router knows the replica it sends it more: remove it first",
    )
    for each in removals():
        accepted(each)
    urls = [url for each in removals() for url in parse_qs(urlsplit(each.path).query).get("url", [])]
    require(urls == [leaving] and stayed == [kept], f"{leaving} removed", f"{urls} removed", "remove this one, once")
    finished.result()
    require(
        removals()[0].started < ended[0],
        "the replica removed while it still has work",
        "removed when its work was done",
        "while you waited, new requests could come: remove first, then wait",
    )
    require(
        not still,
        "a return when the replica is idle",
        "a request still at work there",
        "removed is not idle: wait until its running and waiting requests are 0",
    )
