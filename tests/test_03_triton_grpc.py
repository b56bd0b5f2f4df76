"""Triton with our `vllm` backend, over real sockets: the contract line by line, then its weak places."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import tritonclient.grpc as triton_grpc
from desk import eventually, seconds_until, spared
from tritonclient.utils import InferenceServerException

from servebook import launch
from servebook.launch import Server
from servebook.launch.files import Files, read_log
from servebook.processes import KEPT, free_port, marked
from servebook.settings import load_settings
from servebook.ways.client import Answer, Piece
from servebook.ways.kserve.client import V2Client
from servebook.ways.metrics import metric
from servebook.ways.triton_grpc import steps
from servebook.ways.triton_grpc.aio_client import TritonAioClient
from servebook.ways.triton_grpc.backend.server import tritonserver_command, tritonserver_env
from servebook.ways.triton_grpc.client import TritonClient
from servebook.workbook.notebook import Pace, measure_pace

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = "vllm_model"
PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True}
STORY: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
WITH_STATUS = {"triton_grpc_error": "true"}


def tensor(name: str, value: Any, shape: list[int] | None = None) -> triton_grpc.InferInput:
    """An input tensor: str and bytes as BYTES, bool as BOOL; shape [1] unless told otherwise."""
    data = value.encode() if isinstance(value, str) else value
    is_bool = isinstance(value, bool)
    entry = triton_grpc.InferInput(name, shape or [1], "BOOL" if is_bool else "BYTES")
    entry.set_data_from_numpy(np.array([data], dtype=np.bool_ if is_bool else np.object_).reshape(shape or [1]))
    return entry


def ask(
    server: Server, *inputs: triton_grpc.InferInput, headers: dict[str, str] | None = None, **more: Any
) -> list[Any]:
    """Send one request on a stream; return what the callback got: results and, last, an error where one came."""
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    got: list[Any] = []
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: arrived.put(error or result), headers=headers, stream_timeout=120)
        client.async_stream_infer(MODEL, list(inputs), **more)
        while not got or not (isinstance(got[-1], Exception) or is_final(got[-1])):
            got.append(arrived.get(timeout=120))
        client.stop_stream()
    assert arrived.empty(), "something came after the last response"
    return got


def is_final(result: triton_grpc.InferResult) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def texts(results: list[Any], choice: int = 0) -> str:
    return "".join(result.as_numpy("text_output")[choice].decode() for result in results)


def generate_over_http(server: Server, **body: Any) -> requests.Response:
    return requests.post(f"{server.url}/v2/models/{MODEL}/generate", json=body, timeout=120)


def vllm_metric(server: Server, name: str) -> float:
    return metric(server.metrics, f"vllm:{name}", model=MODEL, version="1")


def running(server: Server) -> float:
    return vllm_metric(server, "num_requests_running")


async def until(condition: Callable[[], bool], what: str) -> float:
    return await asyncio.to_thread(seconds_until, condition, what)


async def use(client: TritonAioClient, stream: bool) -> None:
    """Ask for more than anyone waits for."""
    if not stream:
        await client.generate(PROMPT, **LONG)
    async with aclosing(client.stream(PROMPT, **LONG)) as chunks:
        async for _ in chunks:
            pass


def family(server: Server) -> dict[str, psutil.Process]:
    """The server's stub and EngineCore."""
    children = psutil.Process(server.pid).children(recursive=True)
    names = {"stub": "triton_python", "core": "VLLM::EngineCor"}
    return {role: next(child for child in children if child.name().startswith(name)) for role, name in names.items()}


def test_notebook(triton: Server, run_notebook: Callable[[str], None]) -> None:
    run_notebook("03_triton_grpc")


# The contract


