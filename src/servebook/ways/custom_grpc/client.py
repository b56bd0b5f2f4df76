"""A synchronous client of llm.v1.LLMService: deadlines, retries, cancellation, key."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

import grpc

from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from servebook.ways.client import Answer, Piece
from servebook.ways.grpc_streams import check_end

RETRY_UNAVAILABLE = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "llm.v1.LLMService"}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
"""Service config: nothing of an answer has arrived, and to generate again does no harm; a second try may have one, on
another server, or on this one later. gRPC stops retrying when a response's headers are here (gRFC A6), which come with
the first message."""

KEEPALIVE = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000)]
OPTIONS = [("grpc.service_config", RETRY_UNAVAILABLE), *KEEPALIVE]

REASONS = {llm_pb2.FINISH_REASON_STOP: "stop", llm_pb2.FINISH_REASON_LENGTH: "length"}
"""In the words of the REST API; a server may tell none, or one that is newer than this list: then it is ""."""


class GrpcClient:
    """A client of the server at `address` ("host:port"); use it in a `with` block, from any number of threads.

    `credentials` (`grpc.ssl_channel_credentials(…)`) switch TLS on. Errors are `grpc.RpcError` with `code()`.
    """

    def __init__(
        self, address: str, *, api_key: str | None = None, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        channel = (
            grpc.secure_channel(address, credentials, OPTIONS)
            if credentials
            else grpc.insecure_channel(address, OPTIONS)
        )
        self.channel = grpc.intercept_channel(channel, AddKey(api_key)) if api_key else channel
        self.stub = llm_pb2_grpc.LLMServiceStub(self.channel)

    def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:
        """Return the whole answer within `timeout` seconds; `sampling` are fields of GenerateRequest."""
        request = llm_pb2.GenerateRequest(prompt=prompt, **sampling)
        return read_answer(self.stub.Generate(request, timeout=timeout))

    def stream(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Generator[Piece]:
        """Yield what is new as it comes; leaving the loop, or closing the generator, cancels the call."""
        request = llm_pb2.StreamGenerateRequest(prompt=prompt, **sampling)
        call = self.stub.StreamGenerate(request, timeout=timeout)
        piece = None
        try:
            for message in call:
                yield (piece := read_piece(message))
            check_end(piece)
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def read_answer(response: llm_pb2.GenerateResponse) -> Answer:
    """The message as every way tells it."""
    usage, reason = response.usage, REASONS.get(response.finish_reason, "")
    return Answer(response.text, usage.completion_tokens, usage.prompt_tokens, reason, tuple(response.token_ids))


def read_piece(message: llm_pb2.StreamGenerateResponse) -> Piece:
    """The message as every way tells it."""
    reason = REASONS.get(message.finish_reason, "") if message.is_finished else None
    return Piece(message.text, len(message.token_ids), reason, tuple(message.token_ids))


class AddKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Adds the key to each call's metadata."""

    def __init__(self, key: str) -> None:
        self.metadata = ("authorization", f"Bearer {key}")

    def intercept_unary_unary(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        metadata = [*(client_call_details.metadata or ()), self.metadata]
        return continuation(client_call_details._replace(metadata=metadata), request)

    intercept_unary_stream = intercept_unary_unary
