"""One client for every server that speaks the Open Inference Protocol (V2) over gRPC: Triton, KServe and others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as v2

Tensors = dict[str, npt.NDArray[Any]]


class V2Client:
    """A client of one model on the server at `address` ("host:port"); use it in a `with` block.

    Errors are `tritonclient.utils.InferenceServerException` with `status()` and `message()`.
    """

    def __init__(self, address: str, model: str = "vllm_model") -> None:
        self.model = model
        self.stub = v2.InferenceServerClient(address)

    @cached_property
    def server(self) -> dict[str, Any]:
        """Name, version and extensions of the server: the part of the protocol that says what else it can do."""
        return dict(self.stub.get_server_metadata(as_json=True))

    @cached_property
    def decoupled(self) -> bool:
        """Whether one request may have any number of responses: Triton's extension, which refuses unary calls."""
        if "model_configuration" not in self.server["extensions"]:
            return False
        config = self.stub.get_model_config(self.model).config
        return bool(config.model_transaction_policy.decoupled)

    def state(self) -> dict[str, bool]:
        """Liveness and readiness of the server, and readiness of the model."""
        return {
            "live": self.stub.is_server_live(),
            "ready": self.stub.is_server_ready(),
            "model ready": self.stub.is_model_ready(self.model),
        }

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Datatype and shape of every input that the model takes."""
        metadata = self.stub.get_model_metadata(self.model)
        return {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs}

    def generate(
        self, text: str, sampling: Mapping[str, Any] | None = None, *, timeout: float = 60, **flags: bool
    ) -> Tensors:
        """Return the output tensors for `text` within `timeout` seconds, without the prompt in front.

        `sampling` holds fields of vLLM's SamplingParams; `flags` are inputs such as `return_finish_reason=True`.
        """
        inputs = [tensor("text_input", text), tensor("sampling_parameters", json.dumps(sampling or {}))]
        inputs += [tensor(name, value) for name, value in ({"exclude_input_in_output": True} | flags).items()]
        if not self.decoupled:
            return _outputs(self.stub.infer(self.model, inputs, client_timeout=timeout))
        (answer,) = self._responses(inputs, timeout)
        return answer

    def _responses(self, inputs: list[v2.InferInput], timeout: float) -> Iterator[Tensors]:
        arrived: SimpleQueue[v2.InferResult | Exception] = SimpleQueue()
        self.stub.start_stream(lambda result, error: arrived.put(error or result), stream_timeout=timeout)
        try:
            self.stub.async_stream_infer(self.model, inputs, enable_empty_final_response=True)
            final = False
            while not final:
                answer = arrived.get()
                if isinstance(answer, Exception):
                    raise answer
                response = answer.get_response()
                final = response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield _outputs(answer)
        finally:
            self.stub.stop_stream()

    def __enter__(self) -> V2Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.stub.close()


def tensor(name: str, value: str | bool) -> v2.InferInput:
    """An input of shape [1]: text as BYTES, a truth value as BOOL."""
    array = np.array([value]) if isinstance(value, bool) else np.array([value.encode()], dtype=np.object_)
    made = v2.InferInput(name, [1], "BOOL" if isinstance(value, bool) else "BYTES")
    made.set_data_from_numpy(array)
    return made


def _outputs(result: v2.InferResult) -> Tensors:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}