def test_metadata_and_config_are_those_of_nvidias_backend(triton: Server) -> None:
    with triton_grpc.InferenceServerClient(triton.grpc) as client:
        assert client.is_server_ready()
        assert client.is_model_ready(MODEL)
        metadata = client.get_model_metadata(MODEL)
        config = client.get_model_config(MODEL).config
    assert {(entry.name, entry.datatype, *entry.shape) for entry in metadata.inputs} == {
        ("text_input", "BYTES", 1),
        ("stream", "BOOL", 1),
        ("sampling_parameters", "BYTES", 1),
        ("exclude_input_in_output", "BOOL", 1),
        ("return_finish_reason", "BOOL", 1),
        ("return_cumulative_logprob", "BOOL", 1),
        ("return_logprobs", "BOOL", 1),
        ("return_num_input_tokens", "BOOL", 1),
        ("return_num_output_tokens", "BOOL", 1),
        ("image", "BYTES", -1),
        ("embedding_request", "BYTES", 1),
    }
    assert {(entry.name, entry.datatype, *entry.shape) for entry in metadata.outputs} == {
        ("text_output", "BYTES", -1),
        ("finish_reason", "BYTES", -1),
        ("cumulative_logprob", "FP32", -1),
        ("logprobs", "BYTES", -1),
        ("num_input_tokens", "UINT32", 1),
        ("num_output_tokens", "UINT32", -1),
    }
    assert {entry.name for entry in config.input if not entry.optional} == {"text_input"}
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 0
    assert config.backend == "vllm"


def test_unary_infer_is_refused(triton: Server) -> None:
    with triton_grpc.InferenceServerClient(triton.grpc) as client, pytest.raises(InferenceServerException) as refusal:
        client.infer(MODEL, [tensor("text_input", PROMPT)])
    assert refusal.value.status() == "StatusCode.UNIMPLEMENTED"
    assert "doesn't support models with decoupled transaction policy" in refusal.value.message()


def test_the_articles_shape_is_refused(triton: Server) -> None:
    (error,) = ask(triton, tensor("text_input", PROMPT, [1, 1]))
    assert re.search(r"Expected \[1\],\s+got \[1,1\]", error.message())


def test_the_prompt_is_echoed_unless_excluded_and_never_when_streaming(triton: Server) -> None:
    text, sampling = tensor("text_input", PROMPT), tensor("sampling_parameters", json.dumps(GREEDY))
    (echoed,) = ask(triton, text, sampling)
    (plain,) = ask(triton, text, sampling, tensor("exclude_input_in_output", True))
    streamed = ask(triton, text, sampling, tensor("stream", True))
    assert texts([echoed]) == PROMPT + texts([plain])
    assert texts([plain]) == texts(streamed)
    assert len(streamed) > 1
    (error,) = ask(triton, text, tensor("stream", True), tensor("exclude_input_in_output", False))
    assert "When streaming, `exclude_input_in_output` = False is not allowed." in error.message()


def test_the_last_response_is_flagged_and_no_other(triton: Server) -> None:
    results = ask(
        triton,
        tensor("text_input", PROMPT),
        tensor("stream", True),
        tensor("sampling_parameters", json.dumps(GREEDY)),
        enable_empty_final_response=True,
    )
    assert [is_final(result) for result in results] == [False] * (len(results) - 1) + [True]


def test_parameters_come_as_tensor_or_with_the_request_and_strings_count(triton: Server) -> None:
    text = tensor("text_input", PROMPT)
    (as_tensor,) = ask(triton, text, tensor("sampling_parameters", json.dumps(GREEDY)))
    (as_strings,) = ask(triton, text, tensor("sampling_parameters", '{"temperature": "0", "max_tokens": "6"}'))
    (with_request,) = ask(triton, text, parameters={"temperature": "0", "max_tokens": 6})
    assert texts([as_tensor]) == texts([as_strings]) == texts([with_request])


