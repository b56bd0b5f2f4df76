"""Step 0 of the predictor: a blocking client inside `async def predict`.

Still wrong: while one caller waits for an answer, nobody else gets one, not even a health check.
"""

from __future__ import annotations

import json
from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model
from openai import OpenAI

from servebook.settings import TENSOR_MODEL_NAME
from servebook.ways.kserve.steps.loopback import LoopbackServer


class Predictor(Model):  # type: ignore[misc]
    """Hands each request on to an engine that speaks OpenAI's API."""

    def __init__(self, upstream: str, key: str | None) -> None:
        super().__init__(TENSOR_MODEL_NAME)
        self.client = OpenAI(base_url=f"{upstream}/v1", api_key=key or "none")
        self.ready = True

    async def predict(self, payload: InferRequest, *_: Any) -> InferResponse:
        """Answer with the whole text."""
        tensors = {tensor.name: tensor.data[0] for tensor in payload.inputs}
        sampling = json.loads(tensors["sampling_parameters"])
        prompt = tensors["text_input"]
        # The event loop stands still here until the whole answer is there.
        answer = self.client.completions.create(model=self.name, prompt=prompt, extra_body=sampling)
        output = InferOutput("text_output", [1], "BYTES", [answer.choices[0].text])
        return InferResponse(payload.id or "", self.name, [output])


def start(upstream: str, key: str | None, http_port: int) -> None:
    """Serve until a signal comes."""
    LoopbackServer(http_port).start([Predictor(upstream, key)])
