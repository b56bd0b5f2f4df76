"""Chapter 6: the Open Inference Protocol over REST and gRPC, against KServe's ModelServer with our predictor."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import psutil
import pytest
import requests
import schemathesis
import tritonclient.grpc as v2
import tritonclient.http as v2_http
from desk import eventually, half_a_request
from hypothesis import HealthCheck
from hypothesis import given as hypothesis_given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from servebook import launch
from servebook.checkout import ROOT
from servebook.lab.taps.http import Exchange, Tap
from servebook.settings import TENSOR_MODEL_NAME
from servebook.ways.client import Answer
from servebook.ways.kserve.client import V2Client, tensor
from servebook.ways.kserve.steps import ladder
from servebook.ways.limits import GIVEN_UP
from servebook.ways.metrics import metric
from servebook.workbook.notebook import Pace, measure_pace

pytestmark = pytest.mark.engine

MODEL = TENSOR_MODEL_NAME
PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "max_tokens": 12}
ENDLESS = {"max_tokens": 1900, "ignore_eos": True}

JsonTensor = dict[str, Any]


def given(name: str, value: Any, datatype: str = "", shape: tuple[int, ...] = (1,)) -> JsonTensor:
    """A tensor as V2 writes it in JSON."""
    datatype = datatype or ("BOOL" if isinstance(value, bool) else "BYTES")
    return {"name": name, "shape": list(shape), "datatype": datatype, "data": [value]}


def infer(kserve: launch.Server, *tensors: JsonTensor, model: str = MODEL, **more: Any) -> requests.Response:
    return requests.post(f"{kserve.url}/v2/models/{model}/infer", json={"inputs": tensors, **more}, timeout=60)


def sampling(**fields: Any) -> JsonTensor:
    return given("sampling_parameters", json.dumps(fields))


@pytest.fixture(scope="module")
def client(kserve: launch.Server) -> Iterator[V2Client]:
    with V2Client(kserve.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def rest_answer(vllm: launch.Server) -> str:
    """The greedy text of vLLM's own REST endpoint."""
    body = {"model": vllm.model, "prompt": PROMPT, **GREEDY}
    return str(requests.post(f"{vllm.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])


# Health and metadata, the same over both protocols


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        (f"/v2/models/{MODEL}/ready", {"name": MODEL, "ready": True}),
        ("/v2/models", {"models": [MODEL]}),
    ],
)
def test_health_over_rest(kserve: launch.Server, path: str, body: dict[str, Any]) -> None:
    answer = requests.get(kserve.url + path, timeout=60)
    assert (answer.status_code, answer.json()) == (200, body)


def test_health_over_grpc(client: V2Client) -> None:
    assert client.state() == {"live": True, "ready": True, "model ready": True}


