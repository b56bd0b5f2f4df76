"""The predictor: one vLLM engine behind KServe's `predict`."""

from __future__ import annotations

import uuid
from typing import Any

from kserve import InferRequest, InferResponse, Model
from kserve.errors import InvalidInput, ModelNotReady
from vllm.exceptions import VLLMClientError
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from servebook.ways.kserve.server.openai import OpenAIAnswers
from servebook.ways.kserve.server.tensors import INPUTS, OUTPUTS, TextRequest, read_request, write_outputs


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
        return [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in OUTPUTS.items()]

    async def predict(
        self,
        payload: InferRequest,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        """Generate until the end and answer once: the Open Inference Protocol has no streaming.

        A cancelled call cancels this coroutine, and leaving `generate` aborts the request in the engine.

        Raises:
            InvalidInput: a tensor does not fit, or the prompt is too long; the message names the tensor.
            EngineDown: the engine has died.
        """
        if not isinstance(payload, InferRequest):
            raise InvalidInput(f"this model speaks the V2 protocol: POST /v2/models/{self.name}/infer")
        asked = read_request(payload)
        outputs = write_outputs(asked, await self.generate(asked))
        if payload.request_outputs:
            wanted = [output.name for output in payload.request_outputs]
            if missing := sorted(set(wanted) - {output.name for output in outputs}):
                raise InvalidInput(
                    f"output {', '.join(missing)} is unknown, or was not asked for by its return_ tensor"
                )
            outputs = [output for output in outputs if output.name in wanted]
        return InferResponse(
            response_id=payload.id or str(uuid.uuid4()),
            model_name=self.name,
            infer_outputs=outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )

    async def generate(self, asked: TextRequest) -> RequestOutput:
        """The engine's one final output."""
        try:
            prompt = parse_model_prompt(self.llm.model_config, asked.text_input)
            (tokens,) = await self.llm.renderer.render_cmpl_async([prompt])
        except VLLMClientError as error:
            raise InvalidInput(f"tensor text_input: {error}") from None
        try:
            async for output in self.llm.generate(tokens, asked.sampling_parameters, str(uuid.uuid4())):
                final = output
        except VLLMClientError as error:
            raise InvalidInput(f"tensor sampling_parameters: {error}") from None
        except EngineDeadError:
            raise EngineDown(self.name, "Its engine has died; restart the server.") from None
        return final
