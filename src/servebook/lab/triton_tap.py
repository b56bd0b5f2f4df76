"""A tap on Triton's gRPC: relays every call to the real server, and notes what passes.

What passes is not altered; a `pace` may hold a response back, or break the stream off as a lost server would.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor


class Lost(Exception):
    """Raised by a pace: the server is gone in the midst of a stream."""


@dataclass
class Stream:
    """One call of ModelStreamInfer: what was asked and answered so far."""

    requests: list[Any] = field(default_factory=list)
    responses: list[Any] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """Whether the client cancelled the call."""
    ended: threading.Event = field(default_factory=threading.Event)

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


Pace = Callable[[Any, Stream], None]
"""Called with each response of a stream before it goes out."""


class TritonTap(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Relays to the Triton at `target` ("host:port") while the `with` block lasts.

    Attributes:
        address: "host:port", where the learner's code is to connect to.
        methods: the names of the methods called so far.
        streams: every stream so far.
    """

    def __init__(self, target: str, pace: Pace | None = None) -> None:
        self.pace = pace or (lambda response, stream: None)
        self.methods: list[str] = []
        self.streams: list[Stream] = []
        self._upstream = grpc.insecure_channel(target)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._upstream)
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, handlers=[self])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> TritonTap:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()
        self._upstream.close()
        self._pool.shutdown()

    def busy(self) -> bool:
        """Whether a request waits for responses."""
        return any(
            len(stream.requests) > sum(map(is_final, stream.responses)) and not stream.ended.is_set()
            for stream in self.streams
        )

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        """The handler for a call."""
        name = call.method.rpartition("/")[2]
        self.methods.append(name)
        if name == "ModelStreamInfer":
            return grpc.stream_stream_rpc_method_handler(
                self._stream,
                service_pb2.ModelInferRequest.FromString,
                service_pb2.ModelStreamInferResponse.SerializeToString,
            )
        ask = self._upstream.unary_unary(call.method, bytes, bytes)

        def unary(request: bytes, context: grpc.ServicerContext) -> Any:
            try:
                return ask(request, metadata=_passed_on(context))
            except grpc.RpcError as error:
                context.abort(error.code(), error.details() or "")

        return grpc.unary_unary_rpc_method_handler(unary)

    def _stream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        stream = Stream()
        self.streams.append(stream)

        def noted() -> Iterator[Any]:
            with suppress(Exception):  # a client that leaves ends the iterator with an error
                for request in requests:
                    stream.requests.append(request)
                    yield request

        seconds = context.time_remaining()
        # gRPC says "no deadline" with a time far beyond anybody's life.
        limit = seconds if seconds is not None and seconds < 1e6 else None
        upstream = self._stub.ModelStreamInfer(noted(), timeout=limit, metadata=_passed_on(context))

        def over() -> None:
            if not stream.ended.is_set():
                stream.left.set()
            upstream.cancel()

        context.add_callback(over)
        try:
            for response in upstream:
                self.pace(response, stream)
                stream.responses.append(response)
                yield response
        except Lost:
            stream.ended.set()
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server has gone")
        except grpc.RpcError as error:
            if not stream.left.is_set():
                stream.ended.set()
                context.abort(error.code(), error.details() or "")
        finally:
            stream.ended.set()
            upstream.cancel()


def _passed_on(context: grpc.ServicerContext) -> tuple[tuple[str, str | bytes], ...]:
    return tuple((key, value) for key, value in context.invocation_metadata() if key != "user-agent")


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether `holds` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
