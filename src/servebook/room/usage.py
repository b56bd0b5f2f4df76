"""How many tokens the engine wrote for a request, read from its answer as it passes."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from servebook.room.asking import Ask

ANSWER_BYTES = 4 << 20
"""Of a whole answer as much is kept to be read at its end; a longer one costs what was asked for."""
UNREAD_SECONDS = 1.0
"""A piece that lies here longer means a caller who does not read, and an engine that is further on."""
WRITTEN = ("completion_tokens", "output_tokens")
"""What OpenAI's and Anthropic's usage call it."""


class Usage:
    """What one request costs: `tokens`, at every moment what it would cost if it ended now.

    Nothing before it has `begun` and when the engine refuses it. What the engine says, once the answer has ended. Of
    a stream that was left what its pieces held; all that was asked for where that cannot be known: the answer was not
    awaited, or its pieces were not read while the engine wrote on.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.begun = False
        self.refused = False
        self.ended = False
        self.told: int | None = None
        """What the engine has said last."""
        self.counted: int | None = None
        """What a stream's pieces have held at most."""
        self.unread = 0.0
        """The longest that a piece lay here, in seconds."""
        self.offered: float | None = None
        """Since when one lies here now."""

    @property
    def tokens(self) -> int:
        asked = self.ask.answers * self.ask.tokens
        if not self.begun or self.refused:
            return 0
        if self.ended and self.told is not None:
            return self.told
        lying = time.monotonic() - self.offered if self.offered else 0
        if self.counted is None or max(self.unread, lying) > UNREAD_SECONDS:
            return asked
        return min(max(self.counted, self.told or 0), asked)

    async def read(self, answer: aiohttp.ClientResponse, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same pieces; those of a stream cut where its events end, and without what only we asked for."""
        self.refused = answer.status >= 400
        packed = answer.headers.get("Content-Encoding", "identity") != "identity"  # unasked for: it cannot be read here
        streamed = answer.content_type == "text/event-stream" and not packed
        self.counted = 0 if streamed else None
        kept = b""  # of a stream, the event that has begun
        async for piece in pieces:
            passing = piece
            if streamed:
                *events, kept = (kept + piece).split(b"\n\n")
                passing = b"".join(event + b"\n\n" for event in events if self.passes(event))
            elif len(kept) <= ANSWER_BYTES:
                kept += piece
            if passing:
                self.offered = time.monotonic()
                yield passing
                self.unread = max(self.unread, time.monotonic() - self.offered)
                self.offered = None
        if streamed and kept:
            yield kept
        if not streamed:
            self.told = written(loads(kept))
        self.ended = True

    def passes(self, event: bytes) -> bool:
        """Count an event; whether the learner gets to see it."""
        said = loads(event.partition(b"data:")[2])
        piece = isinstance(said, dict) and said.get("choices")  # its usage, where it has any, is of one answer alone
        if not piece and (told := written(said)) is not None:
            self.told = told
        elif isinstance(said, dict):
            assert self.counted is not None
            self.counted += self.ask.interval
        return not (self.ask.adds_usage and isinstance(said, dict) and said.get("usage") and said.get("choices") == [])


def loads(text: bytes) -> Any:
    """The JSON, None where it is none: "[DONE]", an answer that is too long to keep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def written(said: Any) -> int | None:
    """The tokens that an answer, or an event that ends one, says were written."""
    if not isinstance(said, dict):
        return None
    places = (said, said.get("response"), said.get("message"))
    for usage in (place.get("usage") for place in places if isinstance(place, dict)):
        for name in WRITTEN:
            if isinstance(usage, dict) and isinstance(usage.get(name), int):
                return int(usage[name])
    return None
