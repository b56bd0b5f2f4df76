"""What becomes of the obvious gRPC server, `steps/step_0_blocking.py`: vLLM's offline class `LLM` behind threads.

The server is a process of its own. It serves `llm.v1.LLMService` on two ports: on one, a lock lets a single
thread at a time use the engine; on the other, nothing does. This module asks both, and prints what came of it as one
JSON object: `alone`, `locked` and `unlocked` (each an `Outcome`), `stream` (the error of `stream=True`) and `exit`,
the server's exit code (None while it lives).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import grpc

from servebook.engine.arguments import engine_args, engine_argv, engine_env
from servebook.engine.model import model_path
from servebook.engine.start import WITH_ENGINE
from servebook.errors import ServebookError
from servebook.launch.child import Child, run_engine
from servebook.processes import wait_until
from servebook.settings import load_settings
from servebook.ways.custom_grpc.client import GrpcClient

AS_IT_COMES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""The engine in a process of its own: vLLM's default for `LLM`, and so what whoever writes this server has."""
START_SECONDS = 300
MAX_TOKENS = 12
PROMPTS = [f"Story {number}. Once upon a time" for number in range(1, 9)]


def serve() -> None:
    """Start the engine and both ports, print the addresses, serve."""
    from vllm import LLM, EngineArgs

    from servebook.ways.custom_grpc.steps.step_0_blocking import start

    settings = load_settings()
    args = engine_args(engine_argv(settings, model_path(settings)))  # as every engine that it is compared with
    options = {field.name: getattr(args, field.name) for field in fields(EngineArgs)}
    llm = LLM(**options | {"disable_log_stats": True})  # as `LLM` has it
    servers, ports = zip(*(start(llm, turn) for turn in (threading.Lock(), nullcontext())), strict=True)
    print(json.dumps([f"127.0.0.1:{port}" for port in ports]), flush=True)
    servers[0].wait_for_termination()


@dataclass(frozen=True)
class Outcome:
    """What a group of clients got: seconds in all, tokens per second, texts and errors by prompt."""

    seconds: float
    tokens_per_s: float
    texts: dict[str, str]
    errors: dict[str, str]


def ask(address: str, clients: int, api_key: str | None = None, timeout: float = 60) -> Outcome:
    """Ask each of PROMPTS once, `clients` at a time, greedily; each call may take `timeout` seconds."""
    texts, errors, tokens = {}, {}, 0
    with GrpcClient(address, api_key=api_key) as client, ThreadPoolExecutor(clients) as pool:
        started = time.monotonic()
        calls = {
            prompt: pool.submit(client.generate, prompt, timeout=timeout, max_tokens=MAX_TOKENS, temperature=0)
            for prompt in PROMPTS
        }
        for prompt, call in calls.items():
            try:
                answer = call.result()
            except grpc.RpcError as error:
                errors[prompt] = str(error.code().name)
            else:
                texts[prompt] = answer.text
                tokens += len(answer.token_ids)
        seconds = time.monotonic() - started
    return Outcome(seconds, tokens / seconds, texts, errors)


def addresses(server: Child) -> list[str]:
    """Where the two ports listen; nothing until they do."""
    return next((json.loads(line) for line in server.said().splitlines() if line.startswith('["127')), [])


def main() -> None:
    """Start the server, ask, print, and end the server with all that it started, which a crash leaves behind."""
    command = [*WITH_ENGINE, "servebook.ways.custom_grpc.mistake", "serve"]
    settings = load_settings()
    env = engine_env(settings) | AS_IT_COMES
    env.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    with run_engine(settings, command, addresses, env=env, seconds=START_SECONDS, grace=0) as server:
        locked, unlocked = addresses(server)
        result: dict[str, Any] = {"alone": asdict(ask(locked, clients=1))}
        with GrpcClient(locked) as client:
            try:
                next(client.stream(PROMPTS[0]))
            except grpc.RpcError as error:
                result["stream"] = f"{error.code().name}: {error.details()}"
        result["locked"] = asdict(ask(locked, clients=len(PROMPTS)))
        result["unlocked"] = asdict(ask(unlocked, clients=len(PROMPTS), timeout=15))  # it may hang as well
        wait_until(lambda: server.process.poll() is not None, 5)  # if it crashed, its exit code is due now
        print(json.dumps(result | {"exit": server.process.poll()}))


if __name__ == "__main__":
    try:
        serve() if sys.argv[1:] == ["serve"] else main()
    except ServebookError as error:
        sys.exit(str(error))
