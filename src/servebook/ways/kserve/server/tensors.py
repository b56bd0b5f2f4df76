"""Between KServe's tensors and the contract's plain values."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from kserve import InferInput, InferOutput, InferRequest
from kserve.protocol.infer_type import to_http_parameters

from servebook.ways.refusals import cut
from servebook.ways.v2.contract import INPUTS, OUTPUTS, BadRequest, check_description


def check_counts(request: InferRequest) -> None:
    """Refuse more inputs or outputs than there are, and one that is there twice, before any is looked at.

    Raises:
        BadRequest: too many of them, or contradictory ones.
    """
    for field, listed, most in (("inputs", request.inputs, INPUTS), ("outputs", request.request_outputs, OUTPUTS)):
        if len(listed or ()) > len(most):
            raise BadRequest(field, f"there are {len(most)} at most, got {len(listed)}")
    names = [tensor.name for tensor in request.inputs or ()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadRequest(cut(min(twice), 40), "is there twice")


def elements(request: InferRequest) -> dict[str, Any]:
    """The one element of each input.

    Raises:
        BadRequest: an input is unknown, or of another datatype, shape or content; the message names it.
    """
    return {tensor.name: _element(tensor) for tensor in request.inputs}


def parameters_of(request: InferRequest) -> str:
    """The request's parameters as a JSON object."""
    return json.dumps(to_http_parameters(request.parameters or {}))


def tensors(values: Mapping[str, list[Any]]) -> list[InferOutput]:
    """The output tensors, shape [number of elements]."""
    return [InferOutput(name, [len(listed)], OUTPUTS[name], listed) for name, listed in values.items()]


def _element(tensor: InferInput) -> str | bytes | bool:
    check_description(tensor.name, tensor.datatype, tensor.shape)
    try:
        # `data` holds what came as JSON or as typed protobuf contents; raw bytes are decoded by as_numpy.
        (value,) = tensor.data or tensor.as_numpy().tolist()
    except (ValueError, TypeError, struct.error):
        raise BadRequest(tensor.name, f"its data is not one {tensor.datatype} element") from None
    if isinstance(value, bool) != (tensor.datatype == "BOOL") or not isinstance(value, bool | str | bytes):
        raise BadRequest(tensor.name, f"expected a {tensor.datatype} element, got {value!r}")
    return value
