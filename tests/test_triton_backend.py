"""The Triton backend's parts that need no engine: arrays, files, the server's command."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import psutil
import pytest
import requests
from vllm.engine.arg_utils import AsyncEngineArgs

from servebook.engine.arguments import engine_args, engine_argv
from servebook.errors import LaunchError
from servebook.launch import SERVERS
from servebook.launch.child import run_child
from servebook.launch.probes import http_ok
from servebook.processes import free_port, wait_until
from servebook.settings import Settings
from servebook.ways.triton_grpc.backend import __main__ as backend
from servebook.ways.triton_grpc.backend.files import ModelFilesError, engine_words_as_json, read_engine_args, read_loras
from servebook.ways.triton_grpc.backend.guardian import MARK, start_guardian
from servebook.ways.triton_grpc.backend.repository import MODEL_REPOSITORY, render_repository
from servebook.ways.triton_grpc.backend.server import tritonserver_command, tritonserver_env
from servebook.ways.triton_grpc.backend.tensors import arrays, elements


def test_values_become_arrays_of_the_datatypes_that_triton_wants() -> None:
    values: dict[str, list[Any]] = {
        "text_output": ["가", ""],
        "finish_reason": ["stop", "None"],
        "cumulative_logprob": [-0.5, math.nan],
        "logprobs": ["null", "[]"],
        "num_input_tokens": [3],
        "num_output_tokens": [2, 0],
    }
    tensors = arrays(values)
    assert list(tensors["text_output"]) == ["가".encode(), b""]
    assert {name: (tensor.dtype.type, tensor.shape) for name, tensor in tensors.items()} == {
        "text_output": (np.object_, (2,)),
        "finish_reason": (np.object_, (2,)),
        "cumulative_logprob": (np.float32, (2,)),
        "logprobs": (np.object_, (2,)),
        "num_input_tokens": (np.uint32, (1,)),
        "num_output_tokens": (np.uint32, (2,)),
    }
    assert arrays({"text_output": []})["text_output"].shape == (0,)
    assert elements({"text_input": np.array([b"x"], np.object_), "stream": np.array([True])}) == {
        "text_input": b"x",
        "stream": True,
    }


@pytest.mark.parametrize(
    "words",
    [
        "--model m --max-model-len 128 --enforce-eager",
        "--model m --served-model-name a b --no-enable-prefix-caching",
        "--model=m --gpu-memory-utilization=0.5 --seed -1",
        "--model=405 --served-model-name true 1e3 --tokenizer null --revision 405",
        """--model m --override-generation-config '{"temperature": 0.1}' --dtype float32""",
    ],
)
def test_words_become_the_arguments_that_vllms_own_parser_reads(words: str) -> None:
    assert_read_alike(shlex.split(words))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_launchers_words_become_the_same_arguments(device: str, settings: Settings, tmp_path: Path) -> None:
    argv = engine_argv(settings.model_copy(update={"device": device}), tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(engine_words_as_json(argv)))
    assert_read_alike(argv, read_engine_args(tmp_path))


def assert_read_alike(argv: list[str], ours: AsyncEngineArgs | None = None) -> None:
    ours, theirs = ours or AsyncEngineArgs(**engine_words_as_json(argv)), engine_args(argv)
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


def test_two_servers_that_make_the_same_repository_at_once_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", "/here"]
    rename = Path.rename

    def second(copy: Path, target: Path) -> None:
        if not target.exists():
            shutil.copytree(copy, target)  # by the other server, a moment before
        rename(copy, target)

    monkeypatch.setattr(Path, "rename", second)
    rendered = render_repository(MODEL_REPOSITORY, tmp_path, words)
    assert "/here" in (rendered / "vllm_model/1/model.json").read_text()
    assert list(tmp_path.iterdir()) == [rendered]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        render_repository(MODEL_REPOSITORY, tmp_path, ["--model", "/there"])


async def test_an_error_that_nobody_expected_reaches_neither_client_nor_log_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They may quote the prompt. Triton's own module is there in its server only."""
    triton = MagicMock()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    there = set(sys.modules)
    module = importlib.import_module("servebook.ways.triton_grpc.backend.engine")
    for name in set(sys.modules) - there:
        if name.startswith("servebook."):
            del sys.modules[name]  # nobody else gets one with that in place of Triton

    prompt = "a secret"

    async def fails(*_: object) -> None:
        raise RuntimeError(prompt)

    engine = module.Engine.__new__(module.Engine)
    engine._generate = fails
    sender = MagicMock()
    engine.waiting = {sender: "a task"}
    await engine._serve("a request", sender)
    (logged,), _ = triton.Logger.log_error.call_args
    assert "RuntimeError at" in logged
    assert "in fails" in logged
    assert prompt not in logged
    (message, _), _ = triton.TritonError.call_args
    assert message == "generation failed; the server's log has the cause"
    sender.send.assert_called_once()


