"""Reads the server-sent events of vLLM's two text APIs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from servebook.lab.taps.http import Exchange


def events_of(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, cut after each event."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n\n")
        for event in whole:
            yield event + b"\n\n"
    if rest:
        yield rest


def content_of(event: bytes) -> str:
    """The text that one event of either API adds, "" where it adds none."""
    if not event.startswith(b"data:") or b"[DONE]" in event:
        return ""
    return "".join(text_of(choice) for choice in json.loads(event[5:])["choices"])


def text_of(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")


def streamed_text(exchange: Exchange) -> str:
    """All the text that the server sent."""
    return "".join(text_of(choice) for event in exchange.events() for choice in event["choices"])
