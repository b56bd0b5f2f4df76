"""Our own gRPC service, `llm.v1.LLMService`: server streaming, and unary; of one front, and of several."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc

from servebook.bench.load import DEADLINE_SECONDS, Job, Message, Send
from servebook.launch import Server, find_server
from servebook.launch.table import Endpoints
from servebook.protos.llm.v1 import llm_pb2, llm_pb2_grpc
from servebook.settings import Settings
from servebook.ways.custom_grpc.aio_client import GrpcAioClient
from servebook.ways.custom_grpc.client import REASONS

FRONTS = 2
CONNECTIONS = 8
"""To several fronts: each connection stays with the front that Linux gave it to."""


def _several(settings: Settings, model: Path, needs: dict[str, Endpoints]) -> list[str]:
    fronts = settings.fronts if settings.fronts > 1 else FRONTS
    return find_server("grpc").argv(settings.model_copy(update={"fronts": fronts}), model, needs)


SEVERAL = replace(find_server("grpc"), argv=_several)
"""The server with several fronts over one engine: `SERVEBOOK_FRONTS`, or two."""


@asynccontextmanager
async def stream(server: Server) -> AsyncIterator[Send]:
    """A message for each output of the engine; the last one tells the usage."""
    async with GrpcAioClient(server.grpc, api_key=server.settings.key) as client:

        async def send(job: Job) -> AsyncIterator[Message]:
            async for message in _read(client.stub.StreamGenerate(_asked(job), timeout=DEADLINE_SECONDS)):
                yield message

        yield send


@asynccontextmanager
async def spread(server: Server) -> AsyncIterator[Send]:
    """The same, each request on the next of several connections."""
    metadata = (("authorization", f"Bearer {server.settings.key}"),) if server.settings.key else ()
    own = [("grpc.use_local_subchannel_pool", 1)]  # otherwise all channels to an address share one connection
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(server.grpc, own)) for _ in range(CONNECTIONS)
        ]
        stubs = itertools.cycle([llm_pb2_grpc.LLMServiceStub(channel) for channel in channels])

        async def send(job: Job) -> AsyncIterator[Message]:
            call = next(stubs).StreamGenerate(_asked(job), timeout=DEADLINE_SECONDS, metadata=metadata)
            async for message in _read(call):
                yield message

        yield send


def _asked(job: Job) -> llm_pb2.StreamGenerateRequest:
    return llm_pb2.StreamGenerateRequest(prompt=job.prompt, max_tokens=job.max_tokens, temperature=0)


async def _read(call: AsyncIterable[llm_pb2.StreamGenerateResponse]) -> AsyncIterator[Message]:
    async for message in call:
        if not message.is_finished:
            yield Message(message.text)
        else:
            usage = message.usage
            yield Message(message.text, REASONS[message.finish_reason], usage.prompt_tokens, usage.completion_tokens)


@asynccontextmanager
async def unary(server: Server) -> AsyncIterator[Send]:
    """The whole answer as one message."""
    async with GrpcAioClient(server.grpc, api_key=server.settings.key) as client:

        async def send(job: Job) -> AsyncIterator[Message]:
            request = llm_pb2.GenerateRequest(prompt=job.prompt, max_tokens=job.max_tokens, temperature=0)
            answer = await client.stub.Generate(request, timeout=DEADLINE_SECONDS)
            usage, reason = answer.usage, REASONS[answer.finish_reason]
            yield Message(answer.text, reason, usage.prompt_tokens, usage.completion_tokens)

        yield send
