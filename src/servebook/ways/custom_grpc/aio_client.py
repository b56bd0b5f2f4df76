"""The asyncio twin of `client`: hundreds of calls on one channel, in one thread."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from servebook.ways.client import Answer, Piece
from servebook.ways.custom_grpc.client import OPTIONS, read_answer, read_piece
from servebook.ways.grpc_streams import check_end


class GrpcAioClient:
    """A client of the server at `address` ("host:port"); use it in an `async with` block, on one event loop.

    `credentials` (`grpc.ssl_channel_credentials(…)`) switch TLS on. Errors are `grpc.aio.AioRpcError` with `code()`.
    """

    def __init__(
        self, address: str, *, api_key: str | None = None, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        interceptors: list[Any] = [AddKeyUnary(api_key), AddKeyStream(api_key)] if api_key else []
        self.channel = (
            grpc.aio.secure_channel(address, credentials, OPTIONS, interceptors=interceptors)
            if credentials
            else grpc.aio.insecure_channel(address, OPTIONS, interceptors=interceptors)
        )
        self.stub = llm_pb2_grpc.LLMServiceStub(self.channel)

    async def generate(
        self,
        prompt: str,
        *,
        timeout: float = 60,  # noqa: ASYNC109  # travels with the call, as its deadline
        **sampling: Any,
    ) -> Answer:
        """Return the whole answer within `timeout` seconds; cancelling the task cancels the call."""
        request = llm_pb2.GenerateRequest(prompt=prompt, **sampling)
        return read_answer(await self.stub.Generate(request, timeout=timeout))

    async def stream(
        self,
        prompt: str,
        *,
        timeout: float = 60,  # noqa: ASYNC109
        **sampling: Any,
    ) -> AsyncGenerator[Piece]:
        """Yield what is new as it comes. To leave early, wrap it in `contextlib.aclosing`: that cancels the call."""
        request = llm_pb2.StreamGenerateRequest(prompt=prompt, **sampling)
        call = self.stub.StreamGenerate(request, timeout=timeout)
        piece = None
        try:
            async for message in call:
                yield (piece := read_piece(message))
            check_end(piece)
        finally:
            call.cancel()

    async def __aenter__(self) -> GrpcAioClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close(None)


class AddKeyUnary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Adds the key to the metadata of unary calls."""

    def __init__(self, key: str) -> None:
        self.key = f"Bearer {key}"

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(with_key(client_call_details, self.key), request)


class AddKeyStream(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Adds the key to the metadata of streaming calls: in grpc.aio, one class cannot do both."""

    def __init__(self, key: str) -> None:
        self.key = f"Bearer {key}"

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(with_key(client_call_details, self.key), request)


def with_key(details: Any, key: str) -> Any:
    """The same call, with the key in its metadata."""
    metadata = grpc.aio.Metadata(*(details.metadata or ()), ("authorization", key))
    return details._replace(metadata=metadata)
