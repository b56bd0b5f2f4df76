"""Chapter 02: the notebook, and the contract of a stream, read from real sockets."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from desk import eventually
from httpx_sse import connect_sse

from servebook.launch import Server
from servebook.ways.metrics import metric

pytestmark = [pytest.mark.lane("one"), pytest.mark.timeout(600)]

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "max_tokens": 16}
PROMPT = {"prompt": "Once upon a time", "max_tokens": 16}


def test_notebook(
    run_notebook: Callable[[str], None], vllm: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against an engine elsewhere: this run's, known by its URL only. None is started but the one to be killed."""
    monkeypatch.setenv("SERVEBOOK_ENGINE_URL", vllm.url)
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path))
    run_notebook("02_sse_streaming")
    assert {log.name.partition(".")[0] for log in (tmp_path / "logs").iterdir()} == {"vllm-victim"}


def stream(vllm: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    """All events of a stream but the last, which must be [DONE]."""
    request = {"model": vllm.model, "stream": True, "temperature": 0} | body
    with httpx.Client(timeout=60) as http, connect_sse(http, "POST", vllm.url + path, json=request) as source:
        assert source.response.status_code == 200
        assert source.response.headers["content-type"].startswith("text/event-stream")
        events = [event.data for event in source.iter_sse()]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["delta"].get("content") or "" if "delta" in choice else choice["text"])


@pytest.mark.parametrize(("path", "body"), [(CHAT, QUESTION), (TEXT, PROMPT)])
def test_streamed_and_whole_are_the_same(vllm: Server, path: str, body: dict[str, Any]) -> None:
    events = stream(vllm, path, **body)
    whole = httpx.post(vllm.url + path, json={"model": vllm.model, "temperature": 0} | body, timeout=60).json()
    choice = whole["choices"][0]
    assert "".join(text_of(event["choices"][0]) for event in events) == (
        choice["message"]["content"] if path == CHAT else choice["text"]
    )
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + [choice["finish_reason"]]
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize(("path", "body"), [(CHAT, QUESTION), (TEXT, PROMPT)])
def test_usage_comes_last_and_without_choices(vllm: Server, path: str, body: dict[str, Any]) -> None:
    *events, last = stream(vllm, path, **body, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0
    assert not [event for event in events if event.get("usage")]


@pytest.mark.parametrize("text", ["안녕하세요", "👩🏽‍💻🎉", "naïve café", "日本語"])
def test_no_delta_holds_half_a_character(vllm: Server, text: str) -> None:
    body = {"messages": QUESTION["messages"], "structured_outputs": {"choice": [text]}}
    deltas = [text_of(event["choices"][0]) for event in stream(vllm, CHAT, **body)]
    assert "".join(deltas) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(deltas)


def test_a_broken_connection_stops_the_engine(vllm: Server) -> None:
    """A reset, as from a crashed client, not a polite close."""
    made = metric(vllm.url, "vllm:generation_tokens_total")
    story = {"model": vllm.model, "prompt": "Once", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    body = json.dumps(story).encode()
    host, port = vllm.http.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: metric(vllm.url, "vllm:num_requests_running") == 0, "an idle engine")
    assert metric(vllm.url, "vllm:generation_tokens_total") - made < 750
