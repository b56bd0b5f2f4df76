"""Chapter 5: the gateway on real sockets in front of a real engine; a few units through the ASGI transport."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from http.client import HTTPConnection
from itertools import product
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import requests
import schemathesis
from aiohttp import web
from aiohttp.test_utils import TestServer
from desk import eventually, half_a_request
from fastapi import FastAPI
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from starlette.types import Message, Receive, Scope, Send

from servebook import launch
from servebook.lab.taps.http import Exchange, Tap
from servebook.launch.child import child_server
from servebook.processes import free_port
from servebook.ways.fastapi_gateway import mistake
from servebook.ways.fastapi_gateway.client import GatewayAioClient, GatewayClient
from servebook.ways.fastapi_gateway.server.app import PAGE, create_app
from servebook.ways.fastapi_gateway.server.chat import ChatRequest, chat, chat_events
from servebook.ways.fastapi_gateway.server.config import Config
from servebook.ways.fastapi_gateway.server.engine import Engine
from servebook.ways.fastapi_gateway.server.errors import GatewayError
from servebook.ways.fastapi_gateway.server.limits import HISTORY_TURNS, MAX_TOKENS, MESSAGE_CHARS
from servebook.ways.fastapi_gateway.server.telemetry import Metrics, Telemetry
from servebook.ways.fastapi_gateway.steps import step_1_await, step_2_disconnect, step_3_errors, step_4_limits
from servebook.ways.metrics import metric
from servebook.workbook.notebook import Pace, measure_pace

pytestmark = [pytest.mark.lane("one"), pytest.mark.timeout(600)]

GATEWAY = "servebook.ways.fastapi_gateway.server"
KEY = "only-for-this-test"
JAPAN = {"message": "What is the capital of Japan?", "temperature": 0, "max_tokens": 20}
# Without chance, and long; but how long is the device's affair. Where it may not end by itself it goes to `endless`.
STORY = {"message": "Tell me a very long story.", "max_tokens": 1500, "temperature": 0}


def texts(body: str) -> list[dict[str, Any]]:
    """The data of all events of a stream that ended well."""
    *events, done, end = body.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


EVENTS = {"Content-Type": "text/event-stream"}


def piece(content: str, finish_reason: str | None = None) -> dict[str, Any]:
    """A chunk as vLLM streams it."""
    return {"choices": [{"delta": {"content": content}, "finish_reason": finish_reason}]}


def running(engine: str) -> float:
    return metric(engine, "vllm:num_requests_running") + metric(engine, "vllm:num_requests_waiting")


ENDLESS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def endless(vllm: launch.Server) -> Iterator[str]:
    """The URL of the engine, where every answer is as long as it may be."""
    with Tap(vllm.url, more=ENDLESS) as tap:
        yield tap.url


@pytest.fixture(scope="module")
def keyed(endless: str) -> Iterator[str]:
    """A gateway with a key and four places."""
    with child_server(GATEWAY, "--upstream", endless, "--max-concurrent", "4", SERVEBOOK_API_KEY=KEY) as url:
        yield url


def with_key(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_notebook(run_notebook: Callable[[str], None]) -> None:
    run_notebook("05_fastapi_gateway")


# The answers


def test_chat_is_the_engines_answer(gateway: launch.Server, vllm: launch.Server) -> None:
    answer = requests.post(f"{gateway.url}/chat", json=JAPAN, timeout=60).json()
    messages = [{"role": "user", "content": JAPAN["message"]}]
    direct = requests.post(
        f"{vllm.url}/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 20}, timeout=60
    ).json()
    assert answer == {
        "response": direct["choices"][0]["message"]["content"],
        "finish_reason": direct["choices"][0]["finish_reason"],
        "usage": {k: direct["usage"][k] for k in ("prompt_tokens", "completion_tokens")},
    }


def test_a_message_is_all_that_a_request_needs(gateway: launch.Server) -> None:
    answer = requests.post(f"{gateway.url}/chat", json={"message": "Tell me a very long story."}, timeout=120)
    assert answer.status_code == 200
    assert 1 <= answer.json()["usage"]["completion_tokens"] <= 100
    assert ChatRequest(message="x").for_engine() == {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100}


def test_stream_is_the_same_answer_in_pieces(gateway: launch.Server) -> None:
    whole = requests.post(f"{gateway.url}/chat", json=JAPAN, timeout=60).json()
    stream = requests.post(f"{gateway.url}/chat/stream", json=JAPAN, timeout=60)
    assert stream.headers["content-type"].startswith("text/event-stream")
    *pieces, last = texts(stream.text)
    assert all(piece.keys() == {"text"} and piece["text"] for piece in pieces)
    assert "".join(piece["text"] for piece in pieces) == whole["response"]
    assert last == {"text": "", "finish_reason": whole["finish_reason"], "usage": whole["usage"]}


def test_history_and_system_reach_the_engine(gateway: launch.Server, vllm: launch.Server) -> None:
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    ask = JAPAN | {"system": "Answer in one word.", "history": history}
    answer = requests.post(f"{gateway.url}/chat", json=ask, timeout=60).json()
    plain = requests.post(f"{gateway.url}/chat", json=JAPAN, timeout=60).json()
    messages = [
        {"role": "system", "content": ask["system"]},
        *history,
        {"role": "user", "content": ask["message"]},
    ]
    direct = requests.post(
        f"{vllm.url}/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 20}, timeout=60
    ).json()
    assert answer["response"] == direct["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == direct["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]


async def test_korean_and_emoji_come_whole(vllm: launch.Server) -> None:
    words = "안녕하세요, 서울의 여우 🦊!"
    body = {
        "messages": [{"role": "user", "content": "Greet me."}],
        "structured_outputs": {"choice": [words]},
        "max_tokens": 200,
    }
    async with Engine(Config(vllm.url)) as engine:
        events = chat_events(await engine.call("utf-8").stream(body), "utf-8", Metrics())
        raw = b"".join([event async for event in events])
    assert "".join(piece["text"] for piece in texts(raw.decode())) == words


def test_64_callers_at_once(gateway: launch.Server) -> None:
    def ask(number: int) -> tuple[int, str, int]:
        path = ("/chat", "/chat/stream")[number % 2]
        answer = requests.post(f"{gateway.url}{path}", json=JAPAN | {"max_tokens": 16}, timeout=120)
        if path == "/chat":
            return answer.status_code, answer.json()["response"], answer.json()["usage"]["completion_tokens"]
        *pieces, last = texts(answer.text)
        text = "".join(piece["text"] for piece in pieces)
        return answer.status_code, text, last["usage"]["completion_tokens"]

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert {status for status, *_ in answers} == {200}
    assert all(text and 1 <= tokens <= 16 for _, text, tokens in answers)


@pytest.mark.survives("a reader who does not read", "gateway", lost="nothing")
async def test_a_slow_reader_gets_everything_and_holds_up_nobody() -> None:
    words = [f"{number} " * (1 << 19) for number in range(2, 10)] * 4  # 32 MiB: more than the sockets between them hold
    sent = []

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers=EVENTS)
        await answer.prepare(request)
        last = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": len(words)}}
        for chunk in [*(piece(each) for each in words), piece("", "stop"), last]:
            await answer.write(b"data: %b\n\n" % json.dumps(chunk).encode())
        sent.append(request)
        await answer.write(b"data: [DONE]\n\n")
        return answer

    def read(url: str) -> None:
        with requests.post(f"{url}/chat/stream", json=JAPAN, stream=True, timeout=60) as slow:
            begun = slow.raw.read(16)
            other = requests.post(f"{url}/chat/stream", json=JAPAN, timeout=60)
            assert [each["text"] for each in texts(other.text)] == [*words, ""]
            assert len(sent) == 1, "what nobody reads waits in the engine, and not in the gateway's memory"
            assert [each["text"] for each in texts((begun + slow.raw.read()).decode())] == [*words, ""]

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", stream)])
    async with TestServer(app) as upstream:
        with child_server(GATEWAY, "--upstream", str(upstream.make_url(""))) as url:
            await asyncio.to_thread(read, url)


def test_an_idle_connection_outlives_what_its_client_keeps(gateway: launch.Server, vllm: launch.Server) -> None:
    """httpx keeps one for 5 s, as uvicorn does by itself: the client would meet its end, and lose a request."""
    kept = [HTTPConnection(server.http, timeout=30) for server in (gateway, vllm)]  # which opens none in its place
    for idle_seconds in (6, 0):
        for each in kept:
            each.request("GET", "/metrics")
            assert each.getresponse().read()
        time.sleep(idle_seconds)
    for each in kept:
        each.close()


async def test_unicodes_line_ends_keep_an_event_on_one_line(vllm: launch.Server) -> None:
    words = "one\u2028two\u2029three\u0085four"
    body = {"messages": [{"role": "user", "content": "Go."}], "structured_outputs": {"choice": [words]}}
    async with Engine(Config(vllm.url)) as engine:
        events = chat_events(await engine.call("lines").stream(body), "lines", Metrics())
        raw = b"".join([event async for event in events]).decode()
    assert "".join(piece["text"] for piece in texts(raw)) == words
    assert all(json.loads(line[6:]) for line in raw.splitlines() if line and line != "data: [DONE]")


def test_clients_of_other_dialects_are_answered(gateway: launch.Server) -> None:
    """The middleware that does it has tests of its own (test_asgi.py); here it is in place."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}
    for path in ("/chat", "/chat/stream"):
        answer = requests.post(f"{gateway.url}{path}", json=JAPAN | {"max_tokens": 2}, headers=offer, timeout=60)
        assert answer.status_code == 200
        assert path == "/chat" or answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    for path in ("/healthz", "/readyz", "/", "/docs"):
        answer = requests.head(f"{gateway.url}{path}", timeout=30)
        assert (answer.status_code, answer.content) == (200, b"")


