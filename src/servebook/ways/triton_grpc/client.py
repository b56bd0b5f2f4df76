"""A short synchronous client of Triton's `vllm` backend, on `tritonclient.grpc`.

A decoupled model answers on a stream only, also when there is one response: `infer` is refused.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from servebook.ways.client import Answer, Piece, one_answer
from servebook.ways.v2.answers import Tensors, read_answer, read_piece, stream_infer


def infer_inputs(prompt: str, *, stream: bool, **sampling: Any) -> list[triton.InferInput]:
    """The input tensors of one request. Every one has shape [1]: the model does not batch, the engine does."""
    one_answer(sampling)
    values = {
        "text_input": np.array([prompt.encode()], dtype=np.object_),
        "sampling_parameters": np.array([json.dumps(sampling).encode()], dtype=np.object_),
        "stream": np.array([stream]),
        "exclude_input_in_output": np.array([True]),
        "return_finish_reason": np.array([True]),
        "return_num_output_tokens": np.array([True]),
        "return_num_input_tokens": np.array([not stream]),
    }
    inputs = []
    for name, value in values.items():
        inputs.append(triton.InferInput(name, [1], "BYTES" if value.dtype == np.object_ else "BOOL"))
        inputs[-1].set_data_from_numpy(value)
    return inputs


class TritonClient:
    """A client of `model` on the server at `address` ("host:port"), for any number of threads.

    Each call has a channel of its own: `tritonclient` has one stream on each. gRPC may let channels share a connection.
    `sampling` are fields of vLLM's SamplingParams, and no `n`. Errors are InferenceServerException: `error.status()`
    names the gRPC status, DEADLINE_EXCEEDED after `timeout` seconds.
    """

    def __init__(self, address: str, model: str = "vllm_model") -> None:
        self.address = address
        self.model = model

    def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:
        """Return the whole answer, which comes as one response."""
        (answer,) = self._responses(infer_inputs(prompt, stream=False, **sampling), timeout)
        return read_answer(answer)

    def stream(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Generator[Piece]:
        """Yield the answer as it comes; leaving the loop, or closing the generator, cancels the request."""
        with closing(self._responses(infer_inputs(prompt, stream=True, **sampling), timeout)) as responses:
            for response in responses:
                yield read_piece(response)

    def _responses(self, inputs: list[triton.InferInput], timeout: float) -> Generator[Tensors]:
        with triton.InferenceServerClient(self.address) as client:
            yield from stream_infer(client, self.model, inputs, timeout)

    def __enter__(self) -> TritonClient:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open between two calls."""
