"""The ten stages, each told by what comes over the wire."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import requests
from prometheus_client.parser import text_string_to_metric_families

from servebook.bearer import bearer
from servebook.errors import ServebookError
from servebook.lab.capstone.bench import (
    LISTEN_SECONDS,
    PATIENCE_SECONDS,
    Answer,
    Bench,
    Stream,
    at_once,
    written,
)
from servebook.lab.capstone.contract import (
    CAPACITY,
    END_SECONDS,
    GONE_SECONDS,
    MAX_TOKENS,
    PROMPT_CHARACTERS,
    REQUESTS,
    TOKENS,
)
from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.learner_server.judge import GATHERED, last_error
from servebook.lab.rest import key_of
from servebook.lab.taps.http import Exchange
from servebook.processes import wait_until

PROMPT = "The sea is"
BACK_SECONDS = 30.0
HEARD_SECONDS = 6 * GONE_SECONDS
HOLD_SECONDS = 15.0
"""How long an answer of the engine is held for what is to come before it goes on."""
BEYOND = 4
"""Callers beyond the capacity."""
HELD_AT = 2
"""The event of a stream that is held, from 0: a busy engine may put several tokens into one."""
LEAVERS_TOKENS = 200
PIECES_AFTER_LEAVING = 40
BEGUN = "the stream began before this was known, and its 200 is out: see to it first, and begin the answer then"
NOT_ASKED = "the text is to come from the engine"
UNLIMITED = "there is no such limit: look at the body before the engine gets it"
WRONG_STATUS = {
    401: "the right key is Authorization: Bearer and SERVICE_KEY from the environment",
    404: "there is no such path",
    405: "the path is there, but not for this method",
    422: "the service refuses a body as the brief has it",
    500: "the service raised an error of its own: its log says which",
}


def ok(answer: Answer | Stream, what: str = "POST /generate") -> None:
    """Require status 200."""
    require(
        answer.status == 200,
        f"200 for {what}",
        answer if isinstance(answer, Answer) else f"{answer.status}",
        WRONG_STATUS.get(answer.status, "the service refuses what it is to answer"),
    )


def ready(bench: Bench) -> None:
    """It starts while the engine is away."""
    with bench.without_engine():
        wait_until(lambda: not bench.alive() or bench.listens(), LISTEN_SECONDS)
        require(
            bench.alive(),
            "a service that runs on",
            last_error(bench.child.said()) or bench.child.said()[-400:],
            "it has ended by itself; where its engine is not there yet, it has to wait for it",
        )
        require(
            bench.listens(),
            f"a service at 127.0.0.1:{bench.port}",
            f"nobody listens, {LISTEN_SECONDS:.0f} s after its start",
            "listen on PORT of the environment, at once: a service that waits for its engine says so by 503",
        )
        away = bench.get("/health", HEARD_SECONDS)
        judge(
            503,
            away.status,
            (away.status == 200, "health says ready without having asked the engine: ask it, over and over"),
            (away.status == 404, "there is no GET /health"),
            (away.status == 401, "who looks after the service has no key: health is open"),
            otherwise="that the engine does not answer has to become a 503",
            expected="503 for GET /health while the engine is away",
            shown=away,
        )
    here = in_time(200, lambda: bench.get("/health"))
    require(
        here.status == 200,
        "200 for GET /health once the engine is there",
        here,
        "it looked for the engine once and keeps to that: ask again",
    )


def in_time(status: int, ask: Callable[[], Answer], seconds: float = BACK_SECONDS) -> Answer:
    """The first answer with this status; the last one where none came in so many seconds."""
    answers: list[Answer] = []

    def came() -> bool:
        answers.append(ask())
        return answers[-1].status == status

    wait_until(came, seconds)
    return answers[-1]


def own_text(bench: Bench) -> None:
    """The engine's own greedy text."""
    tokens = 12
    own = engines_own(bench, tokens)
    before = len(bench.asked())
    answer = bench.post(PROMPT, tokens)
    ok(answer)
    made = last_asked(bench, before)
    asked = made.body if isinstance(made.body, dict) else {}
    given = answer.json() if isinstance(answer.json(), dict) else {}
    judge(
        own,
        given.get("text"),
        ("text" not in given, 'the answer is JSON: {"text": …, "tokens": …}'),
        ("chat" in made.path, "the prompt goes to /v1/completions as it is: a chat's template changes it"),
        (asked.get("prompt") not in (PROMPT, [PROMPT]), "the engine was asked another prompt than the caller's"),
        (asked.get("max_tokens") != tokens, "max_tokens goes on to the engine: its own default is another"),
        (asked.get("temperature") != 0, "greedy is temperature 0; without it the engine draws lots"),
        (lambda got, right: got.strip() == right.strip(), "the text was trimmed: a leading space is part of it"),
        (lambda got, right: got == PROMPT + right, "the prompt is no part of the answer"),
        otherwise="the text is choices[0].text as it came",
    )
    judge(tokens, given.get("tokens"), otherwise="the engine counts: usage.completion_tokens")


