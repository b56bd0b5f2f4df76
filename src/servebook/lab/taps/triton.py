"""A tap on Triton's gRPC that understands its streams; a `watcher` sees each response before it goes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from servebook.lab.taps.grpc import Call, Filter, GrpcTap

FINAL = "triton_final_response"
PIECE = 8
"""Characters: about two tokens."""


@dataclass
class Stream:
    """One call of ModelStreamInfer: what was asked and answered so far."""

    call: Call
    responses: list[Any] = field(default_factory=list)

    @property
    def requests(self) -> list[Any]:
        return [service_pb2.ModelInferRequest.FromString(message) for message in self.call.requests]

    @property
    def text(self) -> str:
        """The text of all responses so far."""
        return "".join(map(text_of, self.responses))


def text_of(response: Any) -> str:
    """The text in a response, "" where it has none."""
    answer = response.infer_response
    for place, output in enumerate(answer.outputs):
        if output.name == "text_output":
            return str(deserialize_bytes_tensor(answer.raw_output_contents[place])[0].decode())
    return ""


def is_final(response: Any) -> bool:
    """Whether nothing more comes for its request."""
    parameters = response.infer_response.parameters
    return bool(response.error_message) or (FINAL in parameters and parameters[FINAL].bool_param)


def cut(response: Any, begins: bool) -> Iterator[Any]:
    """The same text in responses of at most `PIECE` characters; the first of a stream (`begins`) has none.

    A busy machine's engine puts into one response what an idle one's puts into many, and what a learner is told must
    not depend on that. One without text comes from vLLM while the text might still become a stop string.
    """
    text = text_of(response)
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    *before, last = [""] * begins + pieces or [""]
    for piece in before:
        part = type(response)()
        part.CopyFrom(response)
        part.infer_response.parameters[FINAL].bool_param = False
        _write(part, piece)
        yield part
    if before:
        _write(response, last)
    yield response


def _write(response: Any, text: str) -> None:
    answer = response.infer_response
    place = [output.name for output in answer.outputs].index("text_output")
    answer.raw_output_contents[place] = serialize_byte_tensor(np.array([text.encode()], dtype=object)).item()


Watcher = Callable[[Any, Stream], None]
"""Called with each response of a stream before it goes out; may hold it back, or break the stream off (`Lost`)."""


class TritonTap(GrpcTap):
    """Relays to the Triton at `target` ("host:port") while the `with` block lasts.

    `alter` is for every call that is no stream; with `cuts` the responses of streams are `cut`.

    Attributes:
        streams: every stream so far.
    """

    def __init__(
        self, target: str, watcher: Watcher | None = None, alter: Filter | None = None, *, cuts: bool = False
    ) -> None:
        super().__init__(target, self._responses)
        self._alter = alter or (lambda messages, _: messages)
        self._cuts = cuts
        self.streams: list[Stream] = []
        self._watcher = watcher or (lambda response, stream: None)

    def busy(self) -> bool:
        """Whether a request waits for responses."""
        return any(
            len(stream.call.requests) > sum(map(is_final, stream.responses)) and not stream.call.done.is_set()
            for stream in self.streams
        )

    def _responses(self, messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
        if call.method != "ModelStreamInfer":
            yield from self._alter(messages, call)
            return
        self.streams.append(stream := Stream(call))
        for message in messages:
            response = service_pb2.ModelStreamInferResponse.FromString(message)
            for part in cut(response, not stream.responses) if self._cuts else [response]:
                self._watcher(part, stream)
                stream.responses.append(part)
                yield part.SerializeToString()