@pytest.mark.parametrize("stream", [False, True])
def test_optional_outputs(triton: Server, stream: bool) -> None:
    names = ["finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens"]
    results = ask(
        triton,
        tensor("text_input", PROMPT),
        tensor("stream", stream),
        tensor("sampling_parameters", json.dumps(GREEDY | {"logprobs": 1})),
        *(tensor(f"return_{name}", True) for name in names),
    )
    last = results[-1]
    reasons = [result.as_numpy("finish_reason")[0] for result in results]
    assert reasons == [b"None"] * (len(results) - 1) + [b"length"]
    assert sum(result.as_numpy("num_output_tokens")[0] for result in results) == 6
    assert list(last.as_numpy("num_input_tokens")) == [5]
    entries = [entry for result in results for entry in json.loads(result.as_numpy("logprobs")[0])]
    assert len(entries) == 6
    best = [next(iter(entry.values())) for entry in entries]
    assert all(set(token) == {"logprob", "rank", "decoded_token"} for token in best)
    assert "".join(token["decoded_token"] for token in best) == texts(results).removeprefix(PROMPT)
    assert last.as_numpy("cumulative_logprob")[0] == pytest.approx(sum(token["logprob"] for token in best), abs=1e-4)


def test_outputs_that_were_not_asked_for_are_not_sent(triton: Server) -> None:
    (result,) = ask(triton, tensor("text_input", PROMPT), tensor("return_finish_reason", False))
    assert [output.name for output in result.get_response().outputs] == ["text_output"]


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_keep_their_places(triton: Server, stream: bool) -> None:
    results = ask(
        triton,
        tensor("text_input", PROMPT),
        tensor("stream", stream),
        tensor("sampling_parameters", '{"n": 3, "max_tokens": 5, "ignore_eos": true, "seed": 7}'),
        tensor("exclude_input_in_output", True),
        tensor("return_num_output_tokens", True),
        tensor("return_finish_reason", True),
    )
    assert all(result.as_numpy("text_output").shape == (3,) for result in results)
    assert list(sum(result.as_numpy("num_output_tokens") for result in results)) == [5, 5, 5]
    assert list(results[-1].as_numpy("finish_reason")) == [b"length"] * 3
    assert len({texts(results, choice) for choice in range(3)}) > 1, "seeds of the choices differ, so do their texts"


def test_korean_arrives_whole(triton: Server) -> None:
    """A choice forces text out of the model whose characters are several bytes and tokens each."""
    sampling = json.dumps({"structured_outputs": {"choice": ["안녕하세요, 반갑습니다"]}, "max_tokens": 64})
    results = ask(
        triton, tensor("text_input", "인사:"), tensor("stream", True), tensor("sampling_parameters", sampling)
    )
    assert texts(results) == "안녕하세요, 반갑습니다"
    assert not any("\ufffd" in texts([result]) for result in results)


def test_http_generate_and_generate_stream(triton: Server) -> None:
    answer = generate_over_http(triton, text_input=PROMPT, parameters=GREEDY, exclude_input_in_output=True).json()
    body = {"text_input": PROMPT, "stream": True, "parameters": GREEDY}
    url = f"{triton.url}/v2/models/{MODEL}/generate_stream"
    with requests.post(url, json=body, stream=True, timeout=120) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix(b"data: ")) for line in response.iter_lines() if line]
    assert "".join(event["text_output"] for event in events) == answer["text_output"]
    assert len(events) > 1


# Refusals


