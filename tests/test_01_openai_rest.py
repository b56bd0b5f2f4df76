"""Chapter 01: the notebook, and the facts of the API beyond it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import requests
from openai import AsyncOpenAI

from servebook.launch import Server
from servebook.ways.metrics import metric

pytestmark = [pytest.mark.lane("one"), pytest.mark.timeout(600)]


def test_notebook(run_notebook: Callable[[str], None]) -> None:
    run_notebook("01_openai_rest")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"model": "gpt-42", "prompt": "x"}, 404),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400),
        ("/v1/completions", {"prompt": "x", "max_tokens": 10**6}, 400),
        ("/v1/completions", {"prompt": "hello " * 5000}, 400),
        ("/v1/chat/completions", {"messages": "x"}, 400),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "x"}},
            400,
        ),
    ],
)
def test_errors_have_one_form(vllm: Server, path: str, body: dict[str, Any], status: int) -> None:
    answer = requests.post(vllm.url + path, json={"model": vllm.model} | body, timeout=60)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["code"] == status
    assert error["message"]


def test_what_is_no_json_is_a_bad_request(vllm: Server) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{vllm.url}/v1/completions", data="{not json", headers=headers, timeout=60)
    assert answer.status_code == 400


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/completions", 405), ("POST", "/v1/nothing", 404)])
def test_wrong_method_and_wrong_path(vllm: Server, method: str, path: str, status: int) -> None:
    assert requests.request(method, vllm.url + path, json={}, timeout=60).status_code == status


def test_any_text_survives_the_way_there_and_back(vllm: Server) -> None:
    prompt = '안녕하세요 👩🏽‍💻 "quoted" \\ \n\t'
    body = {"model": vllm.model, "prompt": prompt, "echo": True, "max_tokens": 1, "temperature": 0}
    answer = requests.post(f"{vllm.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["choices"][0]["text"].startswith(prompt)


async def test_requests_share_the_engine(vllm: Server) -> None:
    """Requests over separate connections share the engine's steps, and each gets its own tokens."""
    steps = metric(vllm.url, "vllm:iteration_tokens_total_count")
    client = AsyncOpenAI(base_url=f"{vllm.url}/v1", api_key="dummy", max_retries=0)
    answers = await asyncio.gather(
        *(
            client.completions.create(
                model=vllm.model, prompt=f"{n}", max_tokens=40 + n, extra_body={"ignore_eos": True}
            )
            for n in range(8)
        )
    )
    tokens = [answer.usage.completion_tokens for answer in answers if answer.usage]
    assert tokens == [40 + n for n in range(8)]
    # One after the other they would take a step for each token.
    assert metric(vllm.url, "vllm:iteration_tokens_total_count") - steps < sum(tokens)
    await client.close()
