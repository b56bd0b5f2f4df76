"""A short asyncio client of Triton's `vllm` backend, on `tritonclient.grpc.aio`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from servebook.ways.triton_grpc.client import ERRORS_WITH_STATUS, Chunk, infer_inputs, read_chunk


class TritonClient:
    """Many streams over one connection; use it with `async with`."""

    def __init__(self, address: str, model: str = "vllm_model") -> None:
        self.client = triton.InferenceServerClient(address)
        self.model = model

    async def __aenter__(self) -> TritonClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    def stream(self, prompt: str, *, deadline: float | None = None, **sampling: Any) -> AsyncGenerator[Chunk]:
        """Yield the answer as it comes; closing the generator cancels the request. `deadline`: seconds from now.

        Raises:
            InferenceServerException: `error.status()` names the gRPC status, DEADLINE_EXCEEDED after the deadline.
        """
        return self._responses(infer_inputs(prompt, stream=True, **sampling), deadline)

    async def generate(self, prompt: str, *, deadline: float | None = None, **sampling: Any) -> Chunk:
        """Return the whole answer, which comes as one response. Errors as for `stream`."""
        inputs = infer_inputs(prompt, stream=False, **sampling)
        (answer,) = [chunk async for chunk in self._responses(inputs, deadline)]
        return answer

    async def _responses(self, inputs: list[Any], deadline: float | None) -> AsyncGenerator[Chunk]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": self.model, "inputs": inputs}  # then half-close: the server ends the stream

        responses = self.client.stream_infer(requests(), stream_timeout=deadline, headers=ERRORS_WITH_STATUS)
        try:
            async for result, error in responses:
                if error:
                    raise error
                yield read_chunk(result)
        except grpc.aio.AioRpcError as error:
            raise InferenceServerException(error.details(), status=str(error.code())) from None
        finally:
            responses.cancel()  # of no effect on a stream that has ended
