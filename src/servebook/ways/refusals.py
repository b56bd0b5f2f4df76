"""The words of a refusal."""

from __future__ import annotations

import re

MOST_CHARS = 400
"""Of a reason. gRPC sends it as metadata, of which a client takes 8 KiB; a letter may take nine bytes there."""

PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+?:\d+: ")
"""Where xgrammar's errors come from, in its own source."""


def cut(text: str, most: int = MOST_CHARS) -> str:
    """`text` without what is beyond `most` characters: some of vLLM's refusals repeat the input."""
    return text if len(text) <= most else f"{text[:most]}…"


def reason(error: Exception) -> str:
    """What an error of vLLM's says to whoever sent the request."""
    return cut(PLACE.sub("", str(error.args[0]) if error.args else str(error)).strip())
