"""The room's front: relays learners' requests to vLLM, each with a key of its own and a share of the engine.

What passes is not altered, streams included. Neither a key nor a word of what is said reaches a log.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError

from servebook.bearer import engine_key
from servebook.launch.probes import only_ours
from servebook.room import asking
from servebook.room.asking import GENERATING, TOKENIZING, TOKENIZING_BYTES
from servebook.room.board import Attempt, Board, stuck_first, watch_key
from servebook.room.keys import Roll
from servebook.room.limits import Bucket, Limits, Refused, Turnstile
from servebook.room.usage import Usage
from servebook.ways.limits import BODY_SECONDS, GIVEN_UP, POOL_IDLE_SECONDS, READER_SECONDS

log = logging.getLogger("servebook.room")

OPEN = {"/health", "/ping", "/version", "/metrics"}
"""What needs no key, as with vLLM on its own machine."""
RELAYED = {*GENERATING, *TOKENIZING, *OPEN, "/v1/models"}
"""What learners reach of vLLM, to the letter. Its other paths are for whoever runs it, or would evade the shares."""
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length", "date", "server"}
READ_HERE = {"accept-encoding", "content-encoding"}
"""How bodies are packed: the front reads them on their way."""
UNPACKED = {"Accept-Encoding": "identity"}
"""Else aiohttp says what it could unpack, and a proxy before an engine elsewhere would pack a stream into one piece."""
BODY_BYTES = 1 << 20
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 60, 120)
READ_SECONDS = 300.0
"""How long the engine may be silent: before an answer that is not streamed, or within a stream."""
HEALTH_SECONDS = 2.0
"""How long the engine may take to say that it is well."""
ANSWER_SECONDS = 10.0
"""How long it may take to say what its context is, or to give a page; on a busy machine that may take some time."""
PAGE_SECONDS = 1.0
"""How old a page may be that is shown without a key: many who ask for it cost the engine's server no more than one."""
WATCH = "/services/watch/"
"""Where the instructor looks at the room; the hub's proxy has the same path."""
CHECKS_PER_MINUTE = 60
"""Of one learner; more are not heard."""


@dataclass
class Learner:
    """What the front knows of a learner since it started."""

    requests: Bucket
    tokens: Bucket
    checks: Bucket = field(default_factory=lambda: Bucket(CHECKS_PER_MINUTE))
    served: int = 0
    refused: int = 0
    under_way: set[asyncio.Task[Any]] = field(default_factory=set)


class Metrics:
    """The front's Prometheus metrics; they name no learner."""

    def __init__(self, turnstile: Turnstile) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("room_requests", "Requests of learners.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "room_request_seconds", "From request to last byte, served ones.", buckets=SECONDS, registry=registry
        )
        self.first = Histogram(
            "room_first_byte_seconds", "From request to first byte, served ones.", buckets=SECONDS, registry=registry
        )
        self.waited = Histogram("room_wait_seconds", "For a place in the engine.", buckets=SECONDS, registry=registry)
        Gauge("room_running", "Requests in the engine.", registry=registry).set_function(turnstile.running.total)
        Gauge("room_waiting", "Requests that wait.", registry=registry).set_function(lambda: turnstile.waiting)


def error_response(
    status: int, code: str, message: str, param: str | None = None, *, retry_after: int | None = None
) -> web.Response:
    """An error in the shape that OpenAI's clients read."""
    headers = {"Retry-After": str(retry_after)} if retry_after is not None else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    error = {"message": message, "type": code, "param": param, "code": status}
    return web.json_response({"error": error}, status=status, headers=headers)


def refusal_response(refusal: Refused) -> web.Response:
    return error_response(refusal.status, refusal.code, refusal.message, refusal.param, retry_after=refusal.retry_after)


def shown_key(request: web.Request) -> str:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    key = key.strip().encode(errors="replace").decode()  # a header may be no UTF-8
    return key if scheme.lower() == "bearer" else ""


