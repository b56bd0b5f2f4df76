"""KServe's OpenAI endpoints, answered by vLLM's own implementation of that API."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import ModuleType
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.generate.base import protocol as generate_protocol
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine import protocol as serve_protocol
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.renderers import chat_utils
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from servebook.ways.asgi import LINE_ENDS
from servebook.ways.limits import GIVEN_UP, LimitExceeded, check
from servebook.ways.v2.request import LIMITS, check_limits, constraint_of

# KServe 0.21 was built for vLLM 0.24 and looks for these two modules where they were then. Without them its
# import fails, and the server leaves the OpenAI endpoints out with one line in its log.
moved = ModuleType("vllm.entrypoints.openai.engine.protocol")
moved.__dict__.update(vars(serve_protocol) | vars(generate_protocol))
sys.modules |= {
    "vllm.entrypoints.openai.engine.protocol": moved,
    "vllm.entrypoints.chat_utils": chat_utils,
}

from kserve.protocol.rest.openai import ChatCompletionRequest, CompletionRequest, OpenAIGenerativeModel  # noqa: E402


class OpenAIAnswers(OpenAIGenerativeModel):  # type: ignore[misc]
    """Completions and chat completions, at once or as server-sent events."""

    def answer_with(self, engine: AsyncLLM) -> None:
        """Set up vLLM's two handlers on `engine`."""
        models = OpenAIServingModels(engine, [BaseModelPath(name=self.name, model_path=engine.model_config.model)])
        shared: dict[str, Any] = {
            "request_logger": None,
            "online_renderer": OnlineRenderer(
                model_config=engine.model_config,
                renderer=engine.renderer,
                request_logger=None,
                chat_template=None,
                chat_template_content_format="auto",
            ),
        }
        self.completions = OpenAIServingCompletion(engine, models, **shared)
        self.chat = OpenAIServingChat(
            engine, models, "assistant", chat_template=None, chat_template_content_format="auto", **shared
        )

    async def create_completion(
        self, request: CompletionRequest, raw_request: Request, context: dict[str, Any] | None = None
    ) -> AsyncGenerator[str, None] | Any:
        return await guarded(self.completions.create_completion, request, raw_request)

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request, context: dict[str, Any] | None = None
    ) -> AsyncGenerator[str, None] | Any:
        return await guarded(self.chat.create_chat_completion, request, raw_request)


async def guarded(answer: Callable[[Any, Request], Awaitable[Any]], request: Any, raw_request: Request) -> Any:
    """Let `answer` have a request that is within the limits, and keep a stream's events one line each.

    Raises:
        VLLMValidationError: it is beyond a limit, cannot be answered by this model, or has a constraint that the engine
            gave up; in a stream vLLM tells it as an error without a cause.
    """
    prompt = getattr(request, "prompt", None)
    is_list = isinstance(prompt, list) and not all(isinstance(part, int) for part in prompt)  # token ids are one prompt
    try:
        check(
            LIMITS,
            prompts=len(prompt or ()) if is_list else 1,
            request_id=raw_request.headers.get("X-Request-Id", request.request_id),  # as vLLM takes it
            messages=getattr(request, "messages", None),
            names={"prompts": "prompt"},
        )
        check_limits(sampling := sampling_of(request))
    except LimitExceeded as error:
        raise VLLMValidationError(str(error), parameter=error.field) from None
    constraint = constraint_of(sampling)
    if task := asyncio.current_task():  # vLLM's decorator began it, and would let it run on
        raw_request.scope["tasks"].add(task)
    try:
        answered = await answer(request, raw_request)
    except (ValueError, TypeError) as error:  # as of a picture for a model that reads text; vLLM's own says 400
        raise VLLMValidationError(str(error)) from None
    except GenerationError:
        if constraint is None:
            raise
        field = f"structured_outputs.{constraint}"
        raise VLLMValidationError(f"{field} {GIVEN_UP}", parameter=field) from None
    if isinstance(answered, AsyncGenerator):
        return (event.translate(LINE_ENDS) async for event in answered)
    return answered


def sampling_of(request: Any) -> SamplingParams:
    """What a request asks for. Its length has no limit here, and must not be in the way of the others."""
    beams = {"use_beam_search": False, "temperature": 1.0} if request.use_beam_search else {}
    params: SamplingParams = request.model_copy(update=beams).to_sampling_params(max(1, request.min_tokens), {})
    return params


async def vllm_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with the status and body that vLLM's own server has for this error."""
    answer = create_error_response(error)
    return JSONResponse(answer.model_dump(), status_code=answer.error.code)
