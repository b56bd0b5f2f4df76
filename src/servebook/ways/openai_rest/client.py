"""Clients of everything that speaks OpenAI's completions, made with OpenAI's SDK: vLLM, and its router in front."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from openai import APIConnectionError, APIResponseValidationError, AsyncOpenAI, AsyncStream, OpenAI, Stream
from openai.types import Completion

from servebook.settings import url_of
from servebook.ways.client import Answer, Piece, one_answer

NO_KEY = "no-key"
"""The SDK wants one, also for a server that asks for none."""

SECONDS = 60
"""The longest wait for bytes, where no call has its own."""

COUNTED = {"include_usage": True, "continuous_usage_stats": True}
"""Stream options: the number of tokens so far comes with every event, and in a last one without text.

The second one is vLLM's own; its router does not hand it on, and then only the last event counts.
"""


class OpenAIClient:
    """A client of the server at `url` ("http://host:port"); use it in a `with` block, from any number of threads.

    `sampling` are fields of the body, vLLM's own among them (`top_k`, `ignore_eos`), and no `n`. Errors are
    `openai.APIError`.
    """

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.client = OpenAI(base_url=v1(url), api_key=api_key or NO_KEY, max_retries=0, timeout=SECONDS)

    @cached_property
    def model(self) -> str:
        """The name of the first model that the server has."""
        return self._first_model(SECONDS)

    def _first_model(self, seconds: float) -> str:
        return first_model(self.client.models.with_raw_response.list(timeout=seconds).http_response)

    def _model_within(self, seconds: float) -> str:
        if "model" not in vars(self):  # the first call asks for it, with its own timeout
            self.model = self._first_model(seconds)
        return self.model

    def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:
        """Return the whole answer; `timeout` bounds each wait for bytes, in seconds."""
        one_answer(sampling)
        model = self._model_within(timeout)
        ask = self.client.completions.with_raw_response.create
        return read_answer(ask(model=model, prompt=prompt, timeout=timeout, extra_body=sampling).http_response)

    def stream(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Generator[Piece]:
        """Yield what is new as it comes; leaving the loop, or closing the generator, closes the connection."""
        one_answer(sampling)
        more = sampling | {"stream_options": COUNTED}
        with self.client.completions.create(
            model=self._model_within(timeout), prompt=prompt, stream=True, timeout=timeout, extra_body=more
        ) as events:
            tokens = 0
            end: Piece | None = None
            for event in events:
                piece = read_piece(event, tokens) if event.choices else None
                if piece is None:
                    end = recount(end, tokens_of(event) - tokens)
                elif piece.finish_reason:
                    end = piece
                else:
                    yield piece
                tokens = tokens_of(event)
            if end is None:
                raise cut_off(events)
            yield end

    def __enter__(self) -> OpenAIClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()


class OpenAIAioClient:
    """The same for asyncio; use it in an `async with` block."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        self.client = AsyncOpenAI(base_url=v1(url), api_key=api_key or NO_KEY, max_retries=0, timeout=SECONDS)
        self._model = ""

    async def model(self, seconds: float = SECONDS) -> str:
        """The name of the first model that the server has; `seconds` bound each wait for bytes."""
        if not self._model:
            asked = self.client.models.with_raw_response.list(timeout=seconds)
            self._model = first_model((await asked).http_response)
        return self._model

    async def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:  # noqa: ASYNC109
        """Return the whole answer; cancelling the task closes the connection."""
        one_answer(sampling)
        model = await self.model(timeout)
        ask = self.client.completions.with_raw_response.create
        asked = ask(model=model, prompt=prompt, timeout=timeout, extra_body=sampling)
        return read_answer((await asked).http_response)

    async def stream(
        self,
        prompt: str,
        *,
        timeout: float = 60,  # noqa: ASYNC109
        **sampling: Any,
    ) -> AsyncGenerator[Piece]:
        """Yield what is new as it comes; to leave early, wrap it in `contextlib.aclosing`."""
        one_answer(sampling)
        more = sampling | {"stream_options": COUNTED}
        asked = self.client.completions.create(
            model=await self.model(timeout), prompt=prompt, stream=True, timeout=timeout, extra_body=more
        )
        async with await asked as events:
            tokens = 0
            end: Piece | None = None
            async for event in events:
                piece = read_piece(event, tokens) if event.choices else None
                if piece is None:
                    end = recount(end, tokens_of(event) - tokens)
                elif piece.finish_reason:
                    end = piece
                else:
                    yield piece
                tokens = tokens_of(event)
            if end is None:
                raise cut_off(events)
            yield end

    async def __aenter__(self) -> OpenAIAioClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()


def v1(url: str) -> str:
    """Where the API of the server at `url` begins."""
    return f"{url_of(url).rstrip('/')}/v1"


@contextmanager
def read_as(what: str, response: Any) -> Iterator[Any]:
    """The JSON of a response, to be read within the block: of a page, say, the SDK itself makes an AttributeError.

    Raises:
        APIResponseValidationError: it is not `what`.
    """
    try:
        yield response.json()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        said = f"What {response.url} answers is no {what}: is it a server with OpenAI's API?"
        raise APIResponseValidationError(response, None, message=said) from None


def first_model(response: Any) -> str:
    """The name of the first model of those that the server lists."""
    with read_as("list of models", response) as listed:
        return str(listed["data"][0]["id"])


def cut_off(events: Stream[Completion] | AsyncStream[Completion]) -> APIConnectionError:
    """For a stream that came to its end before the answer did: a proxy may end it well where the engine is gone."""
    return APIConnectionError(message="The stream ended before the answer.", request=events.response.request)


def tokens_of(event: Completion) -> int:
    """The tokens of the answer so far."""
    return event.usage.completion_tokens if event.usage else 0


def read_piece(event: Completion, tokens: int) -> Piece:
    """What an event brings, after one with `tokens` so far."""
    choice = event.choices[0]
    return Piece(choice.text, tokens_of(event) - tokens, choice.finish_reason)


def recount(end: Piece | None, more: int) -> Piece | None:
    """The last piece, with tokens that were told only after it."""
    return end and replace(end, tokens=end.tokens + more)


def read_answer(response: Any) -> Answer:
    """A whole answer."""
    with read_as("completion", response) as completion:
        [choice], usage = completion["choices"], completion.get("usage") or {}
        tokens = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
        return Answer(choice["text"], *tokens, choice["finish_reason"])
