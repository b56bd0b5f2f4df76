"""The asyncio twin of `client`, for servers that give one response to a request, as KServe does."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import tritonclient.grpc.aio as v2

from servebook.ways.client import Answer, Piece, one_answer
from servebook.ways.kserve.client import WANTED, infer_inputs, whole_piece
from servebook.ways.v2.answers import outputs, read_answer


class V2AioClient:
    """A client of one model on the server at `address` ("host:port"); use it in an `async with` block.

    Errors are `tritonclient.utils.InferenceServerException`. A decoupled model refuses these calls: for Triton,
    `V2Client` and chapter 03 have a client that asks on a stream.
    """

    def __init__(self, address: str, model: str = "vllm_model") -> None:
        self.model = model
        self.stub = v2.InferenceServerClient(address)

    async def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:  # noqa: ASYNC109
        """Return the whole answer within `timeout` seconds; cancelling the task cancels the call."""
        one_answer(sampling)
        inputs = infer_inputs(prompt, sampling, **WANTED)
        return read_answer(outputs(await self.stub.infer(self.model, inputs, client_timeout=timeout)))

    async def stream(
        self,
        prompt: str,
        *,
        timeout: float = 60,  # noqa: ASYNC109
        **sampling: Any,
    ) -> AsyncGenerator[Piece]:
        """Yield the whole answer as one piece: the core of V2 has one response to a request."""
        yield whole_piece(await self.generate(prompt, timeout=timeout, **sampling))

    async def __aenter__(self) -> V2AioClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stub.close()
