"""What the gateway goes by; its command line sets what differs from one place to the next."""

from __future__ import annotations

from dataclasses import dataclass

from servebook.ways.limits import READER_SECONDS


@dataclass(frozen=True)
class Config:
    """`upstream` is vLLM's root URL; `key` is asked of callers and shown to vLLM. Times are in seconds.

    `traces_endpoint` is the URL of an OTLP/gRPC receiver of spans; without it nobody is traced.
    `idle_seconds` bounds the wait for the next bytes of a stream, which may last as long as they come, and
    `answer_seconds` that for a whole answer.
    """

    upstream: str
    key: str | None = None
    max_concurrent: int = 128
    max_body_bytes: int = 256 * 1024
    connect_seconds: float = 2
    idle_seconds: float = 60
    answer_seconds: float = 300
    reader_seconds: float = READER_SECONDS
    cors_origins: tuple[str, ...] = ()
    traces_endpoint: str | None = None
