"""The Triton backend's parts that need no engine: requests, responses, files, the server's command."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import psutil
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from servebook.engine.arguments import engine_args, engine_argv
from servebook.errors import LaunchError
from servebook.launch.child import run_child
from servebook.launch.probes import http_ok
from servebook.launch.processes import free_port
from servebook.settings import Settings
from servebook.ways.triton_grpc.backend.files import ModelFilesError, engine_words_as_json, read_engine_args, read_loras
from servebook.ways.triton_grpc.backend.repository import MODEL_REPOSITORY, render_repository
from servebook.ways.triton_grpc.backend.request import (
    BadRequest,
    GenerateRequest,
    UnsupportedRequest,
    parse_request,
    stream_interval,
    text_tensor,
)
from servebook.ways.triton_grpc.backend.response import Responses
from servebook.ways.triton_grpc.backend.server import tritonserver_command, tritonserver_env
from servebook.ways.v2.contract import INPUTS, OPTIONAL_OUTPUTS


def parse(text: Any = b"Hello", parameters: Any = "{}", **inputs: Any) -> GenerateRequest:
    tensors = {"text_input": np.array([text], dtype=np.object_)}
    for name, value in inputs.items():
        tensors[name] = np.array([value], dtype=np.object_ if isinstance(value, bytes) else None)
    return parse_request(tensors, parameters)


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


@pytest.mark.parametrize("name", OPTIONAL_OUTPUTS)
def test_optional_outputs_are_asked_for_by_name(name: str) -> None:
    assert parse(**{f"return_{name}": True}).outputs == {name}
    assert parse(**{f"return_{name}": False}).outputs == frozenset()
    assert f"return_{name}" in {tensor["name"] for tensor in INPUTS}


def test_tokens_share_responses_where_there_are_many_streams() -> None:
    assert [stream_interval(requests) for requests in (1, 3, 4, 6, 8, 32)] == [1, 1, 2, 3, 4, 4]


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
    (r'{"stop": "\ud800"}', "sampling_parameters: not JSON"),
    ('{"temprature": 1}', "sampling_parameters.temprature: vLLM has no such sampling parameter"),
    ('{"output_kind": 0}', "sampling_parameters.output_kind: vLLM has no such sampling parameter"),
    ('{"_eos_token_id": 0}', "sampling_parameters._eos_token_id: vLLM has no such sampling parameter"),
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
    with pytest.raises(BadRequest, match="text_input: the prompt is empty"):
        parse(b"")
    with pytest.raises(BadRequest, match="text_input: not UTF-8"):
        parse(b"\xff")
    for name in ("image", "embedding_request"):
        with pytest.raises(UnsupportedRequest, match=f"{name}: this backend generates text"):
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

    first = responses.tensors(output((2, "c", [9], None), (0, "가", [7, 8], "stop")))
    assert list(first["text_output"]) == ["가".encode(), b"", b"c"]
    assert list(first["finish_reason"]) == [b"stop", b"None", b"None"]
    assert list(first["num_output_tokens"]) == [2, 0, 1]
    assert list(first["num_input_tokens"]) == [3]
    assert [math.isnan(value) for value in first["cumulative_logprob"]] == [False, True, False]
    assert json.loads(first["logprobs"][2]) == [{"9": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}}]
    assert first["logprobs"][1] == b"null"
    assert {name: tensor.dtype for name, tensor in first.items()} == {
        "text_output": np.object_,
        "finish_reason": np.object_,
        "cumulative_logprob": np.float32,
        "logprobs": np.object_,
        "num_input_tokens": np.uint32,
        "num_output_tokens": np.uint32,
    }

    second = responses.tensors(output((1, "b", [5], "length")))
    assert list(second["text_output"]) == [b"", b"b", b""]
    assert list(second["finish_reason"]) == [b"stop", b"length", b"None"]


def test_the_prompt_is_echoed_before_each_choice_and_only_what_was_asked_for_is_sent() -> None:
    responses = Responses(parse(parameters='{"n": 2}'))
    tensors = responses.tensors(output((0, " a", [1], "stop"), (1, " b", [2], "stop")))
    assert {name: list(tensor) for name, tensor in tensors.items()} == {"text_output": [b"Hello a", b"Hello b"]}
    assert text_tensor([]).shape == (0,)


@pytest.mark.parametrize(
    "words",
    [
        "--model m --max-model-len 128 --enforce-eager",
        "--model m --served-model-name a b --no-enable-prefix-caching",
        "--model=m --gpu-memory-utilization=0.5 --seed -1",
        """--model m --override-generation-config '{"temperature": 0.1}' --dtype float32""",
    ],
)
def test_words_become_the_arguments_that_vllms_own_parser_reads(words: str) -> None:
    assert_read_alike(shlex.split(words))


def test_the_launchers_words_become_the_same_arguments(settings: Settings, tmp_path: Path) -> None:
    assert_read_alike(engine_argv(settings, tmp_path))


def assert_read_alike(argv: list[str]) -> None:
    ours, theirs = AsyncEngineArgs(**engine_words_as_json(argv)), engine_args(argv)
    for key in engine_words_as_json(argv):
        value = getattr(ours, key)
        assert getattr(theirs, key) in (value, [value]), key  # an option that may repeat is a list there


@pytest.mark.parametrize("word", ["-tp", "stray"])
def test_a_word_without_a_key_is_refused(word: str) -> None:
    with pytest.raises(ModelFilesError, match=f"{word} has no key in model.json: write the long option"):
        engine_words_as_json([word, "2"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "model.json is missing"),
        ("{", "model.json is not JSON"),
        ("[]", "model.json must hold a JSON object, not a list"),
        ('{"modle": "m"}', "vLLM .* has no engine argument 'modle'; did you mean model"),
    ],
)
def test_a_bad_model_json_fails_the_load_and_says_why(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    with pytest.raises(ModelFilesError, match=reason):
        read_engine_args(tmp_path)


def test_adapters_are_read_only_where_lora_is_enabled(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"model": "m", "enable_lora": true}')
    with pytest.raises(ModelFilesError, match=r"multi_lora.json is missing"):
        read_loras(tmp_path, read_engine_args(tmp_path))
    (tmp_path / "multi_lora.json").write_text('{"pirate": "/adapters/pirate"}')
    assert read_loras(tmp_path, read_engine_args(tmp_path)) == {"pirate": "/adapters/pirate"}
    (tmp_path / "model.json").write_text('{"model": "m"}')
    assert read_loras(tmp_path, read_engine_args(tmp_path)) is None


def test_settings_win_key_by_key_in_the_rendered_repository(tmp_path: Path) -> None:
    rendered = render_repository(MODEL_REPOSITORY, tmp_path, ["--model", "/here", "--enforce-eager"])
    values = json.loads((rendered / "vllm_model/1/model.json").read_text())
    source = json.loads((MODEL_REPOSITORY / "vllm_model/1/model.json").read_text())
    assert values == source | {"model": "/here", "enforce_eager": True}
    assert (rendered / "vllm_model/config.pbtxt").read_text() == (
        MODEL_REPOSITORY / "vllm_model/config.pbtxt"
    ).read_text()
    assert render_repository(MODEL_REPOSITORY, tmp_path, ["--model", "/here", "--enforce-eager"]) == rendered
    assert render_repository(MODEL_REPOSITORY, tmp_path, ["--model", "/there"]) != rendered
    with pytest.raises(LaunchError, match="--model-repository DIR"):
        render_repository(tmp_path / "nothing", tmp_path, [])


def test_the_server_listens_on_this_machine_only(tmp_path: Path) -> None:
    def command(repository: Path, host: str = "127.0.0.1") -> list[str]:
        return tritonserver_command(
            repository, tmp_path / "scratch", host=host, grpc_port=1, http_port=2, metrics_port=3
        )

    assert {"--grpc-address=127.0.0.1", "--http-address=127.0.0.1", "--metrics-address=127.0.0.1"} < set(
        command(MODEL_REPOSITORY)
    )
    with pytest.raises(LaunchError, match="Triton knows no API keys"):
        command(MODEL_REPOSITORY, host="0.0.0.0")
    with pytest.raises(LaunchError, match="There is no model repository"):
        command(tmp_path / "nothing")


STUB = """
import subprocess, sys
from servebook.ways.triton_grpc.backend.guardian import start_guardian
guardian = start_guardian(death_seconds=0.5)
engine = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(engine.pid, guardian.process.pid, flush=True)
word = sys.stdin.readline()
if word != "end\\n":
    guardian.expect_the_end()
