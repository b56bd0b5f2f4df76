"""A short asyncio client of Triton's `vllm` backend, on `tritonclient.grpc.aio`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import tritonclient.grpc.aio as triton

from servebook.clients.triton_client import ERRORS_WITH_STATUS, Chunk, infer_inputs, read_chunk


class TritonClient:
    """Many streams over one connection; use it with `async with`."""

    def __init__(self, address: str, model: str = "vllm_model") -> None:
        self.client = triton.InferenceServerClient(address)
        self.model = model

    async def __aenter__(self) -> TritonClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def stream(self, prompt: str, *, timeout: float | None = None, **sampling: Any) -> AsyncIterator[Chunk]:
        """Yield the answer as it comes; closing the iterator cancels the request. `timeout` is in seconds.

        Raises:
            InferenceServerException: the server refused or failed; `error.status()` names the gRPC status.
        """
        inputs = infer_inputs(prompt, stream=True, **sampling)
        async for chunk in self._responses(inputs, timeout):
            yield chunk

    async def generate(self, prompt: str, *, timeout: float | None = None, **sampling: Any) -> Chunk:
        """Return the whole answer, which comes as one response. Errors as for `stream`."""
        inputs = infer_inputs(prompt, stream=False, **sampling)
        (answer,) = [chunk async for chunk in self._responses(inputs, timeout)]
        return answer

    async def _responses(self, inputs: list[Any], timeout: float | None) -> AsyncIterator[Chunk]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": self.model, "inputs": inputs}  # then half-close: the server ends the stream

        responses = self.client.stream_infer(requests(), stream_timeout=timeout, headers=ERRORS_WITH_STATUS)
        try:
            async for result, error in responses:
                if error:
                    raise error
                yield read_chunk(result)
        finally:
            responses.cancel()  # of no effect on a stream that has ended
