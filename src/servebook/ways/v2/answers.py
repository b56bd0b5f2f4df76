"""What a client reads: the responses to one request, as tensors by their names, and what those mean."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy.typing as npt
import tritonclient.grpc as v2
from tritonclient.utils import InferenceServerException

from servebook.ways.client import Answer, Piece

Tensors = dict[str, npt.NDArray[Any]]
Arrival = tuple[v2.InferResult, None] | tuple[None, InferenceServerException]

ERRORS_WITH_STATUS = {"triton_grpc_error": "true"}
"""Metadata that asks Triton for errors as gRPC status codes; without it they come as bare text."""

LOOK_SECONDS = 0.5
"""How soon the end of a stream is noticed of which nothing tells."""


def stream_infer(
    client: v2.InferenceServerClient, model: str, inputs: list[v2.InferInput], timeout: float
) -> Generator[Tensors]:
    """Yield the responses to one request as they come; closing the generator cancels the request.

    A client has one stream at a time.

    Raises:
        InferenceServerException: `status()` names the gRPC status: DEADLINE_EXCEEDED after `timeout` seconds, INTERNAL
            where the stream has ended in order, and the answer has not.
    """
    arrived: SimpleQueue[Arrival] = SimpleQueue()
    client.start_stream(
        lambda result, error: arrived.put((result, error)),  # called on the client's own thread
        stream_timeout=timeout,
        headers=ERRORS_WITH_STATUS,
    )
    stream, final = client._stream, False
    try:
        with suppress(InferenceServerException):  # of a stream that has failed already: what has arrived says why
            client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        for result, error in arrivals(arrived, stream._handler):
            if error:
                raise error
            final = is_final(result)
            if tensors := outputs(result):
                yield tensors
            if final:
                return
        raise ended_early()
    finally:
        client.stop_stream(cancel_requests=not final)
        stream._request_queue.put(None)  # when it has cancelled, its thread would wait for ever to send


def arrivals(arrived: SimpleQueue[Arrival], thread: Thread) -> Iterator[Arrival]:
    """What `thread` puts there until it ends: of a stream that has ended in order it says nothing."""
    while thread.is_alive() or not arrived.empty():
        with suppress(Empty):
            yield arrived.get(timeout=LOOK_SECONDS)


def is_final(result: v2.InferResult) -> bool:
    """Whether this is the last response to its request."""
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def ended_early() -> InferenceServerException:
    """What half an answer is worth."""
    return InferenceServerException("the stream ended before the answer did", status="StatusCode.INTERNAL")


def outputs(result: v2.InferResult) -> Tensors:
    """The output tensors of a response by their names."""
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def read_piece(tensors: Tensors) -> Piece:
    """A response that has a finish reason and the number of output tokens."""
    text, reason, tokens = (tensors[name][0] for name in ("text_output", "finish_reason", "num_output_tokens"))
    return Piece(text.decode(), int(tokens), None if reason == b"None" else reason.decode())


def read_answer(tensors: Tensors) -> Answer:
    """A response that is the whole answer, and has the number of input tokens too."""
    piece = read_piece(tensors)
    return Answer(piece.text, piece.tokens, int(tensors["num_input_tokens"][0]), piece.finish_reason or "")
