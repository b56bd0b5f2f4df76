"""The tensor contract: as plain values, and over the wire of both servers that keep it, Triton and KServe."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import hypothesis
import numpy as np
import pytest
import tritonclient.grpc as v2
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from servebook.launch import Server
from servebook.ways.limits import GIVEN_UP, LimitExceeded
from servebook.ways.refusals import MOST_CHARS
from servebook.ways.v2.contract import INPUTS, OPTIONAL_OUTPUTS, OUTPUTS, BadRequest, GaveUp, UnsupportedRequest
from servebook.ways.v2.request import GenerateRequest, check_limits, read_request
from servebook.ways.v2.response import Responses

# As plain values


def parse(text: Any = b"Hello", parameters: Any = "{}", **inputs: Any) -> GenerateRequest:
    return read_request({"text_input": text, **inputs}, parameters)


def test_a_request_without_options_is_unary_and_echoes() -> None:
    request = parse()
    assert (request.prompt, request.stream, request.echo, request.lora_name) == ("Hello", False, True, None)
    assert request.sampling.output_kind is RequestOutputKind.FINAL_ONLY
    assert request.sampling.max_tokens == 16  # vLLM's default, as in NVIDIA's container
    assert request.outputs == frozenset()


def test_streaming_never_echoes_and_asks_for_deltas() -> None:
    assert not parse(stream=True).echo
    assert not parse(stream=True, exclude_input_in_output=True).echo
    assert parse(stream=True).sampling.output_kind is RequestOutputKind.DELTA
    with pytest.raises(BadRequest, match="When streaming, `exclude_input_in_output` = False is not allowed"):
        parse(stream=True, exclude_input_in_output=False)
    assert not parse(exclude_input_in_output=True).echo


def test_a_constraint_keeps_the_name_that_it_was_asked_for_by() -> None:
    request = parse(**structured(choice=["yes", "no"]))
    asked = request.sampling.structured_outputs
    asked.choice, asked.grammar = None, 'root ::= "yes" | "no"'  # as vLLM writes it before it compiles it
    assert request.constraint == f"{CONSTRAINT}.choice"


@pytest.mark.parametrize("name", OPTIONAL_OUTPUTS)
def test_optional_outputs_are_asked_for_by_name(name: str) -> None:
    assert parse(**{f"return_{name}": True}).outputs == {name}
    assert parse(**{f"return_{name}": False}).outputs == frozenset()
    assert INPUTS[f"return_{name}"] == "BOOL"


def test_strings_become_what_the_field_is() -> None:
    values = {"max_tokens": "7", "temperature": "0.5", "ignore_eos": "false", "seed": "3", "logprobs": "2", "top_p": 1}
    sampling = parse(sampling_parameters=json.dumps(values).encode()).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.ignore_eos) == (7, 0.5, False)
    assert (sampling.seed, sampling.logprobs, sampling.top_p) == (3, 2, 1.0)


def test_the_tensor_wins_over_request_parameters_and_null_means_default() -> None:
    assert parse(parameters='{"max_tokens": 5}').sampling.max_tokens == 5
    assert parse(parameters='{"max_tokens": 5}', sampling_parameters=b"{}").sampling.max_tokens == 16
    assert parse(parameters='{"max_tokens": null}').sampling.max_tokens == 16


@pytest.mark.parametrize("key", ["structured_outputs", "guided_decoding"])
@pytest.mark.parametrize("nested", [False, True])
def test_structured_outputs_come_as_object_or_as_json_within_json(key: str, nested: bool) -> None:
    choice: Any = {"choice": ["예", "아니요"]}
    request = parse(parameters=json.dumps({key: json.dumps(choice) if nested else choice}))
    assert request.sampling.structured_outputs.choice == ["예", "아니요"]


BAD_PARAMETERS = [
    ("{", "sampling_parameters: not JSON"),
    ("[1]", "sampling_parameters: must be a JSON object, got list"),
    ('{"temperature": NaN}', "sampling_parameters: not JSON: NaN is not a JSON number"),
    ('{"temperature": 1e999}', "sampling_parameters: not JSON: 1e999 is not finite"),
    ('{"seed": 9223372036854775808}', "sampling_parameters: not JSON: 9223372036854775808 does not fit into 64 bits"),
    ('{"seed": 1' + "0" * 5000 + "}", "sampling_parameters: not JSON: 1000"),
    ("[" * 100_000, "sampling_parameters: not JSON"),
    ('{"seed": 1}' + " " * 2**20, "sampling_parameters: longer than 1048576 characters"),
    *(
        (f'{{"{name}": {value}}}', f"sampling_parameters.{name}: has too many entries")
        for name, value in {
            "stop": f"[{'[],' * 340_000}[]]",
            "logit_bias": json.dumps({str(each): [] for each in range(70_000)}),
            "structured_outputs": f'{{"choice": [{"1," * 500_000}1]}}',
        }.items()
    ),
    (r'{"stop": "\ud800"}', "sampling_parameters: not JSON"),
    ('{"temprature": 1}', "sampling_parameters.temprature: vLLM has no such sampling parameter"),
    ('{"output_kind": 0}', "sampling_parameters.output_kind: vLLM has no such sampling parameter"),
    ('{"_eos_token_id": 0}', "sampling_parameters._eos_token_id: vLLM has no such sampling parameter"),
    (
        '{"repetition_detection": {"max_patern_size": 8}}',
        "sampling_parameters.repetition_detection.max_patern_size: vLLM has no such sampling parameter",
    ),
    (
        '{"structured_outputs": {"json": {}, "disable_any_whitespce": true}}',
        "sampling_parameters.structured_outputs.disable_any_whitespce: vLLM has no such sampling parameter",
    ),
    (
        '{"guided_decoding": "{\\"choice\\": [\\"a\\"], \\"_backend\\": \\"x\\"}"}',
        "sampling_parameters.structured_outputs._backend: vLLM has no such sampling parameter",
    ),
    ('{"temperature": -1}', "sampling_parameters.temperature: temperature must be non-negative"),
    ('{"max_tokens": "many"}', "sampling_parameters.max_tokens: Input should be a valid integer"),
    ('{"max_tokens": 1.5}', "sampling_parameters.max_tokens: Input should be a valid integer"),
    ('{"n": 0}', "sampling_parameters: n must be at least 1"),
    ('{"stop": [1]}', "sampling_parameters.stop"),
    ('{"structured_outputs": "{"}', "sampling_parameters: not JSON"),
    ('{"structured_outputs": {"choice": ["a"], "regex": "b"}}', "one kind of structured outputs"),
    ('{"lora_name": 7}', "sampling_parameters.lora_name: must be a string"),
]


@pytest.mark.parametrize(("parameters", "reason"), BAD_PARAMETERS, ids=[reason[:60] for _, reason in BAD_PARAMETERS])
def test_bad_sampling_parameters_are_named(parameters: str, reason: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        parse(parameters=parameters)
    assert reason in str(refusal.value)


def test_bad_inputs_are_named() -> None:
    with pytest.raises(BadRequest, match="text_input: the prompt is missing or empty"):
        parse(b"")
    with pytest.raises(BadRequest, match="text_input: not UTF-8"):
        parse(b"\xff")
    for name in ("image", "embedding_request"):
        with pytest.raises(UnsupportedRequest, match=f"{name}: this model generates text"):
            parse(**{name: b"x"})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["n", "temperature", "stop", "seed", "logit_bias", "structured_outputs", "extra_args", "x"])


@hypothesis.settings(deadline=None)
@given(st.binary() | st.dictionaries(FIELDS, JSON_VALUES, max_size=3).map(lambda values: json.dumps(values).encode()))
def test_whatever_comes_is_a_request_or_a_refusal(parameters: bytes) -> None:
    try:
        outcome = parse(sampling_parameters=parameters).prompt
    except BadRequest as refusal:
        outcome = str(refusal)
    assert outcome == "Hello" or outcome.startswith("sampling_parameters")


def output(*choices: tuple[int, str, list[int], str | None]) -> RequestOutput:
    completions = [
        CompletionOutput(index, text, ids, -0.5, [{i: Logprob(-0.5, 1, "x")} for i in ids], finish_reason=reason)
        for index, text, ids, reason in choices
    ]
    finished = all(reason for _, _, _, reason in choices)
    return RequestOutput("id", None, [1, 2, 3], None, completions, finished)


def test_every_response_has_one_element_per_choice_in_order() -> None:
    flags = {f"return_{name}": True for name in OPTIONAL_OUTPUTS}
    responses = Responses(parse(stream=True, parameters='{"n": 3, "logprobs": 1}', **flags))

    first = responses.values(output((2, "c", [9], None), (0, "가", [7, 8], "stop")))
    assert first["text_output"] == ["가", "", "c"]
    assert first["finish_reason"] == ["stop", "None", "None"]
    assert first["num_output_tokens"] == [2, 0, 1]
    assert first["num_input_tokens"] == [3]
    assert [math.isnan(value) for value in first["cumulative_logprob"]] == [False, True, False]
    assert json.loads(first["logprobs"][2]) == [{"9": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}}]
    assert first["logprobs"][1] == "null"
    assert first.keys() == OUTPUTS.keys()

    second = responses.values(output((1, "b", [5], "length")))
    assert second["text_output"] == ["", "b", ""]
    assert second["finish_reason"] == ["stop", "length", "None"]


def test_the_prompt_is_echoed_before_each_choice_and_only_what_was_asked_for_is_sent() -> None:
    responses = Responses(parse(parameters='{"n": 2}'))
    values = responses.values(output((0, " a", [1], "stop"), (1, " b", [2], "stop")))
    assert values == {"text_output": ["Hello a", "Hello b"]}


def test_what_the_engine_gave_up_is_no_success() -> None:
    with pytest.raises(
        BadRequest, match=r"^sampling_parameters\.structured_outputs\.regex: takes more than 10 s .* fits it"
    ):
        Responses(parse(parameters='{"structured_outputs": {"regex": "a"}}')).values(output((0, "", [], "error")))
    for reason in ("error", "abort"):
        with pytest.raises(GaveUp):
            Responses(parse()).values(output((0, " some", [1], reason)))


def test_a_refusal_does_not_repeat_a_long_input() -> None:
    with pytest.raises(BadRequest) as refusal:
        parse(parameters=json.dumps({"x" * 5000: 1}))
    assert len(str(refusal.value)) < MOST_CHARS


@pytest.mark.parametrize(
    "values", [{"top_k": str(10**20)}, {"seed": str(2**64)}, {"logit_bias": {str(10**20): 1}}], ids=str
)
def test_a_number_within_a_string_has_64_bits_too(values: dict[str, Any]) -> None:
    """pydantic makes numbers of them, and the engine's messages could not carry them."""
    with pytest.raises(BadRequest, match=f"sampling_parameters.{min(values)}: may have integers of 64 bits at most"):
        parse(parameters=json.dumps(values))


