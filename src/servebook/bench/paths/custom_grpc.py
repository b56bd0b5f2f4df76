"""Our own gRPC service, `llm.v1.LLMService`: server streaming, and unary."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from servebook.bench.load import Job, Message, Send
from servebook.launch import Server
from servebook.protos.llm.v1 import llm_pb2
from servebook.ways.custom_grpc.aio_client import GrpcAioClient
from servebook.ways.custom_grpc.client import REASONS

DEADLINE_SECONDS = 600


@asynccontextmanager
async def stream(server: Server) -> AsyncIterator[Send]:
    """A message for each output of the engine; the last one tells the usage."""
    async with GrpcAioClient(server.grpc, api_key=server.settings.key) as client:

        async def send(job: Job) -> AsyncIterator[Message]:
            request = llm_pb2.StreamGenerateRequest(prompt=job.prompt, max_tokens=job.max_tokens, temperature=0)
            async for message in client.stub.StreamGenerate(request, timeout=DEADLINE_SECONDS):
                if not message.is_finished:
                    yield Message(message.text)
                else:
                    usage = message.usage
                    reason = REASONS[message.finish_reason]
                    yield Message(message.text, reason, usage.prompt_tokens, usage.completion_tokens)

        yield send


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