def test_both_protocols_describe_the_same_tensors(kserve: launch.Server, client: V2Client) -> None:
    over_rest = requests.get(f"{kserve.url}/v2/models/{MODEL}", timeout=60).json()
    assert {each["name"]: (each["datatype"], each["shape"]) for each in over_rest["inputs"]} == client.tensors()
    assert [each["name"] for each in over_rest["outputs"]] == [
        *("text_output", "finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
    ]
    assert client.server["name"] == "kserve"
    assert not client.decoupled


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_nobody_shares_its_port(kserve: launch.Server, protocol: str) -> None:
    """By SO_REUSEPORT two servers of one user would each get a part of the calls, and neither would say so."""
    with socket.socket() as another:
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            another.bind(("127.0.0.1", int(kserve.endpoints[protocol].rpartition(":")[2])))


def test_listens_on_loopback_only(kserve: launch.Server) -> None:
    ports = {int(address.rpartition(":")[2]) for address in kserve.endpoints.values()}
    listening = {
        (where.laddr.ip.removeprefix("::ffff:"), where.laddr.port)  # gRPC opens IPv4 through an IPv6 socket
        for where in psutil.net_connections("tcp")
        if where.status == psutil.CONN_LISTEN and where.laddr and where.laddr.port in ports
    }
    assert listening == {("127.0.0.1", port) for port in ports}


# Inference


def test_rest_and_grpc_give_the_text_of_vllms_own_endpoint(
    kserve: launch.Server, client: V2Client, rest_answer: str
) -> None:
    over_rest = infer(
        kserve, given("text_input", PROMPT), sampling(**GREEDY), given("exclude_input_in_output", True)
    ).json()
    assert over_rest["outputs"][0] | {"parameters": None} == {
        "name": "text_output",
        "datatype": "BYTES",
        "shape": [1],
        "parameters": None,
        "data": [rest_answer],
    }
    (over_grpc,) = client.infer(PROMPT, GREEDY)["text_output"]
    assert over_grpc.decode() == rest_answer


def test_outputs_come_when_asked_for(client: V2Client) -> None:
    answer = client.infer(
        PROMPT,
        {"n": 2, "max_tokens": 7, "ignore_eos": True},
        return_finish_reason=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
    )
    assert answer.keys() == {"text_output", "finish_reason", "num_input_tokens", "num_output_tokens"}
    assert answer["text_output"].shape == (2,)
    assert answer["finish_reason"].tolist() == [b"length", b"length"]
    assert answer["num_input_tokens"].tolist() == [5]
    assert answer["num_output_tokens"].tolist() == [7, 7]
    assert answer["num_output_tokens"].dtype == np.uint32


def test_log_probabilities_as_in_triton(kserve: launch.Server, client: V2Client) -> None:
    flags = {"return_logprobs": True, "return_cumulative_logprob": True}
    answer = client.infer(PROMPT, GREEDY | {"logprobs": 2}, **flags)
    (tokens,) = [json.loads(choice) for choice in answer["logprobs"]]
    assert len(tokens) == GREEDY["max_tokens"]
    best = [max(token.values(), key=lambda entry: entry["logprob"]) for token in tokens]
    assert {entry["rank"] for entry in best} == {1}
    assert b"".join(entry["decoded_token"].encode() for entry in best) == answer["text_output"][0]
    assert answer["cumulative_logprob"].dtype == np.float32
    assert answer["cumulative_logprob"][0] == pytest.approx(sum(entry["logprob"] for entry in best), rel=1e-4)
    without = client.infer(PROMPT, GREEDY, **flags)
    assert without["logprobs"].tolist() == [b"null"]
    assert np.isnan(without["cumulative_logprob"]).all()
    as_json = infer(kserve, given("text_input", PROMPT), *(given(name, True) for name in flags)).json()["outputs"]
    assert {output["name"]: output["data"] for output in as_json[1:]} == {
        "cumulative_logprob": [None],
        "logprobs": ["null"],
    }


def test_prompt_comes_back_unless_excluded(kserve: launch.Server, rest_answer: str) -> None:
    answer = infer(kserve, given("text_input", PROMPT), sampling(**GREEDY)).json()
    assert answer["outputs"][0]["data"] == [PROMPT + rest_answer]


def test_korean_survives_both_protocols(kserve: launch.Server, client: V2Client) -> None:
    choice = {"structured_outputs": {"choice": ["안녕하세요, 세계"]}, "max_tokens": 60}
    (over_grpc,) = client.infer("Say hello: ", choice)["text_output"]
    answer = infer(kserve, given("text_input", "안녕"), sampling(**choice), given("exclude_input_in_output", True))
    assert [over_grpc.decode()] == answer.json()["outputs"][0]["data"] == ["안녕하세요, 세계"]


def test_binary_tensors_over_http(kserve: launch.Server, rest_answer: str) -> None:
    http = v2_http.InferenceServerClient(kserve.http)
    inputs = []
    for name, text in {"text_input": PROMPT, "sampling_parameters": json.dumps(GREEDY)}.items():
        inputs.append(v2_http.InferInput(name, [1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    (text,) = http.infer(MODEL, inputs).as_numpy("text_output")
    assert text.decode() == PROMPT + rest_answer


def test_only_requested_outputs_are_sent(kserve: launch.Server, client: V2Client) -> None:
    tensors = given("text_input", PROMPT), sampling(**GREEDY), given("return_finish_reason", True)
    answer = infer(kserve, *tensors, outputs=[{"name": "finish_reason"}]).json()
    assert [output["name"] for output in answer["outputs"]] == ["finish_reason"]
    inputs = [tensor("text_input", PROMPT), tensor("return_finish_reason", True)]
    result = client.stub.infer(MODEL, inputs, outputs=[v2.InferRequestedOutput("finish_reason")])
    assert [output.name for output in result.get_response().outputs] == ["finish_reason"]


def test_concurrent_calls_batch_in_one_engine(kserve: launch.Server, client: V2Client) -> None:
    """The highest number of running requests is more than one, so calls did not queue behind each other."""
    calls = [
        client.stub.async_infer(
            MODEL,
            [tensor("text_input", PROMPT), tensor("sampling_parameters", '{"max_tokens": 1500, "ignore_eos": true}')],
            callback=lambda result, error: None,
        )
        for _ in range(4)
    ]
    eventually(lambda: running(kserve) == 4, "all four in the engine")
    for call in calls:
        call.cancel()
    eventually(lambda: running(kserve) == 0, "an idle engine")


def test_one_client_speaks_to_triton_too(triton: launch.Server, client: V2Client, rest_answer: str) -> None:
    with V2Client(triton.grpc) as other:
        assert other.state() == client.state()
        assert (other.server["name"], other.decoupled) == ("triton", True)
        assert client.tensors().items() <= other.tensors().items()
        answers = [each.generate(PROMPT, **GREEDY) for each in (client, other)]
        assert answers == [Answer(rest_answer, GREEDY["max_tokens"], 5, "length")] * 2
        pieces = [list(each.stream(PROMPT, **GREEDY)) for each in (client, other)]
        assert len(pieces[0]) == 1 < len(pieces[1])
        assert "".join(piece.text for piece in pieces[1]) == pieces[0][0].text == rest_answer
        with pytest.raises(InferenceServerException, match="top_p") as caught:
            other.generate(PROMPT, top_p=7)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


# Mistakes: the right code, and a message that names the tensor

BAD = {
    "wrong datatype": ([given("text_input", 1.0, "FP32")], "text_input: expected datatype BYTES, got FP32"),
    "wrong shape": ([given("text_input", PROMPT, shape=(1, 1))], "text_input: expected shape [1], got [1, 1]"),
    "unknown tensor": (
        [given("text_inptu", PROMPT)],
        "text_inptu: there is no such input; this model takes text",
    ),
    "missing tensor": ([sampling(max_tokens=1)], "text_input: the prompt is missing or empty"),
    "prompt too long": ([given("text_input", "word " * 3000)], "text_input: This model's maximum context"),
    "streaming": ([given("text_input", PROMPT), given("stream", True)], "stream: the Open Inference Protocol"),
    "lora": (
        [given("text_input", PROMPT), sampling(lora_name="x")],
        "sampling_parameters.lora_name: this model has",
    ),
    "malformed JSON": (
        [given("text_input", PROMPT), given("sampling_parameters", "{'n': 1}")],
        "sampling_parameters: not JSON: Expecting property name",
    ),
    "out of range": ([given("text_input", PROMPT), sampling(top_p=7)], "sampling_parameters.top_p: top_p must be"),
    "beyond a limit": ([given("text_input", PROMPT), sampling(stop="x" * 10**6)], "sampling_parameters.stop: may have"),
    "half a character in JSON": (
        [given("text_input", PROMPT), given("sampling_parameters", '{"stop": "\\ud800"}')],
        "sampling_parameters: not JSON: ",
    ),
}
"""What both servers refuse alike is in test_v2.py; here are KServe's own cases, and both of its protocols."""

HALF = "\ud800"
"""Of a surrogate pair: JSON can say it, and UTF-8 cannot."""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (f"/v2/models/{MODEL}/infer", {"inputs": [given(HALF, "x")]}),
        (f"/v2/models/{MODEL}/infer", {"inputs": [given("text_input", HALF)]}),
        (f"/v2/models/{MODEL}/infer", {"inputs": [given("text_input", "x", HALF)]}),
        (f"/v2/models/{MODEL}/infer", {"id": HALF, "inputs": [given("text_input", "x"), sampling(max_tokens=1)]}),
        (f"/v2/models/{MODEL}/infer", {"inputs": [given("text_input", "x")], "outputs": [{"name": HALF}]}),
        ("/openai/v1/completions", {"model": HALF, "prompt": "x"}),
        ("/openai/v1/completions", {"model": MODEL, "prompt": HALF}),
        ("/openai/v1/completions", {"model": MODEL, "prompt": "x", "stop": HALF}),
        ("/openai/v1/completions", {"model": MODEL, "prompt": "x", "bad_words": [HALF], "stream": True}),
        ("/openai/v1/completions", {"model": MODEL, "prompt": "x", "request_id": HALF}),
        ("/openai/v1/chat/completions", {"model": MODEL, "messages": [{"role": HALF, "content": "x"}]}),
    ],
)
def test_half_a_character_is_the_callers_error_wherever_it_is(
    kserve: launch.Server, path: str, body: dict[str, Any]
) -> None:
    answer = requests.post(f"{kserve.url}{path}", json=body, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD)
def test_bad_tensors_are_the_callers_error(
    kserve: launch.Server, client: V2Client, tensors: list[JsonTensor], message: str
) -> None:
    over_rest = infer(kserve, *tensors)
    assert over_rest.status_code == 400
    assert over_rest.json()["error"].startswith(message)
    inputs = []
    for each in tensors:
        inputs.append(v2.InferInput(each["name"], each["shape"], each["datatype"]))
        dtype = {"BYTES": np.object_, "BOOL": np.bool_, "FP32": np.float32}[each["datatype"]]
        inputs[-1].set_data_from_numpy(np.array(each["data"], dtype=dtype).reshape(each["shape"]))
    with pytest.raises(InferenceServerException) as caught:
        client.stub.infer(MODEL, inputs)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message().startswith(message)


def test_unknown_model(kserve: launch.Server, client: V2Client) -> None:
    answer = infer(kserve, given("text_input", PROMPT), model="nope")
    assert (answer.status_code, answer.json()) == (404, {"error": "Model with name nope does not exist."})
    with pytest.raises(InferenceServerException, match="Model with name nope does not exist") as caught:
        client.stub.infer("nope", [tensor("text_input", PROMPT)])
    assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"data": None}, "text_input.data: Input should be a valid list"),
        ({"data": [1]}, "text_input: expected a BYTES element, got 1"),
        ({"data": ["a", "b"]}, "text_input: its data is not one BYTES element"),
        ({"shape": "1"}, "text_input.shape: Input should be a valid list"),
    ],
)
def test_malformed_json_names_the_tensor(kserve: launch.Server, broken: dict[str, Any], message: str) -> None:
    answer = infer(kserve, given("text_input", PROMPT) | broken)
    assert (answer.status_code, answer.json()) == (400, {"error": message})


