"""A synchronous client of llm.v1.LLMService: deadlines, retries, cancellation, key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc

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
"""Service config: UNAVAILABLE means that no work was done. gRPC stops retrying with the first message of a stream."""

KEEPALIVE = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000)]
OPTIONS = [("grpc.service_config", RETRY_UNAVAILABLE), *KEEPALIVE]


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

    def generate(self, prompt: str, *, timeout: float = 60, **fields: Any) -> llm_pb2.GenerateResponse:
        """Return the whole text within `timeout` seconds; `fields` are those of GenerateRequest."""
        return self.stub.Generate(llm_pb2.GenerateRequest(prompt=prompt, **fields), timeout=timeout)

    def stream(self, prompt: str, *, timeout: float = 60, **fields: Any) -> Iterator[llm_pb2.StreamGenerateResponse]:
        """Yield messages as they come; leaving the loop, or closing the iterator, cancels the call."""
        call = self.stub.StreamGenerate(llm_pb2.StreamGenerateRequest(prompt=prompt, **fields), timeout=timeout)
        try:
            yield from call
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


class AddKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Adds the key to each call's metadata."""

    def __init__(self, key: str) -> None:
        self.metadata = ("authorization", f"Bearer {key}")

    def intercept_unary_unary(self, continuation: Callable[..., Any], client_call_details: Any, request: Any) -> Any:
        metadata = [*(client_call_details.metadata or ()), self.metadata]
        return continuation(client_call_details._replace(metadata=metadata), request)

    intercept_unary_stream = intercept_unary_unary
