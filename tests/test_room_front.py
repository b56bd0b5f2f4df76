"""The front of a room: keys, shares and limits, in front of a stand-in for the engine."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager, closing, suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import active_children, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import nbformat
import psutil
import pytest
import requests
import tiny_server
from aiohttp import ClientConnectionError, ClientSession, ConnectionTimeoutError, web
from aiohttp.test_utils import BaseTestServer, TestServer, make_mocked_request
from aiohttp.web_response import ContentCoding
from classroom import bearer
from desk import eventually, held_open
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nbformat.v4 import new_notebook
from typer.testing import CliRunner

from servebook import launch
from servebook.bearer import engine_key
from servebook.checkout import ROOT
from servebook.errors import LaunchError, ModelError, ServebookError
from servebook.lab.feedback import Result
from servebook.lab.handout import blanks
from servebook.lab.manifest import Lab, load_labs
from servebook.lab.record import Store
from servebook.launch.display import TerminalProgress
from servebook.launch.files import Files
from servebook.launch.table import SERVERS, Endpoints, find_server, rooms_engine
from servebook.processes import free_port, wait_until
from servebook.room import admin, asking, cli, collect, desk, front, hub, load, tls
from servebook.room.admin import instructors_key, instructors_settings, rooms_settings
from servebook.room.asking import TOKENIZING
from servebook.room.board import Attempt, Board, stuck_first, watch_key
from servebook.room.front import RELAYED, Front, Learner
from servebook.room.keys import Roll
from servebook.room.limits import Bucket, Limits, Refused, Turnstile
from servebook.room.usage import Usage
from servebook.settings import Settings, load_settings, own_settings
from servebook.ways.limits import GIVEN_UP
from servebook.whole import write_whole

KEY = "the-instructors-key"


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more reaches the disk, though a name may still be made."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_a_key_counts_until_it_is_replaced_or_revoked(tmp_path: Path) -> None:
    roll = Roll(tmp_path / "keys.json")
    first = roll.issue("ada")
    second = roll.issue("ada")
    other = roll.issue("grace")
    assert [roll.name_of(key) for key in (first, second, other, "")] == [None, "ada", "grace", None]
    assert roll.revoke("ada")
    assert roll.revoked("ada")
    assert roll.name_of(second) is None
    again = Roll(tmp_path / "keys.json")
    assert again.name_of(other) == "grace"
    assert again.revoked("ada")
    assert not again.revoke("nobody")
    assert again.forget("grace")
    assert again.name_of(other) is None
    assert not again.forget("grace")
    with pytest.raises(ValueError, match="cannot name a learner"):
        roll.issue("../x")


@pytest.mark.survives(
    "a full disk while a key is revoked", "room", lost="nothing: it is refused, and the key is as it was"
)
@pytest.mark.parametrize("change", ["revoke", "forget"])
def test_a_revocation_that_cannot_be_written_is_not_said_to_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    roll = Roll(tmp_path / "keys.json")
    key = roll.issue("ada")
    with monkeypatch.context() as disk:
        full_disk(disk)
        with pytest.raises(OSError, match="No space left"):
            getattr(roll, change)("ada")
    assert roll.name_of(key) == Roll(tmp_path / "keys.json").name_of(key) == "ada"  # now as after a restart
    getattr(roll, change)("ada")
    assert roll.name_of(key) is Roll(tmp_path / "keys.json").name_of(key) is None


@pytest.mark.parametrize("content", [b"", b'{"ada": ', b"[]", b'{"ada": 1}', b"\xff"])
def test_a_damaged_roll_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys.json").write_bytes(content)
    with pytest.raises(ServebookError, match=r"keys\.json cannot be read: it is not what a room has written"):
        Roll(tmp_path / "keys.json")


def test_a_bucket_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bucket = Bucket(per_minute=60)
    assert bucket.take(50) == 0
    assert bucket.take(20) == 10
    now = 10.0
    assert bucket.take(20) == 0
    now = 100.0
    assert bucket.take(180) == 0  # more than it ever holds: when it is full
    assert bucket.take(1) == 121  # and all of it is made up for
    bucket.give_back(180)
    assert bucket.level == 60
    assert bucket.take(60) == 0
    bucket.give_back(20)
    assert bucket.take(20) == 0
    assert bucket.take(1) == 1


CONTEXT = 2048


@pytest.mark.parametrize(
    ("path", "ask", "answers", "tokens"),
    [
        ("/v1/completions", {"prompt": "a"}, 1, 16),
        ("/v1/completions", {"prompt": "a", "max_tokens": None}, 1, CONTEXT),  # vLLM writes to the context's end
        ("/v1/chat/completions", {"messages": []}, 1, CONTEXT),
        ("/v1/chat/completions", {"messages": [], "ignore_eos": True}, 1, CONTEXT),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 5, "n": 3}, 6, 5),
        ("/v1/chat/completions", {"max_completion_tokens": 7, "max_tokens": 100}, 1, 7),
        ("/v1/completions", {"max_completion_tokens": 7, "max_tokens": 100}, 1, 100),  # the first is chat's alone
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 5}, 1, 5),
        ("/v1/completions", {"prompt": [[1, 2, 3], [4]], "max_tokens": 5}, 2, 5),
        ("/v1/chat/completions", {"prompt": [], "max_tokens": 5}, 1, 5),
        ("/v1/completions", {"max_tokens": 5.0, "n": -1}, 1, 5),
        ("/v1/completions", {"max_tokens": -1}, 1, 0),
        ("/v1/completions", {"max_tokens": 10**9}, 1, CONTEXT),  # what the engine will refuse
        ("/v1/completions", [], 1, 0),
        ("/v1/responses", {"max_output_tokens": 9, "max_tokens": 1}, 1, 9),
        ("/v1/messages", {"max_tokens": 9}, 1, 9),
        ("/inference/v1/generate", {"max_tokens": 1, "sampling_params": {"max_tokens": 9, "n": 2}}, 2, 9),
        ("/inference/v1/generate", {"token_ids": [1]}, 1, 0),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {}}, 1, CONTEXT),
    ],
)
def test_tokens_count_as_asked_for_and_what_is_not_asked_for_as_the_most(
    path: str, ask: object, answers: int, tokens: int
) -> None:
    read = asking.read(path, json.dumps(ask).encode(), CONTEXT, places=16)
    assert (read.answers, read.tokens) == (answers, tokens)


FIELDS = [
    *("prompt", "n", "max_tokens", "max_completion_tokens", "max_output_tokens", "sampling_params", "background"),
    *("stream", "stream_options", "stream_interval", "logprobs", "top_logprobs", "prompt_logprobs", "stop", "tools"),
    *("logit_bias", "structured_outputs", "response_format", "text", "output_config", "json", "regex", "function"),
    *("messages", "input", "content"),
]
"""Names that mean something to the front, in any place."""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner),
    max_leaves=10,
)


def asked_or_refused(path: str, body: bytes) -> asking.Ask | Refused:
    try:
        return asking.read(path, body, CONTEXT, places=16)
    except Refused as refused:
        return refused


NUMBERS = st.sampled_from([-1, 0, 1, 17, 4096, 10**9])


@given(st.sampled_from(list(asking.GENERATING)), st.dictionaries(st.sampled_from(FIELDS), NUMBERS | VALUES, max_size=5))
@hypothesis_settings(max_examples=300, deadline=None)
def test_whatever_is_asked_counts_within_the_places_and_the_context_or_is_refused(
    path: str, ask: dict[str, Any]
) -> None:
    read = asked_or_refused(path, json.dumps(ask).encode())
    if isinstance(read, Refused):
        assert read.status == 400
        assert len(read.message) < 200
        return
    assert 1 <= read.answers <= 16
    assert 0 <= read.tokens <= CONTEXT
    there = json.loads(read.body)
    added = there.pop("stream_options", None) if read.adds_usage else None
    assert json.dumps(there) == json.dumps({k: v for k, v in ask.items() if not (added and k == "stream_options")})
    assert read.adds_usage == bool(added and added["include_usage"])


HUGE = {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000_000}
SELF = {"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}


@pytest.mark.parametrize(
    ("path", "ask", "field", "limit"),
    [
        ("/v1/completions", {"structured_outputs": {"json": HUGE}}, "structured_outputs.json", "256"),
        ("/v1/completions", {"structured_outputs": {"json": json.dumps(HUGE)}}, "structured_outputs.json", "256"),
        ("/v1/completions", {"structured_outputs": {"json": SELF}}, "structured_outputs.json", "itself"),
        ("/v1/completions", {"structured_outputs": {"regex": "(a{99}){99}"}}, "structured_outputs.regex", "256"),
        ("/v1/completions", {"structured_outputs": {"grammar": "x" * 20_000}}, "structured_outputs.grammar", "16384"),
        ("/v1/completions", {"structured_outputs": {"choice": ["a"] * 999}}, "structured_outputs.choice", "500"),
        (
            "/v1/completions",
            {"structured_outputs": {"structural_tag": json.dumps({"structures": [{"schema": HUGE}]})}},
            "structured_outputs.structural_tag",
            "256",
        ),
        ("/v1/completions", {"prompt": ["a"] * 1024}, "prompt", "16"),
        ("/v1/completions", {"prompt": ["a"] * 4, "n": 5}, "n", "16"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 30_000}, "messages", "512"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 513}]}, "messages", "512"),
        ("/v1/responses", {"input": [{"role": "user", "content": ""}] * 65}, "input", "64"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{}] * 65}]}, "input", "64"),
        ("/v1/messages", {"system": [{"type": "text", "text": ""}] * 513}, "system", "512"),
        ("/v1/completions", {"n": 4096}, "n", "16"),
        ("/v1/completions", {"vllm_xargs": {str(i): {} for i in range(5000)}}, "vllm_xargs", "4096"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [1] * 5000}]}, "messages", "4096"),
        ("/v1/completions", {"logprobs": 21}, "logprobs", "20"),
        ("/v1/completions", {"prompt_logprobs": -1}, "prompt_logprobs", "20"),
        ("/v1/chat/completions", {"top_logprobs": 999}, "top_logprobs", "20"),
        ("/v1/chat/completions", {"stop": ["a"] * 17}, "stop", "16"),
        ("/v1/chat/completions", {"stop": "a" * 10**5}, "stop", "256"),
        ("/v1/chat/completions", {"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "300"),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": HUGE}}},
            "response_format",
            "256",
        ),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SELF}}},
            "response_format.json_schema.schema",
            "itself",
        ),
        (
            "/v1/chat/completions",
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": HUGE}}], "tool_choice": "required"},
            "tools",
            "256",
        ),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": HUGE}}}, "text", "256"),
        ("/v1/responses", {"background": True}, "background", "false"),
        ("/v1/messages", {"tools": [{"name": "f", "input_schema": SELF}]}, "tools", "itself"),
        ("/v1/messages", {"stop_sequences": ["a"] * 17}, "stop_sequences", "16"),
        ("/v1/messages", {"output_config": {"format": {"schema": HUGE}}}, "output_config", "256"),
        ("/v1/completions", {"request_id": "a" * 65}, "request_id", "64"),
        ("/inference/v1/generate", {"sampling_params": {"n": 4096}}, "n", "16"),
        ("/inference/v1/generate", {"sampling_params": [], "token_ids": ["a"] * 5000}, "token_ids", "4096"),
        ("/inference/v1/generate", {"sampling_params": {}, "token_ids": ["a"] * 5000}, "token_ids", "4096"),
        ("/v1/completions", [{}] * 5000, "the body", "4096"),
        (
            "/inference/v1/generate",
            {"sampling_params": {"structured_outputs": {"json": HUGE}}},
            "structured_outputs.json",
            "256",
        ),
    ],
)
async def test_what_would_hold_up_everybody_is_refused_by_field_and_limit(
    engine: tuple[StandIn, str], tmp_path: Path, path: str, ask: object, field: str, limit: str
) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url) as ada:
        status, answer, _ = await ada.ask("POST", path, ask)
        assert (status, answer["error"]["param"]) == (400, field)
        assert field in answer["error"]["message"]
        assert limit in answer["error"]["message"]
        assert (await ada.complete(6000))[0] == 200  # it cost nothing
    assert path not in stand_in.seen or path == "/v1/completions"


async def test_an_id_in_a_header_has_the_same_limit(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    """vLLM prefers it to the body's."""
    _, url = engine
    async with caller(tmp_path, url) as ada:
        target = str(ada.front.make_url("/v1/completions"))

        def send(characters: int) -> requests.Response:
            headers = bearer(ada.key) | {"X-Request-Id": "x" * characters}
            return requests.post(target, json={"max_tokens": 1}, headers=headers, timeout=10)

        assert (await asyncio.to_thread(send, 64)).status_code == 200
        beyond = await asyncio.to_thread(send, 65)
        assert (beyond.status_code, beyond.json()["error"]["param"]) == (400, "X-Request-Id")