def test_whatever_comes_over_http_is_served_or_refused(kserve: launch.Server) -> None:
    """Every operation of KServe's own OpenAPI document, with bodies that fit it and bodies that do not."""
    schema = schemathesis.openapi.from_dict(requests.get(f"{kserve.url}/openapi.json", timeout=30).json())
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    asked = 0

    @hypothesis_settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @hypothesis_given(st.data())
    def served_or_refused(data: st.DataObject) -> None:
        nonlocal asked
        case = data.draw(st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
        if "model_name" in case.path_parameters:
            case.path_parameters["model_name"] = MODEL
        if isinstance(case.body, dict) and "model" in case.body:
            case.body |= {"model": MODEL, "max_tokens": 2, "max_completion_tokens": 2}
        answer = case.call(base_url=kserve.url, timeout=60)
        # 501: what KServe's SDK has and this server does not, such as v1's explanations, embeddings and ranking.
        assert answer.status_code < 500 or answer.status_code == 501, (case.as_curl_command(), answer.text)
        asked += 1

    for found in schema.get_all_operations():
        operation = found.ok()
        served_or_refused()
    assert asked > 100


def test_what_breaks_a_validator_is_the_callers_error(kserve: launch.Server) -> None:
    url = f"{kserve.url}/openai/v1"
    answer = requests.post(f"{url}/chat/completions", json={"model": MODEL, "messages": None}, timeout=30)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, "the body is malformed")
    answer = requests.get(f"{url}/models/nope", timeout=30)
    assert (answer.status_code, answer.json()) == (404, {"error": "Model with name nope does not exist."})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (f"/v2/models/{MODEL}/infer", {"inputs": [{}] * 100_000}),
        (f"/v2/models/{MODEL}/infer", {"inputs": [given("text_input", PROMPT) | {"shape": [""] * 100_000}]}),
        ("/openai/v1/chat/completions", {"messages": [1] * 100_000}),
        ("/openai/v1/completions", {"prompt": [-1] * 100_000}),
        ("/openai/v1/completions", {"prompt": "x", "vllm_xargs": {str(each): {} for each in range(50_000)}}),
    ],
    ids=["inputs", "shape", "messages", "prompt", "vllm_xargs"],
)
def test_what_takes_seconds_to_validate_is_refused_before(
    kserve: launch.Server, path: str, body: dict[str, Any]
) -> None:
    """By KServe's and vLLM's pydantic: for the messages 5 s, and 1 GB for as many errors."""
    answer = requests.post(kserve.url + path, json={"model": MODEL} | body, timeout=30)
    said = "has too many entries: all lists and objects of a request may have 4096."
    assert (answer.status_code, answer.json()) == (400, {"error": f"{list(body)[-1]} {said}"})


