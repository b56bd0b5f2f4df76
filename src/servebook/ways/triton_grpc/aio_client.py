"""A short asyncio client of Triton's `vllm` backend, on `tritonclient.grpc.aio`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from servebook.ways.client import Answer, Piece
from servebook.ways.triton_grpc.client import infer_inputs
from servebook.ways.v2.answers import (
    ERRORS_WITH_STATUS,
    Tensors,
    ended_early,
    is_final,
    outputs,
    read_answer,
    read_piece,
)


class TritonAioClient:
    """Many streams over one connection; use it with `async with`. Errors are those of `TritonClient`."""

    def __init__(self, address: str, model: str = "vllm_model") -> None:
        self.client = triton.InferenceServerClient(address)
        self.model = model

    async def __aenter__(self) -> TritonAioClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def stream(
        self,
        prompt: str,
        *,
        timeout: float = 60,  # noqa: ASYNC109  # travels with the call, as its deadline
        **sampling: Any,
    ) -> AsyncGenerator[Piece]:
        """Yield the answer as it comes; closing the generator cancels the request."""
        async with aclosing(self._responses(infer_inputs(prompt, stream=True, **sampling), timeout)) as responses:
            async for response in responses:
                yield read_piece(response)

    async def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:  # noqa: ASYNC109
        """Return the whole answer, which comes as one response."""
        inputs = infer_inputs(prompt, stream=False, **sampling)
        (answer,) = [response async for response in self._responses(inputs, timeout)]
        return read_answer(answer)

    async def _responses(self, inputs: list[Any], seconds: float) -> AsyncGenerator[Tensors]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": self.model, "inputs": inputs}  # then half-close: the server ends the stream

        responses = self.client.stream_infer(requests(), stream_timeout=seconds, headers=ERRORS_WITH_STATUS)
        final = False
        try:
            async for result, error in responses:
                if error:
                    raise error
                final = is_final(result)
                yield outputs(result)
            if not final:
                raise ended_early()
        except grpc.aio.AioRpcError as error:
            raise InferenceServerException(error.details(), status=str(error.code())) from None
        finally:
            responses.cancel()  # of no effect on a stream that has ended