class StandIn:
    """In the place of vLLM: notes what reaches it, and answers with `status`."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.status = 200
        self.health, self.readiness = 200, 404
        self.bodies: list[bytes] = []
        self.keys: list[str] = []
        """Each `Authorization` of each request."""
        self.says: Any = {}
        """Its answer, or the events of a stream."""
        self.goes_on: asyncio.Event | None = None
        """What it waits for before its answer ends."""
        self.packs = ""
        """As a proxy before it may: what it answers is packed "where it may be" or "always"."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET" and request.path == "/v1/models":
            return web.json_response({"data": [{"max_model_len": CONTEXT}]})
        self.seen.append(request.raw_path)
        self.bodies.append(await request.read())
        self.keys += request.headers.getall("Authorization", [])
        if request.path == "/health":
            if self.goes_on:
                await self.goes_on.wait()
            return web.json_response({}, status=self.health)
        if request.path == "/readiness":
            return web.json_response({}, status=self.readiness)
        if not isinstance(self.says, list):
            if self.goes_on:
                await self.goes_on.wait()
            return self.packed(web.json_response(self.says, status=self.status))
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await self.packed(stream).prepare(request)
        for event in self.says:
            await stream.write(
                b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
            )
        if self.goes_on:
            await self.goes_on.wait()
        await stream.write_eof()
        return stream

    def packed(self, answer: web.StreamResponse) -> web.StreamResponse:
        if self.packs:
            answer.enable_compression(ContentCoding.gzip if self.packs == "always" else None)
        return answer


class Caller:
    """A learner with a key, in front of a front with these limits."""

    def __init__(self, front: BaseTestServer, front_app: Front, key: str) -> None:
        self.front = front
        self.front_app = front_app
        self.key = key

    def state(self) -> Learner:
        return self.front_app.learner("ada")

    def level(self) -> float:
        """What is left of a minute's tokens."""
        return self.state().tokens.level

    def served(self) -> tuple[float | None, ...]:
        """As the instructor sees it, and as the two histograms of what was served do."""
        histograms = ("room_request_seconds_count", "room_first_byte_seconds_count")
        return self.state().served, *map(self.front_app.metrics.registry.get_sample_value, histograms)

    def taken(self) -> int:
        """Places in the engine."""
        return self.front_app.turnstile.running.total()

    def begin(self, path: str, body: object, timeout: float = 30) -> requests.Response:
        """Post; the body of the answer is still to be read."""
        url = str(self.front.make_url(path))
        return requests.post(url, json=body, headers=bearer(self.key), stream=True, timeout=timeout)

    async def send(self, path: str, body: object) -> requests.Response:
        """Post, and read the whole answer."""

        def whole() -> requests.Response:
            answer = self.begin(path, body)
            assert answer.content is not None
            return answer

        return await asyncio.to_thread(whole)

    async def ask(self, method: str, path: str, body: object = None, key: str | None = None) -> tuple[int, Any, str]:
        """Status, JSON and Retry-After of the answer. The path goes out as it is; a body of bytes does, too."""

        def send() -> tuple[int, Any, str]:
            connection = HTTPConnection("127.0.0.1", self.front.port, timeout=30)
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, raw, bearer(self.key if key is None else key))
            with closing(connection), connection.getresponse() as answer:
                return answer.status, json.loads(answer.read()), answer.headers.get("Retry-After", "")

        return await asyncio.to_thread(send)

    async def counted(self) -> list[str]:
        """The front's counters of requests."""
        url, headers = str(self.front.make_url("/room/metrics")), bearer(KEY)
        page = await asyncio.to_thread(requests.get, url, headers=headers, timeout=10)
        return [line for line in page.text.splitlines() if line.startswith("room_requests_total")]

    async def complete(self, max_tokens: int) -> tuple[int, Any, str]:
        return await self.ask("POST", "/v1/completions", {"max_tokens": max_tokens})


@pytest.fixture
async def engine() -> AsyncIterator[tuple[StandIn, str]]:
    stand_in, app = StandIn(), web.Application()
    app.add_routes([web.route("*", "/{path:.*}", stand_in.answer)])
    async with TestServer(app) as server:
        yield stand_in, str(server.make_url(""))


@asynccontextmanager
async def caller(
    folder: Path, upstream: str, limits: Limits | None = None, *, own_engine: bool = False
) -> AsyncIterator[Caller]:
    roll = Roll(folder / "keys.json")
    front = Front(upstream, KEY, roll, limits or Limits(), own_engine=own_engine)
    async with TestServer(front.app(), handler_cancellation=True) as server:
        yield Caller(server, front, roll.issue("ada"))