@pytest.mark.parametrize("field", ["inputs", "outputs", "parameters", "inputs.parameters", "outputs.parameters"])
def test_nor_is_a_request_of_thousands_of_parts_read_over_grpc(client: V2Client, field: str) -> None:
    request = v2.service_pb2.ModelInferRequest(model_name=MODEL)
    *where, last = field.split(".")
    message = getattr(request, where[0]).add(name="text_input") if where else request
    for each in range(65):
        if last == "parameters":
            message.parameters[str(each)].bool_param = True
        else:
            getattr(message, last).add(name="text_input")
    with pytest.raises(grpc.RpcError, match="there may be 64") as caught:
        client.stub._client_stub.ModelInfer(request, timeout=30)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("path", [f"/v2/models/{MODEL}/infer", "/openai/v1/completions"])
def test_a_body_that_is_not_said_to_be_json(kserve: launch.Server, path: str, kind: str | None) -> None:
    """As `curl -d` sends it."""
    for body in (b'{"inputs": []}', b""):
        answer = requests.post(f"{kserve.url}{path}", data=body, headers={"Content-Type": kind}, timeout=30)
        assert answer.status_code == 400
        assert "a JSON object, sent with `Content-Type: application/json`" in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("GET", "/v2/nowhere", b"", 404, "Not Found"),
        ("GET", f"/v2/models/{MODEL}/config", b"", 404, "Not Found"),
        ("PUT", f"/v2/models/{MODEL}/infer", b"", 405, "Method Not Allowed"),
        ("POST", f"/v2/models/{MODEL}/infer", b'{"id": "\xff"}', 400, "There was an error parsing the body"),
        ("POST", f"/v2/models/{MODEL}/infer", b'{"id": 1', 400, "the body is not JSON: Expecting ',' delimiter at 8"),
    ],
)
def test_every_error_is_where_the_protocol_has_it(
    kserve: launch.Server, method: str, path: str, body: bytes, status: int, error: str
) -> None:
    kind = {"Content-Type": "application/json"}
    answer = requests.request(method, f"{kserve.url}{path}", data=body, headers=kind, timeout=30)
    assert (answer.status_code, answer.json()) == (status, {"error": error})


def test_tritonclient_reads_what_this_server_does_not_have(kserve: launch.Server) -> None:
    with pytest.raises(InferenceServerException) as caught:
        v2_http.InferenceServerClient(kserve.http).get_model_config(MODEL)
    assert (caught.value.status(), caught.value.message()) == ("404", "Not Found")


