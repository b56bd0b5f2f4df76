"""From a request's fields to what the engine takes: a rendered prompt and sampling parameters, or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import EngineInput
from vllm.renderers import BaseRenderer
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from servebook.protos.llm.v1.llm_pb2 import GenerateRequest, Sampling, StreamGenerateRequest
from servebook.ways.custom_grpc.server.errors import Refusal, invalid
from servebook.ways.limits import LimitExceeded, Limits, check
from servebook.ways.refusals import reason

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

Request = GenerateRequest | StreamGenerateRequest

CHAT = ChatParams(chat_template_kwargs={"add_generation_prompt": True})
MAX_TEMPERATURE = 2
"""As in vLLM."""
LIMITS = Limits()
CONSTRAINTS = {"regex": "regex", "json_schema": "schema", "choice": "choice"}
"""The kinds of constraint, and the limits that hold for each."""


class Inputs:
    """Checks and converts requests for one model.

    `renderer` is the engine's own, so that text becomes the same tokens as in vLLM's OpenAI server;
    `max_model_len` is in tokens; `defaults` are the model's own sampling defaults (`generation_config.json`).
    """

    def __init__(self, renderer: BaseRenderer, max_model_len: int, defaults: Mapping[str, Any]) -> None:
        self.renderer = renderer
        self.max_model_len = max_model_len
        self.defaults = defaults

    @classmethod
    def of(cls, engine: AsyncLLM) -> Inputs:
        """For the model of `engine`."""
        model = engine.model_config
        return cls(engine.renderer, model.max_model_len, model.get_diff_sampling_param())

    async def prompt(self, request: Request) -> EngineInput:
        """Tokenize, on vLLM's thread pool: a long text must not hold up the other calls.

        Raises:
            Refusal: no input, an empty one, one beyond the context, or token ids beyond the vocabulary.
        """
        kind = request.WhichOneof("input")
        try:
            match kind:
                case "prompt":
                    [rendered] = await self.renderer.render_cmpl_async([{"prompt": request.prompt}])
                case "prompt_token_ids":
                    if (count := len(request.prompt_token_ids.ids)) >= self.max_model_len:
                        raise self.no_room(request, count)
                    ids = list(request.prompt_token_ids.ids)
                    self.renderer.validate_token_ids(ids)
                    [rendered] = await self.renderer.render_cmpl_async([{"prompt_token_ids": ids}])
                case "chat":
                    if not 1 <= (count := len(request.chat.messages)) <= LIMITS.messages:
                        raise invalid("chat.messages", f"must be from 1 to {LIMITS.messages}, got {count}")
                    turns = [{"role": turn.role, "content": turn.content} for turn in request.chat.messages]
                    _, [rendered] = await self.renderer.render_chat_async([turns], CHAT)
                case _:
                    raise invalid("prompt", "set one of prompt, prompt_token_ids and chat")
        except (VLLMClientError, ValueError, TypeError) as error:  # chat templates raise all three
            raise invalid(kind or "prompt", reason(error)) from error
        if not rendered["prompt_token_ids"]:
            raise invalid(kind, "must not be empty")
        return rendered

    def params(self, request: Request, prompt_tokens: int, stream: bool) -> SamplingParams:
        """What the request says, over the model's defaults; with `stream`, outputs hold only what is new.

        Raises:
            Refusal: a value out of range; or prompt and `max_tokens` do not fit into the context together.
        """
        room = self.max_model_len - prompt_tokens
        if room < 1:
            raise self.no_room(request, prompt_tokens)
        usual = min(self.defaults.get("max_tokens", room), room)  # a model may have a default for this, too
        max_tokens = request.max_tokens if request.HasField("max_tokens") else usual
        if not 1 <= max_tokens <= room:
            raise invalid(
                "max_tokens",
                f"must be from 1 to {room} after a prompt of {prompt_tokens}, got {max_tokens}",
            )
        if not 0 <= request.temperature <= MAX_TEMPERATURE:  # NaN does not pass either
            raise invalid("temperature", f"must be from 0 to {MAX_TEMPERATURE}, got {request.temperature}")
        if request.sampling.top_k < 0:
            raise invalid("sampling.top_k", f"must be 0 (all tokens) or more, got {request.sampling.top_k}")
        if request.sampling.seed == -1:
            raise invalid("sampling.seed", "must not be -1: vLLM takes that for no seed")
        check_limits(request.sampling)
        said: dict[str, Any] = {"temperature": request.temperature} if request.HasField("temperature") else {}
        sampling = request.sampling
        said |= {name: getattr(sampling, name) for name in ("top_p", "top_k", "seed") if sampling.HasField(name)}
        try:
            return SamplingParams(
                **{**self.defaults, **said, "max_tokens": max_tokens},
                stop=list(sampling.stop),
                ignore_eos=sampling.ignore_eos,
                structured_outputs=constraint(sampling),
                output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
                skip_clone=True,  # nobody else has this object
            )
        except (VLLMClientError, ValueError) as error:
            field = getattr(error, "parameter", None)
            raise invalid(f"sampling.{field}" if field else "sampling", reason(error)) from error

    def no_room(self, request: Request, prompt_tokens: int) -> Refusal:
        """The refusal of a prompt that fills the context."""
        return invalid(
            request.WhichOneof("input") or "prompt",
            f"its {prompt_tokens} tokens leave no room in the context of {self.max_model_len}",
        )


def check_limits(sampling: Sampling) -> None:
    """Refuse what would keep the engine from everybody else.

    Raises:
        Refusal: a field is beyond its limit, or a stop string is empty.
    """
    if "" in sampling.stop:
        raise invalid("sampling.stop", "a string to stop at must not be empty")
    kind = sampling.WhichOneof("constraint")
    asked: dict[str, Any] = {CONSTRAINTS[kind]: written(sampling)} if kind else {}
    names = {limit: f"sampling.{field}" for field, limit in {"stop": "stop", **CONSTRAINTS}.items()}
    try:
        check(LIMITS, stop=sampling.stop, names=names, **asked)
    except LimitExceeded as error:
        raise invalid(error.field, str(error.args[0])) from None


def constraint(sampling: Sampling) -> StructuredOutputsParams | None:
    """The form that the text must have, None where any will do."""
    kind = sampling.WhichOneof("constraint")
    return StructuredOutputsParams(**{"json" if kind == "json_schema" else kind: written(sampling)}) if kind else None


def written(sampling: Sampling) -> str | list[str]:
    """The constraint's text, or its choices."""
    if sampling.HasField("choice"):
        return list(sampling.choice.options)
    return sampling.regex or sampling.json_schema
