"""A short synchronous client of Triton's `vllm` backend, on `tritonclient.grpc`.

A decoupled model answers on a stream only, also when there is one response: `infer` is refused.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import tritonclient.grpc as triton

ERRORS_WITH_STATUS = {"triton_grpc_error": "true"}
"""Metadata that asks Triton for errors as gRPC status codes; without it they come as bare text."""


class Chunk(NamedTuple):
    """One response: new text, how many tokens it is made of, and why the answer ended ("" until it does)."""

    text: str
    tokens: int
    finish_reason: str


def infer_inputs(prompt: str, *, stream: bool, **sampling: Any) -> list[triton.InferInput]:
    """The input tensors of one request. Every one has shape [1]: the model does not batch, the engine does."""
    values = {
        "text_input": np.array([prompt.encode()], dtype=np.object_),
        "sampling_parameters": np.array([json.dumps(sampling).encode()], dtype=np.object_),
        "stream": np.array([stream]),
        "exclude_input_in_output": np.array([True]),
        "return_finish_reason": np.array([True]),
        "return_num_output_tokens": np.array([True]),
    }
    inputs = []
    for name, value in values.items():
        inputs.append(triton.InferInput(name, [1], "BYTES" if value.dtype == np.object_ else "BOOL"))
        inputs[-1].set_data_from_numpy(value)
    return inputs


def read_chunk(result: triton.InferResult) -> Chunk:
    """The first choice of a response."""
    text, reason, tokens = (result.as_numpy(name)[0] for name in ("text_output", "finish_reason", "num_output_tokens"))
    return Chunk(text.decode(), int(tokens), "" if reason == b"None" else reason.decode())


def stream(
    address: str, prompt: str, *, model: str = "vllm_model", deadline: float | None = None, **sampling: Any
) -> Generator[Chunk]:
    """Yield the answer as it comes; leaving the loop cancels the request. `deadline` is in seconds from now.

    Raises:
        InferenceServerException: `error.status()` names the gRPC status, DEADLINE_EXCEEDED after the deadline.
    """
    yield from _responses(address, model, infer_inputs(prompt, stream=True, **sampling), deadline)


def generate(
    address: str, prompt: str, *, model: str = "vllm_model", deadline: float | None = None, **sampling: Any
) -> Chunk:
    """Return the whole answer, which comes as one response. Errors as for `stream`."""
    (answer,) = _responses(address, model, infer_inputs(prompt, stream=False, **sampling), deadline)
    return answer


def _responses(address: str, model: str, inputs: list[triton.InferInput], deadline: float | None) -> Generator[Chunk]:
    arrived: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
    final = False
    with triton.InferenceServerClient(address) as client:  # one open stream per client
        client.start_stream(
            lambda result, error: arrived.put((result, error)),  # called on the client's own thread
            stream_timeout=deadline,
            headers=ERRORS_WITH_STATUS,
        )
        try:
            client.async_stream_infer(model, inputs)
            while not final:
                result, error = arrived.get()
                if error:
                    raise error
                final = result.get_response().parameters["triton_final_response"].bool_param
                yield read_chunk(result)
        finally:
            client.stop_stream(cancel_requests=not final)
