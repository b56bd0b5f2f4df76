"""Step 0 of the server: vLLM's offline class `LLM` behind a pool of threads. `mistake.py` runs it.

Still wrong: `LLM` does not stream, its calls do not share a batch, and several threads at a time break it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import grpc
from vllm import LLM, SamplingParams

from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc

THREADS = 4


class Servicer(llm_pb2_grpc.LLMServiceServicer):
    """One call, one thread, one `LLM.generate`."""

    def __init__(self, llm: LLM, turn: AbstractContextManager[Any]) -> None:
        self.llm = llm
        self.turn = turn

    def Generate(self, request: llm_pb2.GenerateRequest, context: grpc.ServicerContext) -> llm_pb2.GenerateResponse:
        """Block a thread until the text is complete."""
        params = SamplingParams(max_tokens=request.max_tokens, temperature=request.temperature)
        with self.turn:
            [output] = self.llm.generate([request.prompt], params, use_tqdm=False)
        return llm_pb2.GenerateResponse(text=output.outputs[0].text, token_ids=output.outputs[0].token_ids)

    def StreamGenerate(
        self, request: llm_pb2.StreamGenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[llm_pb2.StreamGenerateResponse]:
        """Stream, if `LLM.generate` could."""
        for output in self.llm.generate([request.prompt], stream=True):
            yield llm_pb2.StreamGenerateResponse(text=output.outputs[0].text)


def start(llm: LLM, turn: AbstractContextManager[Any]) -> tuple[grpc.Server, int]:
    """Serve on a free port of this machine; give the server and its port."""
    server = grpc.server(ThreadPoolExecutor(THREADS))
    llm_pb2_grpc.add_LLMServiceServicer_to_server(Servicer(llm, turn), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port