if word != "stuck\\n":
    guardian.release()
guardian.process.wait()
"""
SERVER = """
import subprocess, sys, time
stub = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(stub.pid, flush=True)
time.sleep(60)
"""


def test_a_killed_stub_takes_engine_and_server_along() -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER, STUB], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout
    stub = int(server.stdout.readline())
    engine, guardian = (psutil.Process(int(pid)) for pid in server.stdout.readline().split())
    os.kill(stub, signal.SIGKILL)
    assert server.wait(10) == -signal.SIGKILL
    _, alive = psutil.wait_procs([engine, guardian], timeout=10)
    assert not alive


def test_a_stub_that_is_stuck_after_its_engines_death_is_ended_with_all() -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER, STUB], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout
    assert server.stdin
    stub = psutil.Process(int(server.stdout.readline()))
    engine, guardian = (psutil.Process(int(pid)) for pid in server.stdout.readline().split())
    server.stdin.write(b"stuck\n")
    server.stdin.flush()
    assert server.wait(10) == -signal.SIGKILL
    _, alive = psutil.wait_procs([stub, engine, guardian], timeout=10)
    assert not alive


@pytest.mark.parametrize("word", [b"end\n", b"dying\n"])
def test_a_stub_that_ends_as_it_should_harms_nobody(word: bytes) -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER, STUB], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout
    assert server.stdin
    stub = psutil.Process(int(server.stdout.readline()))
    engine, guardian = (psutil.Process(int(pid)) for pid in server.stdout.readline().split())
    server.stdin.write(word)
    server.stdin.flush()
    guardian.wait(10)
    assert engine.is_running()
    assert server.poll() is None
    for process in (engine, stub, server):
        process.kill()
    server.wait(10)


# --- a real server without a model --------------------------------------------------------------------------------


def load_by_raw_http2(port: int, key: bytes) -> bytes:
    """Ask for the load of a model over gRPC with a header that no client's library would send; what comes back."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    headers = {
        **{b":method": b"POST", b":scheme": b"http", b":path": b"/inference.GRPCInferenceService/RepositoryModelLoad"},
        **{b":authority": b"x", b"content-type": b"application/grpc", b"te": b"trailers", key: b"x"},
    }
    block = b"".join(b"\0" + bytes([len(n)]) + n + bytes([len(v)]) + v for n, v in headers.items())
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(10)
        hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
        connection.sendall(hello + frame(1, 4, 1, block) + frame(0, 1, 1, b"\0\0\0\0\x03\x12\x01x"))
        answer = b""
        while b"grpc-message" not in answer and (more := connection.recv(4096)):
            answer += more
    return answer