def test_without_vllms_files_there_is_a_gateway_without_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.ways.fastapi_gateway.server.app.SWAGGER", "moved")
    paths = {getattr(route, "path", "") for route in create_app(Config("http://127.0.0.1:9")).routes}
    assert "/docs" not in paths
    assert "/chat" in paths


# What the gateway refuses

BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"message": "\xff\xfe"}',
    "a lone surrogate": b'{"message": "\\ud800 secret"}',
    "deep": b"[" * 5_000,
    "huge number": b'{"message": "secret", "max_tokens": ' + b"9" * 5_000 + b"}",
} | {
    name: json.dumps(body).encode()
    for name, body in {
        "null": None,
        "list": ["secret"],
        "no message": {},
        "message null": {"message": None},
        "message number": {"message": 5},
        "message empty": {"message": ""},
        "message list": {"message": ["secret"]},
        "message too long": {"message": "secret" * MESSAGE_CHARS},
        "max_tokens zero": {"message": "secret", "max_tokens": 0},
        "max_tokens negative": {"message": "secret", "max_tokens": -1},
        "max_tokens too many": {"message": "secret", "max_tokens": MAX_TOKENS + 1},
        "max_tokens fraction": {"message": "secret", "max_tokens": 1.5},
        "max_tokens word": {"message": "secret", "max_tokens": "many"},
        "temperature negative": {"message": "secret", "temperature": -0.1},
        "temperature hot": {"message": "secret", "temperature": 2.1},
        "temperature NaN": {"message": "secret", "temperature": float("nan")},
        "temperature infinite": {"message": "secret", "temperature": float("inf")},
        "system empty": {"message": "secret", "system": ""},
        "history string": {"message": "secret", "history": "secret"},
        "history role": {"message": "secret", "history": [{"role": "system", "content": "secret"}]},
        "history content": {"message": "secret", "history": [{"role": "user"}]},
        "history long": {"message": "secret", "history": [{"role": "user", "content": "x"}] * (HISTORY_TURNS + 1)},
        "unknown field": {"message": "secret", "max_token": 5},
        "unknown fields that are long": {"message": "secret", **{f"{n}{'x' * 5000}": 1 for n in range(20)}},
    }.items()
}