async def whole_body(request: web.Request, most: int = BODY_BYTES) -> bytes:
    """A request's body.

    Raises:
        Refused: 400, 408, 413; it cannot be read, does not come in time, or has more than `most` bytes.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.clone(client_max_size=most).read()
    except web.RequestPayloadError:
        raise Refused(400, "bad_request", "The body cannot be read.") from None
    except TimeoutError:
        raise Refused(408, "slow_request", f"The body took longer than {BODY_SECONDS:g} s.") from None
    except web.HTTPRequestEntityTooLarge as refusal:
        raise Refused(413, "request_entity_too_large", refusal.text or refusal.reason) from None


class BrokenOff(Exception):
    """The engine did not end its answer; `response` is what was begun of it, on a connection that is cut."""

    def __init__(self, response: web.StreamResponse) -> None:
        super().__init__()
        self.response = response


@contextmanager
def gone_if_unread(request: web.Request) -> Iterator[None]:
    """Cut a learner's connection where what is written within this takes too long; all goes on as if they had left."""

    def cut() -> None:
        log.warning("a learner does not read an answer")
        if request.transport:
            request.transport.abort()

    timer = asyncio.get_running_loop().call_later(READER_SECONDS, cut)
    try:
        yield
    finally:
        timer.cancel()


def to_its_end(handler: Callable[[web.Request], Awaitable[web.Response]]) -> Any:
    """The same handler, which goes on when its caller leaves: a change is made with all that follows, or not at all."""

    async def shielded(request: web.Request) -> web.Response:
        return await asyncio.shield(handler(request))

    return shielded


