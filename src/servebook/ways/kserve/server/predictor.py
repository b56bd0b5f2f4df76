"""The predictor: one vLLM engine behind KServe's `predict`."""

from __future__ import annotations

import uuid
from typing import Any

from kserve import InferRequest, InferResponse, Model
from kserve.errors import InvalidInput, ModelNotReady
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from servebook.ways.kserve.server.openai import OpenAIAnswers
from servebook.ways.kserve.server.tensors import check_counts, elements, parameters_of, tensors
from servebook.ways.v2.contract import INPUTS, OUTPUTS, BadRequest, GaveUp
from servebook.ways.v2.request import GenerateRequest, read_request, refused
from servebook.ways.v2.response import Responses

ONE_ANSWER = "the Open Inference Protocol has one response to a request; stream through /openai/v1/completions instead"


class EngineDown(ModelNotReady):  # type: ignore[misc]
    """The engine has died: HTTP 503, gRPC UNAVAILABLE."""

    @property
    def reason(self) -> str:
        """KServe's gRPC interceptor reads this field, which KServe's own class lacks."""
        return str(self)


class Predictor(Model, OpenAIAnswers):  # type: ignore[misc]
    """Answers the Open Inference Protocol and KServe's OpenAI endpoints from the same engine."""

    def __init__(self, name: str, engine: AsyncLLM) -> None:
        super().__init__(name)
        self.llm = engine
        self.answer_with(engine)
        self.ready = True

    async def healthy(self) -> bool:
        return self.ready and not self.llm.errored

    def load(self) -> bool:
        """KServe calls this for a request to a model that is not healthy; a dead engine does not come back."""
        raise EngineDown(self.name, "Its engine has died; restart the server.")

    def get_input_types(self) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": datatype, "shape": [1]} for name, datatype in INPUTS.items()]

    def get_output_types(self) -> list[dict[str, Any]]:
        one = {"num_input_tokens": 1}  # the others have one element per choice (`n`)
        return [{"name": name, "datatype": kind, "shape": [one.get(name, -1)]} for name, kind in OUTPUTS.items()]

    async def predict(
        self,
        payload: InferRequest,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        """Generate until the end and answer once: the Open Inference Protocol has no streaming.

        A cancelled call cancels this coroutine, and leaving `generate` aborts the request in the engine.

        Raises:
            InvalidInput: a tensor does not fit, or is beyond a limit; the message names it.
            EngineDown: the engine has died, or gave the request up.
        """
        if not isinstance(payload, InferRequest):
            raise InvalidInput(f"this model speaks the V2 protocol: POST /v2/models/{self.name}/infer")
        try:
            check_counts(payload)
            request = read_request(elements(payload), parameters_of(payload))
            if request.stream or request.lora_name:
                field = "stream" if request.stream else "sampling_parameters.lora_name"
                raise BadRequest(field, ONE_ANSWER if request.stream else "this model has no adapters")
            asked = [output.name for output in payload.request_outputs or ()]
            if unknown := [name for name in asked if name not in ("text_output", *request.outputs)]:
                raise BadRequest("outputs", f"{unknown[0]} is unknown, or was not asked for by its return_ tensor")
            values = Responses(request).values(await self.generate(request))
        except BadRequest as error:
            raise InvalidInput(str(error)) from None
        except GaveUp as error:
            raise EngineDown(self.name, str(error)) from None
        for output in payload.request_outputs or ():  # KServe forgets what holds for all outputs where some are listed
            output.parameters = {"binary_data": payload.use_binary_outputs} | (output.parameters or {})
        wanted = asked or values.keys()
        return InferResponse(
            response_id=payload.id or str(uuid.uuid4()),
            model_name=self.name,
            infer_outputs=tensors({name: values[name] for name in values if name in wanted}),
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )

    async def generate(self, request: GenerateRequest) -> RequestOutput:
        """The engine's one final output."""
        try:
            prompt = parse_model_prompt(self.llm.model_config, request.prompt)
            (tokens,) = await self.llm.renderer.render_cmpl_async([prompt])
        except VLLMClientError as error:
            raise refused("text_input", error) from None
        try:
            async for output in self.llm.generate(tokens, request.sampling, str(uuid.uuid4())):
                final = output
        except VLLMClientError as error:
            raise refused("sampling_parameters", error, request) from None
        except EngineDeadError:
            raise EngineDown(self.name, "Its engine has died; restart the server.") from None
        except GracefulHTTPError as error:  # vLLM's own limits (--max-num-queued-reqs)
            raise EngineDown(self.name, error.message) from None
        return final