@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_input_is_refused_in_words_of_ours(gateway: launch.Server, path: str, body: bytes) -> None:
    answer = requests.post(f"{gateway.url}{path}", data=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code in (400, 422)
    error = answer.json()["error"]
    assert error.keys() == {"code", "message", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert 0 < len(error["message"]) < 500
    assert "secret" not in answer.text


@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_other_refusals(gateway: launch.Server, path: str) -> None:
    def status(**request: Any) -> tuple[int, str]:
        answer = requests.request(request.pop("method", "POST"), f"{gateway.url}{path}", timeout=30, **request)
        return answer.status_code, answer.json()["error"]["code"]

    assert status(data="a=b", headers={"Content-Type": "text/plain"}) == (422, "invalid_request")
    assert status(json={"message": "word " * 5_000}) == (400, "too_long")
    assert status(json={"message": "hello", "system": "x" * 300_000}) == (413, "too_large")
    assert status(method="GET") == (405, "http_error")


@pytest.mark.parametrize("headers", [{}, with_key("wrong"), with_key(""), {"Authorization": f"Basic {KEY}"}])
def test_key_missing_or_wrong(keyed: str, headers: dict[str, str]) -> None:
    bodies = b'{"message": ""}', b"{not json", b"\xff", b" " * 1_000_000
    for path, body in product(("/chat", "/chat/stream"), bodies):
        answer = requests.post(
            f"{keyed}{path}", data=body, headers=headers | {"Content-Type": "application/json"}, timeout=30
        )
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "unauthorized"
        assert KEY not in answer.text
    assert requests.post(f"{keyed}/nothing", headers=headers, timeout=30).status_code == 404
    assert requests.post(f"{keyed}/healthz", headers=headers, timeout=30).status_code == 405
    assert requests.post(f"{keyed}/chat%0A", json=JAPAN, headers=headers, timeout=30).status_code == 401
    metrics = requests.get(f"{keyed}/metrics", timeout=30).text
    assert re.search(r'gateway_requests_total\{path="/chat",status="401"\} \d', metrics)


def test_the_right_key_opens(keyed: str) -> None:
    assert requests.post(f"{keyed}/chat", json=JAPAN, headers=with_key(), timeout=60).status_code == 200
    assert requests.get(f"{keyed}/healthz", timeout=30).json() == {"status": "alive"}


def test_beyond_the_last_place_503_and_when_to_come_back(keyed: str, vllm: launch.Server) -> None:
    session = requests.Session()
    session.headers.update(with_key())
    streams = [session.post(f"{keyed}/chat/stream", json=STORY, stream=True, timeout=60) for _ in range(4)]
    refused = session.post(f"{keyed}/chat", json=JAPAN, timeout=30)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "busy"
    for stream in streams:
        stream.close()
    eventually(
        lambda: session.post(f"{keyed}/chat", json=JAPAN | {"max_tokens": 1}, timeout=30).status_code == 200,
        "the places to be free again",
    )
    eventually(lambda: running(vllm.url) == 0, "the engine is idle")


def test_other_origins_are_shut_out_unless_named(gateway: launch.Server, vllm: launch.Server) -> None:
    preflight = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    closed = requests.options(f"{gateway.url}/chat", headers=preflight, timeout=30)
    assert closed.status_code == 405
    assert "access-control-allow-origin" not in closed.headers
    with child_server(GATEWAY, "--upstream", vllm.url, "--cors-origin", preflight["Origin"]) as url:
        named = requests.options(f"{url}/chat", headers=preflight, timeout=30)
        other = requests.options(f"{url}/chat", headers=preflight | {"Origin": "https://other.example"}, timeout=30)
    assert named.headers["access-control-allow-origin"] == preflight["Origin"]
    assert "access-control-allow-origin" not in other.headers


async def test_an_origin_may_be_named_as_the_address_bar_shows_it() -> None:
    app = create_app(Config("http://127.0.0.1:9", cors_origins=("https://elsewhere.example/",)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        answer = await client.get("/healthz", headers={"Origin": "https://elsewhere.example"})
    assert answer.headers["access-control-allow-origin"] == "https://elsewhere.example"


def test_a_whole_number_may_be_written_with_a_point(gateway: launch.Server) -> None:
    answer = requests.post(f"{gateway.url}/chat", json=JAPAN | {"max_tokens": 2.0}, timeout=60)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 2)


# The contract


schema = schemathesis.openapi.from_dict(
    create_app(Config("http://127.0.0.1:9")).openapi(),
    config=schemathesis.Config.from_dict(
        {
            "checks": {
                # A body may fit its schema and still be too much for the model, or too long to be looked at.
                "positive_data_acceptance": {"expected-statuses": [200, 400, 413]},
                "negative_data_rejection": {"expected-statuses": [400, 401, 405, 413, 422]},
            }
        }
    ),
)


@schema.parametrize()  # type: ignore[untyped-decorator]
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_contract(case: schemathesis.Case, keyed: str) -> None:
    """What the OpenAPI document promises holds, for requests that fit it and for those that do not."""
    if isinstance(case.body, dict) and case.body.get("max_tokens", 100) in range(3, MAX_TOKENS + 1):
        case.body["max_tokens"] = 2  # a valid request may ask for 2048 tokens: right, but long
    case.call_and_validate(base_url=keyed, headers=with_key(), timeout=60)


def test_documentation_has_examples_and_needs_no_other_host(gateway: launch.Server) -> None:
    document = requests.get(f"{gateway.url}/openapi.json", timeout=30).json()
    assert document["components"]["schemas"]["ChatRequest"]["examples"]
    assert "[DONE]" in str(document["paths"]["/chat/stream"]["post"]["responses"]["200"]["content"])
    docs = requests.get(f"{gateway.url}/docs", timeout=30).text
    assert "//" not in re.sub(r"<!--.*?-->", "", docs.replace("</", "")) or "://" not in docs
    for name in re.findall(r'(?:src|href)="([^"]+)"', docs):
        assert requests.get(f"{gateway.url}{name}", timeout=30).status_code == 200


# Callers who leave


@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_a_disconnect_aborts_in_the_engine_at_once(gateway: launch.Server, vllm: launch.Server, path: str) -> None:
    """Of 1,500 tokens it writes a few more. Not by a clock, which goes on when a busy machine stands still."""
    for _ in range(3):
        eventually(lambda: running(vllm.url) == 0, "the engine is idle")
        caller = half_a_request(gateway.url, path, STORY)
        eventually(lambda: metric(vllm.url, "vllm:num_requests_running") == 1, "the engine has the request")
        before = metric(vllm.url, "vllm:generation_tokens_total")
        caller.close()
        eventually(lambda: running(vllm.url) == 0, "the engine let go")
        assert metric(vllm.url, "vllm:generation_tokens_total") - before < 50


# Units: the application without a socket


@pytest.fixture
async def app(vllm: launch.Server) -> AsyncIterator[FastAPI]:
    app = create_app(Config(vllm.url))
    async with app.router.lifespan_context(app):
        yield app


async def test_request_ids(app: FastAPI) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        kept = await client.get("/healthz", headers={"X-Request-ID": "trace-1.a_b"})
        assert kept.headers["x-request-id"] == "trace-1.a_b"
        made = {
            (await client.get("/healthz", headers={"X-Request-ID": bad})).headers["x-request-id"]
            for bad in ("", "with space", "x" * 65, "<script>")
        }
        assert len(made) == 4
        assert all(re.fullmatch("[0-9a-f]{32}", each) for each in made)


async def test_head_counts_where_get_does(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Config("http://127.0.0.1:9", key="key"))
    caplog.set_level("INFO", "servebook.ways.fastapi_gateway.server")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        for path, status in (("/healthz", 200), ("/chat", 405), ("/nowhere", 404)):
            assert (await client.head(path)).status_code == status
        counted = (await client.get("/metrics")).text
    assert [line.split(" 1.0")[0] for line in counted.splitlines() if line.startswith("gateway_requests_total")] == [
        'gateway_requests_total{path="/healthz",status="200"}',
        'gateway_requests_total{path="/chat",status="405"}',
        'gateway_requests_total{path="other",status="404"}',
    ]
    said = [record.getMessage() for record in caplog.records if record.name.startswith("servebook")]
    assert [line.rpartition(" ms")[0].rsplit(" ", 1)[0] for line in said[:3]] == [
        "HEAD /healthz 200",
        "HEAD /chat 405",
        "HEAD other 404",
    ]


async def test_an_error_of_ours_is_a_500_without_details() -> None:
    app = create_app(Config("http://127.0.0.1:9"))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.get("/readyz")  # outside of its lifespan the application has no engine
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "engine" not in answer.json()["error"]["message"].removeprefix("The gateway")


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
async def test_a_body_that_is_not_said_to_be_json(kind: str) -> None:
    """As `curl -d` sends it."""
    app = create_app(Config("http://127.0.0.1:9"))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
    ):
        for body in (json.dumps(JAPAN), "", "null"):
            answer = await client.post("/chat", content=body, headers={"Content-Type": kind})
            assert answer.status_code == 422
            said = "The body must be a JSON object, sent with `Content-Type: application/json`."
            assert answer.json()["error"]["message"] == said


async def test_metrics_count_by_route_and_status(app: FastAPI) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway", timeout=60) as client:
        usage = (await client.post("/chat", json=JAPAN)).json()["usage"]
        await client.post("/chat/stream", json=JAPAN)
        await client.post("/chat", json={})
        await client.get("/made/up%0Apath")
        page = (await client.get("/metrics")).text
    for line in (
        'gateway_requests_total{path="/chat",status="200"} 1.0',
        'gateway_requests_total{path="/chat/stream",status="200"} 1.0',
        'gateway_requests_total{path="/chat",status="422"} 1.0',
        'gateway_requests_total{path="other",status="404"} 1.0',
        "gateway_time_to_first_token_seconds_count 1.0",
        "gateway_requests_running 1.0",
    ):
        assert line in page
    assert "made" not in page
    tokens = {kind: float(n) for kind, n in re.findall(r'gateway_tokens_total{kind="(\w+)"} (\S+)', page)}
    assert tokens == {kind: 2 * usage[f"{kind}_tokens"] for kind in ("prompt", "completion")}, "the stream's, too"


async def test_a_caller_who_leaves_is_a_499() -> None:
    metrics = Metrics()

    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(_: Message) -> None: ...

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    await Telemetry(half, metrics)({"type": "http", "method": "GET", "headers": []}, receive, send)
    assert metrics.registry.get_sample_value("gateway_requests_total", {"path": "other", "status": "499"}) == 1


def test_logs_have_the_request_id_and_never_the_words(gateway: launch.Server) -> None:
    answer = requests.post(f"{gateway.url}/chat", json={"message": "xyzzyplugh", "max_tokens": 8}, timeout=60)
    requests.post(f"{gateway.url}/chat", json={"message": "xyzzyplugh " * 4_000}, timeout=60)
    assert gateway.log
    log = gateway.log.read_text()
    assert "POST /chat 200 " in log
    assert answer.headers["x-request-id"] in log
    assert "xyzzyplugh" not in log


# The page (its behaviour: test_chat_page.py)


def test_the_page_asks_no_other_host_and_has_a_strict_policy(gateway: launch.Server) -> None:
    page = requests.get(gateway.url, timeout=30)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for file in PAGE.iterdir():
        text = requests.get(f"{gateway.url}/page/{file.name}", timeout=30)
        assert text.status_code == 200
        assert not re.search(
            r"(https?:)?//(?!www\.w3\.org/2000/svg)\w", re.sub(r"^\s*//.*$", "", text.text, flags=re.M)
        )
    assert not re.search(r"<script>|<style|\son\w+=|style=", page.text)


YES: dict[str, Any] = {
    "choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
}
"""An answer as vLLM gives it."""


async def test_a_proxy_before_the_engine_is_not_asked_to_pack_an_answer() -> None:
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.headers.getall("Accept-Encoding"))
        return web.json_response(YES)

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", answer)])
    async with TestServer(app) as upstream, Engine(Config(str(upstream.make_url("")), key=KEY)) as engine:
        assert await engine.call("1").complete({}) == YES
    assert asked == [["identity"]]


async def test_the_clients_have_no_limit_beside_the_gateways() -> None:
    """As many callers at once as a gateway takes: httpx's own limit would let 100 of them through."""
    many = Config("").max_concurrent
    here, all_here = [0], asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        here[0] += 1
        if here[0] == many:
            all_here.set()
        await all_here.wait()
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        return web.json_response({"response": "yes", "usage": usage, "finish_reason": "stop"})

    app = web.Application()
    app.add_routes([web.post("/chat", answer)])
    async with TestServer(app) as server:
        url = str(server.make_url(""))
        async with GatewayAioClient(url) as aio:
            answers = await asyncio.gather(*(aio.generate("Here?", timeout=30) for _ in range(many)))
        here[0], all_here = 0, asyncio.Event()
        with GatewayClient(url) as client, ThreadPoolExecutor(many) as pool:
            calls = [asyncio.wrap_future(pool.submit(client.generate, "Here?", timeout=30)) for _ in range(many)]
            answers += await asyncio.gather(*calls)
    assert {each.text for each in answers} == {"yes"}


# When something dies


@pytest.mark.survives("the server killed (SIGKILL)", "gateway", lost="its streams, each broken off")
def test_a_gateway_killed_and_started_again(vllm: launch.Server, endless: str) -> None:
    port = free_port()
    eventually(lambda: running(vllm.url) == 0, "the engine is idle")
    with child_server(GATEWAY, "--upstream", endless, port=port) as url:
        stream = requests.post(f"{url}/chat/stream", json=STORY, stream=True, timeout=30)
        pieces = stream.iter_content(16)
        assert next(pieces)
        gateway = next(child for child in psutil.Process().children() if str(port) in child.cmdline())
        gateway.kill()
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(pieces)
    eventually(lambda: running(vllm.url) == 0, "the engine let go")
    with child_server(GATEWAY, "--upstream", vllm.url, port=port) as url:
        assert requests.post(f"{url}/chat", json=JAPAN, timeout=60).status_code == 200


def test_no_engine_is_said_in_words() -> None:
    with child_server(GATEWAY, "--upstream", f"127.0.0.1:{free_port()}") as url:  # http:// goes without saying
        for path, ask in (("/readyz", None), ("/chat", JAPAN), ("/chat/stream", JAPAN)):
            answer = requests.request("POST" if ask else "GET", f"{url}{path}", json=ask, timeout=30)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_unavailable"
            assert answer.headers["retry-after"] == "5"
        assert requests.get(f"{url}/healthz", timeout=30).status_code == 200


async def test_an_answer_that_the_engine_broke_off_is_no_success() -> None:
    aborted = {"index": 0, "delta": {"content": ""}, "message": {"content": "Tok"}, "finish_reason": "abort"}

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        yield {"choices": [aborted | {"delta": {"content": "Tok"}, "finish_reason": None}]}
        yield {"choices": [aborted]}

    events = [each async for each in chat_events(chunks(), "id", Metrics())]
    assert len(events) == 2
    assert events[1].startswith(b'event: error\ndata: {"error": {"code": "engine_unavailable"')

    async def complete(body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [aborted], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}

    with pytest.raises(GatewayError) as caught:
        await chat(SimpleNamespace(), ChatRequest(message="Hello"), SimpleNamespace(complete=complete))  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.code) == (503, "engine_unavailable")


