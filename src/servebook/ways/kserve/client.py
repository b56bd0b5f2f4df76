"""One client for every server that speaks the Open Inference Protocol (V2) over gRPC: Triton, KServe and others."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from functools import cached_property
from typing import Any

import numpy as np
import tritonclient.grpc as v2
from tritonclient.utils import InferenceServerException

from servebook.ways.client import Answer, Piece, one_answer
from servebook.ways.v2.answers import Tensors, outputs, read_answer, read_piece, stream_infer

WANTED = {f"return_{name}": True for name in ("finish_reason", "num_input_tokens", "num_output_tokens")}
"""Inputs that ask for what an Answer consists of."""

ASK_SECONDS = 10
"""How long a server may take to say what it is."""


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
        return self._metadata(ASK_SECONDS)

    def _metadata(self, seconds: float) -> dict[str, Any]:
        return dict(self.stub.get_server_metadata(as_json=True, client_timeout=seconds))

    @cached_property
    def decoupled(self) -> bool:
        """What `ask_decoupled` says, asked once."""
        return self.ask_decoupled(ASK_SECONDS)

    def ask_decoupled(self, seconds: float) -> bool:
        """Whether one request may have any number of responses: Triton's extension, which refuses unary calls."""
        if "model_configuration" not in self.server["extensions"]:
            return False
        config = self.stub.get_model_config(self.model, client_timeout=seconds).config
        return bool(config.model_transaction_policy.decoupled)

    def _left_of(self, timeout: float) -> float:
        """Ask the server what it is and what its model is, which the first call does within its own time."""
        end = time.monotonic() + timeout
        if "server" not in vars(self):
            self.server = self._metadata(timeout)
        if "decoupled" not in vars(self):
            self.decoupled = self.ask_decoupled(end - time.monotonic())
        return end - time.monotonic()

    def state(self) -> dict[str, bool]:
        """Liveness and readiness of the server, and readiness of the model."""
        return {
            "live": self.stub.is_server_live(client_timeout=ASK_SECONDS),
            "ready": self.stub.is_server_ready(client_timeout=ASK_SECONDS),
            "model ready": self.stub.is_model_ready(self.model, client_timeout=ASK_SECONDS),
        }

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Datatype and shape of every input that the model takes."""
        metadata = self.stub.get_model_metadata(self.model, client_timeout=ASK_SECONDS)
        return {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs}

    def infer(
        self, text: str, sampling: Mapping[str, Any] | None = None, *, timeout: float = 60, **flags: bool
    ) -> Tensors:
        """Return the output tensors for `text` within `timeout` seconds, without the prompt in front.

        `sampling` holds fields of vLLM's SamplingParams; `flags` are inputs such as `return_finish_reason=True`.
        """
        inputs = infer_inputs(text, sampling or {}, **flags)
        timeout = self._left_of(timeout)
        if not self.decoupled:
            return outputs(self.stub.infer(self.model, inputs, client_timeout=timeout))
        answers = list(stream_infer(self.stub, self.model, inputs, timeout))
        if len(answers) != 1:  # as with the flag stream=True
            said = f"infer() reads one response and got {len(answers)}: use stream()"
            raise InferenceServerException(said, status="StatusCode.INTERNAL")
        return answers[0]

    def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:
        """Return the whole answer within `timeout` seconds; `sampling` are fields of vLLM's SamplingParams."""
        one_answer(sampling)
        return read_answer(self.infer(prompt, sampling, timeout=timeout, **WANTED))

    def stream(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Generator[Piece]:
        """Yield the answer as it comes, where the server is decoupled; from any other all of it is one piece."""
        one_answer(sampling)
        timeout = self._left_of(timeout)
        if not self.decoupled:
            yield whole_piece(self.generate(prompt, timeout=timeout, **sampling))
            return
        inputs = infer_inputs(prompt, sampling, stream=True, **WANTED)
        with closing(stream_infer(self.stub, self.model, inputs, timeout)) as responses:
            for response in responses:
                yield read_piece(response)

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


def infer_inputs(text: str, sampling: Mapping[str, Any], **flags: bool) -> list[v2.InferInput]:
    """The input tensors of one request, whose answer comes without the prompt in front."""
    inputs = [tensor("text_input", text), tensor("sampling_parameters", json.dumps(sampling))]
    return inputs + [tensor(name, value) for name, value in ({"exclude_input_in_output": True} | flags).items()]


def whole_piece(answer: Answer) -> Piece:
    """What a stream of one piece is made of."""
    return Piece(answer.text, answer.tokens, answer.finish_reason)