TOO_LONG = "word " * 3000
REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"sampling_parameters": '{"temperature": -1}'}, "INVALID_ARGUMENT", "sampling_parameters.temperature: "),
    ({"sampling_parameters": '{"temprature": 1}'}, "INVALID_ARGUMENT", "sampling_parameters.temprature: "),
    ({"sampling_parameters": '{"max_tokens": "x"}'}, "INVALID_ARGUMENT", "sampling_parameters.max_tokens: "),
    ({"sampling_parameters": '{"logprobs": 1000000}'}, "INVALID_ARGUMENT", "sampling_parameters"),
    ({"sampling_parameters": '{"allowed_token_ids": [999999]}'}, "INVALID_ARGUMENT", "sampling_parameters"),
    ({"sampling_parameters": "{"}, "INVALID_ARGUMENT", "sampling_parameters: not JSON"),
    ({"sampling_parameters": b"\xff"}, "INVALID_ARGUMENT", "sampling_parameters: not UTF-8"),
    ({"text_input": ""}, "INVALID_ARGUMENT", "text_input: the prompt is missing or empty"),
    ({"text_input": b"\xff\xfe"}, "INVALID_ARGUMENT", "text_input: not UTF-8"),
    ({"text_input": TOO_LONG}, "INVALID_ARGUMENT", "text_input: This model's maximum context length is 2048 tokens"),
    (
        {"sampling_parameters": '{"lora_name": "x"}'},
        "INVALID_ARGUMENT",
        "sampling_parameters.lora_name: LoRA feature is not enabled.",
    ),
    ({"image": "aGk="}, "UNIMPLEMENTED", "image: this model generates text from text only"),
    ({"embedding_request": "{}"}, "UNIMPLEMENTED", "embedding_request: this model generates text from text only"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("inputs", "status", "reason"), REFUSALS, ids=[reason[:50] for *_, reason in REFUSALS])
def test_refusals_name_field_and_reason(
    triton: Server, inputs: dict[str, Any], status: str, reason: str, stream: bool
) -> None:
    values = {"text_input": PROMPT, "stream": stream} | inputs
    tensors = [tensor(name, value) for name, value in values.items()]
    (with_status,) = ask(triton, *tensors, headers=WITH_STATUS)
    assert with_status.status() == f"StatusCode.{status}"
    assert with_status.message().startswith(reason)
    (as_text,) = ask(triton, *tensors)
    assert as_text.message() == with_status.message()


def test_http_answers_refusals_with_400(triton: Server) -> None:
    response = generate_over_http(triton, text_input=PROMPT, parameters={"top_p": 2})
    assert (response.status_code, response.json()["error"].split(":")[0]) == (400, "sampling_parameters.top_p")


def test_malformed_requests_in_bulk_harm_nobody(triton: Server) -> None:
    stub = family(triton)["stub"].pid
    sure = GREEDY | {"max_tokens": 2}  # the fourth is a near tie, which may go the other way in a batch
    pieces = ["{", "}", "[", '"n"', ":", "1e999", "-1", "null", '"temperature"', ",", "\\u0000", "\ud55c", "9" * 40]
    chance = random.Random(3)
    malformed = ["".join(chance.choices(pieces, k=chance.randint(1, 8))) for _ in range(200)]
    values = [-1, 2**62, "x", [], {}, [[[]]], 1e308, True]
    fields = [
        "n",
        "temperature",
        "top_k",
        "seed",
        "stop",
        "logit_bias",
        "structured_outputs",
        "bad_words",
        "min_tokens",
    ]
    malformed += [json.dumps({field: value, "max_tokens": 1}) for field in fields for value in values if value != 2**62]

    async def all_at_once() -> tuple[list[Answer], int]:
        async with TritonAioClient(triton.grpc) as client:
            good = [asyncio.create_task(client.generate(PROMPT, **sure)) for _ in range(8)]
            bad = [
                asyncio.to_thread(ask, triton, tensor("text_input", "x"), tensor("sampling_parameters", text))
                for text in malformed
            ]
            outcomes = await asyncio.gather(*bad)
            return await asyncio.gather(*good), sum(isinstance(got[-1], Exception) for got in outcomes)

    answers, refused = asyncio.run(all_at_once())
    assert {answer.text for answer in answers} == {" Paris."}
    assert refused > 200
    assert family(triton)["stub"].pid == stub
    assert TritonClient(triton.grpc).generate(PROMPT, **sure) == answers[0]


# Many at once, and those who leave


