"""What gRPC does not tell: a stream may end in order, and the answer in it not."""

from __future__ import annotations

import grpc

from servebook.ways.client import Piece


def check_end(last: Piece | None) -> None:
    """Refuse a stream that has ended with `last`, where that is not the end of an answer.

    Raises:
        grpc.aio.AioRpcError: INTERNAL; what came is half an answer. It is a `grpc.RpcError`, as those of all channels.
    """
    if last is None or last.finish_reason is None:
        none, said = grpc.aio.Metadata(), "the stream ended before the answer did"
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, none, none, details=said, debug_error_string=said)
