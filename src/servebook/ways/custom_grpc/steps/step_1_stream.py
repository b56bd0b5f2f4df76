"""Step 1 of the server: `AsyncLLM`, on an event loop beside the threads. All callers share a batch, and text streams.

Still wrong: the engine goes on when a caller leaves; a refused caller waits for ever, a fifth one for a free thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any
from uuid import uuid4

import grpc
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc

THREADS = 4


class Servicer(llm_pb2_grpc.LLMServiceServicer):
    """One call, one thread, which waits for what the engine's event loop hands it."""

    def __init__(self, engine: AsyncLLM, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self.loop = loop

    def StreamGenerate(
        self, request: llm_pb2.StreamGenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[llm_pb2.StreamGenerateResponse]:
        """Yield a message for each output of the engine."""
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            ignore_eos=request.sampling.ignore_eos,
            output_kind=RequestOutputKind.DELTA,  # what is new, not the text so far
        )
        came: Queue[Any] = Queue()  # outputs, and None at the end

        async def generate() -> None:
            [tokens] = await self.engine.renderer.render_cmpl_async([{"prompt": request.prompt}])
            async for output in self.engine.generate(tokens, params, uuid4().hex):
                came.put(output)
            came.put(None)

        asyncio.run_coroutine_threadsafe(generate(), self.loop)
        for output in iter(came.get, None):
            yield llm_pb2.StreamGenerateResponse(text=output.outputs[0].text, is_finished=output.finished)


async def start(engine: AsyncLLM) -> tuple[grpc.Server, int]:
    """Serve on a free port of this machine; give the server and its port."""
    server = grpc.server(ThreadPoolExecutor(THREADS))
    servicer = Servicer(engine, asyncio.get_running_loop())  # type: ignore[abstract]  # Generate: UNIMPLEMENTED
    llm_pb2_grpc.add_LLMServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port
