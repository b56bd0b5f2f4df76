"""Receives the spans of a request from every program that it went through, and puts them in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from servebook.errors import ServebookError

PARTS = {
    "queue": "gen_ai.latency.time_in_queue",
    "prefill": "gen_ai.latency.time_in_model_prefill",
    "decode": "gen_ai.latency.time_in_model_decode",
}
"""What vLLM's span consists of, in this order, and the attributes that say how many seconds (`vllm/tracing`)."""


@dataclass(frozen=True)
class Span:
    """One piece of work: when it began and ended, in seconds since 1970, and what caused it.

    `trace` is common to all spans of one request; `parent` is the `span` that this one belongs to, "" for the first.
    Ids are in hexadecimal.
    """

    name: str
    trace: str
    span: str
    parent: str
    start: float
    end: float
    attributes: dict[str, Any]


class Collector(TraceServiceServicer):
    """The receiving end of OTLP over gRPC: keeps in memory what programs send, the last 10,000 spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.news = threading.Condition()

    def Export(self, request: ExportTraceServiceRequest, context: grpc.ServicerContext) -> ExportTraceServiceResponse:
        """Take a batch of spans; the answer is empty where nothing was refused."""
        scopes = (scope for resource in request.resource_spans for scope in resource.scope_spans)
        with self.news:
            self.spans += [_span(each) for scope in scopes for each in scope.spans]
            del self.spans[:-10_000]
            self.news.notify_all()
        return ExportTraceServiceResponse()

    def trace(self, trace: str, names: set[str], seconds: float = 30) -> list[Span]:
        """The spans of one trace by their beginning, as soon as all of `names` are among them.

        Programs send their spans in batches, every five seconds by default.

        Raises:
            ServebookError: they have not come within `seconds`; the message names those that have.
        """

        def found() -> list[Span]:
            return [each for each in self.spans if each.trace == trace]

        with self.news:
            there = self.news.wait_for(lambda: names <= {each.name for each in found()}, seconds)
            spans = sorted(found(), key=lambda each: each.start)
        if not there:
            have = ", ".join(each.name for each in spans) or "nothing"
            raise ServebookError(
                f"Of trace {trace} there is {have} after {seconds:g} s.", "Was every program given the endpoint?"
            )
        return spans


def waterfall(spans: Sequence[Span]) -> dict[str, tuple[float, float]]:
    """When each span began and ended, in seconds since the first began; after vLLM's, the parts that it consists of.

    vLLM says how long queue, prefill and decode took. They are laid end to end, back from the span's end. What is left
    before them is the time until the engine takes the request in, which it does between two steps.
    """
    first = min(span.start for span in spans)
    rows: dict[str, tuple[float, float]] = {}
    for span in sorted(spans, key=lambda each: each.start):
        rows[span.name] = (span.start - first, span.end - first)
        end, parts = span.end - first, {}
        for part, attribute in reversed(PARTS.items()):
            if attribute in span.attributes:
                parts[f"  {part}"] = (end - span.attributes[attribute], end)
                end -= span.attributes[attribute]
        if parts and end > (start := span.start - first):
            parts["  not yet taken in"] = (start, end)
        rows |= dict(reversed(parts.items()))
    return rows


@contextmanager
def collect() -> Iterator[tuple[Collector, str]]:
    """A collector for the length of the block, on a free port of this machine only, and its URL."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # generated
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def _span(sent: Any) -> Span:
    """A span as it came, with plain values."""
    attributes = {each.key: _value(each.value) for each in sent.attributes}
    return Span(
        sent.name,
        sent.trace_id.hex(),
        sent.span_id.hex(),
        sent.parent_span_id.hex(),
        sent.start_time_unix_nano / 1e9,
        sent.end_time_unix_nano / 1e9,
        attributes,
    )


def _value(sent: Any) -> Any:
    """What an attribute holds: text, a number or a truth value (lists are left out)."""
    kind = sent.WhichOneof("value")
    return getattr(sent, kind) if kind in {"string_value", "bool_value", "int_value", "double_value"} else None
