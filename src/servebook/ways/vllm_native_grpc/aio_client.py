"""The asyncio twins of `client` and `inference_client`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2
from tokenizers import Tokenizer

from servebook.protos.vllm import inference_pb2_grpc
from servebook.ways.client import Answer, Piece, one_answer
from servebook.ways.grpc_streams import check_end
from servebook.ways.vllm_native_grpc import client as ids
from servebook.ways.vllm_native_grpc import inference_client as texts


class VllmGrpcAioClient:
    """A client of Python's server at `address` ("host:port"); use it in an `async with` block.

    Errors are `grpc.aio.AioRpcError` with `code()`.
    """

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address, [("grpc.max_receive_message_length", -1)])
        self.stub = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)
        self._tokenizer: Tokenizer | None = None

    async def tokenizer(self, seconds: float = ids.TOKENIZER_SECONDS) -> Tokenizer:
        """The engine's own tokenizer, fetched from the server once, within `seconds`."""
        if self._tokenizer is None:
            chunks = self.stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=seconds)
            self._tokenizer = ids.read_tokenizer(b"".join([chunk.data async for chunk in chunks]))
        return self._tokenizer

    async def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:  # noqa: ASYNC109
        """Return the whole answer within `timeout` seconds; cancelling the task cancels the call.

        What `VllmGrpcClient.stream` says of `n` and `stop` holds here and for `stream`, too.
        """
        pieces = [piece async for piece in self.stream(prompt, timeout=timeout, **sampling)]
        return ids.put_together(pieces, len((await self.tokenizer()).encode(prompt).ids))

    async def stream(
        self,
        prompt: str,
        *,
        timeout: float = 60,  # noqa: ASYNC109  # travels with the call, as its deadline
        **sampling: Any,
    ) -> AsyncGenerator[Piece]:
        """Yield text as it becomes whole; to leave early, wrap it in `contextlib.aclosing`."""
        one_answer(sampling)
        end = time.monotonic() + timeout
        tokenizer = await self.tokenizer(timeout)
        prompt_ids = tokenizer.encode(prompt).ids
        decoder = ids.decoder_after(prompt_ids, tokenizer)
        call = self.stub.Generate(ids.request_for(prompt_ids, **sampling), timeout=end - time.monotonic())
        piece = None
        try:
            async for message in call:
                yield (piece := ids.read_piece(message, decoder, tokenizer))
            check_end(piece)
        finally:
            call.cancel()

    async def __aenter__(self) -> VllmGrpcAioClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close(None)


class InferenceAioClient:
    """A client of the Rust front end at `address` ("host:port"); use it in an `async with` block.

    `credentials` (`grpc.ssl_channel_credentials(…)`) switch TLS on. Errors are `grpc.aio.AioRpcError` with `code()`.
    """

    def __init__(self, address: str, *, credentials: grpc.ChannelCredentials | None = None) -> None:
        aio = grpc.aio
        self.channel = aio.secure_channel(address, credentials) if credentials else aio.insecure_channel(address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float = 60,  # noqa: ASYNC109
        **sampling: Any,
    ) -> Answer:
        """Return the whole answer within `timeout` seconds; `sampling` are the names that `request` takes."""
        return texts.read_answer(await self.stub.Generate(texts.request(prompt, **sampling), timeout=timeout))

    async def stream(
        self,
        prompt: str | Sequence[int],
        *,
        timeout: float = 60,  # noqa: ASYNC109
        **sampling: Any,
    ) -> AsyncGenerator[Piece]:
        """Yield what is new as it comes; to leave early, wrap it in `contextlib.aclosing`."""
        call = self.stub.GenerateStream(texts.request(prompt, **sampling), timeout=timeout)
        piece = None
        try:
            async for response in call:
                for output in response.outputs:
                    yield (piece := texts.read_piece(output))
            check_end(piece)
        finally:
            call.cancel()

    async def __aenter__(self) -> InferenceAioClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close(None)