async def test_32_streams_at_once(triton: Server) -> None:
    async def one(client: TritonAioClient, number: int) -> list[Piece]:
        prompt = f"Count from {number}:"
        return [chunk async for chunk in client.stream(prompt, max_tokens=24, ignore_eos=True, temperature=0)]

    async with TritonAioClient(triton.grpc) as client:
        answers = await asyncio.gather(*(one(client, number) for number in range(32)))
    for chunks in answers:
        assert sum(chunk.tokens for chunk in chunks) == 24
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    await until(lambda: running(triton) == 0, "no request is left running")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancel_reaches_the_engine_at_once(triton: Server, stream: bool) -> None:
    """Seen in the engine's own counts, whether or not a response was ever sent: of 1,500 tokens it writes a few more.

    Not by a clock, which goes on when a busy machine stands still. Triton's backend asks every 0.05 s who has left.
    """
    most = 50 + (await asyncio.to_thread(pace_of, triton)).tokens(0.1, at_least=0)
    async with TritonAioClient(triton.grpc) as client:
        for _ in range(3):
            task = asyncio.create_task(use(client, stream))
            await until(lambda: running(triton) == 1, "the request runs")
            before = vllm_metric(triton, "generation_tokens_total")
            task.cancel()
            await until(lambda: running(triton) == 0, "the engine is free")
            assert vllm_metric(triton, "generation_tokens_total") - before < most


async def test_a_cancel_before_the_first_token(triton: Server) -> None:
    """On a fast engine before the first response, which is the whole answer: the prefill may be done by then."""
    pace = await asyncio.to_thread(pace_of, triton)
    prompt = " ".join(str(number) for number in range(400))  # leaves room for 559 tokens
    async with TritonAioClient(triton.grpc) as client:
        before = vllm_metric(triton, "generation_tokens_total")
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.generate(prompt, **LONG)
        seconds = time.monotonic() - start
        await client.generate("next", max_tokens=1)
        await until(lambda: running(triton) == 0, "the engine is free")
    # What it writes until the client leaves, and until that is seen; 20 for who looks late.
    most = 20 + pace.tokens(seconds + 0.1, at_least=0)
    assert vllm_metric(triton, "generation_tokens_total") - before < most


@pytest.mark.survives("200 callers who leave at random", "triton", lost="nothing")
async def test_200_random_cancels(triton: Server) -> None:
    """gRPC cancels crash some Triton releases (server issues 7368, 8034)."""
    before = {role: process.pid for role, process in family(triton).items()}
    chance = random.Random(5)

    async def leave_early(client: TritonAioClient) -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(chance.expovariate(4)):
                await use(client, stream=chance.random() < 0.5)
            return "answered"
        return "left"

    async with TritonAioClient(triton.grpc) as client:
        for _ in range(10):
            outcomes = await asyncio.gather(*(leave_early(client) for _ in range(20)))
            assert set(outcomes) == {"left"}
        await until(lambda: running(triton) == 0 and vllm_metric(triton, "num_requests_waiting") == 0, "all aborted")
        answer = await client.generate(PROMPT, **GREEDY)
    assert answer.finish_reason == "length"
    assert {role: process.pid for role, process in family(triton).items()} == before


def pace_of(server: Server) -> Pace:
    return measure_pace(lambda n: TritonClient(server.grpc).generate(PROMPT, max_tokens=n, ignore_eos=True))