def test_a_number_that_the_engines_messages_cannot_carry(kserve: launch.Server) -> None:
    body = {"model": MODEL, "prompt": "x", "top_k": 10**20}
    answer = requests.post(f"{kserve.url}/openai/v1/completions", json=body, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("top_k may have integers of 64 bits at most")


def test_a_constraint_that_no_token_fits_is_the_callers_error(kserve: launch.Server) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4, "structured_outputs": {"regex": r"[^\s\S]"}}
    answer = requests.post(f"{kserve.url}/openai/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"structured_outputs.regex {GIVEN_UP}")


def test_an_output_that_there_is_not_is_refused_before_the_engine_works(kserve: launch.Server) -> None:
    before = generated(kserve)
    answer = infer(kserve, given("text_input", PROMPT), outputs=[{"name": "text_output"}, {"name": "finish_reason"}])
    assert answer.status_code == 400
    assert answer.json()["error"] == "outputs: finish_reason is unknown, or was not asked for by its return_ tensor"
    assert generated(kserve) == before


def test_openais_client_finds_the_model(kserve: launch.Server) -> None:
    with openai.OpenAI(base_url=f"{kserve.url}/openai/v1", api_key="none") as asked:
        found = asked.models.retrieve(MODEL)
    assert (found.id, found.object) == (MODEL, "model")


@pytest.mark.parametrize("ask", ["infer", "is_model_ready", "get_model_metadata"])
def test_a_name_of_any_length_is_not_found(client: V2Client, ask: str) -> None:
    """gRPC carries the reason as metadata: of a long one the client would hear of its size only."""
    inputs = [[tensor("text_input", PROMPT)]] if ask == "infer" else []
    with pytest.raises(InferenceServerException, match="Model with name mmm") as caught:
        getattr(client.stub, ask)("m" * 20_000, *inputs)
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_a_refusal_is_short_and_writes_no_line_of_its_own_into_the_log(kserve: launch.Server, client: V2Client) -> None:
    assert kserve.log
    before = kserve.log.stat().st_size
    not_text = v2_http.InferInput("text_input", [1], "BYTES")
    not_text.set_data_from_numpy(np.array([b"\xff" * 900_000], dtype=np.object_))
    with pytest.raises(InferenceServerException) as caught:
        v2_http.InferenceServerClient(kserve.http).infer(MODEL, [not_text])
    assert len(caught.value.message()) < 1000
    unknown = requests.get(f"{kserve.url}/v2/models/{'m' * 20_000}/ready", timeout=30)
    assert (unknown.status_code, len(unknown.text) < 1000) == (404, True)
    forged = f"forged-{time.time_ns()}"
    for path in (f"/v2/models/x%0A{forged}/ready", f"/x%0A{forged}"):
        assert requests.get(kserve.url + path, timeout=30).status_code == 404
    for asked in (
        {"inputs": [given(f"x\n{forged}", "x")]},
        {"inputs": [given("text_input", PROMPT)], "outputs": [{"name": f"x\n{forged}"}]},
    ):
        refused = requests.post(f"{kserve.url}/v2/models/{MODEL}/infer", json=asked, timeout=30)
        assert refused.status_code == 400
        assert forged in refused.json()["error"]
    binary = v2_http.InferInput(f"x\n{forged}", [1], "BYTES")
    binary.set_data_from_numpy(np.array([b"x"], dtype=np.object_))
    with pytest.raises(InferenceServerException):
        v2_http.InferenceServerClient(kserve.http).infer(MODEL, [binary])
    with pytest.raises(InferenceServerException):
        client.stub.infer(f"x\n{forged}", [tensor("text_input", PROMPT)])
    written = kserve.log.read_bytes()[before:].decode()
    assert len(written) < 50_000
    assert forged in written
    assert f"\n{forged}" not in written


def test_truncated_raw_bytes_name_the_tensor(kserve: launch.Server, client: V2Client) -> None:
    five_announced_two_sent = b"\x05\x00\x00\x00ab"
    over_grpc = v2.InferInput("text_input", [1], "BYTES")
    over_grpc._raw_content = five_announced_two_sent
    with pytest.raises(InferenceServerException, match="text_input: its data is not one BYTES element"):
        client.stub.infer(MODEL, [over_grpc])
    over_http = v2_http.InferInput("text_input", [1], "BYTES")
    over_http.set_data_from_numpy(np.array([b"ab"], dtype=np.object_))
    over_http._raw_data = five_announced_two_sent
    with pytest.raises(InferenceServerException, match="text_input: the binary data does not fit"):
        v2_http.InferenceServerClient(kserve.http).infer(MODEL, [over_http])


def test_bytes_that_are_not_utf8_name_the_tensor(client: V2Client) -> None:
    given_bytes = v2.InferInput("text_input", [1], "BYTES")
    given_bytes.set_data_from_numpy(np.array([b"\xff"], dtype=np.object_))
    with pytest.raises(InferenceServerException, match="text_input: not UTF-8") as caught:
        client.stub.infer(MODEL, [given_bytes])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_message_beyond_the_limit(client: V2Client) -> None:
    with pytest.raises(InferenceServerException, match="larger than max") as caught:
        client.stub.infer(MODEL, [tensor("text_input", "x" * 9 * 2**20)])
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_more_outputs_than_there_are(kserve: launch.Server) -> None:
    answer = infer(kserve, given("text_input", PROMPT), outputs=[{"name": "text_output"}] * 1_000)
    assert (answer.status_code, answer.json()) == (400, {"error": "outputs: there are 6 at most, got 1000"})
    answer = infer(kserve, given("text_input", PROMPT), outputs=[{"name": "text_output"}] * 100_000)
    assert (answer.status_code, answer.json()) == (413, {"error": "The request's body is longer than 1048576 bytes."})


def test_an_input_that_is_there_twice(kserve: launch.Server, client: V2Client) -> None:
    """Which of the two would hold?"""
    answer = infer(kserve, given("text_input", PROMPT), given("text_input", "Another"))
    assert (answer.status_code, answer.json()) == (400, {"error": "text_input: is there twice"})
    with pytest.raises(InferenceServerException, match="text_input: is there twice"):
        client.stub.infer(MODEL, [tensor("text_input", PROMPT), tensor("text_input", "Another")])


def test_the_one_version_is_served_and_another_is_not_found(kserve: launch.Server, client: V2Client) -> None:
    root = f"{kserve.url}/v2/models/{MODEL}"
    body = {"inputs": [given("text_input", PROMPT), sampling(max_tokens=1)]}
    for version, status in (("1", 200), ("2", 404), ("x", 404), ("1", 200)):
        assert requests.post(f"{root}/versions/{version}/infer", json=body, timeout=60).status_code == status
        for path in ("", "/ready"):
            assert requests.get(f"{root}/versions/{version}{path}", timeout=60).status_code == status
        assert requests.post(f"{root}/infer", json=body, timeout=60).status_code == 200
    assert client.stub.is_model_ready(MODEL, "1")
    assert client.stub.infer(MODEL, [tensor("text_input", PROMPT)], model_version="1").as_numpy("text_output").size
    for call in (client.stub.get_model_metadata, client.stub.is_model_ready):
        with pytest.raises(InferenceServerException, match="version 2 does not exist") as caught:
            call(MODEL, "2")
        assert caught.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize("action", ["load", "unload"])
def test_nobody_unloads_the_model(kserve: launch.Server, client: V2Client, action: str) -> None:
    assert requests.post(f"{kserve.url}/v2/repository/models/{MODEL}/{action}", timeout=60).status_code == 404
    with pytest.raises(InferenceServerException, match="loads its one model at its start") as caught:
        getattr(client.stub, f"{action}_model")(MODEL)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    assert client.state() == {"live": True, "ready": True, "model ready": True}


def test_binary_outputs_also_where_outputs_are_listed(kserve: launch.Server) -> None:
    http = v2_http.InferenceServerClient(kserve.http)
    text = v2_http.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([PROMPT.encode()], dtype=np.object_))
    flag = v2_http.InferInput("return_finish_reason", [1], "BOOL")
    flag.set_data_from_numpy(np.array([True]))
    for listed in ([], ["text_output"], ["finish_reason", "text_output"]):
        answer = infer(
            kserve,
            given("text_input", PROMPT),
            given("return_finish_reason", True),
            outputs=[{"name": name} for name in listed],
            parameters={"binary_data_output": True},
        )
        head = json.loads(answer.content[: int(answer.headers["inference-header-content-length"])])
        assert all("binary_data_size" in output["parameters"] for output in head["outputs"])
        outputs = [v2_http.InferRequestedOutput(name, binary_data=name == "text_output") for name in listed]
        result = http.infer(MODEL, [text, flag], outputs=outputs)
        assert result.as_numpy("text_output")[0].decode().startswith(PROMPT)


