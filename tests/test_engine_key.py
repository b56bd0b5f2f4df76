"""The key before every path of a vLLM that is opened to the network, loaded as vLLM loads it; no engine."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from servebook.launch import find_server
from servebook.settings import load_settings
from servebook.ways.openai_rest.key import KeyOnEveryPath

KEY = "sk-not-for-other-eyes"
PATHS = ["/v1/models", "/invocations", "/tokenize", "/metrics", "/version", "/docs", "/v1/../invocations", "/health/"]


def arguments(host: str) -> Namespace:
    """The command line of `servebook up vllm`, as vLLM reads it."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = find_server("vllm").argv(load_settings(host=host, api_key=KEY), Path("/model"), {})
    words = [{"{http}": "8000"}.get(word, word) for word in words]
    read: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(words[words.index("serve") + 1 :])
    return read


@pytest.fixture
async def opened(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    """An application with the middleware of a vLLM that listens on all addresses; it answers 200 on every path."""
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
    from vllm.entrypoints.serve.sagemaker.api_router import sagemaker_standards_bootstrap

    monkeypatch.setenv("VLLM_API_KEY", KEY)
    app = FastAPI(docs_url=None)
    app.add_api_route("/{path:path}", lambda: "said", methods=["GET", "POST", "OPTIONS"])
    init_entrypoints_middleware(arguments("0.0.0.0"), app, ("generate",))
    app = sagemaker_standards_bootstrap(app)  # puts middleware of its own around and behind
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gpu-box") as client:
        yield client


async def test_every_path_but_health_asks_for_the_key(opened: httpx.AsyncClient) -> None:
    assert (await opened.get("/health")).json() == "said"
    for path in PATHS:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            for method in ("GET", "POST", "OPTIONS"):
                assert (await opened.request(method, path, headers=headers)).status_code == 401, (method, path)
        assert (await opened.post(path, headers={"Authorization": f"Bearer {KEY}"})).json() == "said"


async def test_a_socket_without_the_key_is_refused() -> None:
    async def application(*_: object) -> None:
        pytest.fail("it came through")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        door = KeyOnEveryPath(application)
    await door({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send)
    assert (sent[0]["type"], sent[0]["status"]) == ("websocket.http.response.start", 401)


def test_without_a_key_there_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(KeyError):
        KeyOnEveryPath(FastAPI())


def test_on_its_own_machine_vllm_is_as_it_comes() -> None:
    """Chapter 01 shows what vLLM's own check covers, and what it leaves open."""
    assert arguments("127.0.0.1").middleware == []
