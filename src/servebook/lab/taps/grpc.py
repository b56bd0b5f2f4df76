"""A tap on the wire for gRPC: relays any service's calls between a learner's code and a real server, and notes them.

On the wire a unary call is a stream of one message, so one handler relays every kind without knowing the proto.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc

from servebook.lab.feedback import NotYet
from servebook.lab.taps.http import not_lost

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
FOREVER = 1e6
"""gRPC says "no deadline" with a time far beyond anybody's life (seconds)."""
RESTRICTED = "protocol is restricted"
"""So Triton answers a call that is locked, with the code of a server that is not there."""
GRACE_SECONDS = 0.5
"""Without any grace a client's library complains on stderr, which nbgrader takes for a failure."""


@dataclass
class Call:
    """One call; messages are serialized, times are of `time.monotonic()`."""

    method: str
    """The last part of the path: "Generate" of "/vllm.grpc.engine.VllmEngine/Generate"."""
    timeout: float | None = None
    """The seconds that the caller gave it; None: no deadline."""
    requests: list[bytes] = field(default_factory=list)
    responses: list[bytes] = field(default_factory=list)
    """What the server has sent so far."""
    code: grpc.StatusCode | None = None
    """How the server ended it; None while it has not."""
    details: str = ""
    left: float | None = None
    """When the client went away before that."""
    lost: bool = False
    """Whether the server itself could not be reached, or has gone: no filter's doing."""
    done: threading.Event = field(default_factory=threading.Event)


class Lost(Exception):
    """Raised by a filter: the server is gone in the midst of a call."""


Filter = Callable[[Iterator[bytes], Call], Iterator[bytes]]


class GrpcTap:
    """Relays to the server at `target` ("host:port") while the `with` block lasts.

    A `filter` may hold messages back, join them where the server itself would, or break the call off (`Lost`).

    Attributes:
        address: where the learner's code is to connect to.
        calls: every call so far, in the order of arrival.
    """

    def __init__(self, target: str, filter: Filter | None = None) -> None:
        self.filter = filter or (lambda messages, _: messages)
        self.calls: list[Call] = []
        self._upstream = grpc.insecure_channel(target, UNLIMITED)
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="grpc tap")
        self._server = grpc.server(self._pool, options=UNLIMITED)
        self._server.add_generic_rpc_handlers((_AnyMethod(self._relay),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._upstream.close()
        self._pool.shutdown(wait=False)
        if isinstance(error, NotYet):
            not_lost(any(call.lost for call in self.calls))

    def close(self) -> None:
        """Take no more calls, and soon cancel what is still under way."""
        self._server.stop(GRACE_SECONDS).wait()

    def busy(self) -> bool:
        """Whether a call is under way."""
        return any(not call.done.is_set() for call in self.calls)

    def of(self, method: str) -> list[Call]:
        """The calls of that method so far."""
        return [call for call in self.calls if call.method == method]

    def settle(self, seconds: float = 60) -> None:
        """Wait until no call is under way."""
        deadline = time.monotonic() + seconds
        for call in list(self.calls):
            call.done.wait(max(0, deadline - time.monotonic()))

    def _relay(self, path: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        call = Call(path.rsplit("/", 1)[-1])
        self.calls.append(call)

        def asked() -> Iterator[bytes]:
            with suppress(grpc.RpcError):  # how gRPC says that the client left before its last request
                for message in requests:
                    call.requests.append(message)
                    yield message

        left = context.time_remaining()
        call.timeout = timeout = left if left is not None and left < FOREVER else None
        metadata = tuple((key, value) for key, value in context.invocation_metadata() if key != "user-agent")
        ask = self._upstream.stream_stream(path, None, None)
        upstream: Any = ask(asked(), timeout=timeout, metadata=metadata)

        def ended() -> None:
            if call.code is None:
                call.left = time.monotonic()
                upstream.cancel()
            call.done.set()

        def answered() -> Iterator[bytes]:
            for message in upstream:
                call.responses.append(message)
                yield message

        if not context.add_callback(ended):
            ended()
            return
        try:
            yield from self.filter(answered(), call)
            call.code = grpc.StatusCode.OK
        except Lost:
            call.code, call.details = grpc.StatusCode.UNAVAILABLE, "the server has gone"
            context.abort(call.code, call.details)
        except grpc.RpcError:
            if call.left is None:
                call.code, call.details = upstream.code(), upstream.details() or ""
                call.lost = call.code is grpc.StatusCode.UNAVAILABLE and RESTRICTED not in call.details
                context.abort(call.code, call.details)
        finally:
            upstream.cancel()  # where the filter ended before the server did


class _AnyMethod(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # at run time it takes none
    def __init__(self, relay: Callable[..., Iterator[bytes]]) -> None:
        self.relay = relay

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        path = details.method
        return grpc.stream_stream_rpc_method_handler(lambda requests, context: self.relay(path, requests, context))