@asynccontextmanager
async def in_front_of(body: str, kind: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway whose upstream answers 200 and `body` to everything."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=body, content_type=kind)

    upstream = web.Application()
    upstream.add_routes([web.post("/v1/chat/completions", answer)])
    async with TestServer(upstream) as server:
        app = create_app(Config(str(server.make_url(""))))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
        ):
            yield client


OTHERS: list[dict[str, Any]] = [
    {"choices": None},
    {"choices": []},
    {"choices": [{}]},
    {"choices": [{"message": {}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": "yes"}, "finish_reason": None}]},
    {"usage": {"prompt_tokens": 1}},
    {"usage": {"prompt_tokens": 1, "completion_tokens": -1}},
]
NO_COMPLETION = "The engine answered with what is no chat completion."


@pytest.mark.parametrize(
    "body",
    [
        *("", "<html>Sign in</html>", "null", "[]", "[" * 100_000, '{"detail": "ok"}', '{"error": {"message": "no"}}'),
        json.dumps({"choices": YES["choices"]}),
        *(json.dumps(YES | other) for other in OTHERS),
    ],
    ids=lambda body: body[:100],
)
async def test_a_success_that_is_no_completion_is_a_bad_gateway(body: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever else may listen where vLLM should: the caller is told, and the log says what came."""
    for kind in ("application/json", "text/html"):
        async with in_front_of(body, kind) as gateway:
            for path in ("/chat", "/chat/stream"):
                answer = await gateway.post(path, json=JAPAN)
                error = answer.json()["error"]
                assert (answer.status_code, error["code"], error["message"]) == (502, "engine_failed", NO_COMPLETION)
                assert f"id={error['request_id']}" in caplog.text
    assert caplog.text.count("no vLLM at 127.0.0.1") == 4
    assert "Sign in" not in caplog.text


DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("events", "message"),
    [
        *((f"data: {each}\n\n", NO_COMPLETION) for each in ("null", "5", "[]", "{", "{}", '{"choices": null}')),
        *((f'data: {{"choices": [{each}]}}\n\n', NO_COMPLETION) for each in ("5", "{}", '{"delta": {}}')),
        ('data: {"choices": [], "usage": {"prompt_tokens": "a"}}\n\n', NO_COMPLETION),
        *((events, "The engine broke off its answer.") for events in ("", 'data: {"error": {"code": 500}}\n\n')),
    ],
)
async def test_an_event_that_is_no_part_of_one_is_told_in_an_event(events: str, message: str) -> None:
    """And an end before the engine has said why it ended is none: some servers and proxies say [DONE] in any case."""
    async with in_front_of(f"data: {json.dumps(piece('Tok'))}\n\n{events}{DONE}", EVENTS["Content-Type"]) as gateway:
        answer = await gateway.post("/chat/stream", json=JAPAN)
    first, error, end = answer.text.split("\n\n")
    assert (answer.status_code, first, end) == (200, 'data: {"text": "Tok"}', "")
    assert error.startswith("event: error\n")
    assert json.loads(error.partition("data: ")[2])["error"]["message"] == message


@pytest.fixture(scope="module")
def doomed() -> launch.Server:
    """An engine of its own, to be stopped and killed."""
    return launch.serve("vllm", instance="vllm-doomed", engine_url=None)


GO = {"messages": [{"role": "user", "content": "Go."}], "max_tokens": 1500, "ignore_eos": True}


async def first_token_seconds(server: launch.Server) -> float:
    """From the request to the first chunk; then the request is taken back."""
    async with Engine(Config(server.url)) as engine:
        call = engine.call("first")
        started = time.monotonic()
        await anext(await call.stream(GO))
        seconds = time.monotonic() - started
        call.close()
    return seconds


@pytest.mark.survives(
    "the engine stopped (SIGSTOP) beyond the time limit", "gateway", lost="its answers, each with an error"
)
async def test_an_engine_that_hangs_is_a_timeout(doomed: launch.Server) -> None:
    assert doomed.pid
    await first_token_seconds(doomed)  # what only the first request pays for
    patience = max(2, 5 * await first_token_seconds(doomed))
    app = create_app(Config(doomed.url, idle_seconds=patience, answer_seconds=2 * patience))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60) as client,
    ):
        chunks = await app.state.engine.call("hang").stream(GO)
        await anext(chunks)
        os.kill(doomed.pid, signal.SIGSTOP)
        try:
            raw = b"".join([event async for event in chat_events(chunks, "hang", app.state.metrics)])
            answers = [await client.post(path, json=JAPAN) for path in ("/chat", "/chat/stream")]
        finally:
            os.kill(doomed.pid, signal.SIGCONT)
    *_, last, end = raw.decode().split("\n\n")
    assert last.startswith('event: error\ndata: {"error": {"code": "engine_timeout"')
    assert end == ""
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(504, "engine_timeout")] * 2


@pytest.mark.survives("the engine killed (SIGKILL)", "gateway", lost="its answers, each with an error")
def test_the_engine_killed_under_load_and_back(doomed: launch.Server, vllm: launch.Server) -> None:
    """Back is the run's own engine, at the place of the one that was killed while it wrote all answers."""
    assert doomed.pid
    with (
        Tap(doomed.url, more=ENDLESS) as tap,
        child_server(GATEWAY, "--upstream", tap.url) as url,
        ThreadPoolExecutor(16) as pool,
    ):
        calls = [
            pool.submit(requests.post, f"{url}{path}", json=STORY, timeout=60)
            for path in ("/chat", "/chat/stream")
            for _ in range(8)
        ]
        eventually(lambda: metric(doomed.url, "vllm:num_requests_running") == 16, "the engine has all requests")
        written = metric(doomed.url, "vllm:generation_tokens_total")
        begun = written + 16 * 8  # a few steps of all: the first text of each is on its way
        eventually(lambda: metric(doomed.url, "vllm:generation_tokens_total") > begun, "all answers have begun")
        os.kill(doomed.pid, signal.SIGKILL)
        answers = [call.result() for call in calls]
        for answer in answers[:8]:
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")
        for answer in answers[8:]:
            assert answer.status_code == 200
            *pieces, error, end = answer.text.split("\n\n")
            assert pieces
            assert "[DONE]" not in answer.text
            name, data = error.split("\n")
            assert (name, end) == ("event: error", "")
            assert json.loads(data.removeprefix("data: "))["error"] == {
                "code": "engine_failed",
                "message": "The engine broke off its answer.",
                "request_id": answer.headers["x-request-id"],
            }
        assert requests.get(f"{url}/readyz", timeout=30).status_code == 503
        tap.close()  # and nobody listens
        assert requests.post(f"{url}/chat", json=JAPAN, timeout=30).json()["error"]["code"] == "engine_unavailable"

        doomed.stop()
        with Tap(vllm.url, port=int(tap.url.rsplit(":", 1)[1])):
            assert requests.get(f"{url}/readyz", timeout=30).status_code == 200
            assert requests.post(f"{url}/chat", json=JAPAN, timeout=60).json()["response"]


# From the article's version to ours

LADDER = [mistake, step_1_await, step_2_disconnect, step_3_errors, step_4_limits]
NO_ENGINE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def steps(endless: str) -> Iterator[list[str]]:
    """The URLs of the first three steps; of the others an application without a socket shows it all.

    They pass on no temperature, with which one of twenty answers is a few words: their engine writes to the limit.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(child_server(step.__name__, "--upstream", endless)) for step in LADDER[:3]]


@pytest.fixture(scope="module")
def pace(vllm: launch.Server) -> Pace:
    def write(tokens: int) -> None:
        body = {"model": vllm.model, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True}
        requests.post(f"{vllm.url}/v1/completions", json=body, timeout=60).raise_for_status()

    return measure_pace(write)


def client_of(app: FastAPI) -> httpx.AsyncClient:
    """A client of an application without a socket; an error of the application is a status, as on a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)


@pytest.mark.parametrize("step", LADDER, ids=lambda step: step.__name__.rpartition(".")[2])
async def test_every_step_answers(step: Any, vllm: launch.Server) -> None:
    async with client_of(step.create_app(vllm.url, None)) as client:
        whole = (await client.post("/chat", json={"message": "Hello!", "max_tokens": 5})).json()
        stream = await client.post("/chat/stream", json={"message": "Hello!", "max_tokens": 5})
    assert whole.keys() == {"response"}
    assert "".join(piece["text"] for piece in texts(stream.text))


def test_a_blocking_client_stops_the_event_loop(
    gateway: launch.Server, vllm: launch.Server, steps: list[str], pace: Pace
) -> None:
    """While one caller waits for /chat, the article's gateway answers nobody; step 1 and ours do."""
    long = STORY | {"max_tokens": pace.tokens(4, at_least=60)}

    def answers_meanwhile(url: str) -> bool:
        with half_a_request(url, "/chat", long) as caller:
            eventually(lambda: metric(vllm.url, "vllm:num_requests_running") >= 1, "the engine has the request")
            requests.get(f"{url}/healthz", timeout=60)
            caller.setblocking(False)
            try:
                return not caller.recv(1)
            except BlockingIOError:
                return True

    assert answers_meanwhile(gateway.url)
    assert answers_meanwhile(steps[1])
    assert not answers_meanwhile(steps[0])


@pytest.mark.parametrize(("step", "path", "ended"), [(1, "/chat", 1), (1, "/chat/stream", 0), (2, "/chat", 0)])
def test_from_step_2_on_nobody_computes_for_who_has_left(
    steps: list[str], vllm: launch.Server, pace: Pace, step: int, path: str, ended: int
) -> None:
    """`ended`: how many answers the engine wrote to their end, though their caller had hung up."""

    def written() -> float:
        ends = ("stop", "length")
        return sum(metric(vllm.url, "vllm:request_success_total", finished_reason=end) for end in ends)

    eventually(lambda: running(vllm.url) == 0, "the engine is idle")
    before = written()
    # Long enough to be seen in the engine, and left while it is there.
    with half_a_request(steps[step], path, STORY | {"max_tokens": pace.tokens(4, at_least=60)}):
        eventually(lambda: running(vllm.url) == 1, "the engine has the request")
    eventually(lambda: running(vllm.url) == 0, "the engine is idle again")
    eventually(lambda: written() - before == ended, "it is counted")


async def test_step_3_says_in_time_that_there_is_no_engine() -> None:
    async with client_of(step_2_disconnect.create_app(NO_ENGINE, None)) as client:
        assert (await client.post("/chat", json={"message": "Hello!"})).status_code == 500
        assert (await client.post("/chat/stream", json={"message": "Hello!"})).status_code == 200
    async with client_of(step_3_errors.create_app(NO_ENGINE, None)) as client:
        for path in ("/chat", "/chat/stream"):
            refused = await client.post(path, json={"message": "Hello!"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.json() == {"detail": "The engine cannot be reached."}


async def test_step_3_tells_a_whole_answer_from_one_that_broke_off(vllm: launch.Server) -> None:
    def cut(chunks: Iterator[bytes], _: Exchange) -> Iterator[bytes]:
        yield next(chunks)
        raise ConnectionResetError

    with Tap(vllm.url, cut) as tap:
        async with client_of(step_3_errors.create_app(tap.url, None)) as client:
            said = (await client.post("/chat/stream", json={"message": "Hello!", "max_tokens": 20})).text
    assert said.endswith('event: error\ndata: {"detail": "The engine broke off its answer."}\n\n')
    assert "[DONE]" not in said


async def test_step_4_refuses_what_step_3_takes(vllm: launch.Server) -> None:
    story = {"message": STORY["message"], "max_tokens": 30}
    for step, empty, statuses in (
        (step_3_errors, 200, [200] * 6),
        (step_4_limits, 422, [200] * step_4_limits.PLACES + [503] * (6 - step_4_limits.PLACES)),
    ):
        async with client_of(step.create_app(vllm.url, None)) as client:
            assert (await client.post("/chat", json={"message": "", "max_tokens": 2})).status_code == empty
            answers = await asyncio.gather(*(client.post("/chat", json=story) for _ in range(6)))
            assert sorted(answer.status_code for answer in answers) == statuses
            assert (await client.post("/chat", json=story)).status_code == 200, "the places are given back"


async def test_what_step_4_lacks_is_in_the_gateway(vllm: launch.Server) -> None:
    """A key, and a body that is refused unread; the chapter ends with these."""
    huge = {"message": "x" * 300_000}
    async with client_of(step_4_limits.create_app(vllm.url, KEY)) as client:
        assert (await client.post("/chat", json=JAPAN)).status_code == 200
        assert (await client.post("/chat", json=huge)).status_code == 422
    app = create_app(Config(vllm.url, KEY))
    async with app.router.lifespan_context(app), client_of(app) as client:
        assert (await client.post("/chat", json=JAPAN)).status_code == 401
        assert (await client.post("/chat", json=huge, headers=with_key())).status_code == 413
