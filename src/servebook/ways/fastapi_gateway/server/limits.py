"""How much the gateway takes: of one request, and of all together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from servebook.ways.fastapi_gateway.server.errors import GatewayError

MESSAGE_CHARS = 32_000
"""The longest message, in characters."""
HISTORY_TURNS = 50
MAX_TOKENS = 2_048
"""The longest answer that a caller may ask for, in tokens."""


class Places:
    """Admits at most `limit` requests at a time and refuses the rest at once: a queue would only hide the load."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a place.

        Raises:
            GatewayError: 503, all are taken.
        """
        if self.taken >= self.limit:
            raise GatewayError(503, "busy", "All places are taken; try again in a moment.", retry_after=1)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
