"""Chapter 13: the notebook, and what each way carries, asked of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import requests

from servebook.launch import Server
from servebook.ways.more_than_text import carries
from servebook.ways.more_than_text.carries import Cell

pytestmark = pytest.mark.timeout(600)


ASK: dict[str, tuple[Callable[[Server], dict[str, Cell]], set[str]]] = {
    "vllm": (lambda at: carries.over_http(at.url, model=at.model), {"JSON", "Responses", "Messages"}),
    "gateway": (lambda at: carries.of_the_gateway(at.url), set()),
}
"""By fixture: how a way is asked, and what it carries as the workbook starts it."""


@pytest.mark.engine
@pytest.mark.parametrize("fixture", ASK)
def test_a_way_carries_what_the_chapter_says(fixture: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(fixture)
    ask, carried = ASK[fixture]
    cells = ask(server)
    assert list(cells) == list(carries.HTTP)
    said = {feature: cell.said for feature, cell in cells.items()}
    assert {feature for feature, cell in cells.items() if cell.carried} == carried, said
    # A refusal is an answer: the server is there, and has judged the request.
    assert not [each for each in said.values() if each.startswith(("UNAVAILABLE", "DEADLINE", "500", "502", "503"))], (
        said
    )


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
    assert carries._fits(text) is fits


def test_the_table_has_a_row_for_each_way_and_a_column_for_each_feature() -> None:
    cells = {
        feature: Cell(feature == "JSON", "200" if feature == "JSON" else "404: no such path")
        for feature in carries.HTTP
    }
    head, row = carries.table({"a way": cells}).splitlines()
    assert head.split() == list(carries.HTTP)
    assert row.split()[:2] == ["a", "way"]
    assert (row.count("no 404"), row.count("yes")) == (len(carries.HTTP) - 1, 1)


def test_notebook(vllm: Server, run_notebook: Callable[[str], None]) -> None:
    run_notebook("13_more_than_text")
