"""Step 4 of the server: it says whether it serves, and what, and how much of it: health, reflection, limits.

Still wrong: when it is full it refuses the health check, too, as if it were dead. And keys, TLS, the unary call, most
of `sampling`, details in errors, metrics and a graceful stop are missing.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc

MOST_SECONDS = 60
MOST_CALLS = 4
MOST_BYTES = 64 * 1024
SERVICES = ("llm.v1.LLMService", "grpc.health.v1.Health")


class Servicer(llm_pb2_grpc.LLMServiceServicer):
    """One call, one task, which gRPC cancels when the caller leaves or the deadline passes."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.engine = engine

    async def StreamGenerate(  # type: ignore[override]
        self, request: llm_pb2.StreamGenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Write a message for each output of the engine, and say why if it does not come to an end."""
        try:
            async with asyncio.timeout(MOST_SECONDS):
                await self.write(request, context)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"A call may take {MOST_SECONDS} s here.")
        except (VLLMClientError, ValueError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except EngineDeadError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "The engine of this server has died.")

    async def write(self, request: llm_pb2.StreamGenerateRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """The same as in step 2."""
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            ignore_eos=request.sampling.ignore_eos,
            output_kind=RequestOutputKind.DELTA,  # what is new, not the text so far
        )
        [tokens] = await self.engine.renderer.render_cmpl_async([{"prompt": request.prompt}])
        # aclosing: however this block is left, the engine stops working for this call.
        async with aclosing(self.engine.generate(tokens, params, uuid4().hex)) as outputs:
            async for output in outputs:
                message = llm_pb2.StreamGenerateResponse(text=output.outputs[0].text, is_finished=output.finished)
                await context.write(message)


async def start(engine: AsyncLLM) -> tuple[grpc.aio.Server, int]:
    """Serve on a free port of this machine; give the server and its port."""
    limits = [("grpc.max_receive_message_length", MOST_BYTES)]
    server = grpc.aio.server(maximum_concurrent_rpcs=MOST_CALLS, options=limits)
    llm_pb2_grpc.add_LLMServiceServicer_to_server(Servicer(engine), server)  # type: ignore[abstract]  # Generate: UNIMPLEMENTED
    states = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs are older
    for name in ("", *SERVICES):
        await states.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    reflection.enable_server_reflection(SERVICES, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port
