"""Which way carries what: for each cell of the table a request is made now, and the answer decides.

A server's refusal is a "no", with its status; so is an answer (200) without what was asked for, and a contract whose
message has no field for it.
`OTHERS` has the rows of the ways whose servers a notebook need not start for this; a test asks them, and holds it true.
"""

from __future__ import annotations

import json
import queue
import tomllib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import requests
import tritonclient.grpc as triton
from smg_grpc_proto import vllm_engine_pb2

from servebook.bearer import bearer
from servebook.protos.llm.v1 import llm_pb2
from servebook.protos.vllm import inference_pb2
from servebook.settings import TENSOR_MODEL_NAME

ADAPTER = "caller"
"""The name of the adapter that is asked for."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}}
CALL = {"type": "function", "function": {"name": "weather"}}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
PROMPT = "Is it sunny?"
CHAT = [{"role": "user", "content": PROMPT}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]
FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
SHORT = {"max_tokens": 80, "temperature": 0}

HTTP: dict[str, tuple[str, dict[str, Any]]] = {
    "tools": ("/v1/chat/completions", {"messages": CHAT, "tools": [TOOL], "tool_choice": CALL, **SHORT}),
    "JSON": ("/v1/chat/completions", {"messages": CHAT, "response_format": FORM, **SHORT}),
    "embeddings": ("/v1/embeddings", {"input": PROMPT}),
    "adapter": ("/v1/completions", {"model": ADAPTER, "prompt": PROMPT, "max_tokens": 2}),
    "Responses": ("/v1/responses", {"input": PROMPT, "max_output_tokens": 2}),
    "Messages": ("/v1/messages", {"messages": CHAT, "max_tokens": 2}),
    "image": ("/v1/chat/completions", {"messages": IMAGE, "max_tokens": 2}),
}
"""What is asked of vLLM's HTTP server, by path and body."""

METHODS = {"embeddings": "Embed", "Responses": "CreateResponse", "Messages": "CreateMessage"}
"""What a gRPC method for it would be called."""

OTHERS: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("others.toml").read_text(encoding="utf-8"))
"""By way and feature: "yes", or "no" and why in short."""

WHY = {"contract": "field", "UNIMPLEMENTED": "UNIMPL.", "INVALID_ARGUMENT": "INVALID"}
"""A refusal's status in short; "field": the contract's message has none for it."""

TOLD = 300
"""Of a refusal, at most so many characters are kept."""


@dataclass(frozen=True)
class Cell:
    """Whether a way carried a feature just now, and what was `said`: the status, and of a refusal its reason."""

    carried: bool
    said: str


def over_http(
    url: str, *, model: str, key: str | None = None, prefix: str = "", stream: bool = False
) -> dict[str, Cell]:
    """Ask an OpenAI server at `url` for each feature, or with `stream` for its answer as server-sent events."""
    cells = {}
    for feature, (path, body) in HTTP.items():
        asked = {"model": model} | body | ({"stream": True} if stream else {})
        cells[feature] = _post(f"{url}{prefix}{path}", asked, key, stream)
    return cells


def of_the_gateway(url: str, *, key: str | None = None) -> dict[str, Cell]:
    """Ask chapter 05's gateway: its own body with the feature's field beside, or the feature's own path."""
    cells = {}
    for feature, (path, body) in HTTP.items():
        if path in ("/v1/chat/completions", "/v1/completions"):
            extra = {name: value for name, value in body.items() if name in ("tools", "response_format", "model")}
            path, body = "/chat", {"message": PROMPT, **(extra or {"message": IMAGE[0]["content"]})}
        cells[feature] = _post(url + path, body, key, stream=False)
    return cells


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
            cells[feature] = _post(f"http://{http}{path}", body, None, stream=False)
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


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Cells in short as text: a row for each way, a column for each feature."""
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{feature:14}" for feature in HTTP)]
    lines += [f"{way:{width}}" + "".join(f"{cells[feature]:14}" for feature in HTTP) for way, cells in rows.items()]
    return "\n".join(line.rstrip() for line in lines)


def in_short(cells: Mapping[str, Cell]) -> dict[str, str]:
    """What stands in the table: "yes", or "no" and the status."""
    why = {feature: cell.said.partition(":")[0] for feature, cell in cells.items()}
    return {feature: "yes" if cells[feature].carried else f"no {WHY.get(said, said)}" for feature, said in why.items()}


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
            cells[feature] = Cell(feature != "JSON" or _fits(text(answer)), "OK")
    return cells


def _call(channel: grpc.Channel, service: str, method: str, message: bytes) -> bytes:
    """The last message that comes back, as it came. A unary answer is a stream of one."""
    call = channel.unary_stream(f"/{service}/{method}", None, None)(message, timeout=60)
    answers: list[bytes] = list(call)
    return answers[-1]


def _infer(address: str, inputs: Mapping[str, bytes]) -> Cell:
    """Ask Triton's model with these inputs, each a tensor of one string, beside the prompt."""
    arrived: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    tensors = []
    for name, value in {"text_input": PROMPT.encode(), **inputs}.items():
        tensors.append(triton.InferInput(name, [1], "BYTES"))
        tensors[-1].set_data_from_numpy(np.array([value], dtype=np.object_))
    with triton.InferenceServerClient(address) as client:
        client.start_stream(
            lambda result, error: arrived.put((result, error)), stream_timeout=60, headers={"triton_grpc_error": "true"}
        )
        client.async_stream_infer(TENSOR_MODEL_NAME, tensors)
        result, error = arrived.get()
        client.stop_stream()
    if error:
        return Cell(False, f"{_status(error)}: {error.message()}"[:TOLD])
    text = result.as_numpy("text_output")[0].decode().removeprefix(PROMPT)
    return Cell(_fits(text) if b"structured_outputs" in inputs["sampling_parameters"] else True, "OK")


def _status(error: Any) -> str:
    return str(error.status() or "UNKNOWN").removeprefix("StatusCode.")


def _post(url: str, body: dict[str, Any], key: str | None, stream: bool) -> Cell:
    answer = requests.post(url, json=body, auth=bearer(key), timeout=60)
    if not answer.ok:
        return Cell(False, f"{answer.status_code}: {answer.text}"[:TOLD])
    kind = answer.headers["content-type"].partition(";")[0]
    if stream and kind != "text/event-stream":
        return Cell(False, f"{kind}: no events")
    if "response_format" not in body and "tools" not in body:
        return Cell(True, str(answer.status_code))
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")] if stream else [answer.text]
    calls, text = _written(events)
    return Cell(bool(calls) if "tools" in body else _fits(text), f"{answer.status_code}: {calls or text}"[:TOLD])


def _written(events: list[str]) -> tuple[list[str], str]:
    """The names of the functions that an answer calls, or its events do, and its text."""
    choices = [choice for event in events for choice in json.loads(event).get("choices", [])]
    said = [choice.get("message") or choice.get("delta") or {} for choice in choices]
    calls = [call["function"].get("name") for each in said for call in each.get("tool_calls") or []]
    return list(filter(None, calls)), "".join(each.get("content") or "" for each in said)


def _fits(text: str) -> bool:
    """Whether it is what the schema allows: an object with this one field."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["sunny"] and isinstance(found["sunny"], bool)