class SlowDisk:
    """A disk that writes nothing before it is `released`."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        self.in_time: list[bool] = []

    def fsync(self, _: int) -> None:
        self.reached.set()
        self.in_time.append(self.released.wait(10))


async def test_who_asks_does_not_wait_for_a_key_that_is_written(
    engine: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with caller(tmp_path, engine[1]) as ada:
        monkeypatch.setattr(os, "fsync", (disk := SlowDisk()).fsync)
        admitting = asyncio.create_task(ada.ask("PUT", "/room/learners/bo", key=KEY))
        await asyncio.to_thread(disk.reached.wait, 10)
        assert (await ada.complete(5))[0] == 200
        disk.released.set()
        assert (await admitting)[0] == 200
    assert disk.in_time == [True]
    assert set(Roll(tmp_path / "keys.json").entries) == {"ada", "bo"}


async def test_no_key_is_made_while_a_revocation_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roll = Roll(tmp_path / "keys.json")
    key = roll.issue("ada")
    room = Front("http://127.0.0.1:9", KEY, roll, Limits())
    monkeypatch.setattr(os, "fsync", (disk := SlowDisk()).fsync)

    def request(method: str) -> web.Request:
        return make_mocked_request(method, "/room/learners/ada", match_info={"name": "ada"})

    dismissing = asyncio.create_task(room.dismiss(request("DELETE")))
    await asyncio.to_thread(disk.reached.wait, 10)
    admitting = asyncio.create_task(room.admit(request("PUT")))
    await asyncio.sleep(0)  # it has begun
    assert roll.name_of(key) == "ada", "what is not written does not count"
    disk.released.set()
    assert [(await task).status for task in (dismissing, admitting)] == [200, 403]
    assert Roll(tmp_path / "keys.json").revoked("ada")


async def test_a_revocation_breaks_off_what_is_under_way_though_its_caller_left(
    engine: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, url = engine
    stand_in.goes_on = asyncio.Event()
    async with caller(tmp_path, url) as ada, ClientSession(headers=bearer(KEY)) as instructor:
        assert ada.front.runner
        served = ada.front.runner.server
        assert served
        asking = asyncio.create_task(ada.complete(5))
        await asyncio.to_thread(eventually, lambda: stand_in.seen, "the request at the engine")
        monkeypatch.setattr(os, "fsync", (disk := SlowDisk()).fsync)
        dismissing = asyncio.create_task(instructor.delete(ada.front.make_url("/room/learners/ada")))
        await asyncio.to_thread(disk.reached.wait, 10)
        dismissing.cancel()
        await asyncio.to_thread(eventually, lambda: len(served.connections) == 1, "the instructor leaves")
        disk.released.set()
        with suppress(OSError, HTTPException):  # its connection is cut
            await asking
        assert ada.front_app.roll.revoked("ada")
        assert not ada.state().under_way
        stand_in.goes_on.set()


async def test_what_the_engine_refused_costs_no_tokens(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url, Limits(learner_tokens_per_minute=CONTEXT)) as ada:
        stand_in.status = 400
        assert [(await ada.complete(10**6))[0] for _ in range(3)] == [400] * 3
        stand_in.status = 200  # and does not say what it came to
        assert (await ada.complete(10**6))[0] == 200
        status, _, wait = await ada.complete(CONTEXT // 2)
        assert status == 429
        assert 0 < int(wait) <= 30  # not the hours that it would take to make up for a million


async def test_who_is_forgotten_and_comes_again_begins_anew(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    _, url = engine
    async with caller(tmp_path, url, Limits(learner_tokens_per_minute=CONTEXT)) as ada:
        assert [(await ada.complete(CONTEXT))[0] for _ in range(2)] == [200, 429]
        assert (await ada.ask("DELETE", "/room/learners/ada?forget=true", key=KEY))[0] == 200
        _, admitted, _ = await ada.ask("PUT", "/room/learners/ada", key=KEY)
        ada.key = admitted["key"]
        assert (await ada.complete(CONTEXT))[0] == 200
        _, board, _ = await ada.ask("GET", "/room/learners", key=KEY)
        assert [(row["name"], row["served"], row["refused"]) for row in board] == [("ada", 1, 0)]


@pytest.mark.parametrize(
    ("form", "health", "status", "field"),
    [
        ({"structured_outputs": {"grammar": "root ::= root"}}, 200, 400, "structured_outputs.grammar"),
        ({"response_format": {"type": "json_object"}}, 200, 400, "response_format"),
        ({"response_format": {"type": "json_object"}}, 503, 503, None),
        ({"response_format": {"type": "text"}}, 200, 500, None),
        ({"text": {"format": {"type": "text"}}}, 200, 500, None),
        ({}, 200, 500, None),
    ],
)
async def test_a_constraint_that_the_engine_gave_up_is_named(
    engine: tuple[StandIn, str], tmp_path: Path, form: dict[str, Any], health: int, status: int, field: str | None
) -> None:
    """A dying engine gives up all it has, and that is no fault of theirs."""
    stand_in, url = engine
    stand_in.health, stand_in.status = health, 500
    stand_in.says = {"error": {"message": "Internal server error", "param": None}}
    async with caller(tmp_path, url) as ada:
        got, answer, _ = await ada.ask("POST", "/v1/chat/completions", {"messages": []} | form)
    assert (got, answer["error"]["param"]) == (status, field)
    if field:
        assert answer["error"]["message"] == f"{field} {GIVEN_UP}."


async def test_behind_a_router_a_replica_that_is_away_is_no_dead_engine(
    engine: tuple[StandIn, str], tmp_path: Path
) -> None:
    stand_in, url = engine
    stand_in.health, stand_in.readiness, stand_in.status = 503, 200, 500
    async with caller(tmp_path, url) as ada:
        assert (await ada.ask("GET", "/room/health", key=""))[0] == 200
        form = {"messages": [], "response_format": {"type": "json_object"}}
        assert (await ada.ask("POST", "/v1/chat/completions", form))[0] == 400


async def test_the_instructor_sees_who_is_where_and_learners_see_nobody(
    engine: tuple[StandIn, str], tmp_path: Path
) -> None:
    wrong = {"exercise": "01.2", "state": "wrong", "cause": "<b>that</b> is the prompt's count " + "x" * 9000}
    async with caller(tmp_path, engine[1], Limits(places=9, learner_requests_per_minute=1)) as ada:
        ada.front_app.roll.issue("alan")
        assert (await ada.ask("GET", "/v1/models"))[0] == 200
        assert (await ada.ask("POST", "/room/checks", {"exercise": "01.1", "state": "passed"}))[0] == 200
        for _ in range(2):
            assert (await ada.ask("POST", "/room/checks", wrong))[0] == 200
        bodies: list[Any] = [
            {"exercise": "99.9", "state": "passed"},
            wrong | {"state": "done"},
            wrong | {"x": 1},
            b"\xff",
            [],
        ]
        for body in bodies:
            assert (await ada.ask("POST", "/room/checks", body))[0] == 400, body
        assert (await ada.ask("POST", "/room/checks", wrong, key="nobody's"))[0] == 401
        for key in (None, "", "nobody's"):
            assert (await ada.ask("GET", "/services/watch/board", key=key))[0] == 401
        status, seen, _ = await ada.ask("GET", "/services/watch/board", key=watch_key(KEY))
        assert status == 200
        assert (await ada.ask("GET", "/room/learners", key=watch_key(KEY)))[0] == 401, "it opens the board alone"
        assert seen["checks_per_minute"] == 3
        assert seen["engine"] == {"ready": True, "running": 0, "places": 9, "waiting": 0}
        first, second = seen["learners"]
        assert (first["name"], first["exercise"], first["state"], first["tries"]) == ("ada", "01.2", "wrong", 2)
        assert (first["passed"], len(first["cause"]), first["needs_help"]) == (1, 300, False)
        assert (second["name"], second["exercise"], second["passed"], second["share"]) == ("alan", "", 0, 0)
        assert first["share"] > 50, "of the requests, though it cost no tokens"
        answers = [(await ada.ask("POST", "/room/checks", wrong))[0] for _ in range(60)]
        assert answers[-1] == 429


async def test_what_learners_say_is_shown_to_the_instructors_terminal_and_not_obeyed(
    engine: tuple[StandIn, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.out, "width", 200)  # no line is cut
    cause = "\x1b]52;c;cm0=\x1b\\\x1b[2J \x9b2J \u202e [red] [/x]\n\n\nhere"
    async with caller(tmp_path, engine[1]) as ada:
        attempt = {"exercise": "01.1", "state": "wrong", "cause": cause}
        assert (await ada.ask("POST", "/room/checks", attempt))[0] == 200
        _, seen, _ = await ada.ask("GET", "/services/watch/board", key=KEY)
    cli.out.print(cli.board_table(seen, hide_names=False))
    table = capsys.readouterr().out
    cli.say(cause)
    line = capsys.readouterr().out
    for shown in (table, line):
        assert not [char for char in shown if not char.isprintable() and char != "\n"]
        words = re.sub(r"\s", "", shown)
        assert "\\x1b]52;c;cm0=" in words
        assert "here" in words
    assert "[red] [/x]" in line
    assert seen["learners"][0]["cause"].endswith("[/x] here"), "a learner makes no line for each of 300 characters"


async def test_an_engine_that_hangs_is_told_on_the_board_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("servebook.room.front.HEALTH_SECONDS", 0.2)
    monkeypatch.setattr("servebook.room.front.ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hanging:  # takes connections, and says nothing
        async with caller(tmp_path, f"http://127.0.0.1:{hanging.getsockname()[1]}") as ada:
            status, seen, _ = await ada.ask("GET", "/services/watch/board", key=KEY)
            assert (status, seen["engine"]["ready"]) == (200, False)
            assert (await ada.ask("GET", "/room/health", key=""))[0] == 503
            told = await asyncio.wait_for(ada.front_app.context_tokens(), 5)
            assert told == Limits.learner_tokens_per_minute, "a learner's first request does not wait for it"


async def test_an_engine_that_answers_again_is_seen_to(
    engine: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "HEALTH_SECONDS", 0.2)
    monkeypatch.setattr(front, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(front, "PAGE_SECONDS", 0)
    stand_in, url = engine
    stand_in.goes_on = hung = asyncio.Event()
    async with caller(tmp_path, url) as ada:
        assert (await ada.ask("GET", "/room/health", key=""))[0] == 503
        stand_in.goes_on = None
        monkeypatch.setattr(front, "HEALTH_SECONDS", 60)
        monkeypatch.setattr(front, "ANSWER_SECONDS", 60)
        assert (await ada.ask("GET", "/room/health", key=""))[0] == 200
    hung.set()


@pytest.mark.parametrize("own", [True, False])
async def test_a_rooms_own_engine_has_a_key_that_opens_nothing_else(
    engine: tuple[StandIn, str], tmp_path: Path, own: bool
) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url, own_engine=own) as ada:
        assert (await ada.complete(5))[0] == 200
        assert (await ada.ask("GET", "/metrics", key=""))[0] == 200
        assert stand_in.keys == [f"Bearer {engine_key(KEY) if own else KEY}"] * 2
        assert (await ada.ask("GET", "/room/learners", key=engine_key(KEY)))[0] == 401


async def test_a_redirect_is_passed_on_and_not_followed(tmp_path: Path) -> None:
    """The front would show the engine's key wherever it leads, past the list of what learners reach."""
    followed: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/v1/models":
            return web.json_response({}, status=307, headers={"Location": "/metrics"})
        followed.append(request.path)
        return web.json_response({})

    app = web.Application()
    app.add_routes([web.get("/{path:.*}", answer)])
    async with TestServer(app) as server, caller(tmp_path, str(server.make_url(""))) as ada:
        assert (await ada.ask("GET", "/v1/models"))[0] == 307
    assert followed == []


SQUATTER = """
import os, socket
os.setuid(65534)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    print(listener.accept()[0].recv(9), flush=True)
"""


