"""Chapter 00: the notebook, and what it relies on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import requests

from servebook.launch import Server

pytestmark = pytest.mark.timeout(600)


def test_notebook(run_notebook: Callable[[str], None]) -> None:
    run_notebook("00_start_here")


@pytest.mark.parametrize("text", ["The capital of Japan is Tokyo.", "안녕하세요", "👩🏽‍💻", "  two  spaces\n"])
def test_tokens_turn_back_into_the_same_text(vllm: Server, text: str) -> None:
    body = {"model": vllm.model, "prompt": text, "add_special_tokens": False}
    tokens = requests.post(f"{vllm.url}/tokenize", json=body, timeout=60).json()
    assert tokens["count"] == len(tokens["tokens"])
    body = {"model": vllm.model, "tokens": tokens["tokens"]}
    assert requests.post(f"{vllm.url}/detokenize", json=body, timeout=60).json()["prompt"] == text
