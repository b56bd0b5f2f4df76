"""The two endpoints: an answer as a whole, and an answer as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from servebook.ways.asgi import LINE_ENDS
from servebook.ways.fastapi_gateway.server.auth import bearer
from servebook.ways.fastapi_gateway.server.engine import Engine, EngineCall
from servebook.ways.fastapi_gateway.server.errors import GatewayError, documented, error_body
from servebook.ways.fastapi_gateway.server.limits import HISTORY_TURNS, MAX_TOKENS, MESSAGE_CHARS, Places
from servebook.ways.fastapi_gateway.server.telemetry import Metrics

router = APIRouter(tags=["chat"])

Text = Annotated[str, Field(min_length=1, max_length=MESSAGE_CHARS)]


def whole(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is the integer 2, though Python's strict integers would refuse it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


EXAMPLE: dict[str, Any] = {"message": "What is the capital of Japan?", "max_tokens": 40, "temperature": 0}


class Turn(BaseModel):
    """One earlier message of the conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user", "assistant"]
    content: Text


class ChatRequest(BaseModel):
    """`max_tokens` bounds the answer; without `temperature` the model's own default holds."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE]})

    message: Text
    max_tokens: Annotated[int, BeforeValidator(whole)] = Field(default=100, ge=1, le=MAX_TOKENS)
    system: Text | None = None
    history: list[Turn] = Field(default=[], max_length=HISTORY_TURNS)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)

    def for_engine(self) -> dict[str, Any]:
        """The same as the body of an OpenAI chat completion."""
        messages = [
            *([{"role": "system", "content": self.system}] if self.system else []),
            *(turn.model_dump() for turn in self.history),
            {"role": "user", "content": self.message},
        ]
        sampling = {} if self.temperature is None else {"temperature": self.temperature}
        return {"messages": messages, "max_tokens": self.max_tokens} | sampling


class Usage(BaseModel):
    """In tokens of the engine's model."""

    prompt_tokens: int
    completion_tokens: int


class ChatResponse(BaseModel):
    """`finish_reason` is "stop" where the model ended by itself, "length" where `max_tokens` ended it."""

    response: str
    finish_reason: str
    usage: Usage


async def engine_call(request: Request, _: Annotated[object, Depends(bearer)]) -> AsyncIterator[EngineCall]:
    """A place and a call to the engine, given back when the response is out or its caller gone."""
    places: Places = request.app.state.places
    engine: Engine = request.app.state.engine
    with places.take():
        call = engine.call(request.state.request_id)
        try:
            yield call
        finally:
            call.close()


Call = Annotated[EngineCall, Depends(engine_call)]


@router.post("/chat", responses=documented(400, 401, 408, 413, 422, 502, 503, 504))
async def chat(request: Request, ask: ChatRequest, call: Call) -> ChatResponse:
    """Answer a message, all at once."""
    answer = await call.complete(ask.for_engine())
    choice, usage = answer["choices"][0], Usage(**answer["usage"])
    no_abort(choice)
    request.app.state.metrics.count(**usage.model_dump())
    return ChatResponse(response=choice["message"]["content"] or "", finish_reason=choice["finish_reason"], usage=usage)


def no_abort(choice: dict[str, Any]) -> None:
    """vLLM calls it a success where it ends a request by itself, as one does that shuts down.

    Raises:
        GatewayError: it did.
    """
    if choice["finish_reason"] == "abort":
        raise GatewayError(503, "engine_unavailable", "The engine broke off its answer; try again.", retry_after=1)


EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"enum": ["message", "error"]}, "data": {"type": "string"}},
}
"""Each event of a stream, as the OpenAPI specification describes them."""
STREAM_EXAMPLE = """\
data: {"text": "The capital"}

data: {"text": " of Japan is Tokyo."}

data: {"text": "", "finish_reason": "stop", "usage": {"prompt_tokens": 37, "completion_tokens": 8}}

data: [DONE]

"""


@router.post(
    "/chat/stream",
    response_class=StreamingResponse,  # for the documentation; EventSourceResponse here would want a generator
    responses=documented(400, 401, 408, 413, 422, 502, 503, 504)
    | {200: {"content": {"text/event-stream": {"schema": EVENT, "example": STREAM_EXAMPLE}}}},
)
async def chat_stream(request: Request, ask: ChatRequest, call: Call) -> EventSourceResponse:
    """Answer a message as server-sent events, closed by `data: [DONE]`.

    The last event before it has an empty text, the finish reason and the usage. What goes wrong after the
    first byte comes as an event named `error`; then there is no `[DONE]`.
    """
    chunks = await call.stream(ask.for_engine())  # before the 200: a refusal still gets its own status
    events = chat_events(chunks, request.state.request_id, request.app.state.metrics)
    return EventSourceResponse(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


async def chat_events(chunks: AsyncIterator[dict[str, Any]], request_id: str, metrics: Metrics) -> AsyncIterator[bytes]:
    """Turn the engine's chunks into our events, one for each that has text."""
    started, first = time.monotonic(), True
    last: dict[str, Any] = {"text": "", "finish_reason": None, "usage": None}
    try:
        async for chunk in chunks:
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    if first:
                        metrics.first_token.observe(time.monotonic() - started)
                        first = False
                    yield event({"text": text})
                no_abort(choice)
                last["finish_reason"] = choice["finish_reason"]
            if usage := chunk.get("usage"):
                last["usage"] = Usage(**usage).model_dump()
                metrics.count(**last["usage"])
    except GatewayError as error:
        metrics.broken_streams.labels(error.code).inc()
        yield event(error_body(error, request_id), name="error")
        return
    yield event(last)
    yield format_sse_event(data_str="[DONE]")


to_json = json.JSONEncoder(ensure_ascii=False).encode


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event, its data on one line for every client: JSON escapes the line breaks, and we Unicode's."""
    return format_sse_event(data_str=to_json(data).translate(LINE_ENDS), event=name)
