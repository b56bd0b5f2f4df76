"""A key as `requests` shows it and nothing else: by itself it would put a password of `~/.netrc` in the key's place."""

from __future__ import annotations

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