@pytest.fixture
def squatter() -> Iterator[IO[str]]:
    """Another user's program; it prints its port, and what it gets."""
    if os.getuid() != 0:
        pytest.skip("needs root to act as another user")
    with subprocess.Popen([sys.executable, "-c", SQUATTER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout
        process.kill()


async def test_whoever_listens_in_the_place_of_a_rooms_engine_is_told_nothing(
    squatter: IO[str], tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{squatter.readline().strip()}"
    async with caller(tmp_path, url, own_engine=True) as ada:
        status, answer, _ = await ada.complete(5)
        assert (status, answer["error"]["type"]) == (503, "engine_unavailable")
        assert (await ada.ask("GET", "/room/health", key=""))[0] == 503
    told, _, _ = select.select([squatter], [], [], 0.5)
    assert not told, "not even a connection was made"


@pytest.mark.usefixtures("no_key_set")
def test_whoever_listens_in_the_place_of_the_front_is_told_nothing(
    squatter: IO[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = squatter.readline().strip()
    entry = {"name": "front", "state": "starting", "endpoints": {"http": f"127.0.0.1:{port}"}}
    monkeypatch.setattr(launch, "status", lambda _: [entry])
    room = admin.RoomAdmin(instructors_settings())
    for ask in (room.board, room.learners):
        with pytest.raises(ServebookError, match="The room does not answer"):
            ask()
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        assert not hub.renew_routes("proxy", f"http://127.0.0.1:{proxy.server_port}", f"http://127.0.0.1:{port}", KEY)
        proxy.shutdown()
    told, _, _ = select.select([squatter], [], [], 0.5)
    assert not told, "not even a connection was made"


def test_the_key_is_that_of_the_room_whichever_terminal_started_it(
    no_key_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = own_settings()
    assert admin.with_rooms_key(settings) == settings, "no room is up"
    with subprocess.Popen(["sleep", "600"], env={"SERVEBOOK_API_KEY": KEY}) as front:
        monkeypatch.setattr(admin, "describe", lambda _: {"pid": front.pid})
        try:
            eventually(lambda: admin.with_rooms_key(settings).key == KEY, "the key of the front")
        finally:
            front.kill()


async def test_a_class_that_asks_at_once_costs_two_looks_which_the_event_loop_does_not_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first was begun before the others were connected: what it found says nothing of them."""
    own = Front("http://127.0.0.1:9", KEY, Roll(tmp_path / "keys.json"), Limits(), own_engine=True)
    found = [True, False]
    looking: list[int] = []

    def look(*_: object) -> bool:
        looking.append(threading.get_ident())
        return found.pop(0)

    monkeypatch.setattr(front, "only_ours", look)
    ends = await asyncio.gather(*(own.require_own() for _ in range(64)), return_exceptions=True)
    assert [type(end) for end in ends] == [type(None)] + [ClientConnectionError] * 63
    assert len(looking) == 2
    assert threading.get_ident() not in looking


def test_who_is_longest_at_it_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    board = Board()
    for name, exercise, minutes in (("ada", "01.1", 0), ("tim", "01.1", 3), ("emmy", "01.2", 2)):
        now += 60 * minutes
        board.note(name, Attempt(exercise=exercise, state="wrong"))
    board.note("grace", Attempt(exercise="01.1", state="passed"))
    now += 60 * 2

    def rows() -> list[tuple[str, bool, int]]:
        found = [{"name": name} | board.row(name) for name in ("newcomer", "grace", "emmy", "tim", "ada")]
        return [(row["name"], row["needs_help"], row["since"]) for row in sorted(found, key=stuck_first)]

    # 01.1 takes 6 minutes in all.
    assert rows()[0] == ("ada", True, 420)
    assert rows()[1:] == [("tim", False, 240), ("emmy", False, 120), ("grace", False, 120), ("newcomer", False, 0)]
    board.note("ada", Attempt(exercise="01.1", state="passed"))
    assert rows()[0][0] == "tim"
    assert board.checks_per_minute() == 1


@pytest.mark.parametrize(("why", "limits"), [("room_full", Limits(waiting=0)), ("engine_unavailable", Limits())])
async def test_what_the_room_refused_costs_no_tokens(tmp_path: Path, why: str, limits: Limits) -> None:
    async with caller(tmp_path, f"http://127.0.0.1:{free_port()}", limits) as ada:
        if why == "room_full":
            ada.front_app.turnstile.running["grace"] = limits.places
        for _ in range(2):
            status, answer, _ = await ada.complete(6000)
            assert (status, answer["error"]["type"]) == (503, why)


def test_a_piece_that_says_what_its_own_answer_has_is_no_total() -> None:
    """`continuous_usage_stats` has vLLM say it with each piece, for one of n answers."""
    usage = Usage(asking.read("/v1/completions", b'{"n": 4, "stream": true}', CONTEXT, places=4))
    usage.counted = 0
    for number in range(8):
        usage.passes(b"data: " + json.dumps(PIECE | {"usage": USAGE | {"completion_tokens": 1 + number // 4}}).encode())
    assert (usage.told, usage.counted) == (None, 8)


@pytest.mark.parametrize(
    ("path", "interval", "counted"),
    [
        ("/v1/messages", -1, 2),
        ("/v1/responses", 9, 2),  # ignored there
        ("/v1/messages", "x", 2),
        ("/v1/completions", -1, 2),  # and refused by the engine
        ("/v1/completions", 9, 18),
    ],
)
def test_a_piece_counts_as_what_it_may_hold(path: str, interval: object, counted: int) -> None:
    usage = Usage(asking.read(path, json.dumps({"stream_interval": interval}).encode(), CONTEXT, places=4))
    usage.counted = 0
    for _ in range(2):
        usage.passes(b"data: " + json.dumps(PIECE).encode())
    assert usage.counted == counted


USAGE = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
PIECE = {"choices": [{"index": 0, "text": "a"}]}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/completions", {"choices": [{"text": "aaa"}], "usage": USAGE}),
        ("/v1/responses", {"usage": {"input_tokens": 1, "output_tokens": 7}}),
        ("/v1/chat/completions", [PIECE, PIECE, {"choices": [], "usage": USAGE}, b"[DONE]"]),
        ("/v1/responses", [{"type": "response.completed", "response": {"usage": {"output_tokens": 7}}}]),
        ("/v1/messages", [{"message": {"usage": {"output_tokens": 0}}}, {"usage": {"output_tokens": 7}}]),
    ],
)
async def test_at_its_end_a_request_costs_what_was_written(
    engine: tuple[StandIn, str], tmp_path: Path, path: str, says: Any
) -> None:
    stand_in, url = engine
    stand_in.says = says
    async with caller(tmp_path, url) as ada:
        assert (await ada.send(path, {"stream": isinstance(says, list)})).status_code == 200
        assert 5990 <= ada.level() <= 5993 + 1  # of 6,000; the bucket fills a little meanwhile


async def test_a_stream_has_no_event_that_its_reader_did_not_ask_for(
    engine: tuple[StandIn, str], tmp_path: Path
) -> None:
    stand_in, url = engine
    last = {"choices": [], "usage": USAGE}
    stand_in.says = [PIECE, last, b"[DONE]"]
    raw = [f"data: {json.dumps(event)}\n\n" for event in (PIECE, last)] + ["data: [DONE]\n\n"]
    async with caller(tmp_path, url) as ada:
        without = await ada.send("/v1/completions", {"stream": True, "stream_options": {"x": 1}})
        asked = await ada.send("/v1/completions", {"stream": True, "stream_options": {"include_usage": True}})
    assert without.text == raw[0] + raw[2]
    assert asked.text == "".join(raw)
    assert [json.loads(body)["stream_options"] for body in stand_in.bodies] == [
        {"x": 1, "include_usage": True},
        {"include_usage": True},
    ]


@pytest.mark.parametrize(("packs", "cost"), [("where it may be", 7), ("always", 100)])
async def test_a_stream_that_a_proxy_would_pack_comes_as_it_is_and_one_that_is_packed_costs_what_was_asked_for(
    engine: tuple[StandIn, str], tmp_path: Path, packs: str, cost: int
) -> None:
    stand_in, url = engine
    stand_in.packs, stand_in.says = packs, [PIECE, {"choices": [], "usage": USAGE}, b"[DONE]"]
    async with caller(tmp_path, url) as ada:
        answer = await ada.send("/v1/completions", {"stream": True, "max_tokens": 100})
        assert ("Content-Encoding" in answer.headers) == (packs == "always")
        assert answer.text.endswith("data: [DONE]\n\n")
        assert 6000 - cost <= ada.level() <= 6000 - cost + 2


async def test_who_leaves_a_stream_pays_for_what_was_written(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    stand_in, url = engine
    stand_in.says, stand_in.goes_on = [PIECE] * 5, asyncio.Event()
    async with caller(tmp_path, url) as ada:

        def leave() -> None:
            with ada.begin("/v1/completions", {"stream": True, "ignore_eos": True, "max_tokens": 1000}) as answer:
                lines = answer.iter_lines()
                assert len([next(lines) for _ in range(9)]) == 9
                assert ada.level() < 5010

        await asyncio.to_thread(leave)
        await asyncio.to_thread(eventually, lambda: ada.level() > 5900, "the end of what was left")
        assert ada.level() <= 5995 + 2


async def test_who_leaves_before_the_answer_pays_what_was_asked_for(
    engine: tuple[StandIn, str], tmp_path: Path
) -> None:
    stand_in, url = engine
    stand_in.goes_on = asyncio.Event()
    async with caller(tmp_path, url, Limits(learner_tokens_per_minute=6000)) as ada:

        def leave() -> None:
            with pytest.raises(requests.Timeout):
                ada.begin("/v1/completions", {"max_tokens": 1000}, timeout=0.5)

        await asyncio.to_thread(leave)
        await asyncio.to_thread(eventually, lambda: not ada.state().under_way, "the end of what was left")
        assert ada.level() < 5000 + 400


async def test_an_answer_that_takes_too_long_is_paid_for(
    engine: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "READ_SECONDS", 0.2)
    stand_in, url = engine
    stand_in.goes_on = asyncio.Event()
    async with caller(tmp_path, url, Limits(learner_tokens_per_minute=6000)) as ada:
        status, answer, wait = await ada.complete(1000)
        assert (status, answer["error"]["type"], wait) == (504, "engine_timeout", "")
        assert answer["error"]["message"] == "No word within 0.2 s. Stream it."
        assert ada.level() < 5000 + 400, "the engine was at work"
        assert await ada.counted() == ['room_requests_total{path="/v1/completions",status="504"} 1.0']


async def test_an_engine_that_takes_no_connection_was_not_at_work(
    engine: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(*_: object, **__: object) -> None:
        raise ConnectionTimeoutError

    async with caller(tmp_path, engine[1], Limits(learner_tokens_per_minute=6000)) as ada:
        monkeypatch.setattr(ClientSession, "request", connect)
        status, answer, wait = await ada.complete(6000)
        assert (status, answer["error"]["type"], wait) == (503, "engine_unavailable", "5")
        assert ada.level() == 6000


async def test_a_stream_that_falls_silent_is_cut_and_costs_what_it_had(
    engine: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "READ_SECONDS", 2)
    stand_in, url = engine
    stand_in.says, stand_in.goes_on = [PIECE] * 5, asyncio.Event()
    async with caller(tmp_path, url) as ada:
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            await ada.send("/v1/completions", {"stream": True, "max_tokens": 1000})
        await asyncio.to_thread(eventually, lambda: not ada.state().under_way, "the end of the request")
        assert 5990 <= ada.level() <= 5995 + 2
        assert await ada.counted() == ['room_requests_total{path="/v1/completions",status="502"} 1.0']
        assert ada.served() == (0, 0, 0)


async def test_what_the_engine_did_not_serve_is_not_counted_as_served(
    engine: tuple[StandIn, str], tmp_path: Path
) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url) as ada:
        for stand_in.status in (400, 404, 500):
            assert (await ada.complete(9))[0] == stand_in.status
        assert ada.served() == (0, 0, 0)
        stand_in.status = 200
        assert (await ada.complete(9))[0] == 200
        assert ada.served() == (1, 1, 1)


async def test_a_fault_of_the_fronts_own_is_not_counted_as_a_caller_who_left(
    engine: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with caller(tmp_path, engine[1]) as ada:
        monkeypatch.setattr(asking, "read", lambda *_: 1 / 0)
        assert (await ada.send("/v1/completions", {})).status_code == 500
        assert await ada.counted() == ['room_requests_total{path="/v1/completions",status="500"} 1.0']


async def test_an_answer_takes_a_place(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    stand_in, url = engine
    stand_in.goes_on = asyncio.Event()
    async with caller(tmp_path, url, Limits(learner_places=4)) as ada:
        first = asyncio.create_task(ada.ask("POST", "/v1/completions", {"n": 2, "prompt": ["a", "b"]}))
        await asyncio.to_thread(eventually, lambda: ada.taken() == 4, "four places taken")
        second = asyncio.create_task(ada.ask("POST", "/v1/completions", {"n": 3}))
        await asyncio.to_thread(eventually, lambda: ada.front_app.turnstile.waiting == 1, "the second waits")
        assert (await ada.ask("POST", "/v1/completions", {"n": 2}))[0] == 429  # 3 of 4 wait already
        stand_in.goes_on.set()
        assert [(await task)[0] for task in (first, second)] == [200, 200]
        assert ada.taken() == 0


@pytest.mark.parametrize("path", sorted(TOKENIZING))
async def test_who_tokenizes_takes_a_place_and_sends_no_book(
    engine: tuple[StandIn, str], tmp_path: Path, path: str
) -> None:
    stand_in, url = engine
    stand_in.goes_on = asyncio.Event()
    async with caller(tmp_path, url, Limits(learner_places=1)) as ada:
        first = asyncio.create_task(ada.ask("POST", path, {}))
        await asyncio.to_thread(eventually, lambda: ada.taken() == 1, "a place taken")
        second = asyncio.create_task(ada.ask("POST", path, {}))
        await asyncio.to_thread(eventually, lambda: ada.front_app.turnstile.waiting == 1, "the second waits")
        assert (await ada.ask("POST", path, {}))[0] == 429
        stand_in.goes_on.set()
        assert [(await task)[0] for task in (first, second)] == [200, 200]
        assert (await ada.ask("POST", path, {"prompt": "1 " * (1 << 15)}))[0] == 413
        assert ada.taken() == 0
    assert len(stand_in.seen) == 2


@pytest.mark.survives("a reader who does not read", "room", lost="that answer; its place is free again")
@pytest.mark.parametrize("streamed", [True, False])
async def test_who_does_not_read_gives_up_the_place(
    engine: tuple[StandIn, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    streamed: bool,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(front.log, "warning", lambda text, *_: said.append(text))
    monkeypatch.setattr(front, "READER_SECONDS", 0.2)
    stand_in, url = engine
    piece = PIECE | {"text": "a" * (1 << 20)}
    stand_in.says = [piece] * 32 if streamed else {"choices": [piece] * 32}  # more than the sockets between them hold
    async with caller(tmp_path, url) as ada:
        answer = await asyncio.to_thread(ada.begin, "/v1/completions", {"stream": streamed, "max_tokens": 1000})
        with answer:
            await asyncio.to_thread(eventually, lambda: not ada.state().under_way, "the end of what nobody reads")
            assert ada.taken() == 0
        assert await ada.counted() == ['room_requests_total{path="/v1/completions",status="499"} 1.0']
    assert said == ["a learner does not read an answer"]


async def test_pages_without_a_key_cost_the_engine_one_request_a_second(
    engine: tuple[StandIn, str], tmp_path: Path
) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url) as ada:
        answers = await asyncio.gather(*(ada.ask("GET", "/metrics", key="") for _ in range(16)))
        assert [status for status, _, _ in answers] == [200] * 16
        assert 1 <= len(stand_in.seen) <= 2
        assert (await ada.ask("GET", "/room/metrics", key=""))[0] == 401
        assert (await ada.ask("GET", "/room/metrics"))[0] == 401  # a learner's key


async def test_an_engine_that_hangs_over_a_page_is_asked_for_it_once(
    engine: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "PAGE_SECONDS", 0)
    stand_in, url = engine
    stand_in.goes_on = asyncio.Event()
    async with caller(tmp_path, url) as ada:
        pages = [asyncio.create_task(ada.ask("GET", "/metrics", key=""))]
        await asyncio.to_thread(eventually, lambda: stand_in.seen, "the first")
        pages += [asyncio.create_task(ada.ask("GET", "/metrics", key="")) for _ in range(4)]
        assert not (await asyncio.wait(pages, timeout=0.5))[0]
        stand_in.goes_on.set()
        assert [(await page)[0] for page in pages] == [200] * 5
    assert stand_in.seen == ["/metrics"]


async def test_paths_that_are_relayed(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    stand_in, url = engine
    paths = [*RELAYED, "/v1/models?a=%2F..&b=/../x"]
    async with caller(tmp_path, url, Limits(learner_tokens_per_minute=10**6)) as ada:
        for path in paths:
            assert (await ada.ask("POST", path, {}))[0] == 200
        assert [(await ada.ask("GET", path, key=""))[0] for path in ("/metrics", "/tokenize")] == [200, 401]
        for headers in ({}, {"Authorization": f"Bearer {ada.key}"}):
            health = str(ada.front.make_url("/health"))
            head = await asyncio.to_thread(requests.head, health, headers=headers, timeout=10)
            assert head.status_code == 200, "monitors send it"
    assert [path.partition("?")[0] for path in stand_in.seen] == [*RELAYED, "/v1/models", "/metrics", "/health"]


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/v1/../invocations",
        "/v1/%2e%2e/invocations",
        "/v1/x/../completions",
        "/v1/./completions",
        "/v1//completions",
        "//v1/completions",
        "/v1/completions/",
        "/v1/complet%69ons",
        "/v1/models/../../invocations",
        "/health/../invocations",
        "/tokenize/..%2finvocations",
        "/v1/chat/completions/batch",
        "/inference/v1/abort_requests",
    ],
)
async def test_no_other_path_reaches_the_engine(engine: tuple[StandIn, str], tmp_path: Path, path: str) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url) as ada:
        status, answer, _ = await ada.ask("POST", path, {"max_tokens": 9})
    assert (status, answer["error"]["type"]) == (404, "not_found")
    assert not stand_in.seen


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"max_tokens": Infinity}', 400, "max_tokens must be a whole number"),
        (b'{"max_tokens": 1e999}', 400, "max_tokens must be a whole number"),
        (b'{"max_tokens": NaN}', 400, "max_tokens must be a whole number"),
        (b'{"max_tokens": "2000.0"}', 400, "max_tokens must be a whole number"),  # vLLM reads 2000
        (b'{"max_tokens": 5, "n": 0.5}', 400, "n must be a whole number"),
        (b"[" * 200_000, 400, "nested too deeply"),
        (b" " * ((1 << 20) + 1), 413, "exceeded"),
    ],
)
async def test_what_cannot_be_counted_is_refused(
    engine: tuple[StandIn, str], tmp_path: Path, body: bytes, status: int, says: str
) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url) as ada:
        got, answer, _ = await ada.ask("POST", "/v1/completions", body)
        assert (got, answer["error"]["code"]) == (status, status)
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert says in answer["error"]["message"]
        assert await ada.counted() == [f'room_requests_total{{path="/v1/completions",status="{status}"}} 1.0']
    assert not stand_in.seen


async def test_a_body_that_is_not_what_its_header_says(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    _, url = engine
    async with caller(tmp_path, url) as ada:
        target, headers = str(ada.front.make_url("/v1/completions")), bearer(ada.key) | {"Content-Encoding": "gzip"}
        answer = await asyncio.to_thread(requests.post, target, data=b"not gzip at all", headers=headers, timeout=10)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "The body cannot be read.")


@pytest.mark.parametrize("path", ["/v1/completions", "/room/checks"])
async def test_a_body_that_does_not_come_is_not_waited_for(
    engine: tuple[StandIn, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(front, "BODY_SECONDS", 0.2)
    async with caller(tmp_path, engine[1]) as ada:

        def begin() -> bytes:
            with socket.create_connection(("127.0.0.1", ada.front.port or 0), timeout=5) as line:
                said = (
                    f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ada.key}\r\nContent-Length: 9\r\n\r\n"
                )
                line.sendall(said.encode())
                return line.recv(4096)

        assert b" 408 " in (await asyncio.to_thread(begin)).partition(b"\r\n")[0]
        assert not ada.state().under_way


async def test_a_check_is_refused_as_a_request_is(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    async with caller(tmp_path, engine[1]) as ada:
        status, answer, _ = await ada.ask("POST", "/room/checks", b" " * ((1 << 20) + 1))
        assert (status, answer["error"]["code"]) == (413, 413)


@pytest.mark.parametrize("path", ["/v1/models", "/room/learners", "/services/watch/board", "/room/checks"])
async def test_a_key_that_is_no_text_is_nobodys(engine: tuple[StandIn, str], tmp_path: Path, path: str) -> None:
    method = "POST" if path == "/room/checks" else "GET"
    async with caller(tmp_path, engine[1]) as ada:
        assert (await ada.ask(method, path, key="\xff"))[0] == 401


async def hold(turnstile: Turnstile, name: str, entered: list[str], leave: asyncio.Event) -> None:
    async with turnstile.place(name):
        entered.append(name)
        await leave.wait()


async def test_free_places_go_round() -> None:
    turnstile = Turnstile(Limits(places=2, learner_places=4))
    entered: list[str] = []
    leave = asyncio.Event()
    names = ["greedy"] * 6 + ["ada", "grace", "ada"]
    tasks = [asyncio.create_task(hold(turnstile, name, entered, leave)) for name in names]
    await asyncio.sleep(0)
    assert entered == ["greedy", "greedy"]
    leave.set()
    await asyncio.gather(*tasks)
    assert entered[2:5] in (["greedy", "ada", "grace"], ["ada", "grace", "greedy"], ["ada", "greedy", "grace"])
    assert turnstile.running.total() == 0
    assert turnstile.waiting == 0


async def test_who_waits_for_a_share_keeps_nobody_from_free_places() -> None:
    turnstile = Turnstile(Limits(places=4, waiting=1, learner_places=2))
    entered: list[str] = []
    leave = asyncio.Event()
    tasks = [asyncio.create_task(hold(turnstile, name, entered, leave)) for name in ("ada", "ada", "ada", "grace")]
    await asyncio.sleep(0)
    assert (entered, turnstile.waiting) == (["ada", "ada", "grace"], 1)
    leave.set()
    await asyncio.gather(*tasks)


async def test_nobody_asks_for_more_places_than_a_small_room_has(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    async with caller(tmp_path, engine[1], Limits(places=2, learner_places=16)) as ada:
        assert (await ada.ask("POST", "/v1/completions", {"n": 3}))[0] == 400
        assert (await ada.ask("POST", "/v1/completions", {"n": 2}))[0] == 200


async def test_too_many_are_refused_and_leavers_free_their_place() -> None:
    turnstile = Turnstile(Limits(places=1, waiting=2, patience=0.2, learner_places=1))
    leave = asyncio.Event()
    first = asyncio.create_task(hold(turnstile, "ada", [], leave))
    await asyncio.sleep(0)
    second = asyncio.create_task(hold(turnstile, "ada", [], leave))
    third = asyncio.create_task(hold(turnstile, "grace", [], leave))
    await asyncio.sleep(0)
    with pytest.raises(Refused) as share:
        await hold(turnstile, "ada", [], leave)
    with pytest.raises(Refused) as full:
        await hold(turnstile, "alan", [], leave)
    assert (share.value.status, full.value.status) == (429, 503)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second  # nobody refused it
    with pytest.raises(Refused, match=r"within 0\.2 s"):
        await third
    assert turnstile.waiting == 0
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    assert turnstile.running.total() == 0


def test_the_front_needs_the_instructors_key(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="needs a key"):
        find_server("front").argv(Settings(state_dir=tmp_path), tmp_path, {"vllm": {"http": "127.0.0.1:8000"}})


def test_the_instructors_key_is_the_one_that_is_set() -> None:
    assert instructors_key(load_settings(api_key="eight-ch")) == "eight-ch"


@pytest.fixture
def no_key_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A terminal with an opened room's host, as docs/room.md has it; the state folder."""
    monkeypatch.delenv("SERVEBOOK_API_KEY", raising=False)
    monkeypatch.setenv("SERVEBOOK_HOST", "0.0.0.0")
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "of" / "mine"))
    return tmp_path / "of" / "mine"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which `room start` would open a room; it goes no further."""
    seen: list[Settings] = []

    def as_far_as_here(settings: Settings) -> None:
        seen.append(settings)
        raise ServebookError("The room is not up.")

    monkeypatch.setattr(cli, "require_safe", as_far_as_here)
    return seen


@pytest.mark.parametrize(
    "words",
    [
        "start",
        "code",
        "code --new",
        "learners",
        "watch --once",
        "admit ada",
        "revoke ada",
        "reset ada",
        "collect",
        "load",
    ],
)
def test_every_command_of_an_opened_room_does_with_the_key_that_is_made(
    no_key_set: Path, started: list[Settings], words: str
) -> None:
    done = CliRunner().invoke(cli.app, words.split())
    assert isinstance(done.exception, ServebookError), done.output
    assert re.search(r"The room is (not up|stopped)|No ada has signed up|Nobody has come in yet", str(done.exception))
    assert [each.host for each in started] == ["0.0.0.0"] * (words == "start")
    assert all(each.key == (no_key_set / "room" / "instructor.key").read_text() for each in started)


@pytest.mark.usefixtures("no_key_set")
@pytest.mark.parametrize("words", ["start", "start --trusted"])
def test_a_room_is_trusted_where_its_command_says_so(
    monkeypatch: pytest.MonkeyPatch, started: list[Settings], words: str
) -> None:
    monkeypatch.setenv("SERVEBOOK_ROOM_TRUSTED", "")  # and put back: the command sets it, for the hub
    done = CliRunner().invoke(cli.app, words.split())
    assert str(done.exception) == "The room is not up.", done.output
    assert [each.room.trusted for each in started] == [words == "start --trusted"]
    assert instructors_settings().room.trusted == (words == "start --trusted"), "as the hub reads them itself"


def test_the_folder_of_keys_and_codes_is_the_instructors_alone(no_key_set: Path) -> None:
    before = os.umask(0o002)
    try:
        assert instructors_settings().key
    finally:
        os.umask(before)
    room = no_key_set / "room"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (no_key_set, room, room / "instructor.key")]
    assert modes == [0o700, 0o700, 0o600]


def test_a_key_that_cannot_be_written_is_made_by_the_next_command(
    no_key_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = no_key_set / "room" / "instructor.key"
    with monkeypatch.context() as disk:
        full_disk(disk)
        with pytest.raises(ServebookError, match=r"instructor\.key cannot be kept: No space left on device"):
            instructors_settings()
    assert not path.exists()
    path.write_text("")  # what an older version left then
    key = instructors_settings().key
    assert key == path.read_text() == instructors_settings().key
    assert len(key) == 43


@pytest.mark.usefixtures("no_key_set")
def test_two_commands_at_once_have_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def drawn(*_: int) -> str:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # where both are here at once, each would write its own
        return secrets.token_hex(16)

    monkeypatch.setattr(secrets, "token_urlsafe", drawn)
    with ThreadPoolExecutor(2) as pool:
        keys = [each.result().key for each in [pool.submit(instructors_settings) for _ in range(2)]]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("says", ["text", "[]", '{"error": "text"}'])
def test_what_answers_in_the_fronts_place_is_quoted_by_its_status(
    no_key_set: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    entry = {"name": "front", "state": "ready", "endpoints": {"http": "127.0.0.1:1"}}
    monkeypatch.setattr(launch, "status", lambda _: [entry])
    answer = requests.Response()
    answer.status_code, answer.reason, answer._content = 502, "Bad Gateway", says.encode()
    monkeypatch.setattr(requests, "request", lambda *_, **__: answer)
    monkeypatch.setattr(admin, "only_ours", lambda _: True)
    with pytest.raises(ServebookError, match="The room answers 502 Bad Gateway"):
        admin.RoomAdmin(instructors_settings()).learners()


def test_passwords_that_cannot_be_changed_are_named(no_key_set: Path) -> None:
    (no_key_set / "room").mkdir(parents=True)
    (no_key_set / "room" / "passwords.sqlite").write_text("no database, by a disk that was full " * 99)
    done = CliRunner().invoke(cli.app, ["reset", "ada"])
    assert re.search(r"passwords\.sqlite cannot be changed: file is not a database", str(done.exception))


@pytest.mark.usefixtures("no_key_set")
@pytest.mark.parametrize("words", ["start", "code", "learners", "code --new"])
def test_a_state_folder_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", "/dev/null/state")
    done = CliRunner().invoke(cli.app, words.split())
    assert isinstance(done.exception, ServebookError), done.exception
    assert "/dev/null/state cannot be used: Not a directory" in str(done.exception)


def test_the_folder_of_a_learners_progress_is_theirs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "state"))
    with Store():
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_a_room_that_crashed_is_not_up(no_key_set: Path) -> None:
    (no_key_set / "servers").mkdir(parents=True)
    (no_key_set / "servers" / "hub.json").write_text('{"state": "failed"}')
    done = CliRunner().invoke(cli.app, ["code"])
    assert str(done.exception).startswith("The room is not up.")


@pytest.mark.parametrize("name", ["hub", "front"])
def test_a_second_terminal_goes_on_with_the_rooms_settings(
    no_key_set: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = {"ROOM_SEATS": "7", "API_KEY": "another-key", "SERVED_NAME": "another", "TEST_RUN": "mine"}
    monkeypatch.setattr(os, "environ", os.environ | {f"SERVEBOOK_{key}": value for key, value in own.items()})
    given = {"API_KEY": KEY, "HOST": "0.0.0.0", "STATE_DIR": "mine", "ROOM_URL": "https://x", "SUPERVISOR": "/x.sock"}
    words = ["sleep", "600"]
    env = {f"SERVEBOOK_{key}": value for key, value in given.items()} | {"LANG": "of the room"}
    with subprocess.Popen(words, env=env) as process:
        there = {"pid": process.pid, "host": "192.0.2.7"}
        monkeypatch.setattr(admin, "describe", lambda files: there if files.instance == name else None)
        try:
            settings = rooms_settings()
        finally:
            process.kill()
    assert (settings.key, settings.host, settings.room.url) == (KEY, "192.0.2.7", "https://x")
    assert (settings.room.seats, settings.model_name) == (40, "smollm2"), "set in this terminal only"
    assert os.environ["SERVEBOOK_TEST_RUN"] == "mine", "which is no setting"
    assert os.environ.get("LANG") != "of the room", "nor is that"
    assert settings.state_dir == no_key_set
    assert os.environ["SERVEBOOK_API_KEY"] == KEY, "for the processes that a command starts"
    assert "SERVEBOOK_SUPERVISOR" not in os.environ


def test_of_commands_that_ask_for_the_key_at_once_one_makes_it(
    no_key_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that made another would lock out who has read the first."""

    def slowly(*words: Any) -> None:
        time.sleep(0.1)  # meanwhile the others have seen that there is none
        write_whole(*words)

    monkeypatch.setattr(admin, "write_whole", slowly)
    with ThreadPoolExecutor(4) as pool:
        keys = list(pool.map(lambda _: instructors_key(own_settings()), range(4)))
    assert keys == [(no_key_set / "room" / "instructor.key").read_text()] * 4


def test_the_join_code_is_drawn_and_is_on_no_command_line(tmp_path: Path) -> None:
    settings = load_settings(room={"env": tmp_path})
    assert "There is no picture of the address: segno is not in" in cli.picture(settings, "https://x/#CODE")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\ntr '\\0' ' ' < /proc/$$/cmdline; echo; cat\n")
    python.chmod(0o755)
    command, _, told = cli.picture(settings, "https://x/#CODE").partition("\n")
    assert "segno" in command
    assert "CODE" not in command
    assert told == "https://x/#CODE"
    python.write_text("#!/bin/sh\nexit 1\n")
    assert "segno is not in" in cli.picture(settings, "https://x/#CODE")


def test_an_address_and_a_path_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "why_not_apart", lambda _: "there is no /tmp/[/x]/useradd")
    settings = load_settings(host="fd00:a::5", api_key=KEY, state_dir=tmp_path, room={"env": tmp_path / "[/x]"})
    cli.show_door(settings, "8100")
    said = capsys.readouterr().out
    assert "Learners sign up at https://[fd00:a::5]:8100 with the join code" in said
    assert "there is no /tmp/[/x]/useradd" in said


def test_a_hub_gets_an_ipv6_address_as_urls_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(hub, "find_hub", lambda _: tmp_path)
    monkeypatch.setattr(hub, "make_master", lambda _: None)
    monkeypatch.setattr(hub, "keep", lambda commands, env, _: given.append(env["SERVEBOOK_HUB_CONFIG"]))
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SERVEBOOK_API_KEY", KEY)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        hub.main(front="http://127.0.0.1:1", http_port=8100, routes_port=1, api_port=2, host="::1")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert json.loads(given[0])["public_url"] == "http://[::1]:8100"


def test_of_the_cache_a_desk_sees_what_is_everybodys_and_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    shared = ["models/m/model.safetensors", "adapters/a/adapter.safetensors", "vllm-rs/1/vllm-rs", "home/hub/m/blob"]
    own = ["home/token", "home/stored_tokens", "vllm/compiled.py", "token"]
    for name in (*shared, *own):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).touch(mode=0o600)
    (cache / "models" / "link").symlink_to(cache / "token")
    monkeypatch.setenv("HF_HOME", str(cache / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    settings = load_settings(cache_dir=cache, state_dir=tmp_path / "state")
    hub.open_cache(settings)
    assert [name for name in (*shared, *own) if (cache / name).stat().st_mode & 0o004] == shared
    shown = [path.removeprefix(f"{cache}/") for path in hub.view(settings)["shown"] if path.startswith(f"{cache}/")]
    assert shown == ["adapters", "home/hub", "models", "vllm-rs"]


OPENED = {"host": "0.0.0.0", "api_key": "instructors-key"}


def test_a_room_whose_desks_are_not_apart_is_opened_only_when_all_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    settings = load_settings(state_dir=tmp_path, **OPENED)
    with pytest.raises(LaunchError, match=r"cannot be kept apart here \(the room does not run as root\)"):
        hub.require_safe(settings)
    hub.require_safe(load_settings(state_dir=tmp_path, room={"trusted": True}, **OPENED))
    hub.require_safe(load_settings(state_dir=tmp_path))
    behind_a_web_server = load_settings(state_dir=tmp_path, room={"url": "https://room.example.org"})
    with pytest.raises(LaunchError, match="cannot be kept apart here"):
        hub.require_safe(behind_a_web_server)


def test_an_opened_room_has_a_certificate_of_its_own_for_its_address(tmp_path: Path) -> None:
    assert tls.files(load_settings(state_dir=tmp_path)) is None
    assert tls.address(load_settings(state_dir=tmp_path), 8100) == "http://127.0.0.1:8100"
    first = load_settings(state_dir=tmp_path, **OPENED | {"host": "192.0.2.7"})
    files = tls.files(first)
    assert files
    assert not files[0].exists(), "made by the room that starts, not by whoever asks for its address"
    assert tls.prepare(first) == files
    assert tls.address(first, 8100) == "https://192.0.2.7:8100"
    assert stat.S_IMODE(files[1].stat().st_mode) == 0o600
    kept = tls.fingerprint(files[0])
    assert re.fullmatch(r"([0-9A-F]{2}:){31}[0-9A-F]{2}", kept)
    tls.prepare(first)
    assert tls.fingerprint(files[0]) == kept  # who compared it once need not do so again
    moved = load_settings(state_dir=tmp_path, **OPENED | {"host": "room.example.org"})
    assert tls.files(moved) == files
    assert tls.fingerprint(files[0]) == kept  # the room that is up goes on with it
    tls.prepare(moved)
    assert tls.fingerprint(files[0]) != kept
    given = load_settings(state_dir=tmp_path, room={"tls_cert": files[0], "tls_key": files[1], "url": "https://x/"})
    assert tls.files(given) == tls.prepare(given) == files
    assert tls.address(given, 8100) == "https://x"
    for everywhere in ("0.0.0.0", "::"):
        host = tls.host_for_learners(load_settings(state_dir=tmp_path, **OPENED | {"host": everywhere}))
        assert host not in ("0.0.0.0", "::"), "no address that a browser could go to"


@pytest.mark.parametrize("lost", ["room.key", "room.pem"])
@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN"])
def test_a_certificate_that_was_not_written_whole_is_made_anew(
    tmp_path: Path, lost: str, content: bytes | None
) -> None:
    settings = load_settings(state_dir=tmp_path, **OPENED | {"host": "192.0.2.7"})
    files = tls.prepare(settings)
    assert files
    before, folder = tls.fingerprint(files[0]), files[0].parent
    (folder / lost).unlink()
    if content is not None:
        (folder / lost).write_bytes(content)
    assert tls.prepare(settings) == files
    assert tls.fingerprint(files[0]) != before
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*files)


def test_a_certificate_with_the_key_of_another_is_made_anew(tmp_path: Path) -> None:
    """A room that is killed between the two writes leaves such a pair."""
    settings = load_settings(state_dir=tmp_path, **OPENED | {"host": "192.0.2.7"})
    files = tls.prepare(settings)
    assert files
    key = files[1].read_bytes()
    tls.make(*files, "192.0.2.7")
    files[1].write_bytes(key)
    assert tls.prepare(settings) == files
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*files)


@pytest.mark.parametrize(
    ("device", "words"), [("cpu", "--max-num-batched-tokens 24 --max-num-seqs 24 --seed 7"), ("gpu", "--seed 7")]
)
def test_a_rooms_engine_takes_short_steps_where_a_long_one_would_hold_up_all(device: str, words: str) -> None:
    settings = load_settings(device=device, engine_args="--seed 7")
    assert SERVERS["front"].needs(settings)["vllm"].engine_args == words


def test_an_engine_that_a_room_starts_has_a_key_of_its_own_and_one_elsewhere_the_rooms(tmp_path: Path) -> None:
    at: dict[str, Endpoints] = {"vllm": {"http": "127.0.0.1:8000"}}
    for url, key, own in ((None, engine_key(KEY), True), ("http://gpu-box:8000", KEY, False)):
        settings = load_settings(api_key=KEY, engine_url=url)
        engine = SERVERS["front"].needs(settings)["vllm"]
        assert engine.key == key
        assert ("KeyOnEveryPath" in engine.engine_args) is own, "a desk would find its port, and /invocations"
        assert ("--own-engine" in SERVERS["front"].argv(settings, tmp_path, at)) is own


def test_a_room_that_is_up_asks_its_keepers_and_probes_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each second: it would be a request to every server that runs."""
    settings = load_settings(api_key=KEY, state_dir=tmp_path)
    probed: list[str] = []
    asked: list[str] = []

    def status(_: Settings) -> list[Any]:
        probed.append("all")
        return [{"name": "hub", "pid": None}, {"name": "vllm", "pid": 1}, {"name": "front", "pid": None}]

    def describe(files: Files) -> Any:
        asked.append(files.instance)
        return {"host": "127.0.0.1"} if len(asked) < 6 else None

    monkeypatch.setattr(cli, "instructors_settings", lambda: settings)
    monkeypatch.setattr(cli, "require_safe", lambda _: None)
    monkeypatch.setattr(cli, "show_door", lambda *_: None)
    monkeypatch.setattr(cli, "describe", describe)
    monkeypatch.setattr(launch, "status", status)
    monkeypatch.setattr(launch, "serve", lambda *_, **__: SimpleNamespace(url="http://127.0.0.1:8100"))
    monkeypatch.setattr(launch, "down", lambda *_: None)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(LaunchError, match="JupyterHub has ended"):
        cli.start(trusted=False)
    assert asked == ["front", "hub", "vllm", "hub", "vllm", "hub"], "the front once, for where it listens"
    assert len(probed) == 2, "before it starts, and when it is up"


ENGINE: Any = {"endpoints": {"http": "127.0.0.1:8000"}, "pid": 1}


def test_an_engine_is_not_left_where_the_front_does_not_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its old port is another's; or it cannot start, for whatever reason. The room goes on, and says so."""
    served: list[Settings] = []
    ended: list[str] = []
    theirs = rooms_engine(load_settings(api_key=KEY))

    def elsewhere(_: str, settings: Settings) -> Any:
        served.append(settings)
        return SimpleNamespace(endpoints={"http": "127.0.0.1:8004"})

    def no_model(_: str, settings: Settings) -> Any:
        raise ModelError("The model is gone.")

    monkeypatch.setattr(cli, "RETRY_SECONDS", 0)
    monkeypatch.setattr(launch, "down", lambda name, _: ended.append(name))
    monkeypatch.setattr(launch, "serve", elsewhere)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        cli.bring_back("vllm", ENGINE | {"endpoints": {"http": f"127.0.0.1:{port}"}}, theirs)
    assert f"Port {port}, where the front asks for the engine, is held by another program." in capsys.readouterr().out
    assert not served, "it is looked for before the engine takes half a minute to start"
    monkeypatch.setattr(cli, "can_bind", lambda *_: True)
    cli.bring_back("vllm", ENGINE, theirs)
    assert "Port 8000, where the front asks" in capsys.readouterr().out
    assert served == [theirs]
    assert ended == ["vllm"]
    monkeypatch.setattr(launch, "serve", no_model)
    cli.bring_back("vllm", ENGINE, theirs)
    assert "The model is gone.\nThe room stays open without its engine" in capsys.readouterr().out


def health(front: launch.Server) -> int:
    return requests.get(f"{front.url}/room/health", timeout=60).status_code


@pytest.mark.survives("the engine killed (SIGKILL)", "room", lost="its answers; it is started again")
@pytest.mark.lifetime
def test_an_engine_that_dies_is_brought_back_where_the_front_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SERVERS, "vllm", SERVERS["vllm"])
    tiny_server.install()
    settings = load_settings(state_dir=tmp_path, api_key=KEY, vllm_http_port=free_port(), front_http_port=free_port())
    front = launch.serve("front", settings=settings)
    try:
        engine = cli.state_of("vllm", settings)
        assert engine["pid"]
        os.kill(engine["pid"], signal.SIGKILL)
        eventually(lambda: not cli.state_of("vllm", settings)["pid"], "the end of the engine")
        eventually(lambda: health(front) == 503, "the front's word of it, which may be a second old")
        cli.bring_back("vllm", engine, rooms_engine(settings))
        eventually(lambda: health(front) == 200, "its word of the other")
        assert cli.state_of("vllm", settings)["endpoints"] == engine["endpoints"]
        assert "The engine has ended, and is started again." in capsys.readouterr().out
    finally:
        for name in ("front", "vllm"):
            launch.down(name, settings)


def solved(root: Path) -> None:
    """A repository at `root` whose instructor has solved lab 01 in place."""
    for folder in ("solutions", "labs"):
        shutil.copytree(ROOT / folder, root / folder)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", root, *words], check=True)
    lab = load_labs()[0]
    shutil.copy(ROOT / "solutions" / lab.path, root / "labs" / lab.path)
    (root / "labs" / lab.stem / "service.py").write_text("the instructor's")


def test_desks_get_the_labs_without_what_the_instructor_has_tried_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "state"))
    solved(tmp_path / "root")
    master = tmp_path / "master"
    desk.make_master(master, tmp_path / "root")
    given = {str(path.relative_to(master)) for path in master.rglob("*") if path.is_file()}
    assert given == {f"labs/{lab.path}" for lab in load_labs()}
    assert all((master / "labs" / path).read_text() == text for path, text in blanks.handed_out().items())
    desk.lay_out(master, tmp_path / "desks" / "ada")
    (ada,) = collect.collect(tmp_path / "desks", tmp_path / "submitted", tmp_path / "root")
    assert (ada.labs, ada.left) == ([], {}), "she has not worked on them"


