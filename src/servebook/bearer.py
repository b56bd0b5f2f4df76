"""Keys: how `requests` shows one, and which one a room's own engine has.

By itself `requests` would put a password of `~/.netrc` in the key's place.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from requests import PreparedRequest


def bearer(key: str | None, scheme: str = "Bearer") -> Callable[[PreparedRequest], PreparedRequest]:
    """What to give as `auth`: the header `Authorization: Bearer KEY`, or none where there is no key."""

    def show(request: PreparedRequest) -> PreparedRequest:
        if key:
            request.headers["Authorization"] = f"{scheme} {key}"
        return request

    return show


def engine_key(instructors_key: str) -> str:
    """The key of a room's own engine: whoever sees it there cannot go on to the front and the hub with it."""
    return hmac.new(instructors_key.encode(), b"servebook room engine", hashlib.sha256).hexdigest()
