"""Step 0 of the backend: each request is answered once, with its whole text, before the next one is looked at.

Still wrong: nothing streams, and callers wait for one another.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from servebook.ways.triton_grpc.client import TritonClient


class TritonPythonModel:
    """What Triton calls. It hands each request on to the Triton that has the engine."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Declare the tensors."""
        config.add_input({"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]})
        config.add_input({"name": "sampling_parameters", "data_type": "TYPE_STRING", "dims": [1]})
        config.add_output({"name": "text_output", "data_type": "TYPE_STRING", "dims": [1]})
        config.set_max_batch_size(0)
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Read from config.pbtxt where the engine is."""
        parameters = json.loads(args["model_config"])["parameters"]
        self.client = TritonClient(parameters["upstream"]["string_value"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Give one response for each request."""
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        """Wait for the whole text."""
        answer = self.client.generate(text_in(request, "text_input"), **sampling_in(request))
        return response(answer.text)


def text_in(request: Any, name: str) -> str:
    """The one text in an input."""
    return str(pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0].decode())


def sampling_in(request: Any) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams."""
    return dict(json.loads(text_in(request, "sampling_parameters")))


def response(text: str) -> Any:
    """A response of one tensor."""
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_))])
