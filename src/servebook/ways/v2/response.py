"""Writes responses: one vLLM output in, the values of one set of output tensors out."""

from __future__ import annotations

from typing import Any

from vllm.outputs import RequestOutput

from servebook.ways.limits import GIVEN_UP
from servebook.ways.v2.contract import BadRequest, GaveUp
from servebook.ways.v2.logprobs import logprobs_json
from servebook.ways.v2.request import GenerateRequest


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

    def values(self, output: RequestOutput) -> dict[str, list[Any]]:
        """The elements of each tensor in the response that carries `output`.

        Raises:
            BadRequest: the engine found no text of the form that the request asks for.
            GaveUp: the engine ended the request by itself.
        """
        texts = [""] * self.request.sampling.n
        counts = [0] * self.request.sampling.n
        logprobs = ["null"] * self.request.sampling.n
        for choice in output.outputs:
            texts[choice.index] = self.prefix + choice.text
            counts[choice.index] = len(choice.token_ids)
            if choice.finish_reason:
                self.finish_reasons[choice.index] = _success(choice.finish_reason, self.request)
            if choice.cumulative_logprob is not None:
                self.cumulative_logprobs[choice.index] = choice.cumulative_logprob
            if choice.logprobs is not None and "logprobs" in self.request.outputs:
                logprobs[choice.index] = logprobs_json(choice)
        values: dict[str, list[Any]] = {
            "text_output": texts,
            "finish_reason": self.finish_reasons,
            "cumulative_logprob": self.cumulative_logprobs,
            "logprobs": logprobs,
            "num_input_tokens": [len(output.prompt_token_ids or ())],
            "num_output_tokens": counts,
        }
        return {name: list(values[name]) for name in values if name == "text_output" or name in self.request.outputs}


def _success(word: str, request: GenerateRequest) -> str:
    """A finish reason that is a success: "stop", "length" or "repetition"."""
    if word == "error" and request.constraint:
        raise BadRequest(request.constraint, GIVEN_UP)
    if word in ("error", "abort"):
        raise GaveUp("the engine gave this request up")
    return word
