"""The servicer: the code between the generated base class and vLLM's engine. Read this one first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from servebook.ways.custom_grpc.server.calls import Call, Calls
from servebook.ways.custom_grpc.server.errors import engine_dead, no_text, unavailable

if TYPE_CHECKING:
    from vllm.inputs.engine import EngineInput
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

    from servebook.ways.custom_grpc.server.inputs import Request

FINISH_REASONS = {
    "stop": llm_pb2.FINISH_REASON_STOP,
    "length": llm_pb2.FINISH_REASON_LENGTH,
}


class Engine(Protocol):
    """What the servicer needs of `vllm.v1.engine.async_llm.AsyncLLM`."""

    @property
    def errored(self) -> bool:
        """Whether the engine has died."""

    def generate(
        self, prompt: EngineInput, sampling_params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they come; closing the generator early aborts the request."""


class Converter(Protocol):
    """What the servicer needs of `inputs.Inputs`."""

    async def prompt(self, request: Request) -> EngineInput:
        """The tokens to continue."""

    def params(self, request: Request, prompt_tokens: int, stream: bool) -> SamplingParams:
        """How to continue them."""


class LLMServicer(llm_pb2_grpc.LLMServiceServicer):
    """`llm.v1.LLMService` on one engine, which is ready after the port is open, and may go before it closes."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.engine: Engine | None = None
        self.inputs: Converter | None = None

    def attach(self, engine: Engine, inputs: Converter) -> None:
        """Serve with `engine` from now on."""
        self.engine, self.inputs = engine, inputs

    async def Generate(
        self, request: llm_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> llm_pb2.GenerateResponse:
        """Wait for the whole text."""
        response = llm_pb2.GenerateResponse()
        async with self.calls.admit("Generate", context) as call:
            outputs = await self.start(request, call, stream=False)
            async with aclosing(outputs):
                async for output in outputs:  # one, the last
                    completion = output.outputs[0]
                    call.completion_tokens = len(completion.token_ids)
                    response.text = completion.text
                    response.token_ids.extend(completion.token_ids)
                    response.finish_reason = finish_reason(completion.finish_reason, call)
                    response.usage.prompt_tokens = call.prompt_tokens
                    response.usage.completion_tokens = call.completion_tokens
        return response

    # A coroutine that writes, where the generated type expects a generator: when a call ends early, grpc.aio
    # cancels a coroutine at once, but leaves a generator to the garbage collector.
    async def StreamGenerate(  # type: ignore[override]
        self, request: llm_pb2.StreamGenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Write a message for each output of the engine."""
        async with self.calls.admit("StreamGenerate", context) as call:
            outputs = await self.start(request, call, stream=True)
            sequence = 0
            # aclosing: however this block is left, the engine stops working for this call.
            async with aclosing(outputs):
                async for output in outputs:
                    completion = output.outputs[0]
                    token_ids = completion.token_ids
                    call.completion_tokens += len(token_ids)
                    message = llm_pb2.StreamGenerateResponse(
                        text=completion.text, sequence=sequence, token_ids=token_ids
                    )
                    if output.finished:
                        message.is_finished = True
                        message.finish_reason = finish_reason(completion.finish_reason, call)
                        message.usage.prompt_tokens = call.prompt_tokens
                        message.usage.completion_tokens = call.completion_tokens
                    if not sequence:
                        call.saw_first_token()
                    # Waits while the reader is slow. The engine does not: what comes meanwhile merges into one output.
                    call.writing_since = time.monotonic()
                    await context.write(message)
                    call.writing_since = None
                    sequence += 1
                    if not output.finished and (hold := self.calls.hold_seconds(call, len(token_ids))):
                        await asyncio.sleep(hold)  # many readers: fewer messages, with more tokens in each

    async def start(self, request: Request, call: Call, stream: bool) -> AsyncGenerator[RequestOutput, None]:
        """Check the request, and hand it to the engine; nothing is computed before the first `async for`.

        Raises:
            Refusal: the request cannot be served, or there is no engine to serve it.
        """
        if self.engine is None or self.inputs is None:
            raise unavailable("ENGINE_STARTING", "The engine of this server is still starting.")
        if self.engine.errored:
            raise engine_dead()
        prompt = await self.inputs.prompt(request)
        call.prompt_tokens = len(prompt["prompt_token_ids"])
        call.constraint = f"sampling.{kind}" if (kind := request.sampling.WhichOneof("constraint")) else ""
        params = self.inputs.params(request, call.prompt_tokens, stream)
        call.max_tokens = params.max_tokens or 0
        return self.engine.generate(prompt, params, call.id)


def finish_reason(word: str | None, call: Call) -> llm_pb2.FinishReason:
    """vLLM's word as the enum's value.

    Raises:
        Refusal: the engine ended the request by itself ("abort", "error"): no success, whatever text there was.
    """
    try:
        return FINISH_REASONS[word or ""]
    except KeyError:
        raise no_text(call.constraint if word == "error" else "") from None