def last_asked(bench: Bench, before: int) -> Exchange:
    """The service's last request to the engine, after the `before` that it had made already.

    Raises:
        NotYet: there is none, the service made the text up.
    """
    made = bench.asked()[before:]
    require(bool(made), "a request to ENGINE_URL", "none", NOT_ASKED)
    return made[-1]


def engines_own(bench: Bench, tokens: int) -> str:
    """What the engine writes after PROMPT, asked without a service between.

    Raises:
        ServebookError: it does not answer.
    """
    body = {"model": bench.vllm.model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    url, auth = f"{bench.vllm.url}/v1/completions", bearer(key_of(bench.vllm))
    try:
        answer = requests.post(url, auth=auth, json=body, timeout=60)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise ServebookError(f"The engine does not answer: {error}", "See `servebook status`.") from None
    return str(answer.json()["choices"][0]["text"])


def streams(bench: Bench) -> None:
    """The engine's stream is held at its third piece until the caller has read the first."""
    first_read, early = threading.Event(), threading.Event()
    before = len(bench.asked())

    def hold(exchange: Exchange, number: int) -> None:
        if number == HELD_AT and first_read.wait(HOLD_SECONDS):
            early.set()

    with bench.gated(hold):
        stream = bench.stream(PROMPT, 32)
        ok(stream)
        require(
            stream.kind.startswith("text/event-stream"),
            "Content-Type: text/event-stream where stream is true",
            stream.kind or "none",
            "stream: true was not looked at, or the answer does not say what it is",
        )
        first = stream.piece()
        first_read.set()
        stream.rest()
    require(first is not None, "events with text", "none", 'each piece is an event: data: {"text": …}')
    exchange = last_asked(bench, before)
    require(early.is_set(), "the first piece before the engine has written the last", "all at the end", GATHERED)
    judge(
        written(exchange).get(PROMPT, ""),
        stream.text,
        otherwise="the pieces, joined, are the engine's text: nothing trimmed, left out or twice",
    )
    require(
        stream.done,
        "data: [DONE] as the last event",
        "the stream just ends",
        "without it nobody can tell a whole stream from one that was cut",
    )


def leaves(bench: Bench) -> None:
    """The engine's stream goes on slowly after the caller left, so that a service may notice at its next piece."""
    gone, enough = threading.Event(), threading.Event()
    before = len(bench.asked())

    def hold(exchange: Exchange, number: int) -> None:
        if number > 3 and not enough.is_set():
            if gone.wait(HOLD_SECONDS):
                wait_until(exchange.client_gone, 0.5)
            if number > PIECES_AFTER_LEAVING or not gone.is_set():  # nobody has read the first piece so far
                enough.set()

    with bench.gated(hold):
        stream = bench.stream(PROMPT, LEAVERS_TOKENS)
        ok(stream)
        stream.piece()
        wait_until(lambda: len(bench.asked()) > before, BACK_SECONDS)  # the first event may be the service's own
        stream.leave()
        gone.set()
        exchange = last_asked(bench, before)
        wait_until(lambda: enough.is_set() or exchange.done.is_set(), PATIENCE_SECONDS)
    require(
        exchange.left is not None,
        "the engine let go once the caller is gone",
        f"it writes on, {PIECES_AFTER_LEAVING} pieces later",
        "nobody reads, and the engine still computes: close its stream when the caller's connection closes",
    )
    health = in_time(200, lambda: bench.get("/health"))
    require(health.status == 200, "200 for GET /health afterwards", health, "a leaver broke something")


def keys(bench: Bench) -> None:
    """Without the key nobody gets to the engine, and the key is nowhere to be read."""
    before = len(bench.asked())
    body = {"prompt": PROMPT, "max_tokens": 1}
    for what, shown, sent in (
        ("no key", "", body),
        ("a wrong key", "Bearer wrong", body),
        ("the key with more behind it", f"Bearer {bench.key}x", body),
        ("the key without Bearer", bench.key, body),
        ("a key that is no ASCII", "Bearer ü".encode().decode("latin-1"), body),
        ("no key and a body that is no JSON", "", b"{not json"),
        ("no key and a body that is no text", "", b"\xff"),
    ):
        answer = bench.send(sent, shown)
        judge(
            401,
            answer.status,
            (answer.status == 200, "anybody can have the engine work"),
            (answer.status == 403, "403 is for those who are known; who shows no right key gets 401"),
            (
                isinstance(sent, bytes) and answer.status >= 400,
                "the body was parsed before the key was looked at. FastAPI parses it before it calls any dependency: "
                "a middleware comes earlier",
            ),
            (answer.status == 500, "what stands in a header may be anything: compare bytes, and never raise"),
            (answer.status == 422, "the key comes first: who has none learns nothing about the body"),
            otherwise="look at the header Authorization before all else",
            expected=f"401 for {what}",
            shown=answer,
        )
        require(
            bench.key.encode() not in answer.body, "no key in an answer", answer, "the refusal tells what the key is"
        )
    answer = bench.send(body, "", path="/generate%0A")
    require(
        400 <= answer.status < 500,
        "no text for a POST to /generate%0A without a key",
        answer,
        "a path with a line's end behind it passes by the key. FastAPI's routes take it for the same path: ask for the "
        "key of every POST, not of those to one path",
    )
    require(
        len(bench.asked()) == before,
        "no request to the engine without a key",
        f"{len(bench.asked()) - before}",
        "the engine was asked before the key was looked at",
    )
    ok(bench.post(PROMPT, 1))
    no_key_in_log(bench)


def no_key_in_log(bench: Bench) -> None:
    """What the service has written so far holds neither its key nor the engine's."""
    log = bench.child.said()
    secrets = [bench.key, *([bench.vllm.settings.key] if bench.vllm.settings.key else [])]
    require(
        not any(secret in log for secret in secrets),
        "no key in the log",
        next((line for line in log.splitlines() if any(secret in line for secret in secrets)), ""),
        "logs are read by many: headers and settings are not for them",
    )


def limits(bench: Bench) -> None:
    """What is beyond the limits is refused by name, and costs the engine nothing."""
    before = len(bench.asked())
    long = "sea " * (PROMPT_CHARACTERS // 4) + "s"
    fitting = {"prompt": PROMPT, "max_tokens": 1}
    for what, field, limit, body in (
        (f"max_tokens = {MAX_TOKENS + 1}", "max_tokens", str(MAX_TOKENS), fitting | {"max_tokens": MAX_TOKENS + 1}),
        ("max_tokens = 0", "max_tokens", "", fitting | {"max_tokens": 0}),
        ('max_tokens = "many"', "max_tokens", "", fitting | {"max_tokens": "many"}),
        ("a body without max_tokens", "max_tokens", "", {"prompt": PROMPT}),
        (f"a prompt of {len(long)} characters", "prompt", str(PROMPT_CHARACTERS), fitting | {"prompt": long}),
        ("a prompt that is a number", "prompt", "", fitting | {"prompt": 5}),
        ("an empty prompt", "prompt", "", fitting | {"prompt": ""}),
        ("a body without prompt", "prompt", "", {"max_tokens": 1}),
    ):
        try:
            answer = bench.send(body)
        except NotYet as fault:  # the engine writes for longer than a caller waits
            require(len(bench.asked()) == before, f"413 or 422 for {what}", "the engine at work on it", UNLIMITED)
            raise fault from None
        judge(
            True,
            answer.status in (413, 422),
            (answer.status == 200, UNLIMITED),
            (answer.status >= 500, "what a caller did wrong is no error of the service: check before you use it"),
            otherwise="a body that is understood and not accepted is 422, one that is too large 413",
            expected=f"413 or 422 for {what}",
            shown=answer,
        )
        said = answer.body.decode(errors="replace")
        require(
            field in said and limit in said,
            f"a refusal that names {field}{' and its limit ' * bool(limit)}{limit}",
            answer,
            "whoever reads it has to know what to change",
        )
    require(
        len(bench.asked()) == before,
        "no request to the engine",
        f"{len(bench.asked()) - before}",
        "it was asked before the limits were looked at",
    )
    ok(bench.post(long[:PROMPT_CHARACTERS], 1), f"a prompt of exactly {PROMPT_CHARACTERS} characters")


def crowd(bench: Bench) -> None:
    """The engine's answers are held until all callers are at work: no clock says whether they were together."""
    before = len(bench.asked())
    apart = threading.Event()

    def came() -> int:
        return len(bench.asked()) - before

    def another(than: int) -> bool:
        return apart.is_set() or came() > than

    def hold(exchange: Exchange, number: int) -> None:
        while not apart.is_set() and (here := came()) < CAPACITY:
            if not wait_until(partial(another, here), HOLD_SECONDS):
                apart.set()

    def one(number: int) -> Answer:
        return bench.post(f"Caller {number} says:", 8)

    with bench.gated(hold):
        answers = at_once(CAPACITY, one)
    made = bench.asked()[before:]
    for answer in answers:
        require(
            isinstance(answer, NotYet) or answer.status not in (429, 503),
            f"200 for {CAPACITY} callers at once, as CAPACITY says",
            answer,
            "refused though there is room: is each place given back when its answer is sent, or its caller gone?",
        )
    require(
        not apart.is_set(),
        f"{CAPACITY} requests at work in the engine together",
        f"{bench.most_at_once(made)}",
        "a call that blocks keeps all others waiting: await it, or give each caller a thread",
    )
    for answer in answers:
        if isinstance(answer, NotYet):
            raise answer
        ok(answer)
    require(bool(made), "a request to ENGINE_URL", "none", NOT_ASKED)
    texts = {prompt: text for exchange in made for prompt, text in written(exchange).items()}
    for number, answer in enumerate(answers):
        given = answer.json()
        judge(
            texts.get(f"Caller {number} says:"),
            given.get("text") if isinstance(given, dict) else given,
            (lambda got, _: got in texts.values(), "this is the answer to another caller: what is shared by calls?"),
            otherwise="each caller gets the text of their own prompt",
        )


def refusals(bench: Bench) -> None:
    """CAPACITY streams are held; some more callers come; all who had a place then leave."""
    let_go = threading.Event()

    def hold(exchange: Exchange, number: int) -> None:
        if number > 0 and not let_go.wait(2 * HOLD_SECONDS):
            let_go.set()  # nobody has read a first piece so far

    with bench.gated(hold):
        held = at_once(CAPACITY, lambda number: bench.stream(PROMPT, 16))
        try:
            for stream in held:
                if isinstance(stream, NotYet):
                    raise stream
                ok(stream, f"{CAPACITY} callers at once, as CAPACITY says")
                stream.piece()
            require(not let_go.is_set(), "the first pieces before the engine has written more", "none so far", GATHERED)
            beyond = at_once(BEYOND, partial(one_too_many, bench))
        finally:
            for stream in held:
                if isinstance(stream, Stream):
                    stream.leave()
            let_go.set()
    for answer in beyond:
        what = f"429 or 503 at once for callers beyond {CAPACITY}"
        if isinstance(answer, NotYet):
            raise NotYet(what, answer.got, "who does not fit waits, and nobody knows how long: refuse")
        judge(
            True,
            answer.status in (429, 503),
            (answer.status == 200 and isinstance(answer, Stream), BEGUN),
            (answer.status == 200, "there is no limit: everybody gets in, and all become slow together"),
            otherwise="full is 429 or 503",
            expected=what,
            shown=answer,
        )
        later(answer)
    again = in_time(200, lambda: bench.post(PROMPT, 1))
    require(
        again.status == 200,
        "200 once all the others have left",
        again,
        "who leaves keeps the place: give it back in a finally",
    )


def one_too_many(bench: Bench, number: int) -> Answer | Stream:
    """What a caller gets who is to be refused; every second one asks for a stream."""
    if number % 2 == 0:
        return bench.post(PROMPT, 1, seconds=HEARD_SECONDS)
    stream = bench.stream(PROMPT, 1, HEARD_SECONDS)
    stream.leave()
    return stream


def later(answer: Answer | Stream) -> None:
    """Require a Retry-After in seconds."""
    require(
        answer.headers.get("Retry-After", "").isdigit(),
        f"the header Retry-After with {answer.status}",
        answer.headers.get("Retry-After", "no such header"),
        "without it callers try again at once, all together",
    )


def gone(bench: Bench) -> None:
    """The engine goes away in the midst of a stream, is away for a while, and comes back."""
    read = threading.Event()

    def breaks(exchange: Exchange, number: int) -> None:
        if number == HELD_AT:
            read.wait(HOLD_SECONDS)
            raise ConnectionAbortedError

    with bench.gated(breaks):
        stream = bench.stream(PROMPT, 32)
        ok(stream)
        stream.piece()
        with bench.without_engine():
            read.set()
            stream.rest()
            require(
                not stream.done,
                "no [DONE] where the engine went away in the midst of the text",
                "data: [DONE]",
                "half an answer is told to be a whole one: [DONE] only after the engine's own end",
            )
            for number in range(2):
                away(bench, number)
            health = in_time(503, lambda: bench.get("/health", HEARD_SECONDS), HEARD_SECONDS)
            require(health.status == 503, "503 for GET /health", health, "health has to follow the engine, both ways")
    health = in_time(200, lambda: bench.get("/health"))
    require(health.status == 200, "200 for GET /health once it is back", health, "health has to follow it, both ways")
    ok(in_time(200, lambda: bench.post(PROMPT, 1)), "a request once the engine is back")
    no_key_in_log(bench)  # once more: an error is what has most to say


def away(bench: Bench, number: int) -> None:
    """While the engine is away, the answer of `one_too_many` is a 503."""
    try:
        answer = one_too_many(bench, number)
    except NotYet as fault:
        cause = "it tries for too long: one try, a short time to connect, and the caller comes back later"
        raise NotYet("503 while the engine is away", fault.got, cause) from None
    judge(
        503,
        answer.status,
        (answer.status == 200 and isinstance(answer, Stream), BEGUN),
        (answer.status == 500, "the error of the connection to the engine came through: it is no bug, but 503"),
        (answer.status in (502, 504), "502 and 504 are near; what passes by itself is 503, with Retry-After"),
        otherwise="what passes by itself is 503",
        expected="503 while the engine is away",
        shown=answer,
    )
    later(answer)


def in_order(bench: Bench) -> None:
    """What the counters say of known requests; then SIGTERM while a stream is under way."""
    before = counters(bench)
    ok(bench.post(PROMPT, 5))
    stream = bench.stream(PROMPT, 7)
    stream.rest()
    refused = [bench.post(PROMPT, 1, key=""), bench.post(PROMPT, 0)]  # 401, and 413 or 422
    right = {f"{REQUESTS} 200": 2, TOKENS: 12} | {f"{REQUESTS} {answer.status}": 1 for answer in refused}

    def moved() -> dict[str, float]:
        now = counters(bench)
        return {name: now[name] - before.get(name, 0) for name in now if now[name] != before.get(name, 0)}

    wait_until(lambda: moved() == right, BACK_SECONDS)  # a counter may follow its answer by a moment
    judge(
        right,
        moved(),
        (lambda got, right: got.get(TOKENS) != right[TOKENS], "tokens are what the engine counts, streams included"),
        (lambda got, right: sum(got.values()) < sum(right.values()), "refusals are answers too: count where all end"),
        otherwise="each answer of POST /generate counts once, by its status",
    )
    ends(bench)


def counters(bench: Bench) -> dict[str, float]:
    """The two counters; that of requests by status."""
    page = bench.get("/metrics")
    ok(page, "GET /metrics")
    try:
        families = list(text_string_to_metric_families(page.body.decode()))
    except ValueError as error:
        cause = "the format is Prometheus' text: prometheus_client's generate_latest writes it"
        raise NotYet("a page for Prometheus", str(error), cause) from None
    found: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name in (REQUESTS, TOKENS):
            name = f"{REQUESTS} {sample.labels.get('status', '')}" if sample.name == REQUESTS else TOKENS
            found[name] = found.get(name, 0) + sample.value
    require(
        TOKENS in found and any(name.startswith(f"{REQUESTS} ") for name in found),
        f"{REQUESTS} and {TOKENS} on /metrics",
        ", ".join(found) or "neither",
        "the names are the brief's; prometheus_client puts _total behind a Counter's by itself",
    )
    return found


def ends(bench: Bench) -> None:
    """SIGTERM while a stream is held: it comes to its end, and then the service does."""
    told = threading.Event()

    def hold(exchange: Exchange, number: int) -> None:
        if number == HELD_AT:
            told.wait(HOLD_SECONDS)

    with bench.gated(hold):
        stream = bench.stream(PROMPT, 32)
        ok(stream)
        stream.piece()
        bench.child.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not bench.listens(), 1)
        told.set()
        stream.rest()
    require(
        stream.done,
        "a stream that comes to its end after SIGTERM",
        f"it broke off after {stream.text!r}",
        "what is under way is finished first: let your server shut down by itself, and give it the time",
    )
    require(
        wait_until(lambda: not bench.alive(), HEARD_SECONDS + END_SECONDS),
        f"the end of the service within {END_SECONDS:.0f} s of SIGTERM",
        "it runs on",
        "somebody swallows the signal, or a thread or task never ends (through a shell, write exec before the command)",
    )


@dataclass(frozen=True)
class Stage:
    """One stage: its number, what it is about, its points, how it is judged, and a hint for who fails it."""

    number: int
    title: str
    points: int
    judge: Callable[[Bench], None]
    hint: str


STAGES = tuple(
    Stage(number, *each)
    for number, each in enumerate(
        [
            (
                "Ready only when the engine is",
                1,
                ready,
                "What does your service do when nobody answers at ENGINE_URL? Chapter 05, section 8 (`/readyz`).",
            ),
            (
                "The engine's own answer",
                1,
                own_text,
                "Print the engine's JSON for one prompt. Chapter 01 has the call.",
            ),
            (
                "Piece by piece",
                2,
                streams,
                "A generator that yields inside the loop over the engine's stream, in a response that streams. "
                "Chapter 02 has the format, chapter 05 the gateway.",
            ),
            (
                "Leaving frees the engine",
                2,
                leaves,
                "Which object holds the connection to the engine, and what closes it when your generator is "
                "cancelled? `async with` does. Chapter 05, step 2.",
            ),
            (
                "Nobody without the key",
                2,
                keys,
                "hmac.compare_digest on bytes, in one place that all of POST /generate goes through before its body is "
                "read.",
            ),
            (
                "Limits that say what they are",
                2,
                limits,
                "A model of the body with its bounds says both by itself: pydantic's Field(ge=…, le=…, max_length=…).",
            ),
            (
                "32 at once, each their own",
                2,
                crowd,
                "Which of your calls does not let the event loop go on while it waits? Chapter 05 begins with one.",
            ),
            (
                "No more than it can carry",
                3,
                refusals,
                "Count who is at work: one more before the engine is asked, one less in a finally, also for leavers. "
                "Chapter 05, step 4.",
            ),
            (
                "The engine goes, and comes back",
                3,
                gone,
                "Which error does your client raise when nobody listens, and how often does it try again before it "
                "says so? max_retries=0, a short time to connect, and one except that answers 503.",
            ),
            (
                "It adds up, and ends in order",
                2,
                in_order,
                "Count where every answer of POST /generate passes, whatever its status. uvicorn and aiohttp finish "
                "what is under way after SIGTERM, if they are the process that gets it.",
            ),
        ],
        1,
    )
)
"""In their order."""
