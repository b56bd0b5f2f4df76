"""The tensors of the model: those of Triton's vLLM backend, so that one client speaks to both servers."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import msgspec
from kserve import InferInput, InferOutput, InferRequest
from kserve.errors import InvalidInput
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from servebook.ways.v2.logprobs import logprobs_json

INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_cumulative_logprob": "BOOL",
    "return_logprobs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
"""Datatype of each input; every shape is [1], and all but `text_input` are optional."""

OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "logprobs": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
"""Datatype of each output. One element per choice (`n`), except `num_input_tokens`, which is one number."""

SERVER_FIELDS = {"output_kind", "detokenize", "skip_clone"}
"""Fields of SamplingParams that the server sets."""


@dataclass(frozen=True)
class TextRequest:
    """What the input tensors ask for; the fields are named like the tensors."""

    text_input: str
    sampling_parameters: SamplingParams
    exclude_input_in_output: bool = False
    return_finish_reason: bool = False
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False


def read_request(request: InferRequest) -> TextRequest:
    """Check the input tensors and take their values out.

    Raises:
        InvalidInput: a tensor is missing, unknown, or of another datatype, shape or content; the message names it.
    """
    values: dict[str, Any] = {tensor.name: _value(tensor) for tensor in request.inputs}
    if not values.get("text_input"):
        raise InvalidInput("tensor text_input is missing or empty")
    if set(request.parameters or {}) - {"binary_data_output"}:
        raise InvalidInput("request parameters are not read here: put them into the tensor sampling_parameters")
    if values.pop("stream", False):
        raise InvalidInput(
            "tensor stream: the Open Inference Protocol has one response to a request; "
            "stream through /openai/v1/completions instead"
        )
    sampling = read_sampling_parameters(values.pop("sampling_parameters", "{}"))
    return TextRequest(sampling_parameters=sampling, **values)


def read_sampling_parameters(text: str) -> SamplingParams:
    """Read a JSON object of vLLM's SamplingParams; what it leaves out has vLLM's default (16 tokens, for one).

    Raises:
        InvalidInput: it is no JSON object, or a field is unknown or out of range; the message names the field.
    """
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise InvalidInput(f"tensor sampling_parameters: expected a JSON object, got {text[:40]!r}")
        allowed = {name for name in SamplingParams.__struct_fields__ if name[0] != "_"} - SERVER_FIELDS
        if unknown := sorted(fields.keys() - allowed):
            raise InvalidInput(f"tensor sampling_parameters: unknown field {', '.join(unknown)}")
        params = msgspec.json.decode(text, type=SamplingParams)
        msgspec.msgpack.encode(params)  # the way to the engine's process, which ends at 64 bits
    except InvalidInput:
        raise
    except (ValueError, OverflowError, RecursionError, VLLMValidationError) as error:
        raise InvalidInput(f"tensor sampling_parameters: {error}") from None
    params.output_kind = RequestOutputKind.FINAL_ONLY
    return params


def write_outputs(asked: TextRequest, result: RequestOutput) -> list[InferOutput]:
    """The output tensors: `text_output`, and those that `asked` wants returned."""
    prefix = "" if asked.exclude_input_in_output else asked.text_input
    outputs: dict[str, list[Any]] = {"text_output": [prefix + choice.text for choice in result.outputs]}
    if asked.return_finish_reason:
        outputs["finish_reason"] = [str(choice.finish_reason) for choice in result.outputs]
    if asked.return_cumulative_logprob:
        known = [choice.cumulative_logprob for choice in result.outputs]
        outputs["cumulative_logprob"] = [math.nan if value is None else value for value in known]
    if asked.return_logprobs:
        outputs["logprobs"] = [logprobs_json(choice) for choice in result.outputs]
    if asked.return_num_input_tokens:
        outputs["num_input_tokens"] = [len(result.prompt_token_ids or ())]
    if asked.return_num_output_tokens:
        outputs["num_output_tokens"] = [len(choice.token_ids) for choice in result.outputs]
    return [InferOutput(name, [len(data)], OUTPUTS[name], data) for name, data in outputs.items()]


def check_description(name: str, datatype: str, shape: list[int]) -> None:
    """Check what is said about a tensor before its data is decoded.

    Raises:
        InvalidInput: no such tensor, or another datatype or shape than it has.
    """
    if name not in INPUTS:
        raise InvalidInput(f"unknown tensor {name}; this model takes {', '.join(INPUTS)}")
    if datatype != INPUTS[name]:
        raise InvalidInput(f"tensor {name}: expected datatype {INPUTS[name]}, got {datatype}")
    if shape != [1]:
        raise InvalidInput(f"tensor {name}: expected shape [1], got {shape}")


def _value(tensor: InferInput) -> str | bool:
    check_description(tensor.name, tensor.datatype, tensor.shape)
    try:
        # `data` holds what came as JSON or as typed protobuf contents; raw bytes are decoded by as_numpy.
        (value,) = tensor.data or tensor.as_numpy().tolist()
        value = value.decode() if isinstance(value, bytes) else value
        str(value).encode()  # fails on half of a surrogate pair, which JSON lets through
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InvalidInput(f"tensor {tensor.name}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, TypeError, struct.error):
        raise InvalidInput(f"tensor {tensor.name}: its data is not one {tensor.datatype} element") from None
    if isinstance(value, bool) != (tensor.datatype == "BOOL") or not isinstance(value, bool | str):
        raise InvalidInput(f"tensor {tensor.name}: expected a {tensor.datatype} element, got {value!r}")
    return value
