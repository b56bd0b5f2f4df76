"""The way to vLLM: one pool of connections, one call per request, its failures in our words."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NotRequired, Self, TypedDict
from urllib.parse import urlsplit

import aiohttp
import msgspec

from servebook.ways.fastapi_gateway.server.config import Config
from servebook.ways.fastapi_gateway.server.errors import GatewayError
from servebook.ways.limits import POOL_IDLE_SECONDS

log = logging.getLogger("servebook.ways.fastapi_gateway.server")

TOO_LONG = {"input_tokens", "max_tokens"}
"""The parameters that vLLM blames when prompt and answer do not fit the model's context."""

# What is read of an answer. Whatever else may listen at `upstream` is found out here, and not where it is used.

Count = Annotated[int, msgspec.Meta(ge=0)]


class Tokens(TypedDict):
    prompt_tokens: Count
    completion_tokens: Count


class Message(TypedDict):
    content: str | None


class Choice(TypedDict):
    message: Message
    finish_reason: str


class Completion(TypedDict):
    choices: Annotated[list[Choice], msgspec.Meta(min_length=1)]
    usage: Tokens


class Delta(TypedDict):
    content: NotRequired[str | None]


class Part(TypedDict):
    delta: Delta
    finish_reason: str | None


class Chunk(TypedDict):
    """Of a stream; where the engine fails half-way it has an `error` instead."""

    choices: NotRequired[list[Part]]
    usage: NotRequired[Tokens | None]
    error: NotRequired[Any]


COMPLETION, CHUNK = msgspec.json.Decoder(Completion), msgspec.json.Decoder(Chunk)


@contextmanager
def engine_failures() -> Iterator[None]:
    """Turn what can go wrong between us and vLLM into a GatewayError."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        raise GatewayError(503, "engine_unavailable", "The engine cannot be reached.", retry_after=5) from None
    except TimeoutError:
        raise GatewayError(504, "engine_timeout", "The engine took too long.") from None
    except (aiohttp.ClientError, ValueError, LookupError):
        raise broken_off() from None


def broken_off() -> GatewayError:
    return GatewayError(502, "engine_failed", "The engine broke off its answer.")


class Engine:
    """vLLM's OpenAI API, as an async context manager that holds the connections. Nothing is retried."""

    def __init__(self, config: Config) -> None:
        self.config = config

    async def __aenter__(self) -> Self:
        config = self.config
        self.session = aiohttp.ClientSession(
            f"{config.upstream.rstrip('/')}/",
            # Of a packed answer a proxy between us and vLLM would pass nothing on before it has a block full.
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {config.key}"} if config.key else {}),
            # No limit of its own: `limits.Places` is the one place that says no.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=POOL_IDLE_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def healthy(self) -> bool:
        """Whether vLLM says that it can serve."""
        try:
            async with self.session.get("health", timeout=aiohttp.ClientTimeout(total=2)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def call(self, request_id: str) -> EngineCall:
        return EngineCall(self, request_id)


class EngineCall:
    """One request to vLLM. `close` it when the caller is done or gone: vLLM then aborts what is unfinished."""

    def __init__(self, engine: Engine, request_id: str) -> None:
        self.engine = engine
        self.request_id = request_id
        self.response: aiohttp.ClientResponse | None = None

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The whole answer as vLLM's chat completion object.

        Raises:
            GatewayError: the engine refused or failed.
        """
        with engine_failures():
            response = await self._post(body, idle_seconds=None)
            return self._read(COMPLETION, await response.read())

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Send the request; when vLLM has accepted it, return its chunks.

        Raises:
            GatewayError: the engine refused, and later, from the iterator: it failed half-way.
        """
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        with engine_failures():
            response = await self._post(body, self.engine.config.idle_seconds)
        if response.content_type != "text/event-stream":
            raise self._unreadable(f"{response.content_type} instead of a stream")
        return self._chunks(response)

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        rest, ended = b"", False
        with engine_failures():
            async for piece in response.content.iter_any():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line == b"data: [DONE]":
                        if not ended:
                            raise broken_off()
                        return
                    if line.startswith(b"data: "):
                        chunk = self._read(CHUNK, line[6:])
                        if "error" in chunk:
                            raise broken_off()
                        if "choices" not in chunk:
                            raise self._unreadable("an event without choices")
                        ended = ended or any(part["finish_reason"] for part in chunk["choices"])
                        yield chunk
        raise broken_off()

    def _read(self, form: msgspec.json.Decoder[Any], answer: bytes) -> dict[str, Any]:
        try:
            read: dict[str, Any] = form.decode(answer)
        except (ValueError, RecursionError) as error:  # names the place, and nothing of what was said
            raise self._unreadable(str(error)) from None
        return read

    def _unreadable(self, why: str) -> GatewayError:
        """For a success that is no chat completion: it is told to the operator what listens there."""
        upstream = urlsplit(self.engine.config.upstream).netloc.rpartition("@")[2]  # without a password
        log.error("no vLLM at %s? What came is no chat completion: %s id=%s", upstream, why, self.request_id)
        return GatewayError(502, "engine_failed", "The engine answered with what is no chat completion.")

    async def _post(self, body: dict[str, Any], idle_seconds: float | None) -> aiohttp.ClientResponse:
        config = self.engine.config
        self.response = await self.engine.session.post(
            "v1/chat/completions",
            json=body,
            headers={"X-Request-Id": self.request_id},
            timeout=aiohttp.ClientTimeout(
                total=None if idle_seconds else config.answer_seconds,
                sock_connect=config.connect_seconds,
                sock_read=idle_seconds,
            ),
        )
        if self.response.status != 200:
            raise await self._refusal(self.response)
        return self.response

    async def _refusal(self, response: aiohttp.ClientResponse) -> GatewayError:
        """What a status other than 200 means to our caller. The engine's own words stay here: they may quote."""
        try:
            param = (await response.json())["error"]["param"]
        except (aiohttp.ClientError, ValueError, LookupError, TypeError):
            param = None
        log.warning("engine refused: status=%d param=%s id=%s", response.status, param, self.request_id)
        if response.status == 400 and param in TOO_LONG:
            return GatewayError(
                400, "too_long", "This does not fit the model's context; shorten the messages or max_tokens."
            )
        if response.status in (400, 422):
            return GatewayError(400, "refused", "The engine does not accept this request.")
        if response.status in (429, 503):
            return GatewayError(503, "busy", "The engine has no room; try again in a moment.", retry_after=1)
        return GatewayError(502, "engine_failed", "The engine could not answer.")

    def close(self) -> None:
        if self.response:
            self.response.close()
