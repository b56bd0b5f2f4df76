"""A tap on Triton's gRPC that understands its streams; a `watcher` sees each response before it goes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from servebook.lab.taps.grpc import Call, Filter, GrpcTap


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
    name = "triton_final_response"
    return bool(response.error_message) or (name in parameters and parameters[name].bool_param)


Watcher = Callable[[Any, Stream], None]
"""Called with each response of a stream before it goes out; may hold it back, or break the stream off (`Lost`)."""


class TritonTap(GrpcTap):
    """Relays to the Triton at `target` ("host:port") while the `with` block lasts.

    `alter` is for every call that is no stream.

    Attributes:
        streams: every stream so far.
    """

    def __init__(self, target: str, watcher: Watcher | None = None, alter: Filter | None = None) -> None:
        super().__init__(target, self._responses)
        self._alter = alter or (lambda messages, _: messages)
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
            self._watcher(response, stream)
            stream.responses.append(response)
            yield message
