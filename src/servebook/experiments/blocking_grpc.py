"""The obvious gRPC server: vLLM's offline class `LLM` behind a thread pool. `python -m servebook.experiments.blocking_grpc`

It serves the same proto as `servebook.grpc_server`, is asked the same questions, and prints what came of it as
one JSON object: `alone` and `together` (each an `Outcome`), and `stream`, the error of `stream=True`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import grpc

from llm.v1 import llm_pb2, llm_pb2_grpc
from servebook.clients.grpc_client import GrpcClient
from servebook.model import model_path
from servebook.settings import load_settings

THREADS = 4
MAX_TOKENS = 24
PROMPTS = [f"Question {number}: what is {number} plus {number}? Answer:" for number in range(1, 9)]


class BlockingServicer(llm_pb2_grpc.LLMServiceServicer):
    """One method call, one thread, one call of `LLM.generate`."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def Generate(self, request: llm_pb2.GenerateRequest, context: grpc.ServicerContext) -> llm_pb2.GenerateResponse:
        """Block a thread until the text is complete."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=request.max_tokens, temperature=request.temperature)
        [output] = self.llm.generate([request.prompt], params, use_tqdm=False)
        completion = output.outputs[0]
        return llm_pb2.GenerateResponse(text=completion.text, token_ids=completion.token_ids)

    def StreamGenerate(
        self, request: llm_pb2.StreamGenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[llm_pb2.StreamGenerateResponse]:
        """Stream, if `LLM.generate` could."""
        for output in self.llm.generate([request.prompt], stream=True):
            yield llm_pb2.StreamGenerateResponse(text=output.outputs[0].text)


@dataclass(frozen=True)
class Outcome:
    """What several clients got: seconds in all, tokens per second, each prompt's text, each failed prompt's error."""

    seconds: float
    tokens_per_s: float
    texts: dict[str, str]
    errors: dict[str, str]

    def wrong(self, alone: Mapping[str, str]) -> int:
        """How many did not get the text that they get when they ask alone."""
        return sum(self.texts.get(prompt) != text for prompt, text in alone.items())


def ask(address: str, clients: int) -> Outcome:
    """Ask each of PROMPTS once, `clients` at a time, greedily."""
    texts, errors, tokens = {}, {}, 0
    with GrpcClient(address) as client, ThreadPoolExecutor(clients) as pool:
        started = time.monotonic()
        calls = {
            prompt: pool.submit(client.generate, prompt, max_tokens=MAX_TOKENS, temperature=0, timeout=30)
            for prompt in PROMPTS
        }
        for prompt, call in calls.items():
            try:
                answer = call.result()
                texts[prompt] = answer.text
                tokens += len(answer.token_ids)
            except grpc.RpcError as error:
                errors[prompt] = f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]
        seconds = time.monotonic() - started
    return Outcome(seconds, tokens / seconds, texts, errors)


def main() -> None:
    """Start engine and server, ask, print, end."""
    from vllm import LLM

    settings = load_settings()
    llm = LLM(
        model=str(model_path(settings)),
        max_model_len=settings.max_model_len,
        kv_cache_memory_bytes=settings.kv_cache_gib * 2**30,
        enforce_eager=not settings.on_gpu,
    )
    server = grpc.server(ThreadPoolExecutor(THREADS))
    llm_pb2_grpc.add_LLMServiceServicer_to_server(BlockingServicer(llm), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    result: dict[str, Any] = {"alone": asdict(ask(address, clients=1))}
    with GrpcClient(address) as client:
        try:
            next(client.stream(PROMPTS[0]))
        except grpc.RpcError as error:
            result["stream"] = f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]
    result["together"] = asdict(ask(address, clients=len(PROMPTS)))
    print(json.dumps(result), flush=True)
    server.stop(None)


if __name__ == "__main__":
    main()
