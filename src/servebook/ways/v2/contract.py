"""The tensors that carry a prompt and its answer: those of Triton's vLLM backend, as NVIDIA's container declares them.

(vllm_backend, 2026-01.) Triton's backend and KServe's predictor serve them alike, so that one client speaks to both.
Standard library only: Triton loads a backend twice, and the first time only to ask for this.
"""

from __future__ import annotations

from servebook.ways.refusals import cut

OPTIONAL_OUTPUTS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
"""Outputs that a request asks for with the input `return_<name>`."""

INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    **{f"return_{name}": "BOOL" for name in OPTIONAL_OUTPUTS},
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

PROTOCOLS_OWN = {
    *("binary_data_output", "priority", "timeout", "id", "request_id"),
    *("sequence_id", "sequence_start", "sequence_end"),
}
"""Request parameters of the protocol itself, which clients such as tritonclient set: not sampling parameters.

One model with one queue may ignore them, and does.
"""


class BadRequest(ValueError):
    """A request that cannot be served: which field (`sampling_parameters.top_p`), and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {cut(reason)}")
        self.field = field


class UnsupportedRequest(BadRequest):
    """A request for something that these servers do not do."""


class GaveUp(Exception):
    """The engine ended a request by itself, as it does when it shuts down; another server may answer it."""


def check_description(name: str, datatype: str, shape: list[int]) -> None:
    """Check what is said about an input before its data is decoded.

    Raises:
        BadRequest: no such tensor, or another datatype or shape than it has.
    """
    if name not in INPUTS:
        raise BadRequest(cut(name, 40), f"there is no such input; this model takes {', '.join(INPUTS)}")
    if datatype != INPUTS[name]:
        raise BadRequest(name, f"expected datatype {INPUTS[name]}, got {datatype}")
    if shape != [1]:
        raise BadRequest(name, f"expected shape [1], got {shape}")
