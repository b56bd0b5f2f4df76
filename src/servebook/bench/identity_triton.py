"""A model that answers with its input, for Triton's Python backend. `bench.tensors` lays it out as a repository."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Sends `TENSOR` back as it came. `BASE64` is decoded to an array and encoded again, as a model would have to."""

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request, each with one tensor of the name and shape of its input."""
        return [
            pb_utils.InferenceResponse([self.answer(tensor) for tensor in request.inputs()]) for request in requests
        ]

    def answer(self, tensor: Any) -> Any:
        array = tensor.as_numpy()
        if tensor.name() == "BASE64":
            values = np.frombuffer(base64.b64decode(array[0]), dtype=np.float32)
            array = np.array([base64.b64encode(values.data)], dtype=np.object_)
        return pb_utils.Tensor(tensor.name(), array)
