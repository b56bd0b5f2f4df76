"""Step 2 of the predictor: an error says whose fault it was, and names the tensor.

Still wrong: the engine finishes an answer whose caller has hung up.
"""

from __future__ import annotations

import json
from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput, ModelNotReady
from openai import APIConnectionError, AsyncOpenAI, BadRequestError

from servebook.settings import TENSOR_MODEL_NAME
from servebook.ways.kserve.steps.loopback import LoopbackServer


class Predictor(Model):  # type: ignore[misc]
    """Hands each request on to an engine that speaks OpenAI's API."""

    def __init__(self, upstream: str, key: str | None) -> None:
        super().__init__(TENSOR_MODEL_NAME)
        self.client = AsyncOpenAI(base_url=f"{upstream}/v1", api_key=key or "none", max_retries=0)
        self.ready = True

    async def predict(self, payload: InferRequest, *_: Any) -> InferResponse:
        """Answer with the whole text, or with a 400 or a 503."""
        prompt, parameters = text_in(payload, "text_input"), text_in(payload, "sampling_parameters")
        try:
            sampling = json.loads(parameters) | {"model": self.name, "stream": False}
            answer = await self.client.completions.create(model=self.name, prompt=prompt, extra_body=sampling)
        except (ValueError, TypeError):
            raise InvalidInput("sampling_parameters: expected a JSON object") from None
        except BadRequestError:
            raise InvalidInput("sampling_parameters: the engine does not accept them, or not with this text") from None
        except APIConnectionError:
            raise ModelNotReady(self.name, "The engine cannot be reached.") from None
        output = InferOutput("text_output", [1], "BYTES", [answer.choices[0].text])
        return InferResponse(payload.id or "", self.name, [output])


def text_in(payload: InferRequest, name: str) -> str:
    """The one text in the tensor `name`."""
    found = [each for each in payload.inputs if each.name == name]
    if len(found) != 1 or found[0].datatype != "BYTES" or len(found[0].data) != 1:
        raise InvalidInput(f"{name}: expected one such tensor, with one BYTES element")
    return str(found[0].data[0])


def start(upstream: str, key: str | None, http_port: int) -> None:
    """Serve until a signal comes."""
    LoopbackServer(http_port).start([Predictor(upstream, key)])
