"""What the backend tells Triton about its model: the contract's tensors in the words of config.pbtxt, and its flags."""

from __future__ import annotations

from typing import Any

from servebook.ways.v2 import contract

TYPES = {"BYTES": "TYPE_STRING", "BOOL": "TYPE_BOOL", "FP32": "TYPE_FP32", "UINT32": "TYPE_UINT32"}

INPUTS: list[dict[str, Any]] = [
    *(
        {"name": name, "data_type": TYPES[datatype], "dims": [1]} | ({} if name == "text_input" else {"optional": True})
        for name, datatype in contract.INPUTS.items()
    ),
    # Of models that see, and for embeddings: declared as in NVIDIA's container, and refused.
    {"name": "image", "data_type": "TYPE_STRING", "dims": [-1], "optional": True},
    {"name": "embedding_request", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
]

OUTPUTS: list[dict[str, Any]] = [
    {"name": name, "data_type": TYPES[datatype], "dims": [1 if name == "num_input_tokens" else -1]}
    for name, datatype in contract.OUTPUTS.items()
]

FLAGS = ("REPORT_CUSTOM_METRICS", "ENABLE_VLLM_HEALTH_CHECK")
"""All that the backend reads from config.pbtxt's `parameters`; engine arguments belong into model.json."""
