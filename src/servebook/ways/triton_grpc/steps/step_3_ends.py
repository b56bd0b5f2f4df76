"""Step 3 of the backend: every request has an end that somebody hears of: the engine when the caller leaves, the
caller when it went wrong.

Still missing: noticing before the first token that a caller has left, most inputs and outputs, metrics, an engine of
its own.
"""

from __future__ import annotations

import json
from contextlib import closing
from threading import Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tritonclient.utils import InferenceServerException

from servebook.ways.triton_grpc.client import TritonClient

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """What Triton calls. It hands each request on to the Triton that has the engine."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Declare the tensors, and that a request may have many responses."""
        config.add_input({"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]})
        config.add_input({"name": "sampling_parameters", "data_type": "TYPE_STRING", "dims": [1]})
        config.add_output({"name": "text_output", "data_type": "TYPE_STRING", "dims": [1]})
        config.set_max_batch_size(0)
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Read from config.pbtxt where the engine is."""
        parameters = json.loads(args["model_config"])["parameters"]
        self.client = TritonClient(parameters["upstream"]["string_value"])

    def execute(self, requests: list[Any]) -> None:
        """Answer each request on a thread of its own."""
        for request in requests:
            given = text_in(request, "text_input"), sampling_in(request), request.get_response_sender()
            Thread(target=self.answer, args=given, daemon=True).start()

    def answer(self, prompt: str, sampling: dict[str, Any], sender: Any) -> None:
        """Send a response for each piece, the last one with a flag that says so, or an error."""
        try:
            with closing(self.client.stream(prompt, **sampling)) as pieces:  # closed, it ends the engine's work
                for piece in pieces:
                    if sender.is_cancelled():
                        sender.send(flags=FINAL)
                        return
                    sender.send(response(piece.text), flags=FINAL if piece.finish_reason else 0)
        except InferenceServerException as error:
            refused = error.status() == "StatusCode.INVALID_ARGUMENT"
            code = pb_utils.TritonError.INVALID_ARG if refused else pb_utils.TritonError.UNAVAILABLE
            failed = pb_utils.TritonError(error.message(), code)
            sender.send(pb_utils.InferenceResponse(error=failed), flags=FINAL)
        except TypeError as error:  # a field that the client has for itself, such as `prompt`
            failed = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            sender.send(pb_utils.InferenceResponse(error=failed), flags=FINAL)


def text_in(request: Any, name: str) -> str:
    """The one text in an input."""
    return str(pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0].decode())


def sampling_in(request: Any) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams."""
    return dict(json.loads(text_in(request, "sampling_parameters")))


def response(text: str) -> Any:
    """A response of one tensor."""
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_))])
