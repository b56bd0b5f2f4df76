"""Reads one request: tensors in, a checked `GenerateRequest` out. Nothing that is wrong gets past here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from servebook.ways.v2.contract import OPTIONAL_OUTPUTS

Tensors = Mapping[str, NDArray[Any]]

SAMPLING = TypeAdapter(SamplingParams)
INTERNAL = {"output_kind", "output_text_buffer_length", "skip_clone", "detokenize"}
"""Fields of SamplingParams that are the server's to set."""
KNOWN = {field.name for field in msgspec.structs.fields(SamplingParams) if field.name[0] != "_"} - INTERNAL
INT64 = 2**63


class BadRequest(ValueError):
    """A request that cannot be served: which field, and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")


def refused(field: str, error: VLLMClientError) -> BadRequest:
    """vLLM's own refusal of `field`, or of the part of it that the error names."""
    parameter = getattr(error, "parameter", None)
    inside = f".{parameter}" if parameter in KNOWN else ""
    return BadRequest(field + inside, str(error.args[0]) if error.args else str(error))


class UnsupportedRequest(BadRequest):
    """A request for something that this backend does not do."""


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt, with everything that its answer depends on.

    `outputs` are the names of the optional outputs asked for; `echo` puts the prompt before the answer.
    """

    prompt: str
    stream: bool
    echo: bool
    sampling: SamplingParams
    lora_name: str | None
    outputs: frozenset[str]


def parse_request(tensors: Tensors, parameters: str) -> GenerateRequest:
    """Read a request from its input tensors and its request parameters (a JSON object).

    Raises:
        BadRequest: an input does not fit.
        UnsupportedRequest: it asks for images or embeddings.
    """
    for name in ("image", "embedding_request"):
        if name in tensors:
            raise UnsupportedRequest(name, "this backend generates text from text only")
    prompt = _text(tensors, "text_input")
    if not prompt:
        raise BadRequest("text_input", "the prompt is empty")
    stream = _flag(tensors, "stream", default=False)
    exclude = _flag(tensors, "exclude_input_in_output", default=stream)
    if stream and not exclude:
        raise BadRequest("exclude_input_in_output", "When streaming, `exclude_input_in_output` = False is not allowed.")
    if "sampling_parameters" in tensors:
        parameters = _text(tensors, "sampling_parameters")
    values = _json_object(parameters)
    lora_name = values.pop("lora_name", None)
    if lora_name is not None and not isinstance(lora_name, str):
        raise BadRequest("sampling_parameters.lora_name", "must be a string")
    return GenerateRequest(
        prompt=prompt,
        stream=stream,
        echo=not exclude,
        sampling=_sampling(values, stream),
        lora_name=lora_name,
        outputs=frozenset(name for name in OPTIONAL_OUTPUTS if _flag(tensors, f"return_{name}", default=False)),
    )


def _text(tensors: Tensors, name: str) -> str:
    try:
        return str(tensors[name].flat[0].decode())
    except UnicodeDecodeError as error:
        raise BadRequest(name, f"not UTF-8 ({error.reason} at byte {error.start})") from None


def _flag(tensors: Tensors, name: str, *, default: bool) -> bool:
    return bool(tensors[name].flat[0]) if name in tensors else default


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}", parse_constant=_no_constant, parse_int=_int64, parse_float=_finite)
        json.dumps(values, ensure_ascii=False).encode()  # fails on half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise BadRequest("sampling_parameters", f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadRequest("sampling_parameters", f"must be a JSON object, got {type(values).__name__}")
    return {name: value for name, value in values.items() if value is not None}


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _int64(digits: str) -> int:
    # The engine's message format ends at 64 bits.
    if len(digits) > 20 or not -INT64 <= int(digits) < INT64:
        raise ValueError(f"{digits[:24]} does not fit into 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits} is not finite")
    return float(digits)


def _sampling(values: dict[str, Any], stream: bool) -> SamplingParams:
    # Clients of older containers say `guided_decoding`; both came as JSON within JSON there.
    if "guided_decoding" in values:
        values.setdefault("structured_outputs", values.pop("guided_decoding"))
    if isinstance(values.get("structured_outputs"), str):
        values["structured_outputs"] = _json_object(values["structured_outputs"])
    if unknown := values.keys() - KNOWN:
        raise BadRequest(f"sampling_parameters.{min(unknown)}", "vLLM has no such sampling parameter")
    try:
        sampling: SamplingParams = SAMPLING.validate_python(values)
    except ValidationError as error:
        found = next(e for e in error.errors() if e["type"] != "is_instance_of")
        where = ".".join(str(part) for part in found["loc"][1:])
        raise BadRequest(f"sampling_parameters.{where}", found["msg"]) from None
    except VLLMClientError as error:
        raise refused("sampling_parameters", error) from None
    except (ValueError, TypeError) as error:
        raise BadRequest("sampling_parameters", str(error)) from None
    sampling.output_kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    return sampling


def text_tensor(texts: list[str]) -> NDArray[np.object_]:
    """A STRING tensor, shape [len(texts)]."""
    return np.array([text.encode() for text in texts], dtype=np.object_)