def test_a_desk_that_is_kept_apart_sees_those_labs_where_the_instructors_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its notebooks and commands look there for what was handed out."""
    settings = load_settings(state_dir=tmp_path / "state", cache_dir=tmp_path / "cache")
    if why := hub.why_not_apart(settings):
        pytest.skip(f"desks cannot be kept apart here: {why}")
    monkeypatch.setattr(hub, "ROOT", root := tmp_path / "root")
    for name in ("src", "labs"):
        (root / name).mkdir(parents=True)
        (root / name / "mine.py").write_text("the instructor's")
    master, home = settings.state_folder("room") / "master", tmp_path / "home"
    (master / "labs").mkdir(parents=True)
    (master / "labs" / "lab.ipynb").write_text("as handed out")
    home.mkdir(mode=0o755)
    where = hub.limits(settings) | hub.view(settings) | {"home": str(home), "uid": hub.NOBODY, "gid": hub.NOBODY}
    look = ["/bin/sh", "-c", 'ls "$0/src" "$0/labs"; cat "$0/labs/lab.ipynb"; rm -r "$0/labs" 2> /dev/null', str(root)]
    told = subprocess.run(
        [sys.executable, "-I", str(hub.ENTER), json.dumps(where), *look], capture_output=True, text=True, check=False
    )
    assert told.stdout == f"{root}/labs:\nlab.ipynb\n\n{root}/src:\nmine.py\nas handed out", told.stderr
    assert (master / "labs" / "lab.ipynb").exists()


def test_what_is_collected_is_the_labs_and_no_file_that_a_learner_points_at(tmp_path: Path) -> None:
    desks, submitted, secret = tmp_path / "desks", tmp_path / "submitted", tmp_path / "secret"
    secret.write_text("the instructor's")
    lab, other, piped, long, foldered = (each.stem for each in load_labs()[:5])
    for name in ("ada", "mallory"):
        for stem in (lab, other, piped, long):
            (desks / name / "labs" / stem).mkdir(parents=True)
        (desks / name / "labs" / lab / f"{lab}.ipynb").write_text(f"by {name}")
        (desks / name / "labs" / lab / "foreign.sh").write_text("")
    mallorys = desks / "mallory" / "labs"
    (mallorys / other / f"{other}.ipynb").symlink_to(secret)
    os.mkfifo(mallorys / piped / f"{piped}.ipynb")
    (mallorys / long / f"{long}.ipynb").write_bytes(b"x" * (1 + (20 << 20)))
    (mallorys / foldered).symlink_to(tmp_path)
    (desks / "link").symlink_to(desks / "ada")
    (desks / "ada" / "labs" / other / f"{other}.ipynb").write_text(blanks.handed_out()[f"{other}/{other}.ipynb"])
    ada, mallory = collect.collect(desks, submitted)
    assert not held_open(str(tmp_path)), "a room has hundreds of these folders, a process 1,024 files"
    assert (ada.learner, ada.labs, ada.left) == ("ada", [lab], {f"{lab}/foreign.sh": "not handed out"})
    assert (mallory.learner, mallory.labs) == ("mallory", [lab])
    assert mallory.left.keys() == {f"{lab}/foreign.sh", other, piped, long, foldered}
    assert mallory.left[piped] == "it is no file"
    files = {str(path.relative_to(submitted)): path.read_text() for path in submitted.rglob("*.*") if path.is_file()}
    times = {name: files.pop(f"{name}/{lab}/timestamp.txt") for name in ("ada", "mallory")}
    assert files == {f"{name}/{lab}/{lab}.ipynb": f"by {name}" for name in ("ada", "mallory")}
    (mallorys / lab / f"{lab}.ipynb").write_text(later := nbformat.writes(new_notebook()))
    collect.collect(desks, submitted)
    assert (submitted / "ada" / lab / "timestamp.txt").read_text() == times["ada"], "nothing new to grade"
    shutil.rmtree(desks / "ada" / "labs")
    collect.collect(desks, submitted)
    assert (submitted / "ada" / lab / f"{lab}.ipynb").read_text() == "by ada", "handed in before it was deleted"
    assert (submitted / "mallory" / lab / "timestamp.txt").read_text() > times["mallory"]
    for torn in (b"", later[:-9].encode(), b"[]", b"\xff"):
        (mallorys / lab / f"{lab}.ipynb").write_bytes(torn)
        _, mallory = collect.collect(desks, submitted)
        assert (mallory.labs, mallory.left[lab][:11]) == ([], "no notebook")
    assert (submitted / "mallory" / lab / f"{lab}.ipynb").read_text() == later


def test_half_a_notebook_is_neither_laid_out_nor_handed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is at a desk stays as its learner's, and what was collected counts as handed in: for ever, were it half."""
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "state"))
    for folder in ("master/labs", "submitted"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "master" / "labs" / "lab.ipynb").write_text("a lab")
    at_desk, submitted = tmp_path / "desk" / "labs" / "lab.ipynb", tmp_path / "submitted" / "lab.ipynb"
    with monkeypatch.context() as disk:
        full_disk(disk)
        with pytest.raises(OSError, match="No space left"):
            desk.lay_out(tmp_path / "master", tmp_path / "desk")
        with pytest.raises(OSError, match="No space left"):
            collect.hand_in(submitted.parent, "lab.ipynb", b"answers")
    assert not [*at_desk.parent.iterdir(), *submitted.parent.iterdir()]
    desk.lay_out(tmp_path / "master", tmp_path / "desk")
    collect.hand_in(submitted.parent, "lab.ipynb", b"answers")
    assert (at_desk.read_text(), submitted.read_text()) == ("a lab", "answers")
    assert (submitted.parent / "timestamp.txt").exists()
    at_desk.write_text("a lab, and answers")
    desk.lay_out(tmp_path / "master", tmp_path / "desk")  # as each time that it is opened
    assert at_desk.read_text() == "a lab, and answers"