def test_half_a_character_is_refused_by_field() -> None:
    with pytest.raises(LimitExceeded, match="bad_words may not have half of a surrogate pair"):
        check_limits(SamplingParams(bad_words=["\ud800"]))


@pytest.mark.parametrize("name", ["priority", "timeout", "request_id", "sequence_id", "triton_something"])
def test_the_protocols_own_parameters_are_no_sampling_parameters(name: str) -> None:
    assert parse(parameters=json.dumps({name: 1, "max_tokens": 3})).sampling.max_tokens == 3
    with pytest.raises(BadRequest, match="vLLM has no such sampling parameter"):
        parse(sampling_parameters=json.dumps({name: 1}))


def test_the_contract_is_light_to_import() -> None:
    """Triton's stub imports it once more than it needs to."""
    code = "import sys, servebook.ways.triton_grpc.backend.declaration; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "vllm", "msgspec", "servebook.ways.v2.request"} & set(done.stdout.split())


# Over the wire: one table for both servers

PROMPT = "The capital of France is"
WITH_STATUS = {"triton_grpc_error": "true"}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.needs(name)) for name in ("triton", "kserve")])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def stub(server: Server) -> Iterator[v2.InferenceServerClient]:
    with v2.InferenceServerClient(server.grpc) as client:
        yield client