def test_tritonclients_own_options_over_http(kserve: launch.Server) -> None:
    http = v2_http.InferenceServerClient(kserve.http)
    text = v2_http.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([PROMPT.encode()], dtype=np.object_))
    result = http.infer(MODEL, [text], request_id="mine", priority=1, timeout=10**7, sequence_id=7, sequence_start=True)
    assert result.get_response()["id"] == "mine"


def test_clients_of_other_dialects_are_answered(kserve: launch.Server) -> None:
    """The middleware that does it has tests of its own (test_asgi.py); here it is in place."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}
    body = {"inputs": [given("text_input", PROMPT), sampling(max_tokens=1)]}
    answer = requests.post(f"{kserve.url}/v2/models/{MODEL}/infer", json=body, headers=offer, timeout=60)
    assert answer.status_code == 200
    for path in ("/", "/v2/health/live", "/v2/health/ready", f"/v2/models/{MODEL}/ready"):
        assert requests.head(kserve.url + path, timeout=60).status_code == 200


# Callers who leave


@pytest.fixture(scope="module")
def pace(client: V2Client) -> Pace:
    return measure_pace(lambda tokens: client.generate("Once", max_tokens=tokens, ignore_eos=True))


def running(kserve: launch.Server) -> float:
    return metric(kserve.url, "vllm:num_requests_running")


def generated(kserve: launch.Server) -> float:
    return metric(kserve.url, "vllm:generation_tokens_total")


def leave_rest(kserve: launch.Server, _: Pace) -> None:
    body = {"inputs": [given("text_input", PROMPT), sampling(**ENDLESS)]}
    with half_a_request(kserve.url, f"/v2/models/{MODEL}/infer", body):
        eventually(lambda: running(kserve) == 1, "the request in the engine")


def leave_grpc(kserve: launch.Server, _: Pace) -> None:
    with V2Client(kserve.grpc) as client:
        inputs = [tensor("text_input", PROMPT), tensor("sampling_parameters", json.dumps(ENDLESS))]
        call = client.stub.async_infer(MODEL, inputs, callback=lambda result, error: None)
        eventually(lambda: running(kserve) == 1, "the request in the engine")
        call.cancel()


def leave_by_deadline(kserve: launch.Server, pace: Pace) -> None:
    with V2Client(kserve.grpc) as client:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(PROMPT, ENDLESS, timeout=pace.seconds(200, at_most=2))
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def leave_openai_stream(kserve: launch.Server, _: Pace) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "stream": True, **ENDLESS}
    with httpx.stream("POST", f"{kserve.url}/openai/v1/completions", json=body, timeout=30) as stream:
        next(stream.iter_lines())


def leave_openai(kserve: launch.Server, _: Pace) -> None:
    with half_a_request(kserve.url, "/openai/v1/completions", {"model": MODEL, "prompt": PROMPT, **ENDLESS}):
        eventually(lambda: running(kserve) == 1, "the request in the engine")


@pytest.mark.parametrize("leave", [leave_rest, leave_grpc, leave_by_deadline, leave_openai_stream, leave_openai])
def test_caller_who_leaves_stops_the_engine(
    kserve: launch.Server, pace: Pace, leave: Callable[[launch.Server, Pace], None]
) -> None:
    before = generated(kserve)
    leave(kserve, pace)
    eventually(lambda: running(kserve) == 0, "an idle engine")
    assert generated(kserve) - before < ENDLESS["max_tokens"] / 2


@pytest.mark.ends("kserve")
@pytest.mark.survives("the engine killed (SIGKILL)", "kserve", lost="its answers, each with an error")
def test_an_engine_that_dies_is_unavailable_to_everyone(kserve: launch.Server) -> None:
    assert kserve.pid
    family = psutil.Process(kserve.pid).children(recursive=True)
    (core,) = [process for process in family if process.name() == "VLLM::EngineCore"]
    endless = given("sampling_parameters", json.dumps(ENDLESS))
    with V2Client(kserve.grpc) as client, ThreadPoolExecutor(2) as pool:
        over_grpc = pool.submit(client.infer, PROMPT, ENDLESS)
        over_rest = pool.submit(infer, kserve, given("text_input", PROMPT), endless)
        eventually(lambda: running(kserve) == 2, "both in the engine")
        core.kill()
        refused = over_rest.result(timeout=60)
        assert (refused.status_code, "engine has died" in refused.text) == (503, True)
        with pytest.raises(InferenceServerException, match="engine has died") as caught:
            over_grpc.result(timeout=60)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
        with pytest.raises(InferenceServerException, match="engine has died") as caught:
            client.infer(PROMPT)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"
        assert client.state() == {"live": True, "ready": False, "model ready": False}
    (entry,) = [entry for entry in launch.status() if entry["name"] == "kserve"]
    assert entry["state"] == "failed"
    kserve.stop()
    assert not psutil.wait_procs(family, timeout=60)[1]


# KServe's OpenAI endpoints


@pytest.fixture(scope="module")
def sdk(kserve: launch.Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{kserve.url}/openai/v1", api_key="unused", max_retries=0, timeout=60)


@pytest.mark.parametrize(
    "fields", [{"min_tokens": 3, "max_tokens": 4}, {"use_beam_search": True, "n": 2, "temperature": 0, "max_tokens": 2}]
)
def test_openai_serves_what_only_the_limits_look_at_closely(kserve: launch.Server, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": PROMPT, **fields}
    answer = requests.post(f"{kserve.url}/openai/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == fields.get("n", 1)


def test_openai_completion_is_the_same_text(sdk: openai.OpenAI, rest_answer: str) -> None:
    answer = sdk.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12)
    assert answer.choices[0].text == rest_answer
    assert answer.usage
    assert answer.usage.completion_tokens == 12


def test_openai_stream_adds_up(sdk: openai.OpenAI, rest_answer: str) -> None:
    stream = sdk.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12, stream=True)
    texts = [chunk.choices[0].text for chunk in stream]
    assert len(texts) > 1
    assert "".join(texts) == rest_answer


def test_unicodes_line_ends_keep_an_event_on_one_line(kserve: launch.Server) -> None:
    words = "one\u2028two\u2029three\u0085four"
    body = {"model": MODEL, "prompt": "x", "structured_outputs": {"choice": [words]}, "max_tokens": 60, "stream": True}
    answer = requests.post(f"{kserve.url}/openai/v1/completions", json=body, timeout=60)
    lines = [line.removeprefix("data: ") for line in answer.content.decode().splitlines() if line]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == words


def test_openai_chat_over_sse(kserve: launch.Server) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "stream": True}
    with httpx.stream("POST", f"{kserve.url}/openai/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.iter_lines() if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "nope", "prompt": "x"}, 404),
        ({"model": MODEL, "prompt": "word " * 3000}, 400),
        ({"model": MODEL, "prompt": "x", "temperature": -1}, 400),
        ({"model": MODEL}, 400),
        ({"model": MODEL, "prompt": "x", "n": 4096}, 400),
        ({"model": MODEL, "prompt": "x", "request_id": "x" * 65}, 400),
        ({"model": MODEL, "prompt": "\ud800"}, 400),
        ({"model": MODEL, "prompt": ["x"] * 1024, "max_tokens": 1}, 400),
        ({"model": MODEL, "prompt": "x", "stop": ["x" * 257]}, 400),
        ({"model": MODEL, "prompt": "x", "structured_outputs": {"json": {"minItems": 10**9}}}, 400),
        ({"model": MODEL, "prompt": "x", "structured_outputs": {"regex": "foo**"}}, 400),
    ],
)
def test_openai_errors_keep_their_codes(kserve: launch.Server, fields: dict[str, Any], status: int) -> None:
    answer = requests.post(f"{kserve.url}/openai/v1/completions", json=fields, timeout=30)
    assert answer.status_code == status
    assert answer.json()["error"]


def test_openai_takes_no_long_id_by_its_header_either(kserve: launch.Server) -> None:
    body, headers = {"model": MODEL, "prompt": "x", "max_tokens": 1}, {"X-Request-Id": "x" * 65}
    answer = requests.post(f"{kserve.url}/openai/v1/completions", json=body, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "request_id")


@pytest.mark.parametrize(("messages", "parts"), [(513, 0), (1, 513)])
def test_openai_counts_messages_and_their_parts(kserve: launch.Server, messages: int, parts: int) -> None:
    empty = {"role": "user", "content": [{"type": "text", "text": ""}] * parts or ""}
    body = {"model": MODEL, "messages": [empty] * messages, "max_tokens": 1}
    answer = requests.post(f"{kserve.url}/openai/v1/chat/completions", json=body, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


# From the predictor that one writes first to ours

STEPS = sorted((ROOT / "src/servebook/ways/kserve/steps").glob("step_*.py"))
CUT = "The wire is cut."


@pytest.fixture(scope="class")
def steps(kserve: launch.Server) -> Iterator[tuple[list[str], Tap]]:
    """The steps' URLs, and the wire to the engine, the chapter's own, that they share."""

    def cut(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        if exchange.body["prompt"] == CUT:
            raise ConnectionResetError
        yield from chunks

    with Tap(kserve.url, cut) as tap, ladder(f"{tap.url}/openai") as urls:
        yield urls, tap


class TestSteps:
    """A class, for the steps' processes to end with the last of these tests."""

    @pytest.fixture(scope="class")
    @classmethod
    def long(cls, pace: Pace) -> JsonTensor:
        """Four seconds of work, however fast the engine is: it can be seen there before it is done."""
        return sampling(max_tokens=pace.tokens(4, at_least=48), ignore_eos=True)

    def refused(self, url: str, *inputs: JsonTensor) -> tuple[int, str]:
        answer = requests.post(f"{url}/v2/models/{MODEL}/infer", json={"inputs": inputs}, timeout=60)
        return answer.status_code, answer.json()["error"]

    def test_every_step_answers_as_the_server_does(self, steps: tuple[list[str], Tap], client: V2Client) -> None:
        urls, _ = steps
        assert len(urls) == len(STEPS)
        for url in urls:
            body = {"inputs": [given("text_input", PROMPT), sampling(**GREEDY)]}
            answer = requests.post(f"{url}/v2/models/{MODEL}/infer", json=body, timeout=60).json()
            assert answer["outputs"][0]["data"] == [client.generate(PROMPT, **GREEDY).text]

    def test_step_0_stops_everybody(
        self, steps: tuple[list[str], Tap], kserve: launch.Server, long: JsonTensor
    ) -> None:
        def lives_meanwhile(url: str) -> bool:
            body = {"inputs": [given("text_input", "Once"), long]}
            with half_a_request(url, f"/v2/models/{MODEL}/infer", body) as caller:
                eventually(lambda: running(kserve) == 1, "the request in the engine")
                assert requests.get(f"{url}/v2/health/live", timeout=60).ok
                caller.setblocking(False)
                try:
                    return not caller.recv(1)
                except BlockingIOError:
                    return True
                finally:
                    eventually(lambda: running(kserve) == 0, "an idle engine")

        assert not lives_meanwhile(steps[0][0])
        assert lives_meanwhile(steps[0][1])

    def test_step_2_says_whose_fault_it_was(self, steps: tuple[list[str], Tap]) -> None:
        (_, awaits, errors, _), _ = steps
        fine = given("text_input", "Hello"), sampling(max_tokens=1)
        faults = [
            (400, "text_input: ", [given("text_inptu", "Hello"), fine[1]]),
            (400, "text_input: ", [given("text_input", 1.5, "FP32"), fine[1]]),
            (400, "sampling_parameters: expected one such tensor", [fine[0]]),
            (400, "sampling_parameters: ", [fine[0], given("sampling_parameters", "{")]),
            (400, "sampling_parameters: ", [fine[0], given("sampling_parameters", "1")]),
            (400, "sampling_parameters: ", [fine[0], sampling(temperature=-1)]),
            (503, "The engine cannot be reached.", [given("text_input", CUT), fine[1]]),
        ]
        for status, words, inputs in faults:
            assert self.refused(awaits, *inputs)[0] == 500
            got, error = self.refused(errors, *inputs)
            assert got == status, error
            assert words in error
        # Of these, neither is the caller's to say.
        body = {"inputs": [fine[0], sampling(max_tokens=1, model="nope", stream=True)]}
        assert requests.post(f"{errors}/v2/models/{MODEL}/infer", json=body, timeout=60).ok

    @pytest.mark.parametrize(("step", "hangs_up"), [(2, False), (3, True)])
    def test_step_3_takes_the_request_to_the_engine_along(
        self, steps: tuple[list[str], Tap], kserve: launch.Server, long: JsonTensor, step: int, hangs_up: bool
    ) -> None:
        urls, tap = steps
        body = {"inputs": [given("text_input", "Once"), long]}
        with half_a_request(urls[step], f"/v2/models/{MODEL}/infer", body):
            eventually(lambda: running(kserve) == 1, "the request in the engine")
        assert tap.exchanges[-1].done.wait(60)
        assert (tap.exchanges[-1].left is not None) == hangs_up


@pytest.mark.timeout(600)
def test_notebook(run_notebook: Callable[[str], None]) -> None:
    run_notebook("06_kserve")