class Kept:
    """In place of `Popen`: one of the room's programs, which ends as soon as it is started, in whichever way."""

    pid = 1

    def __init__(self, name: str, returncode: int | None) -> None:
        self.name = name
        self.returncode = returncode

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        pass

    def wait(self) -> None:
        pass


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], list[int | None]]]:
    """What the keeper of a room has done; how its programs end, one after the other."""
    done: list[str] = []
    ends: list[int | None] = []

    def begin(command: list[str], env: object) -> Kept:
        done.append(f"start {command[0]}")
        return Kept(command[0], ends.pop(0))

    monkeypatch.setattr(hub, "adopt_orphans", lambda: None)  # this process is none of a room
    monkeypatch.setattr(hub, "children", set)
    monkeypatch.setattr(hub, "POLL_SECONDS", 0)
    with monkeypatch.context() as programs:
        programs.setattr(subprocess, "Popen", begin)
        yield done, ends


@pytest.mark.parametrize(
    ("ends", "starts"), [([1], 1), ([0] * 3, 3), ([-9] * 3, 3)], ids=["an error", "no error", "a signal"]
)
def test_what_ends_again_and_again_ends_the_room(
    kept: tuple[list[str], list[int | None]], ends: list[int | None], starts: int
) -> None:
    """By a signal too: where memory is short, each hub is killed."""
    done, following = kept
    following += ends
    with pytest.raises(ServebookError, match="hub ends as soon as it starts"):
        hub.keep({"hub": ["hub"]}, {}, lambda _: True)
    assert done == ["start hub"] * starts


