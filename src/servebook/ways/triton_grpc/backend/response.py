"""Writes responses: one vLLM output in, one set of output tensors out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.outputs import RequestOutput

from servebook.ways.triton_grpc.backend.request import GenerateRequest, text_tensor
from servebook.ways.v2.logprobs import logprobs_json


class Responses:
    """The responses to one request, in order.

    Every tensor but `num_input_tokens` has one element per choice (`n`), in the order of the choices, also
    where an output brings news of some of them only.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.prefix = request.prompt if request.echo else ""
        self.finish_reasons = ["None"] * request.sampling.n
        self.cumulative_logprobs = [float("nan")] * request.sampling.n

    def tensors(self, output: RequestOutput) -> dict[str, NDArray[Any]]:
        """The tensors of the response that carries `output`."""
        texts = [""] * self.request.sampling.n
        counts = [0] * self.request.sampling.n
        logprobs = ["null"] * self.request.sampling.n
        for choice in output.outputs:
            texts[choice.index] = self.prefix + choice.text
            counts[choice.index] = len(choice.token_ids)
            if choice.finish_reason:
                self.finish_reasons[choice.index] = choice.finish_reason
            if choice.cumulative_logprob is not None:
                self.cumulative_logprobs[choice.index] = choice.cumulative_logprob
            if choice.logprobs is not None and "logprobs" in self.request.outputs:
                logprobs[choice.index] = logprobs_json(choice)
        tensors: dict[str, NDArray[Any]] = {"text_output": text_tensor(texts)}
        wanted = self.request.outputs
        if "finish_reason" in wanted:
            tensors["finish_reason"] = text_tensor(self.finish_reasons)
        if "cumulative_logprob" in wanted:
            tensors["cumulative_logprob"] = np.array(self.cumulative_logprobs, dtype=np.float32)
        if "logprobs" in wanted:
            tensors["logprobs"] = text_tensor(logprobs)
        if "num_input_tokens" in wanted:
            tensors["num_input_tokens"] = np.array([len(output.prompt_token_ids or ())], dtype=np.uint32)
        if "num_output_tokens" in wanted:
            tensors["num_output_tokens"] = np.array(counts, dtype=np.uint32)
        return tensors
