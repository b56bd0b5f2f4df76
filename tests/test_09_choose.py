"""Chapter 09: the notebook; every line of the guide has its figure, and every need its line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import product
from typing import Any

import pytest

from servebook.bench.choose import (
    ARTICLE,
    BUSY_TOKENS_PER_S,
    DEFAULT,
    PAIRS,
    QUESTIONS,
    RULES,
    Needs,
    article,
    choose,
    guide,
    outweighed,
    tensor_ms,
    together,
)
from servebook.bench.results import Results, new_results, stored
from servebook.bench.tensors import TensorCost
from servebook.workbook.gate import NOTEBOOKS


def test_notebook(run_notebook: Callable[[str], None]) -> None:
    run_notebook("09_choose")


@pytest.fixture(scope="module")
def run() -> Results:
    """The stored run that the chapter shows."""
    return stored()[0]


def test_every_need_has_a_question_and_changes_the_choice() -> None:
    assert list(QUESTIONS) == [field.name for field in fields(Needs)]
    assert choose(Needs()) == [DEFAULT]
    for name in QUESTIONS:
        answer: dict[str, Any] = {name: BUSY_TOKENS_PER_S if name == "tokens_per_s" else True}
        needs = Needs(**answer)
        assert choose(needs) != [DEFAULT], name


def test_a_service_with_every_need_gets_one_of_each_place() -> None:
    answers: dict[str, Any] = dict.fromkeys(QUESTIONS, True)
    all_needs = Needs(**answers | {"tokens_per_s": BUSY_TOKENS_PER_S})
    taken = choose(all_needs)
    assert [rule.place for rule in taken] == ["gateway", "router", "server", "protocol", "tensors"]
    lost = outweighed(all_needs)
    places = ["router", "server", "protocol", "protocol"]
    assert [winner.place for _, winner in lost] == [rule.place for rule, _ in lost] == places
    assert {id(rule) for rule in [*taken, *(rule for rule, _ in lost)]} == set(map(id, RULES))
    assert choose(Needs(tokens_per_s=BUSY_TOKENS_PER_S - 1)) == [DEFAULT]
    assert outweighed(Needs(many_users=True)) == []


def test_a_need_is_weighed_and_not_added() -> None:
    both = Needs(kserve_cluster=True, many_users=True)
    assert [rule.path for rule in choose(both)] == ["KServe", DEFAULT.path]
    assert [(rule.path, winner.path) for rule, winner in outweighed(both)] == [
        ("vLLM's router in front of replicas", "KServe")
    ]


def test_what_does_not_fit_together_is_said() -> None:
    assert {path for pair in PAIRS for path in pair.paths} <= {rule.path for rule in (DEFAULT, *RULES)}
    answers = [[0, BUSY_TOKENS_PER_S] if name == "tokens_per_s" else [False, True] for name in QUESTIONS]
    choices: list[dict[str, Any]] = [dict(zip(QUESTIONS, each, strict=True)) for each in product(*answers)]
    said = {note for each in choices for note in together(Needs(**each))}
    assert said == {pair.note for pair in PAIRS}, "a pair that nobody can choose"
    assert together(Needs()) == together(Needs(many_users=True)) == together(Needs(kserve_cluster=True)) == []
    for one in ({"other_models": True}, {"kserve_cluster": True}, {"many_users": True}, {"own_rules": True}):
        needs = one | {"token_ids": True}
        assert together(Needs(**needs)), f"{needs}: what speaks V2 or REST beside what speaks token ids"
    (router,) = together(Needs(many_users=True, token_ids=True))
    assert "Rust front end" in router
    (fronts,) = together(Needs(tokens_per_s=BUSY_TOKENS_PER_S, typed_contract=True))
    assert "--fronts" in fronts


def test_the_articles_comparison_is_answered_row_by_row() -> None:
    assert {item for row in ARTICLE for item in row.id.split(", ")} == {"S14", "S15", "S17", "S18", "S19", "S20"}
    assert {row.verdict.split(",")[0] for row in ARTICLE} == {"confirmed", "corrected"}


def test_every_line_rests_on_a_figure_of_the_stored_run(run: Results) -> None:
    for row in [*guide(run)[1], *article(run)[1]]:
        figure = row[-1]
        assert "not in this run" not in figure, row
        assert ("(../BENCHMARKS.md)" in figure) != ("a property" in figure), row
        assert any(letter.isdigit() for letter in figure) or "a property" in figure, row
        assert "CPU" not in figure or "of SSE's @" in figure, "at how many callers?"


def test_a_run_that_lacks_a_figure_says_so() -> None:
    empty = new_results("full", "m", "cpu")
    for row in [*guide(empty)[1], *article(empty)[1]]:
        assert "not in this run" in row[-1] or "a property" in row[-1], row
    assert tensor_ms(empty, "triton", "JSON list") == "not in this run"
    empty.tensors = [
        TensorCost(server="triton", encoding="JSON list", tensor_bytes=1, request_bytes=1, median_ms=9, repeats=1)
    ]
    assert tensor_ms(empty, "triton", "JSON list", 1) == "9 ms"
    assert tensor_ms(empty, "triton", "JSON list") == "too slow to be measured", "it was given up on a smaller one"


def test_chapters_that_the_guide_names_exist() -> None:
    stems = {path.stem[:2] for path in NOTEBOOKS.glob("*.ipynb")}
    named = {number for rule in (DEFAULT, *RULES) for number in rule.chapter.split(", ")}
    assert named <= stems