def test_all_that_ended_is_started_before_the_proxy_is_told_its_routes(
    kept: tuple[list[str], list[int | None]],
) -> None:
    """They come from the hub: one that has ended is waited for in vain."""
    done, following = kept
    following += [-9, -9, None, None]

    def restarted(name: str) -> bool:
        done.append(f"{name} is back")
        if name == "hub":
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        hub.keep({"proxy": ["proxy"], "hub": ["hub"]}, {}, restarted)
    assert done == ["start proxy", "start hub"] * 2 + ["proxy is back", "hub is back"]


def test_a_hub_that_ends_while_the_new_proxy_waits_for_its_routes_is_started(
    kept: tuple[list[str], list[int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, following = kept
    following += [-9, None, None, None]
    programs: list[Any] = []
    begin: Any = subprocess.Popen

    def note(*args: object, **options: object) -> Any:
        programs.append(begin(*args, **options))
        return programs[-1]

    def restarted(name: str) -> bool:
        done.append(f"{name} is back")
        if name == "hub":
            raise KeyboardInterrupt
        programs[1].returncode = -9  # the hub, in whichever turn
        return len(programs) > 3

    # Undone before the fixture puts back what it has put there itself.
    with monkeypatch.context() as noted:
        noted.setattr(subprocess, "Popen", note)
        with pytest.raises(KeyboardInterrupt):
            hub.keep({"proxy": ["proxy"], "hub": ["hub"]}, {}, restarted)
    assert done == [
        *("start proxy", "start hub", "start proxy", "proxy is back"),
        *("start hub", "proxy is back", "hub is back"),
    ]


def test_a_new_proxy_that_nobody_tells_its_routes_is_given_up_and_said(
    kept: tuple[list[str], list[int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, following = kept
    following += [-9, None]
    monkeypatch.setattr(hub, "ROUTES_SECONDS", 0)
    said: list[str] = []

    def warning(text: str, *values: object) -> None:
        said.append(text % values)
        if len(said) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(hub.log, "warning", warning)
    with pytest.raises(KeyboardInterrupt):
        hub.keep({"proxy": ["proxy"]}, {}, lambda _: False)
    assert said == ["proxy ended with code -9", "proxy is back, and was not told its routes within 0 s"]


class AdmitsTwo:
    """In place of a room's front: who was struck off after all."""

    url = "http://127.0.0.1:1"

    def __init__(self) -> None:
        self.there: list[str] = []

    def metrics(self) -> str:
        return ""

    def admit(self, name: str) -> str:
        if len(self.there) == 2:
            raise ServebookError("The room does not answer.")
        self.there.append(name)
        return "key"

    def forget(self, name: str) -> None:
        self.there.remove(name)


def test_learners_of_a_load_that_cannot_begin_are_struck_off(monkeypatch: pytest.MonkeyPatch) -> None:
    room: Any = AdmitsTwo()
    with pytest.raises(ServebookError, match="does not answer"):
        load.run(room, 3)
    assert not room.there

    def broken(*_: object, **__: object) -> Any:
        raise BrokenProcessPool

    monkeypatch.setattr(load, "ProcessPoolExecutor", broken)
    with pytest.raises(ServebookError, match="2 learners were not all ready within 120 s"):
        load.run(room, 2)
    assert not room.there


def test_a_load_of_which_a_process_is_killed_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux does where memory is short. The others wait, for longer than this test may take."""
    killed: list[psutil.Process] = []

    def kill_the_first() -> bool:
        found = [each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())]
        for each in found[:1]:
            each.kill()
            killed.append(each)
        return bool(killed)

    monkeypatch.setattr(load, "START_SECONDS", 3600)
    monkeypatch.setattr(load, "get_context", lambda _: get_context("spawn"))  # a fork server would outlive the test
    room: Any = AdmitsTwo()
    with ThreadPoolExecutor() as pool:
        watching = pool.submit(wait_until, kill_the_first, 60)
        with pytest.raises(ServebookError, match="2 learners were not all ready within 3600 s, or one was ended"):
            load.run(room, 2)
        assert watching.result()
    assert not room.there


def test_a_load_whose_processes_are_not_ready_in_time_ends_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "START_SECONDS", 0)
    monkeypatch.setattr(load, "get_context", lambda _: get_context("spawn"))
    room: Any = AdmitsTwo()
    with pytest.raises(ServebookError, match="2 learners were not all ready within 0 s"):
        load.run(room, 2)
    assert not active_children()


def test_who_waits_for_a_load_sees_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    half = threading.Event()
    shown: list[str] = []

    class Shown(TerminalProgress):
        def show(self, text: str, final: bool = False) -> None:
            shown.append(text.partition(" … ")[0])
            if "50 %" in text:
                half.set()

    def do_lab(lab: Lab, *_: object) -> Iterator[load.Checked]:
        if lab.stem == load.LABS[1]:
            assert half.wait(30)
        for exercise in lab.exercises:
            yield load.Checked(Result(exercise, "passed"), 0)

    monkeypatch.setattr(load, "progress", Shown)
    monkeypatch.setattr(load, "do_lab", do_lab)
    monkeypatch.setattr(load, "samples", lambda _: Counter())
    monkeypatch.setattr(load, "die_with_asker", lambda: None)
    monkeypatch.setattr(load, "made", None, raising=False)
    monkeypatch.setattr(load, "ProcessPoolExecutor", lambda n, _, **options: ThreadPoolExecutor(n, **options))
    room: Any = AdmitsTwo()
    assert load.run(room, 1).count("passed") == 10
    assert shown[0] == "load: getting ready"
    assert "load: 50 % of 10 checks made" in shown
    assert shown[-1] == "load: 10 checks made"


def test_feedback_lands_on_the_desk_and_nowhere_that_a_learner_points_at(tmp_path: Path) -> None:
    desk, elsewhere = tmp_path / "ada", tmp_path / "elsewhere"
    for folder in (desk, elsewhere):
        folder.mkdir()
    if os.getuid() == 0:
        os.chown(desk, 65534, 65534)
    collect.deliver(desk, "feedback", "lab.html", b"well done")
    page = desk / "feedback" / "lab.html"
    assert page.read_bytes() == b"well done"
    assert {path.stat().st_uid for path in (page, page.parent)} == {desk.stat().st_uid}
    (elsewhere / "lab.html").write_text("the instructor's")
    page.unlink()
    page.symlink_to(elsewhere / "lab.html")
    collect.deliver(desk, "feedback", "lab.html", b"better still")
    assert (page.read_bytes(), page.is_symlink()) == (b"better still", False)
    shutil.rmtree(page.parent)
    page.parent.symlink_to(elsewhere)
    with pytest.raises(OSError, match="directory"):
        collect.deliver(desk, "feedback", "lab.html", b"lost")
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == {"lab.html": "the instructor's"}