class Front:
    """The front as a set of handlers. `key` is the instructor's: learners never see it.

    An engine elsewhere has the same key. One that is the room's own (`own_engine`: this user's, on this machine) has
    one that comes from it, and nothing is said to anybody else who listens in its place.
    """

    def __init__(self, upstream: str, key: str, roll: Roll, limits: Limits, *, own_engine: bool = False) -> None:
        self.upstream = upstream.rstrip("/")
        self.key = key
        self.own_engine = own_engine
        self.engines_key = {"Authorization": f"Bearer {engine_key(key) if own_engine else key}"}
        self.roll = roll
        self.limits = limits
        self.turnstile = Turnstile(limits)
        self.metrics = Metrics(self.turnstile)
        self.learners: dict[str, Learner] = {}
        self.pages: dict[str, tuple[float, asyncio.Task[web.Response]]] = {}
        self.context: int | None = None
        self.changing = asyncio.Lock()  # of the roll, and what follows from it
        self.looking = asyncio.Lock()  # at who listens in the engine's place, for `require_own`
        self.looked = 0.0
        self.ours = False
        self.board = Board()

    def app(self) -> web.Application:
        """The front as an application of aiohttp."""
        app = web.Application(client_max_size=BODY_BYTES)
        app.cleanup_ctx.append(self.connections)
        app.add_routes(
            [
                web.get("/room/health", self.health),
                web.post("/room/checks", self.note_check),
                web.get(WATCH, self.show_watch),
                web.get(f"{WATCH}board", self.show_board),
                web.get("/room/metrics", self.instructors(self.show_metrics)),
                web.get("/room/learners", self.instructors(self.list_learners)),
                web.put("/room/learners/{name}", self.instructors(to_its_end(self.admit))),
                web.delete("/room/learners/{name}", self.instructors(to_its_end(self.dismiss))),
                web.route("*", "/{path:.*}", self.relay),
            ]
        )
        return app

    async def connections(self, _: web.Application) -> AsyncIterator[None]:
        """Hold the connections to vLLM. Its pool has no limit: the turnstile is the one place that says no."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=POOL_IDLE_SECONDS)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=2, sock_read=READ_SECONDS)
        trace = aiohttp.TraceConfig()
        # Before the connection, which is then not made: aiohttp would leave it open. And after, since another may have
        # come meanwhile.
        trace.on_connection_create_start.append(self.require_own)
        trace.on_connection_create_end.append(self.require_own)
        traces = [trace] if self.own_engine else []
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=UNPACKED, auto_decompress=False, trace_configs=traces
        ) as self.session:
            yield

    async def require_own(self, *_: object) -> None:
        """Refuse a connection to what another user has put in our engine's place: any desk may, once it has ended.

        Raises:
            ClientConnectionError: nobody of ours listens there.
        """
        asked = time.monotonic()
        async with self.looking:
            # A look takes the system 5 ms and more. One that began later than this was asked for is as good as its own:
            # a class that begins to ask all at once costs two, not two for each.
            if self.looked <= asked:
                began = time.monotonic()
                self.ours = await asyncio.to_thread(only_ours, self.upstream)
                self.looked = began
        if not self.ours:
            raise aiohttp.ClientConnectionError("no engine of ours is there")

    def learner(self, name: str) -> Learner:
        if name not in self.learners:
            limits = self.limits
            self.learners[name] = Learner(
                requests=Bucket(limits.learner_requests_per_minute), tokens=Bucket(limits.learner_tokens_per_minute)
            )
        return self.learners[name]

    # What learners ask for.

    async def relay(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on to vLLM, or refuse it: 400, 401, 404, 408, 413, 429, 503, 504."""
        path = request.rel_url.raw_path  # as it was sent: nothing in the list has to be decoded or tidied up
        if path not in RELAYED:
            return error_response(404, "not_found", "The room's engine has no such path.")
        name = self.roll.name_of(shown_key(request))
        if path in OPEN and (request.method == "HEAD" or (name is None and request.method == "GET")):
            return await self.page(path)
        if name is None:
            return error_response(401, "unauthorized", "Send your key of this room as `Authorization: Bearer KEY`.")
        learner = self.learner(name)
        task = asyncio.current_task()
        assert task
        learner.under_way.add(task)
        started = time.monotonic()
        status = 499  # the caller left
        try:
            response = await self.admitted(request, name, learner)
            status = response.status
        except Refused as refusal:
            learner.refused += 1
            status = refusal.status
            response = refusal_response(refusal)
        except BrokenOff as broken:
            status = 502
            response = broken.response
        except asyncio.CancelledError:
            status = 401 if self.roll.revoked(name) else status
            raise
        except Exception as error:
            if not isinstance(error, (aiohttp.ClientError, ConnectionError)):  # these: nobody is there to write to
                status = 500
            raise
        finally:
            learner.under_way.discard(task)
            seconds = time.monotonic() - started
            label = path if path in GENERATING else "other"
            self.metrics.requests.labels(label, status).inc()
            log.info("%s %s %s %d %.0f ms", name, request.method, label, status, 1000 * seconds)
        return response

    async def admitted(self, request: web.Request, name: str, learner: Learner) -> web.StreamResponse:
        """Hold a learner's request to their limits, then pass it on."""
        if wait := learner.requests.take(1):
            each = self.limits.learner_requests_per_minute
            raise Refused(
                429, "rate_limited", f"That is more than {each} requests a minute. Wait {wait} s.", retry_after=wait
            )
        path = request.rel_url.raw_path
        most = TOKENIZING_BYTES if path in TOKENIZING else BODY_BYTES
        body = await whole_body(request, most)
        if request.method == "POST" and path in TOKENIZING:
            async with self.turnstile.place(name):
                return await self.forward(request, body)
        if request.method != "POST" or path not in GENERATING:
            return await self.forward(request, body)
        id_sent = request.headers.get("X-Request-Id")
        ask = asking.read(path, body, await self.context_tokens(), self.limits.answers, id_sent)
        asked = ask.answers * ask.tokens
        if wait := learner.tokens.take(asked):
            each = self.limits.learner_tokens_per_minute
            raise Refused(
                429, "rate_limited", f"That is more than {each} tokens a minute. Wait {wait} s.", retry_after=wait
            )
        started = time.monotonic()
        usage = Usage(ask)
        try:
            async with self.turnstile.place(name, ask.answers):
                self.metrics.waited.observe(time.monotonic() - started)
                usage.begun = True
                response = await self.forward(request, ask.body, usage, started)
        except Refused:
            usage.refused = True
            raise
        finally:
            learner.tokens.give_back(asked - usage.tokens)
        if response.status < 400:
            learner.served += 1
            self.metrics.seconds.observe(time.monotonic() - started)
        return response

    async def context_tokens(self) -> int:
        """The engine's context: no answer is longer. Where it does not say, a minute's share."""
        if self.context is None:
            with suppress(aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
                timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
                models = f"{self.upstream}/v1/models"
                async with self.session.get(models, headers=self.engines_key, timeout=timeout) as answer:
                    self.context = int((await answer.json())["data"][0]["max_model_len"])
        return self.context or self.limits.learner_tokens_per_minute

    async def forward(
        self, request: web.Request, body: bytes, usage: Usage | None = None, started: float | None = None
    ) -> web.StreamResponse:
        """Relay to vLLM and back, piece by piece as they come; a caller who leaves ends the engine's work too.

        Raises:
            Refused: 400, 503; the engine cannot be reached, has died, or gave up on a constraint.
            BrokenOff: it did not end its answer.
        """
        headers = {k: v for k, v in request.headers.items() if k.lower() not in (HOP_BY_HOP | READ_HERE)}
        headers |= self.engines_key
        try:
            upstream = await self.session.request(
                request.method,
                f"{self.upstream}{request.rel_url.raw_path_qs}",
                data=body or None,
                headers=headers,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                # It was reached, and is at work: this costs what was asked for.
                advice = " Stream it." if usage else ""
                return error_response(504, "engine_timeout", f"No word within {READ_SECONDS:g} s.{advice}")
            raise Refused(503, "engine_unavailable", "The room's engine cannot be reached.", retry_after=5) from None
        async with upstream:
            if upstream.status == 500 and usage and usage.ask.constraint:  # vLLM names neither cause nor field
                if not await self.is_well(self.fetch):  # an engine that dies gave up everybody's
                    raise Refused(503, "engine_unavailable", "The room's engine has died.", retry_after=5)
                raise Refused(400, "constraint", f"{usage.ask.constraint} {GIVEN_UP}.", usage.ask.constraint)
            response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
            response.headers.extend((k, v) for k, v in upstream.headers.items() if k.lower() not in HOP_BY_HOP)
            response.content_length = upstream.content_length
            await response.prepare(request)
            first = time.monotonic()
            pieces = upstream.content.iter_any()
            try:
                async for piece in usage.read(upstream, pieces) if usage else pieces:
                    with gone_if_unread(request):
                        await response.write(piece)
            except (aiohttp.ClientPayloadError, TimeoutError):
                log.warning("the engine broke off an answer")
                if request.transport:  # the status is out: a cut connection is all that can still be said
                    request.transport.abort()
                raise BrokenOff(response) from None
            with gone_if_unread(request):
                await response.write_eof()
        if started is not None and response.status < 400:
            self.metrics.first.observe(first - started)
        return response

    async def page(self, path: str) -> web.Response:
        """One of `OPEN` as the engine shows it, at most `PAGE_SECONDS` old."""
        at, task = self.pages.get(path, (0.0, None))
        if task is None or (task.done() and time.monotonic() - at > PAGE_SECONDS):
            task = asyncio.create_task(self.fetch(path))
            self.pages[path] = time.monotonic(), task
        page = await asyncio.shield(task)  # who leaves does not end it for the others
        return web.Response(status=page.status, headers=page.headers, body=page.body)

    async def fetch(self, path: str) -> web.Response:
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)  # or one that hangs is waited for by all who ask later
        try:
            async with self.session.get(f"{self.upstream}{path}", headers=self.engines_key, timeout=timeout) as answer:
                kind = {"Content-Type": answer.headers["Content-Type"]} if "Content-Type" in answer.headers else {}
                return web.Response(status=answer.status, headers=kind, body=await answer.read())
        except (aiohttp.ClientError, TimeoutError):
            return error_response(503, "engine_unavailable", "The room's engine cannot be reached.", retry_after=5)

    async def engine_ready(self) -> bool:
        """Whether the engine says that it is well, and says so in time."""
        with suppress(TimeoutError):
            return await asyncio.wait_for(self.is_well(self.page), HEALTH_SECONDS)
        return False

    async def is_well(self, ask: Callable[[str], Awaitable[web.Response]]) -> bool:
        """Whether somebody answers requests: of a router, /health says no as soon as one of its replicas is away."""
        return (await ask("/health")).status == 200 or (await ask("/readiness")).status == 200

    async def note_check(self, request: web.Request) -> web.Response:
        """A check was made at a desk: 400, 401, 408, 413, 429."""
        name = self.roll.name_of(shown_key(request))
        if name is None:
            return error_response(401, "unauthorized", "Send your key of this room as `Authorization: Bearer KEY`.")
        if wait := self.learner(name).checks.take(1):
            return error_response(429, "rate_limited", f"More than {CHECKS_PER_MINUTE} a minute.", retry_after=wait)
        try:
            self.board.note(name, Attempt.model_validate_json(await whole_body(request)))
        except Refused as refusal:
            return refusal_response(refusal)
        except ValidationError as error:
            return error_response(400, "bad_request", f"That is no check: {error.errors()[0]['msg']}.")
        return web.json_response({})

    # What the instructor asks for.

    def instructors(self, handler: Callable[[web.Request], Awaitable[web.Response]]) -> Any:
        """The same handler, for who shows the instructor's key."""

        async def guarded(request: web.Request) -> web.Response:
            if not secrets.compare_digest(shown_key(request).encode(), self.key.encode()):
                return error_response(401, "unauthorized", "This is for the instructor's key.")
            return await handler(request)

        return guarded

    async def show_watch(self, _: web.Request) -> web.Response:
        """The page. There is nothing in it: what it shows it asks for with the key that it was opened with."""
        nonce = secrets.token_urlsafe()
        page = files("servebook.room").joinpath("watch.html").read_text(encoding="utf-8").replace("NONCE", nonce)
        allowed = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; connect-src 'self'"
        headers = {"Content-Security-Policy": f"{allowed}; frame-ancestors 'none'", "Referrer-Policy": "no-referrer"}
        return web.Response(text=page, content_type="text/html", headers=headers)

    async def show_board(self, request: web.Request) -> web.Response:
        """Who is where, who needs help first; what the engine has to do. For the instructor's key and the page's."""
        shown = shown_key(request).encode()
        if not any(secrets.compare_digest(shown, key.encode()) for key in (self.key, watch_key(self.key))):
            return error_response(401, "unauthorized", "Open this page by the address of `servebook room watch`.")
        ready = await self.engine_ready()
        rows = []
        for name in self.roll.entries:
            learner = self.learner(name)
            used = max(learner.tokens.used(), learner.requests.used())
            row: dict[str, Any] = {"name": name, "revoked": self.roll.revoked(name), "refused": learner.refused}
            row |= {"under_way": len(learner.under_way), "share": round(100 * used)}
            rows.append(row | self.board.row(name))
        told = {"ready": ready, "running": self.turnstile.running.total()}
        return web.json_response(
            {
                "engine": told | {"places": self.limits.places, "waiting": self.turnstile.waiting},
                "checks_per_minute": self.board.checks_per_minute(),
                "learners": sorted(rows, key=stuck_first),
            }
        )

    async def list_learners(self, _: web.Request) -> web.Response:
        """Every learner with what they have under way, and what was served and refused since the front started."""
        rows = []
        for name in sorted(self.roll.entries):
            learner = self.learner(name)
            rows.append(
                {
                    "name": name,
                    "revoked": self.roll.revoked(name),
                    "under_way": len(learner.under_way),
                    "served": learner.served,
                    "refused": learner.refused,
                }
            )
        return web.json_response(rows)

    async def admit(self, request: web.Request) -> web.Response:
        """A new key for a learner. One whose key was revoked gets none, but by `?again=true`."""
        name = request.match_info["name"]
        async with self.changing:
            if self.roll.revoked(name) and request.query.get("again") != "true":
                return error_response(403, "revoked", f"The key of {name} was revoked by the instructor.")
            try:
                key = await asyncio.to_thread(self.roll.issue, name)
            except ValueError as error:
                return error_response(400, "bad_name", str(error))
            except OSError as error:
                said = f"No key was made: it could not be written ({error.strerror})."
                return error_response(507, "not_written", said)
        log.info("%s has a new key", name)
        return web.json_response({"name": name, "key": key})

    async def dismiss(self, request: web.Request) -> web.Response:
        """Revoke a key, now: what its learner has under way is broken off. With `?forget=true` the name goes too."""
        name, forget = request.match_info["name"], request.query.get("forget") == "true"
        async with self.changing:
            try:
                done = await asyncio.to_thread(self.roll.forget if forget else self.roll.revoke, name)
            except OSError as error:
                said = f"The key of {name} still counts: that could not be written ({error.strerror})."
                return error_response(507, "not_written", said)
            if not done:
                return error_response(404, "not_found", f"There is no learner {name}.")
            for task in list(self.learner(name).under_way):
                task.cancel()
            if forget:
                for kept in (self.learners, self.board.standings, self.board.passed):
                    kept.pop(name, None)
        log.info("the key of %s is revoked", name)
        return web.json_response({"name": name})

    async def health(self, _: web.Request) -> web.Response:
        """Whether the front and the engine behind it can serve."""
        if await self.engine_ready():
            return web.json_response({"status": "ready"})
        return error_response(503, "engine_unavailable", "The room's engine cannot be reached.", retry_after=5)

    async def show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.metrics.registry), content_type="text/plain")
