"""Chapter 13: the notebook, and what each way carries, asked of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import requests

from servebook.errors import ModelError
from servebook.launch import Server
from servebook.settings import TENSOR_MODEL_NAME, load_settings
from servebook.ways.more_than_text import adapter, carries, others
from servebook.ways.more_than_text.carries import Cell
from servebook.ways.vllm_native_grpc.client import VllmGrpcClient

pytestmark = [pytest.mark.lane("own"), pytest.mark.timeout(600)]


def of_python(server: Server) -> dict[str, Cell]:
    with VllmGrpcClient(server.grpc) as client:
        tokenizer = client.tokenizer
        return others.of_python_grpc(client.channel, lambda text: tokenizer.encode(text).ids, tokenizer.decode)


def over_channel(ask: Callable[[grpc.Channel], dict[str, Cell]]) -> Callable[[Server], dict[str, Cell]]:
    def asked(server: Server) -> dict[str, Cell]:
        with grpc.insecure_channel(server.grpc) as channel:
            return ask(channel)

    return asked


HERE: dict[str, tuple[Callable[[Server], dict[str, Cell]], set[str]]] = {
    "vllm": (lambda at: carries.over_http(at.url, model=at.model), {"JSON", "Responses", "Messages"}),
    "gateway": (lambda at: carries.of_the_gateway(at.url), set()),
}
"""By fixture: how the ways that the notebook asks are asked, and what they carry as the workbook starts them."""

OTHERS: dict[str, tuple[Callable[[Server], dict[str, Cell]], str]] = {
    "triton": (lambda at: others.of_triton(at.grpc, at.http), "Triton"),
    "grpc": (over_channel(others.of_own_grpc), "own gRPC"),
    "kserve": (lambda at: carries.over_http(at.url, model=TENSOR_MODEL_NAME, prefix="/openai"), "KServe"),
    "vllm-rs": (over_channel(others.of_rust_grpc), "Rust gRPC"),
    "vllm-grpc": (of_python, "token ids"),
}
"""By server: how the other ways are asked, and their row in the table that is stored."""


def is_an_answer(cells: dict[str, Cell]) -> None:
    """A refusal is an answer: the server is there, and has judged the request."""
    said = {feature: cell.said for feature, cell in cells.items()}
    assert list(cells) == list(carries.HTTP)
    assert not [each for each in said.values() if each.startswith(("UNAVAILABLE", "DEADLINE", "500", "502", "503"))], (
        said
    )


@pytest.mark.engine
@pytest.mark.parametrize("fixture", HERE)
def test_a_way_carries_what_the_chapter_says(fixture: str, request: pytest.FixtureRequest) -> None:
    ask, carried = HERE[fixture]
    cells = ask(request.getfixturevalue(fixture))
    is_an_answer(cells)
    assert {feature for feature, cell in cells.items() if cell.carried} == carried, cells


@pytest.mark.engine
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in OTHERS])
def test_the_stored_rows_are_true(name: str, server_of: Callable[[str], Server]) -> None:
    ask, row = OTHERS[name]
    cells = ask(server_of(name))
    is_an_answer(cells)
    assert carries.in_short(cells) == carries.OTHERS[row], cells


def test_every_stored_row_is_asked() -> None:
    assert [row for _, row in OTHERS.values()] == list(carries.OTHERS)


def test_over_http_streams_are_told_from_whole_answers(vllm: Server) -> None:
    cells = carries.over_http(vllm.url, model=vllm.model, stream=True)
    assert {feature for feature, cell in cells.items() if cell.carried} == {"JSON", "Responses", "Messages"}, cells
    assert cells["embeddings"].said.startswith("404")


def test_after_all_that_was_refused_the_engine_still_writes(vllm: Server) -> None:
    body = {"model": vllm.model, "prompt": "Once", "max_tokens": 2}
    assert requests.post(f"{vllm.url}/v1/completions", json=body, timeout=60).ok


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"sunny": true}', True),
        ('{"sunny": 1}', False),
        ('{"sunny": true, "a": 1}', False),
        ("sunny", False),
        ("[]", False),
    ],
)
def test_an_answer_is_held_to_the_schema(text: str, fits: bool) -> None:
    assert carries.fits(text) is fits


def test_the_table_has_a_row_for_each_way_and_a_column_for_each_feature() -> None:
    cells = {
        feature: Cell(feature == "JSON", "200" if feature == "JSON" else "404: no such path")
        for feature in carries.HTTP
    }
    head, row = carries.table({"a way": carries.in_short(cells)}).splitlines()
    assert head.split() == list(carries.HTTP)
    assert row.split()[:2] == ["a", "way"]
    assert (row.count("no 404"), row.count("yes")) == (len(carries.HTTP) - 1, 1)


def test_the_adapter_learns_calls_and_does_not_forget_to_talk() -> None:
    calls = [answer for _, answer in adapter.examples() if answer.startswith("<tool_call>")]
    talk = [pair for pair in adapter.examples() if pair[1] not in calls]
    assert len(calls) > len(talk) >= 3
    assert set(talk) == set(adapter.TALK)
    for call in calls:
        found = json.loads(call.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        assert found["name"] == "count_letter"
        assert found["arguments"]["letter"] in found["arguments"]["word"]
    assert "strawberry" not in str(calls), "the notebook asks what was not learned by heart"


def test_an_adapter_begins_as_nothing_and_adds_its_product() -> None:
    import torch

    layer, given = torch.nn.Linear(6, 4), torch.randn(3, 6)
    before = layer(given)
    a, b = adapter.put_beside(layer)
    assert torch.equal(layer(given), before)
    with torch.no_grad():
        b += 1
    added = adapter.ALPHA / adapter.RANK * given @ a.T @ b.T
    assert torch.allclose(layer(given), before + added, atol=1e-5)


def test_a_training_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    settings = load_settings(cache_dir=tmp_path)
    monkeypatch.setattr(adapter, "model_path", lambda _: tmp_path / "model")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ModelError, match=r"training ended with 1: .*\n.*SERVEBOOK_MODEL=bundled"):
        adapter.adapter_path(settings)
    assert [path.suffix for path in (tmp_path / "adapters").iterdir()] == [".lock"]


def test_an_adapter_that_is_there_is_found_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(cache_dir=tmp_path)
    monkeypatch.setattr(adapter, "model_path", lambda _: tmp_path)
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    made = adapter.adapter_path(settings)
    monkeypatch.delattr(adapter, "FileLock")
    assert adapter.adapter_path(settings) == made


def test_notebook(vllm: Server, run_notebook: Callable[[str], None]) -> None:
    run_notebook("13_more_than_text")
