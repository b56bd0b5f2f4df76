"""What one request may ask of an engine, as every server reads it."""

from __future__ import annotations

import json
import re
import time
from http import HTTPStatus
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import GracefulHTTPError
from vllm.v1.structured_output.utils import grammar_is_likely_lark
from xgrammar import Grammar

from servebook.ways.custom_grpc.server.errors import refusal_for
from servebook.ways.limits import EBNF, EBNF_RULE, LARK, REGEX, LimitExceeded, Limits, check, check_entries, expansion

LIMITS = Limits()


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def properties(number: int) -> dict[str, Any]:
    return {"properties": {f"p{index}": {} for index in range(number)}}


HALVES = 'a: %json {"maxLength": 128}\nb: %json {"maxLength": 128}'
"""Each schema has half of what both may have."""


@pytest.mark.parametrize(
    ("field", "fits", "too_much", "limit"),
    [
        ("n", 16, 17, 16),
        ("n", -1, 4096, 16),  # what makes no sense is for the engine to say
        ("prompts", 16, 1024, 16),
        ("messages", [{"role": "user", "content": ""}] * 512, [{"role": "user", "content": ""}] * 513, 512),
        ("messages", [{"content": [{}]}] * 512, [{"content": [{}] * 512}, {"content": [{}]}], 512),  # parts of them
        ("messages", [{"content": [{"input": [0] * 600}]}], [[]] * 513, 512),  # what a tool was given is none
        ("messages", [{"content": [{"content": [{}] * 511}]}], [{"content": [{"content": [{}] * 512}]}], 512),
        ("messages", "a text", [[]] * 513, 512),
        ("request_id", "a" * 64, "a" * 65, 64),
        ("logprobs", 20, 21, 20),
        ("logprobs", 0, -1, 20),  # -1: the whole vocabulary
        ("stop", ["a"] * 16, ["a"] * 17, 16),
        ("stop", "a" * 256, "a" * 257, 256),
        ("stop", [], ["a", "b" * 10**6], 256),
        ("logit_bias", dict.fromkeys(range(300)), dict.fromkeys(range(301)), 300),
        ("choice", ["a"] * 500, ["a"] * 501, 500),
        ("choice", ["é" * 8192], ["é" * 8193], 16_384),
        ("regex", "a" * 16_384, "a" * 16_385, 16_384),
        ("regex", "[a-z]{1,256}", "[a-z]{1,257}", 256),
        ("regex", "([a-z]{16}){16}", "([a-z]{16}){17}", 256),
        ("regex", r"\d{4}-\d{2}-\d{2}", "a{" + "9" * 9000 + "}", 256),
        ("grammar", 'root ::= "{999}"{9}', 'root ::= "x"{999}', 256),
        ("grammar", 'start: "a"~1..256', 'start: "a"~1..257', 256),
        ("grammar", 'start: %json {"maxLength": 256}', 'start: %json\n{"maxLength": 257}', 256),
        ("grammar", HALVES, HALVES.replace("128", "129"), 256),
        ("grammar", "start: %json [", "start: %json " + "[" * 8000, 32),
        ("schema", {"type": "array", "minItems": 256}, {"type": "array", "minItems": 10**9}, 256),
        ("schema", '{"minItems": 2}', '{"minItems": 1e9}', 256),
        ("schema", '{"maxLength": 256}', '{"maxLength": Infinity}', 256),
        ("schema", {"anyOf": [{"maxLength": 128}, {"maxItems": 128}]}, {"anyOf": [{"maxLength": 128}] * 3}, 256),
        ("schema", {"pattern": "a{256}"}, {"items": {"pattern": "(a{10}){26}"}}, 256),
        ("schema", {"grammar": 'root ::= "{257}"{256}'}, {"grammar": 'root ::= "x"{ 257 }'}, 256),
        ("schema", {"type": "repeat", "min": 9, "max": 99}, {"type": "repeat", "min": 1, "max": 256}, 256),
        ("schema", {"patternProperties": {"a{256}": {}}}, {"patternProperties": {"a{257}": {}}}, 256),
        (
            "schema",
            {"properties": {"minItems": {"type": "integer"}}},
            {"properties": {"minItems": {"minItems": 999}}},
            256,
        ),
        ("schema", properties(200), properties(201), 200),
        ("schema", {"items": [properties(100)] * 2}, {"items": [properties(101)] * 2}, 200),
        ("schema", {"enum": list(range(500))}, {"enum": list(range(501))}, 500),
        ("schema", nested(32), nested(33), 32),
        ("schema", "[", "[" * 8000 + "]" * 8000, 32),
        ("schema", {"title": "é" * 8_000}, {"title": "é" * 9_000}, 16_384),
        ("schema", True, "[" + " " * 16_384 + "]", 16_384),
        ("schema", {"$ref": "#/$defs/n", "$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}}, {"$ref": "#"}, 0),
        ("schema", {"anyOf": [{"$ref": "#/$defs/a"}] * 2, "$defs": {"a": {}}}, {"anyOf": [{}, {"$ref": "#"}]}, 0),
        ("schema", '{"maximum": 1e400}', '{"maximum": ' + "1" * 5000 + "}", 4300),
        ("schema", {"$ref": "#/nowhere"}, {"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}, 0),
    ],
)
def test_each_limit_lets_pass_what_fits_and_names_itself(field: str, fits: Any, too_much: Any, limit: int) -> None:
    check(LIMITS, **{field: fits})
    with pytest.raises(LimitExceeded) as refused:
        check(LIMITS, **{field: too_much})
    assert (refused.value.field, refused.value.limit) == (field, limit)
    assert str(refused.value).startswith(f"{field} may ")
    assert limit == 0 or str(limit) in str(refused.value)
    assert len(str(refused.value)) < 100  # nothing of the request is repeated


def test_the_field_is_called_as_the_caller_calls_it() -> None:
    with pytest.raises(LimitExceeded, match=r"^sampling\.json_schema may have 256 counted repetitions"):
        check(LIMITS, schema={"minItems": 10**9}, names={"schema": "sampling.json_schema"})


@pytest.mark.parametrize(
    ("pattern", "copies"),
    [
        ("", 0),
        ("abc*(d|e)+", 0),
        ("a{3}", 3),
        ("a{3,}", 3),
        ("a{,5}", 5),
        ("a{2,5}b{4}", 9),
        ("(a{2}b{3}){4}", 20),
        ("((a{2}){3}){4}", 24),
        ("(ab){7}", 7),
        ("a{2}{3}", 6),
        (r"\({3}", 3),
        (r"\{3}", 0),
        ("[{3}]", 0),
        ("[]{3}]{2}", 5),  # xgrammar ends a class at the first "]", where Python takes one in front for a member
        ("[^]([a-z]{9}){9}", 81),
        (r"[^\]{3}]{2}", 2),
        ("(a{9} ){9}", 81),
        ("(a{9}) {9}", 18),  # in a regex a blank is a piece
        ("a~3", 0),
        ("{3}", 3),
        ("a{x}", 0),
        ("a){3}", 3),
        ("(((a{3}", 3),
        ("a{2}b", 2),
    ],
)
def test_counted_repetitions_add_up_and_those_in_groups_multiply(pattern: str, copies: int) -> None:
    assert expansion(pattern) == copies


@pytest.mark.parametrize(
    ("grammar", "copies"),
    [
        ('root ::= ("x"{ 9 }){\n9 , -1 }', 81),
        ('root ::= "x" # one\n{ # two {99}\n9}', 9),
        ('# don\'t\nroot ::= "x"{9}', 9),
        ('# [ " (\nroot ::= "x"{9} [b]', 9),
        ('root ::= ("x"{9} # )\n){9}', 81),
        ('root ::= "{9}" [{9}] "\\"{9}"', 0),
        ('root ::= [^] "x"{9}', 9),
        ('root ::= Regex ( "(a{3}){3}" ){9}', 81),
        ('root ::= Regex("a{9}" # )\n){9}', 81),
        ('root ::= myRegex ("a"{9}){9}\nmyRegex ::= "b"', 81),
        ('root ::= a-Regex ("a"{9}){9}\na-Regex ::= "b"', 81),
    ],
)
def test_an_ebnf_is_counted_as_xgrammar_reads_it(grammar: str, copies: int) -> None:
    assert expansion(grammar, EBNF) == copies
    assert "{9" in str(Grammar.from_ebnf(grammar)) or copies == 0


@pytest.mark.parametrize(
    ("grammar", "copies"),
    [
        ('start: "x" ~ 3 .. 9', 9),
        ('start: "x"{ 3 , 9 }', 9),
        ('start: /"/ "x"~9', 9),
        (r'start: /\/"/ "x"~9', 9),
        ('start: ["x"~9]~9', 81),
        ("start: /(a{3}){3}/i~9", 81),
        ('start: "x" b // " ( /\nb: "x"~9', 9),
        ('start: "x" b # " ( /\rb: "x"~9', 9),
        ('start: "~9" "{9}"', 0),
    ],
)
def test_a_lark_grammar_is_counted_as_xgrammar_reads_it(grammar: str, copies: int) -> None:
    assert expansion(grammar, LARK) == copies
    assert ("9}" in str(Grammar.from_lark(grammar))) == (copies > 0) or '"{9}"' in grammar


@given(st.lists(st.sampled_from(["a ", "::=", "#", "//", "/", ":", "\n", "\r"])).map("".join))
def test_a_grammar_is_read_as_the_kind_that_vllm_takes_it_for(grammar: str) -> None:
    assert bool(EBNF_RULE.search(grammar)) != (grammar_is_likely_lark(grammar) or not grammar)


@given(st.text(alphabet="ab(){}[]\\^0123456789,~.\"' #/\n", max_size=200), st.sampled_from([REGEX, EBNF, LARK]))
def test_any_text_has_an_expansion(text: str, notation: re.Pattern[str]) -> None:
    assert expansion(text, notation) >= 0


@pytest.mark.parametrize(
    "filling", ["{ ", "{ 1", "~ 1", '"', "[", "/", "(", "Regex ( ", "%json [", "# ", "{#", " ", "1"]
)
def test_to_count_takes_no_longer_than_to_read(filling: str) -> None:
    for text in (filling * (16_000 // len(filling)), filling + " " * 16_000, filling + "1" * 16_000):
        for notation in (REGEX, EBNF, LARK):
            began = time.process_time()
            expansion(text, notation)
            EBNF_RULE.search(text)
            assert time.process_time() - began < 0.5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$ref", "anyOf", "enum", "minItems", "pattern", "properties", "x"]), inner)
    ),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_looked_through(schema: Any) -> None:
    """What is no schema is for the engine to refuse: here it passes, or goes beyond a limit; as text no less."""

    def refusal(given_as: Any) -> str:
        try:
            check(LIMITS, schema=given_as)
        except LimitExceeded as refused:
            return str(refused)
        return ""

    assert refusal(json.dumps(schema)) == ("" if isinstance(schema, str) else refusal(schema))


def test_what_can_be_reached_on_many_ways_is_looked_at_once() -> None:
    definitions = {f"d{index}": {"anyOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 8} for index in range(60)}
    check(LIMITS, schema={"$defs": definitions, "$ref": "#/$defs/d0"})  # on each of the 8^60 ways, it would never end


def test_what_vllm_itself_has_no_room_for_is_not_told_as_our_limit() -> None:
    full = GracefulHTTPError("--max-num-queued-reqs", HTTPStatus.SERVICE_UNAVAILABLE)
    refusal = refusal_for(full, "id", constraint="")
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(refusal) == "The engine's queue is full; try again in 1 s."


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"prompt": [1] * 100_000, "stop": ["x"]}, ""),
        ({"prompt": [[1] * 50_000, [2] * 50_000]}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 512}, ""),
        ({"prompt": [1.5] * 5000}, "prompt"),
        ({"prompt": [True] * 5000}, "prompt"),
        ({"prompt": [-1] * 5000}, "prompt"),
        ({"prompt": [[-1] * 5000]}, "prompt"),
        ({"messages": [1] * 5000}, "messages"),
        ({"messages": [[[{}] * 50] * 50] * 50}, "messages"),
        ({"a": {"b": {str(each): {} for each in range(5000)}}}, "a"),
        ({str(each): 1 for each in range(5000)}, "the body"),
        ([1] * 5000, "the body"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_a_request_of_too_many_entries_names_where_they_are(request_: Any, field: str) -> None:
    if not field:
        check_entries(request_)
        return
    with pytest.raises(LimitExceeded, match="4096") as caught:
        check_entries(request_)
    assert caught.value.field == field
