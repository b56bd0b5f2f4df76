"""The tensors of Triton's `vllm` backend, as NVIDIA's container declares them (vllm_backend, 2026-01)."""

from __future__ import annotations

from typing import Any

Tensor = dict[str, Any]


def _flag(name: str) -> Tensor:
    return {"name": name, "data_type": "TYPE_BOOL", "dims": [1], "optional": True}


OPTIONAL_OUTPUTS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
"""Outputs that a request asks for with the input `return_<name>`."""

INPUTS: list[Tensor] = [
    {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]},
    _flag("stream"),
    {"name": "sampling_parameters", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
    _flag("exclude_input_in_output"),
    *(_flag(f"return_{name}") for name in OPTIONAL_OUTPUTS),
    {"name": "image", "data_type": "TYPE_STRING", "dims": [-1], "optional": True},
    {"name": "embedding_request", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
]

OUTPUTS: list[Tensor] = [
    {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "finish_reason", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "cumulative_logprob", "data_type": "TYPE_FP32", "dims": [-1]},
    {"name": "logprobs", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "num_input_tokens", "data_type": "TYPE_UINT32", "dims": [1]},
    {"name": "num_output_tokens", "data_type": "TYPE_UINT32", "dims": [-1]},
]

FLAGS = ("REPORT_CUSTOM_METRICS", "ENABLE_VLLM_HEALTH_CHECK")
"""All that the backend reads from config.pbtxt's `parameters`; engine arguments belong into model.json."""