def ask(stub: v2.InferenceServerClient, values: dict[str, Any], **more: Any) -> Any:
    """One request with each value as an input; the result, or the exception that it ends in."""
    inputs = []
    for name, value in values.items():
        data = value.encode() if isinstance(value, str) else value
        inputs.append(v2.InferInput(name, [1], "BOOL" if isinstance(value, bool) else "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([data], np.bool_ if isinstance(value, bool) else np.object_))
    if stub.get_server_metadata().name == "kserve":
        try:
            return stub.infer("vllm_model", inputs, client_timeout=60, **more)
        except InferenceServerException as error:
            return error
    arrived: SimpleQueue[Any] = SimpleQueue()
    stub.start_stream(lambda result, error: arrived.put(error or result), headers=WITH_STATUS, stream_timeout=60)
    stub.async_stream_infer("vllm_model", inputs, **more)
    got = arrived.get(timeout=60)
    stub.stop_stream()
    return got


def structured(**constraint: Any) -> dict[str, Any]:
    return {"sampling_parameters": json.dumps({"structured_outputs": constraint, "max_tokens": 30})}


def said(**values: Any) -> dict[str, Any]:
    return {"sampling_parameters": json.dumps(values)}


CONSTRAINT = "sampling_parameters.structured_outputs"
LOOP = {"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"text_input": ""}, "text_input: the prompt is missing or empty"),
    ({"text_input": b"\xff"}, "text_input: not UTF-8"),
    ({"text_input": "word " * 3000}, "text_input: This model's maximum context length is 2048 tokens"),
    ({"sampling_parameters": "{"}, "sampling_parameters: not JSON"),
    (said(temprature=0), "sampling_parameters.temprature: vLLM has no such sampling parameter"),
    (structured(choice=["a"], regx="a"), f"{CONSTRAINT}.regx: vLLM has no such sampling parameter"),
    (said(output_text_buffer_length=1), "sampling_parameters.output_text_buffer_length: vLLM has no such"),
    (said(extra_args={"kv_transfer_params": "x"}), "sampling_parameters.extra_args: vLLM has no such"),
    (said(trace_decode_token_ids=[]), "sampling_parameters.trace_decode_token_ids: vLLM has no such"),
    (said(temperature="hot"), "sampling_parameters.temperature: Input should be a valid number"),
    (said(top_p=7), "sampling_parameters.top_p: top_p must be in (0, 1]"),
    (said(seed=2**70), "sampling_parameters: not JSON: 1180591620717411303424 does not fit into 64 bits"),
    (said(allowed_token_ids=[999999]), "sampling_parameters.allowed_token_ids: "),
    # limits, with neighbours of what brought an engine down
    (said(n=17), "sampling_parameters.n: may be 16 at most, got 17"),
    (said(n=4096), "sampling_parameters.n: may be 16 at most"),
    (said(logprobs=-1), "sampling_parameters.logprobs: may be 20 at most"),
    (said(prompt_logprobs=21), "sampling_parameters.prompt_logprobs: may be 20 at most"),
    (said(stop=["x"] * 17), "sampling_parameters.stop: may have 16 strings at most"),
    (said(stop="x" * 1_000_000), "sampling_parameters.stop: may have strings of 256 characters at most"),
    (
        said(bad_words=[f"w{each}" for each in range(301)]),
        "sampling_parameters.bad_words: may have 300 entries",
    ),
    (said(allowed_token_ids=[7] * 301), "sampling_parameters.allowed_token_ids: may have 300 entries"),
    (said(bad_words=["x" * 257]), "sampling_parameters.bad_words: may have strings of 256 characters at most"),
    (said(logit_bias={str(each): 1 for each in range(301)}), "sampling_parameters.logit_bias: may have 300 entries"),
    (structured(json={"type": "array", "minItems": 10**9}), f"{CONSTRAINT}.json: may have 256 counted repetitions"),
    (structured(json='{"maxLength": 1e9}'), f"{CONSTRAINT}.json: may have 256 counted repetitions"),
    (structured(json={"enum": list(range(4_000))}), f"{CONSTRAINT}.json: may take 16384 bytes at most"),
    (structured(json={"enum": list(range(501))}), f"{CONSTRAINT}.json: may have 500 enum values at most"),
    (structured(json={"properties": {str(each): {} for each in range(201)}}), f"{CONSTRAINT}.json: may have 200 prop"),
    (structured(regex="a" * 20_000), f"{CONSTRAINT}.regex: may take 16384 bytes at most"),
    (structured(regex="(a{30}){30}"), f"{CONSTRAINT}.regex: may have 256 counted repetitions"),
    (structured(grammar='root ::= "x"{999}'), f"{CONSTRAINT}.grammar: may have 256 counted repetitions"),
    (structured(choice=["x"] * 501), f"{CONSTRAINT}.choice: may have 500 options at most"),
    (structured(structural_tag='{"minItems": 1e9}'), f"{CONSTRAINT}.structural_tag: may have 256 counted repetitions"),
    # constraints that no text satisfies, or that do not compile; none was ever a success
    (structured(json=LOOP), f"{CONSTRAINT}.json: may not have a $ref that leads to itself"),
    (structured(json="{"), f"{CONSTRAINT}.json: "),
    (structured(json={"type": "integer", "multipleOf": 7}), f"{CONSTRAINT}.json: "),
    (structured(grammar="root ::= root"), f"{CONSTRAINT}.grammar: {GIVEN_UP}"),
    *((structured(regex=regex), f"{CONSTRAINT}.regex: ") for regex in ("foo**", r"\p{L}+", "(?P<a>x)", "(?i)a", "a++")),
    (structured(regex="([" * 3500), f"{CONSTRAINT}.regex: "),
    (structured(choice=[]), f"{CONSTRAINT}.choice: "),
]


@pytest.mark.engine
@pytest.mark.parametrize(("values", "reason"), REFUSED, ids=[reason[:70] for _, reason in REFUSED])
def test_refused_alike(stub: v2.InferenceServerClient, values: dict[str, Any], reason: str) -> None:
    error = ask(stub, {"text_input": PROMPT} | values)
    assert isinstance(error, InferenceServerException), error.get_response()
    assert (error.status(), error.message()[: len(reason)]) == ("StatusCode.INVALID_ARGUMENT", reason)
    assert len(error.message()) < 2 * MOST_CHARS


@pytest.mark.engine
def test_an_answer_does_not_depend_on_who_asked_before(stub: v2.InferenceServerClient) -> None:
    """vLLM keeps to the first backend for structured outputs that a request brings, unless it is told one."""
    for _ in range(2):
        bad, good = (
            ask(stub, {"text_input": PROMPT} | structured(regex=regex)) for regex in (r"\p{L}+", "[a-z]{2}(19|20)")
        )
        assert "sampling_parameters.structured_outputs.regex" in str(bad)
        assert good.as_numpy("text_output")[0].decode().removeprefix(PROMPT)[2:] in ("19", "20")


SERVED: list[tuple[dict[str, Any], dict[str, Any], int | None]] = [
    ({}, {"priority": 1, "timeout": 10**7, "request_id": "mine"}, None),
    ({}, {"sequence_id": 7, "sequence_start": True, "sequence_end": True, "request_id": "mine"}, None),
    ({}, {"parameters": {"max_tokens": 3, "temperature": "0", "ignore_eos": True}}, 3),
    (said(max_tokens="3", temperature="0", ignore_eos="true"), {"parameters": {"max_tokens": 5}}, 3),
    (said(guided_decoding='{"choice": ["a b"]}'), {}, None),
    (structured(json={"type": "object", "properties": {"a": {"type": "string", "maxLength": 2}}}), {}, None),
]
"""Inputs, options of the client, and how many tokens come, where that is certain."""


@pytest.mark.engine
@pytest.mark.parametrize(("values", "more", "tokens"), SERVED, ids=[f"{value}{more}"[:60] for value, more, _ in SERVED])
def test_served_alike(
    stub: v2.InferenceServerClient, values: dict[str, Any], more: dict[str, Any], tokens: int | None
) -> None:
    answer = ask(stub, {"text_input": PROMPT, "return_num_output_tokens": True} | values, **more)
    assert not isinstance(answer, Exception), answer
    (came,) = answer.as_numpy("num_output_tokens")
    assert came == (tokens or came) > 0
    assert answer.as_numpy("text_output")[0].decode().startswith(PROMPT)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.dictionaries(
    st.sampled_from(["n", "temperature", "stop", "seed", "logprobs", "min_tokens", "structured_outputs", "top_k", "x"]),
    SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(["regex", "json", "choice"]), SCALARS),
    max_size=3,
)


@pytest.mark.engine
@hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@given(
    text=st.text(max_size=20) | st.binary(max_size=8), values=VALUES, flags=st.sets(st.sampled_from(list(INPUTS)[3:]))
)
def test_whatever_comes_is_served_or_refused_alike(
    stub: v2.InferenceServerClient, text: str | bytes, values: dict[str, Any], flags: set[str]
) -> None:
    sampling = json.dumps(values | {"max_tokens": 1})
    tensors = {"text_input": text, "sampling_parameters": sampling} | dict.fromkeys(sorted(flags), True)
    answer = ask(stub, tensors)
    if isinstance(answer, InferenceServerException):
        assert answer.status() == "StatusCode.INVALID_ARGUMENT", answer
        assert answer.message().split(":")[0].split(".")[0] in INPUTS