def test_statistics_that_triton_does_not_take_hold_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are dropped, which is said once; those after them come through."""
    triton = MagicMock()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    name = "servebook.ways.triton_grpc.backend.metrics"
    module = importlib.import_module(name)
    del sys.modules[name]  # nobody else gets one with that in place of Triton
    monkeypatch.setattr(module, "MOST_REPORTS", 4)
    logger = module.TritonStatLogger({}, MagicMock(**{"model_config.max_model_len": 128}))
    stuck, go_on, taken = threading.Event(), threading.Event(), []

    def take(value: float) -> None:
        stuck.set()
        go_on.wait(30)
        if value in (1, 2):
            raise RuntimeError("no such metric")
        taken.append(value)

    def step(running: int) -> None:
        logger.record(SimpleNamespace(num_running_reqs=running, num_waiting_reqs=0, kv_cache_usage=0), None)

    logger.metrics["num_requests_running"].set = take
    logger.metrics["num_requests_waiting"] = logger.metrics["gpu_cache_usage_perc"] = MagicMock()
    step(1)
    assert stuck.wait(30)
    for running in range(2, 10):
        step(running)
    assert logger.reports.qsize() <= 4, "two of the first step, and two more"
    go_on.set()
    assert wait_until(lambda: taken == [3], 30), taken
    step(9)  # a gauge that was dropped is not taken for one that was told
    assert wait_until(lambda: taken == [3, 9], 30), taken
    ((said,), _) = triton.Logger.log_warn.call_args
    assert "on the metrics page are incomplete" in said
    triton.Logger.log_warn.assert_called_once()


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


@pytest.mark.parametrize(("device", "sees"), [("gpu", "0"), ("cpu", "")])
def test_only_a_triton_with_an_engine_on_a_gpu_sees_the_card(
    device: str, sees: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would hold a part of its memory that nobody reckons with: the chapter's steps, a lab's rehearsal."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SERVEBOOK_DEVICE", device)
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["backend"])
    become = MagicMock()
    monkeypatch.setattr(os, "execve", become)
    backend.main()
    (_, command, environment), _ = become.call_args
    assert environment["CUDA_VISIBLE_DEVICES"] == sees
    assert ("--allow-gpu-metrics=false" in command) == (device == "cpu")
    assert tritonserver_env()["CUDA_VISIBLE_DEVICES"] == ""


STUB = """
import subprocess, sys, time
from servebook.ways.triton_grpc.backend.guardian import start_guardian
guardian = start_guardian(death_seconds=0.5, lost_seconds=0.5, end_seconds=2)
engine = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(engine.pid, guardian.process.pid, flush=True)
word = sys.stdin.readline()
if word != "end\\n":
    guardian.expect_the_end()
if word != "stuck\\n":
    guardian.release()
if word in ("stuck\\n", "hangs\\n"):
    time.sleep(60)
"""
SERVER = """
import subprocess, sys, time
stub = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(stub.pid, flush=True)
stub.wait() if "waits" in sys.argv else time.sleep(60)
"""


def test_a_stub_ends_as_it_should_without_its_guardian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the model of an engine that died would not be unloaded, and nobody would hear of it."""
    for name in (MARK, "SPT_NOENV"):  # with which the start marks this process
        monkeypatch.setenv(name, "")
    guardian = start_guardian()
    guardian.process.kill()
    guardian.process.wait()
    guardian.expect_the_end()
    guardian.release()


def start_family(
    word: bytes = b"", *more: str
) -> tuple[subprocess.Popen[bytes], psutil.Process, psutil.Process, psutil.Process]:
    """A server; its stub, which is told `word`; and that one's engine and guardian."""
    command = [sys.executable, "-c", SERVER, STUB, *more]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout
    assert server.stdin
    stub = psutil.Process(int(server.stdout.readline()))
    engine, guardian = (psutil.Process(int(pid)) for pid in server.stdout.readline().split())
    server.stdin.write(word)
    server.stdin.flush()
    return server, stub, engine, guardian


def test_a_killed_stub_takes_engine_and_server_along() -> None:
    server, stub, engine, guardian = start_family()
    stub.kill()
    assert server.wait(60) == -signal.SIGKILL
    _, alive = psutil.wait_procs([engine, guardian], timeout=60)
    assert not alive


@pytest.mark.parametrize("word", [b"stuck\n", b"hangs\n"])
def test_a_stub_that_is_stuck_after_its_engines_death_is_ended_with_all(word: bytes) -> None:
    """While it unloads its model, or when it is done with that."""
    server, stub, engine, guardian = start_family(word)
    assert server.wait(60) == -signal.SIGKILL
    _, alive = psutil.wait_procs([stub, engine, guardian], timeout=60)
    assert not alive


def test_a_server_that_waits_for_a_stub_that_is_well_is_ended_with_all(capfd: pytest.CaptureFixture[str]) -> None:
    server, stub, engine, guardian = start_family(b"", "waits")
    server.wait(60)
    _, alive = psutil.wait_procs([stub, engine, guardian], timeout=60)
    assert not alive
    assert SERVERS["triton"].again in capfd.readouterr().err, "by which `serve` knows that it may start another"


@pytest.mark.parametrize("word", [b"end\n", b"dying\n"])
def test_a_stub_that_ends_as_it_should_harms_nobody(word: bytes) -> None:
    server, stub, engine, guardian = start_family(word)
    guardian.wait(60)
    if word == b"dying\n":
        assert stub.status() == psutil.STATUS_ZOMBIE, "the guardian stays as long as a stub whose engine died"
    assert engine.is_running()
    assert server.poll() is None
    for process in (engine, stub, server):
        process.kill()
    server.wait(60)


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