def patience(server: Server) -> float:
    """Seconds in which LONG cannot be done, on an engine of any speed."""
    return pace_of(server).seconds(LONG["max_tokens"] // 3, at_most=0.5)


def spares_long(server: Server) -> AbstractContextManager[None]:
    return spared(lambda: vllm_metric(server, "generation_tokens_total"), lambda: running(server), LONG["max_tokens"])


def test_a_deadline_ends_the_request_on_both_sides(triton: Server) -> None:
    seconds = patience(triton)
    with spares_long(triton), pytest.raises(InferenceServerException) as error:
        list(TritonClient(triton.grpc).stream(PROMPT, timeout=seconds, **LONG))
    assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"


async def test_a_deadline_in_asyncio(triton: Server) -> None:
    seconds = await asyncio.to_thread(patience, triton)
    with spares_long(triton):
        async with TritonAioClient(triton.grpc) as client:
            with pytest.raises(InferenceServerException) as error:
                await client.generate(PROMPT, timeout=seconds, **LONG)
    assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"


@pytest.mark.parametrize("client", [TritonClient, V2Client])
def test_closing_the_synchronous_stream_cancels(client: type[TritonClient | V2Client], triton: Server) -> None:
    before = set(threading.enumerate())
    with client(triton.grpc) as made, closing(made.stream(PROMPT, **LONG)) as endless:
        next(endless)
        eventually(lambda: running(triton) == 1, "the request runs")
    eventually(lambda: running(triton) == 0, "the engine is free")
    eventually(lambda: set(threading.enumerate()) <= before, "no thread is left")


# What it reports, and to whom


def test_vllms_metrics_on_tritons_port(triton: Server) -> None:
    names = ["prompt_tokens_total", "generation_tokens_total", "request_params_n_count"]
    eventually(lambda: running(triton) == 0, "nothing runs")
    before = [vllm_metric(triton, name) for name in names]
    TritonClient(triton.grpc).generate(PROMPT, **GREEDY)
    eventually(lambda: vllm_metric(triton, names[2]) > before[2], "the request is counted")
    assert [vllm_metric(triton, name) - old for name, old in zip(names, before, strict=True)] == [5, 6, 1]
    text = requests.get(f"http://{triton.metrics}/metrics", timeout=60).text
    kinds = dict(re.findall(r"^# TYPE (vllm:\S+) (\S+)$", text, re.MULTILINE))
    assert kinds == {
        "vllm:prompt_tokens_total": "counter",
        "vllm:generation_tokens_total": "counter",
        "vllm:num_preemptions_total": "counter",
        "vllm:num_requests_running": "gauge",
        "vllm:num_requests_waiting": "gauge",
        "vllm:gpu_cache_usage_perc": "gauge",
        "vllm:iteration_tokens_total": "histogram",
        "vllm:time_to_first_token_seconds": "histogram",
        "vllm:time_per_output_token_seconds": "histogram",
        "vllm:e2e_request_latency_seconds": "histogram",
        "vllm:request_queue_time_seconds": "histogram",
        "vllm:request_inference_time_seconds": "histogram",
        "vllm:request_prefill_time_seconds": "histogram",
        "vllm:request_decode_time_seconds": "histogram",
        "vllm:request_prompt_tokens": "histogram",
        "vllm:request_generation_tokens": "histogram",
        "vllm:request_params_n": "histogram",
    }


async def test_triton_counts_each_request_and_one_that_was_cancelled_as_well(triton: Server) -> None:
    """Both as a success: to Triton a request is one when the backend has taken it."""

    def counts() -> tuple[int, int]:
        with triton_grpc.InferenceServerClient(triton.grpc) as client:
            (stats,) = client.get_inference_statistics(MODEL).model_stats
        return stats.inference_count, stats.inference_stats.success.count

    count, success = counts()
    async with TritonAioClient(triton.grpc) as client:
        await client.generate(PROMPT, **GREEDY)
        async with aclosing(client.stream(PROMPT, **LONG)) as stream:
            await anext(stream)
    await until(lambda: counts() == (count + 2, success + 2), "both counted")
    await until(lambda: running(triton) == 0, "the engine is free")


def test_only_this_machine_can_connect_and_nobody_can_load_models(triton: Server) -> None:
    connections = psutil.Process(triton.pid).connections()
    listening = {connection.laddr.ip for connection in connections if connection.status == "LISTEN"}
    # gRPC opens IPv6 sockets where it can, and writes an IPv4 address as one of IPv6.
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    with triton_grpc.InferenceServerClient(triton.grpc) as client, pytest.raises(InferenceServerException) as refusal:
        client.load_model("anything")
    assert "This protocol is restricted" in refusal.value.message()


# Loading


ARTICLE_CONFIG = """
name: "vllm_model"
backend: "vllm"
max_batch_size: 0
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
parameters { key: "model" value: { string_value: "some/model" } }
parameters { key: "gpu_memory_utilization" value: { string_value: "0.9" } }
"""


def test_engine_settings_in_config_pbtxt_have_no_effect_and_an_unknown_one_fails_the_load(tmp_path: Path) -> None:
    version = tmp_path / "repository" / MODEL / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(ARTICLE_CONFIG)
    (version / "model.json").write_text('{"model": "m", "max_model_length": 5}')
    command = tritonserver_command(
        tmp_path / "repository", tmp_path, grpc_port=free_port(), http_port=free_port(), metrics_port=free_port()
    )
    environment = os.environ | tritonserver_env()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    log = done.stdout + done.stderr
    for name in ("model", "gpu_memory_utilization"):
        assert f"config.pbtxt: parameter {name} has no effect; engine arguments belong into 1/model.json" in log
    assert "has no engine argument 'max_model_length'; did you mean max_model_len?" in log


# Deaths


@pytest.fixture(scope="module")
def paused() -> Iterator[Server]:
    """A server whose backend stood still for 2 s while it loaded its model."""
    name = "triton-paused"
    files = Files(load_settings().state_dir, name)

    def stub() -> psutil.Process | None:
        """Once it loads the model; before it does, Triton is patient."""
        if "Resolved architecture" not in read_log(files.log):
            return None
        ours = marked(f"{KEPT}={files.socket}").items()
        return next((psutil.Process(pid) for pid, command in ours if "triton_python_backend_stub" in command), None)

    with ThreadPoolExecutor() as pool:
        served = pool.submit(launch.serve, "triton", instance=name)
        loading = eventually(lambda: served.done() or stub(), "the stub", load_settings().start_timeout)
        assert loading is not True, f"it started, or failed, before it could be paused: {served.exception()}"
        loading.suspend()
        time.sleep(2)  # the pause
        loading.resume()
        server = served.result()
    yield server
    server.stop()


@pytest.mark.lane("own")
@pytest.mark.survives("a pause of 2 s while it loads (SIGSTOP)", "triton", lost="seconds: it is started once more")
def test_a_pause_while_it_loads_is_no_load_that_lasts_for_ever(paused: Server) -> None:
    assert requests.get(f"{paused.url}/v2/models/{MODEL}/ready", timeout=60).status_code == 200
    assert "Triton lost sight of its backend" in Path(f"{paused.log}.1").read_text(), "the log of the first try"


@pytest.fixture
def own(victim: str, request: pytest.FixtureRequest) -> Server:
    """A server to kill, which no other test needs any more."""
    server: Server = request.getfixturevalue({"core": "paused", "stub": "triton"}[victim])
    return server


@pytest.mark.survives("the engine killed (SIGKILL)", "triton", lost="its answers, each with an error")
@pytest.mark.parametrize(
    "victim",
    [pytest.param("core", marks=pytest.mark.lane("own")), pytest.param("stub", marks=pytest.mark.ends("triton"))],
)
async def test_a_death_is_seen_at_once_by_all_and_leaves_nothing(own: Server, victim: str) -> None:
    processes = family(own)
    regions = {entry.path for entry in processes["stub"].memory_maps() if "_backend_shm_region_" in entry.path}
    assert regions

    async def wait_for_answer(client: TritonAioClient, stream: bool) -> str:
        with pytest.raises(InferenceServerException) as error:
            await use(client, stream)
        return str(error.value.status())

    async with TritonAioClient(own.grpc) as client:
        waiting = [asyncio.create_task(wait_for_answer(client, stream)) for stream in [True, False] * 4]
        await until(lambda: running(own) == 8, "all run")
        os.kill(processes[victim].pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            assert set(await asyncio.gather(*waiting)) == {"StatusCode.UNAVAILABLE"}

    def is_ready() -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"{own.url}/v2/models/{MODEL}/ready", timeout=60).status_code == 200
        return False

    await until(lambda: not is_ready(), "the model is not ready any more")
    (entry,) = [entry for entry in launch.status() if entry["name"] == own.name]
    assert entry["state"] == "failed"
    await until(lambda: not any(is_alive(process) for process in processes.values()), "no process is left")
    await until(lambda: not any(Path(region).exists() for region in regions), "no shared memory is left")
    if victim == "core":
        assert "the stub does not end" not in own.tail(1000)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


# From the model that one writes first to the backend


@pytest.fixture(scope="class")
def ladder(triton: Server) -> Iterator[str]:
    before = set(Path("/dev/shm").iterdir())
    with steps.ladder(triton.grpc) as address:
        regions = set(Path("/dev/shm").glob("tmp*")) - before  # perhaps some of another lane's, which go as well
        assert len(regions) >= len(steps.STEPS)
        yield address
    eventually(lambda: not any(region.exists() for region in regions), "no shared memory is left")


class TestSteps:
    """A class, for their Triton to end with the last of these tests."""

    def written(self, triton: Server) -> float:
        """How many tokens the engine has written, for whomever."""
        return vllm_metric(triton, "generation_tokens_total")

    def test_from_step_1_on_the_answer_comes_in_pieces(self, ladder: str, triton: Server) -> None:
        whole = TritonClient(triton.grpc).generate(PROMPT, **GREEDY).text
        for step in range(len(steps.STEPS)):
            pieces = list(steps.stream(ladder, step, PROMPT, **GREEDY))
            assert "".join(pieces) == whole
            assert (len(pieces) > 1) == (step > 0)

    @pytest.mark.parametrize(("step", "waits"), [(1, True), (2, False)])
    def test_from_step_2_on_callers_do_not_wait_for_one_another(
        self, ladder: str, triton: Server, step: int, waits: bool
    ) -> None:
        """`waits`: the first caller has everything before the second one has a first piece."""
        tokens = STORY["max_tokens"]
        if not waits:  # it must not be over before the second caller has connected, however fast the engine is
            tokens = pace_of(triton).tokens(3, at_least=tokens)
        before = self.written(triton)
        with (
            closing(steps.stream(ladder, step, PROMPT, **STORY | {"max_tokens": tokens})) as first,
            closing(steps.stream(ladder, step, PROMPT, **GREEDY)) as second,
        ):
            next(first)
            next(second)
            assert (self.written(triton) - before >= tokens) == waits
        eventually(lambda: running(triton) == 0, "an idle engine")

    @pytest.mark.parametrize(("step", "sampling", "whole"), [(2, STORY, True), (3, LONG, False)])
    def test_step_3_does_not_write_on_for_who_has_left(
        self, ladder: str, triton: Server, step: int, sampling: dict[str, Any], whole: bool
    ) -> None:
        """Triton's figures come a moment after the tokens: "idle" may be from before the call."""
        before = self.written(triton)
        with closing(steps.stream(ladder, step, PROMPT, **sampling)) as pieces:
            next(pieces)
            if not whole:
                eventually(lambda: running(triton) == 1, "an engine at work")
        if whole:
            eventually(lambda: self.written(triton) == before + sampling["max_tokens"], "all of it, for nobody")
        eventually(lambda: running(triton) == 0, "an idle engine")
        assert (self.written(triton) == before + sampling["max_tokens"]) == whole

    @pytest.mark.parametrize(
        ("step", "status"), [(2, "StatusCode.DEADLINE_EXCEEDED"), (3, "StatusCode.INVALID_ARGUMENT")]
    )
    def test_step_3_says_what_is_wrong(self, ladder: str, step: int, status: str) -> None:
        with pytest.raises(InferenceServerException) as caught:
            list(steps.stream(ladder, step, PROMPT, timeout=1 if step == 2 else 30, temperature=-1))
        assert caught.value.status() == status
        assert step == 2 or "temperature" in caught.value.message()