@pytest.mark.parametrize("shared_memory", [False, True])
def test_nobody_can_use_what_everybody_can_read_in_proc(shared_memory: bool, tmp_path: Path) -> None:
    """Model control, traces, the log and shared memory lead to code or files; other users know the command line."""
    repository = tmp_path / "repository"
    repository.mkdir()
    grpc_port, port, metrics_port = free_port(), free_port(), free_port()
    command = tritonserver_command(
        repository,
        tmp_path,
        grpc_port=grpc_port,
        http_port=port,
        metrics_port=metrics_port,
        shared_memory=shared_memory,
    )
    paths = {"repository/index", "repository/models/x/load", "repository/models/x/unload", "trace/setting", "logging"}
    region = "systemsharedmemory/region/a/register"
    ready = f"127.0.0.1:{port}", "/v2/health/ready"
    with run_child(command, lambda _: http_ok(*ready), env=tritonserver_env()) as triton:
        words = Path(f"/proc/{triton.process.pid}/cmdline").read_bytes()
        (name, value) = next(iter(set(re.findall(rb":([^:=\0]+)=([^\0]*)", words))))
        for header in ({}, {"servebook-admin": "x"}):
            codes = {
                path: requests.post(f"http://127.0.0.1:{port}/v2/{path}", json={}, headers=header).status_code
                for path in paths | {region}
            }
            assert {path for path, code in codes.items() if code == 403} == paths | (
                set() if shared_memory else {region}
            )
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(10)
            connection.sendall(
                b"POST /v2/repository/models/x/load HTTP/1.1\r\nHost: x\r\n"
                + name
                + b": "
                + value
                + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
            )
            assert b"poll from model repository" not in connection.recv(4096)
        for key in (name, name.replace(b"\n", b"")):
            answer = load_by_raw_http2(grpc_port, b"triton-grpc-protocol-" + key)
            assert b"poll from model repository" not in answer
        assert http_ok(*ready)


@pytest.mark.parametrize("place", ["josé-서울", "ü"])
def test_a_folder_that_triton_cannot_read_is_named(place: str, tmp_path: Path) -> None:
    repository = tmp_path / place / "repository"
    repository.mkdir(parents=True)
    with pytest.raises(LaunchError, match=f"ASCII.*{place}"):
        tritonserver_command(repository, tmp_path, grpc_port=1, http_port=2, metrics_port=3)
