"""Between Triton's arrays and the contract's plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servebook.ways.v2.contract import OUTPUTS

DTYPES: dict[str, Any] = {"BYTES": np.object_, "FP32": np.float32, "UINT32": np.uint32}


def elements(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The one element of each input; Triton has checked names, datatypes and shapes."""
    return {name: array.flat[0] if array.size else b"" for name, array in tensors.items()}


def arrays(values: Mapping[str, list[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays of a response, shape [number of elements]; text as bytes."""
    return {
        name: np.array([each.encode() if isinstance(each, str) else each for each in listed], DTYPES[OUTPUTS[name]])
        for name, listed in values.items()
    }
