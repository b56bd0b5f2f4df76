"""The Open Inference Protocol (V2), which Triton and KServe share: gRPC by the generated stubs, and REST.

The stubs and not `tritonclient`'s own objects: what is compared is the protocol, and each InferResult costs
the client as much as several messages do on the wire.
"""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import orjson
from tritonclient.grpc import service_pb2, service_pb2_grpc

from servebook.bench.load import DEADLINE_SECONDS, BenchError, Job, Message, Send
from servebook.bench.paths.openai_rest import check, http_session
from servebook.launch import Server
from servebook.settings import TENSOR_MODEL_NAME

RETURNS = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")


def inputs(job: Job, stream: bool) -> dict[str, str | bool]:
    """The input tensors, each of shape [1]. Counts and finish reason come only where they are asked for."""
    values: dict[str, str | bool] = {
        "text_input": job.prompt,
        "sampling_parameters": json.dumps({"max_tokens": job.max_tokens, "temperature": 0}),
        "exclude_input_in_output": True,
    }
    return values | dict.fromkeys(RETURNS, True) | ({"stream": True} if stream else {})


def infer_request(job: Job, stream: bool) -> Any:
    """The ModelInferRequest: BYTES elements have their length in front, four bytes, little-endian."""
    request = service_pb2.ModelInferRequest(model_name=TENSOR_MODEL_NAME)
    for name, value in inputs(job, stream).items():
        kind = "BOOL" if isinstance(value, bool) else "BYTES"
        request.inputs.add(name=name, datatype=kind, shape=[1])
        data = value if isinstance(value, bool) else value.encode()
        raw = struct.pack("?", data) if isinstance(data, bool) else struct.pack("<I", len(data)) + data
        request.raw_input_contents.append(raw)
    return request


def outputs(response: Any) -> dict[str, Any]:
    """The output tensors of one ModelInferResponse, each with one element."""
    raws = response.raw_output_contents
    return {
        tensor.name: _element(tensor, raws[number] if raws else None) for number, tensor in enumerate(response.outputs)
    }


def _element(tensor: Any, raw: bytes | None) -> Any:
    text = tensor.datatype == "BYTES"
    if raw is None:
        return tensor.contents.bytes_contents[0].decode() if text else tensor.contents.uint_contents[0]
    return raw[4:].decode() if text else int.from_bytes(raw, "little")


@asynccontextmanager
async def stub(address: str) -> AsyncIterator[Any]:
    """A stub of the whole inference service."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@asynccontextmanager
async def grpc_stream(server: Server) -> AsyncIterator[Send]:
    """Triton's extension, ModelStreamInfer: a stream of responses to one request. Each counts its own tokens."""
    async with stub(server.grpc) as service:

        async def send(job: Job) -> AsyncIterator[Message]:
            tokens = 0
            async for response in service.ModelStreamInfer(iter([infer_request(job, True)]), timeout=DEADLINE_SECONDS):
                if response.error_message:
                    raise BenchError(f"Triton: {response.error_message}", "See its log (`servebook logs triton`).")
                found = outputs(response.infer_response)
                tokens += found["num_output_tokens"]
                if (reason := found["finish_reason"]) == "None":
                    yield Message(found["text_output"])
                else:
                    yield Message(found["text_output"], reason, found["num_input_tokens"], tokens)

        yield send


@asynccontextmanager
async def grpc_unary(server: Server) -> AsyncIterator[Send]:
    """ModelInfer: the whole answer as one response."""
    async with stub(server.grpc) as service:

        async def send(job: Job) -> AsyncIterator[Message]:
            yield _answer(outputs(await service.ModelInfer(infer_request(job, False), timeout=DEADLINE_SECONDS)))

        yield send


@asynccontextmanager
async def rest(server: Server) -> AsyncIterator[Send]:
    """`POST /v2/models/M/infer`: tensors as JSON, the whole answer as one object."""
    async with http_session(server.url, server.settings.key) as session:

        async def send(job: Job) -> AsyncIterator[Message]:
            tensors = [
                {
                    "name": name,
                    "shape": [1],
                    "datatype": "BOOL" if isinstance(value, bool) else "BYTES",
                    "data": [value],
                }
                for name, value in inputs(job, False).items()
            ]
            async with session.post(f"/v2/models/{TENSOR_MODEL_NAME}/infer", json={"inputs": tensors}) as response:
                await check(response)
                answer = orjson.loads(await response.read())
            yield _answer({tensor["name"]: tensor["data"][0] for tensor in answer["outputs"]})

        yield send


def _answer(found: dict[str, Any]) -> Message:
    return Message(found["text_output"], found["finish_reason"], found["num_input_tokens"], found["num_output_tokens"])
