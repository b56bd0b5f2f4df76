"""How the rows of `others.toml` are asked for; a test does, and holds them true."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from smg_grpc_proto import vllm_engine_pb2
from tritonclient.utils import InferenceServerException

from servebook.protos.llm.v1 import llm_pb2
from servebook.protos.vllm import inference_pb2
from servebook.settings import TENSOR_MODEL_NAME
from servebook.ways.more_than_text.carries import (
    ADAPTER,
    HTTP,
    PIXEL,
    PROMPT,
    SCHEMA,
    SHORT,
    TOLD,
    TOOL,
    Cell,
    fits,
    post,
)
from servebook.ways.v2.answers import stream_infer

METHODS = {"embeddings": "Embed", "Responses": "CreateResponse", "Messages": "CreateMessage"}
"""What a gRPC method for it would be called."""


def of_triton(address: str, http: str) -> dict[str, Cell]:
    """Ask Triton's vLLM backend: by sampling parameters and inputs over gRPC at `address`; other APIs at `http`."""
    sampling: dict[str, dict[str, Any]] = {
        "tools": {"tools": [TOOL]},
        "JSON": {"structured_outputs": {"json": SCHEMA}, **SHORT},
        "adapter": {"lora_name": ADAPTER},
    }
    tensors = {"embeddings": {"embedding_request": b"{}"}, "image": {"image": PIXEL.encode()}}
    cells = {}
    for feature, (path, body) in HTTP.items():
        if feature in sampling or feature in tensors:
            said = json.dumps(sampling.get(feature, {})).encode()
            cells[feature] = _infer(address, {"sampling_parameters": said, **tensors.get(feature, {})})
        else:
            cells[feature] = post(f"http://{http}{path}", body, None, stream=False)
    return cells


def of_own_grpc(channel: grpc.Channel) -> dict[str, Cell]:
    """Ask chapter 04's server."""
    message = partial(llm_pb2.GenerateRequest, prompt=PROMPT, max_tokens=40, temperature=0)
    return _of_grpc(
        partial(_call, channel, "llm.v1.LLMService"),
        {
            "tools": partial(message, tools=[TOOL]),
            "JSON": partial(message, sampling=llm_pb2.Sampling(json_schema=json.dumps(SCHEMA))),
            "adapter": partial(message, model=ADAPTER),
            "image": partial(message, image=PIXEL),
        },
        lambda answer: llm_pb2.GenerateResponse.FromString(answer).text,
    )


def of_rust_grpc(channel: grpc.Channel) -> dict[str, Cell]:
    """Ask vLLM's Rust front end, by what this workbook's copy of its contract knows."""
    short = inference_pb2.Stopping(max_new_tokens=40)
    message = partial(inference_pb2.GenerateRequest, text=PROMPT, temperature=0, stopping=short)
    return _of_grpc(
        partial(_call, channel, "vllm.Inference"),
        {
            "tools": partial(message, tools=[TOOL]),
            "JSON": partial(message, decoding=inference_pb2.Decoding(json=json.dumps(SCHEMA))),
            "adapter": partial(message, model=ADAPTER),
            "image": partial(message, image=PIXEL),
        },
        lambda answer: inference_pb2.GenerateResponse.FromString(answer).outputs[0].text,
    )


def of_python_grpc(
    channel: grpc.Channel, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> dict[str, Cell]:
    """Ask vLLM's gRPC server in Python, which takes and gives token ids: `encode` and `decode` are its tokenizer's."""
    pb = vllm_engine_pb2
    tokens = pb.TokenizedInput(input_ids=encode(PROMPT))
    sampling = partial(pb.SamplingParams, max_tokens=40, temperature=0)
    message = partial(pb.GenerateRequest, request_id=uuid.uuid4().hex, tokenized=tokens, sampling_params=sampling())
    # 1 is IMAGE in the contract's Modality.
    image = pb.MediaRefs(items=[pb.MediaRef(modality=1, url=PIXEL)])
    return _of_grpc(
        partial(_call, channel, "vllm.grpc.engine.VllmEngine"),
        {
            "tools": partial(message, tools=[TOOL]),
            "JSON": partial(message, sampling_params=sampling(json_schema=json.dumps(SCHEMA))),
            "embeddings": partial(pb.EmbedRequest, request_id=uuid.uuid4().hex, tokenized=tokens),
            "adapter": partial(message, model=ADAPTER),
            "image": partial(message, media_refs=image),
        },
        lambda answer: decode(pb.GenerateResponse.FromString(answer).complete.output_ids),
    )


def _of_grpc(
    call: Callable[[str, bytes], bytes], messages: Mapping[str, Callable[[], Any]], text: Callable[[bytes], str]
) -> dict[str, Cell]:
    """A call for each feature: with its message, or where there is none, of a method that would have its name."""
    cells = {}
    for feature in HTTP:
        try:
            message = messages[feature]().SerializeToString() if feature in messages else b""
            answer = call("Generate" if feature in messages and feature != "embeddings" else METHODS[feature], message)
        except ValueError as error:  # protobuf's, of a field that the message does not have
            cells[feature] = Cell(False, f"contract: {error}"[:TOLD])
        except grpc.RpcError as error:
            cells[feature] = Cell(False, f"{error.code().name}: {error.details()}"[:TOLD])
        else:
            cells[feature] = Cell(feature != "JSON" or fits(text(answer)), "OK")
    return cells


def _call(channel: grpc.Channel, service: str, method: str, message: bytes) -> bytes:
    """The last message that comes back, as it came. A unary answer is a stream of one."""
    call = channel.unary_stream(f"/{service}/{method}", None, None)(message, timeout=60)
    answers: list[bytes] = list(call)
    return answers[-1]


def _infer(address: str, inputs: Mapping[str, bytes]) -> Cell:
    """Ask Triton's model with these inputs, each a tensor of one string, beside the prompt."""
    tensors = []
    for name, value in {"text_input": PROMPT.encode(), **inputs}.items():
        tensors.append(triton.InferInput(name, [1], "BYTES"))
        tensors[-1].set_data_from_numpy(np.array([value], dtype=np.object_))
    try:
        with triton.InferenceServerClient(address) as client:
            (answer,) = stream_infer(client, TENSOR_MODEL_NAME, tensors, 60)
    except InferenceServerException as error:
        return Cell(False, f"{_status(error)}: {error.message()}"[:TOLD])
    text = answer["text_output"][0].decode().removeprefix(PROMPT)
    return Cell(fits(text) if b"structured_outputs" in inputs["sampling_parameters"] else True, "OK")


def _status(error: Any) -> str:
    return str(error.status() or "UNKNOWN").removeprefix("StatusCode.")
