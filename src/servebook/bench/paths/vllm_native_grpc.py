"""vLLM's own gRPC servers: Python's answers with token ids, whose text is the client's work; Rust's with text."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from tokenizers import Tokenizer

from servebook.bench.load import DEADLINE_SECONDS, Job, Message, Send
from servebook.engine.model import model_path
from servebook.launch import Server
from servebook.protos.vllm import inference_pb2_grpc
from servebook.ways.vllm_native_grpc.client import decoder_after
from servebook.ways.vllm_native_grpc.inference_client import REASONS, request


@asynccontextmanager
async def stream(server: Server) -> AsyncIterator[Send]:
    """Tokenize, send, detokenize as the ids come: the client's CPU includes what other paths leave to the server."""
    tokenizer = Tokenizer.from_file(str(model_path(server.settings) / "tokenizer.json"))
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        service = vllm_engine_pb2_grpc.VllmEngineStub(channel)

        async def send(job: Job) -> AsyncIterator[Message]:
            ids = tokenizer.encode(job.prompt).ids
            request = vllm_engine_pb2.GenerateRequest(
                request_id=uuid.uuid4().hex,
                tokenized=vllm_engine_pb2.TokenizedInput(input_ids=ids),
                sampling_params=vllm_engine_pb2.SamplingParams(temperature=0, top_p=1, max_tokens=job.max_tokens, n=1),
                stream=True,
            )
            decoder, tokens = decoder_after(ids, tokenizer), 0
            async for response in service.Generate(request, timeout=DEADLINE_SECONDS):
                if response.HasField("chunk"):
                    tokens += len(response.chunk.token_ids)
                    pieces = (decoder.step(tokenizer, token) for token in response.chunk.token_ids)
                    yield Message("".join(piece for piece in pieces if piece))
                else:
                    last = response.complete
                    # Its own completion_tokens counts the last message only: streaming clients add up.
                    yield Message("", last.finish_reason, last.prompt_tokens, tokens)

        yield send


@asynccontextmanager
async def inference(server: Server) -> AsyncIterator[Send]:
    """The Rust front end's `vllm.Inference`, text in and out: a first message about the prompt, then one a token."""
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        service = inference_pb2_grpc.InferenceStub(channel)

        async def send(job: Job) -> AsyncIterator[Message]:
            wanted = request(job.prompt, temperature=0, max_tokens=job.max_tokens)
            prompt_tokens = 0
            async for response in service.GenerateStream(wanted, timeout=DEADLINE_SECONDS):
                if response.HasField("prompt_info"):
                    prompt_tokens = response.prompt_info.num_prompt_tokens
                for output in response.outputs:
                    if output.HasField("finish_info"):
                        end = output.finish_info
                        yield Message(output.text, REASONS[end.finish_reason], prompt_tokens, end.num_output_tokens)
                    else:
                        yield Message(output.text)

        yield send
