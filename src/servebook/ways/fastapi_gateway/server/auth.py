"""The key that callers show."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from fastapi import Request
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from servebook.ways.fastapi_gateway.server.errors import GatewayError, error_response

bearer = HTTPBearer(auto_error=False, description="SERVEBOOK_API_KEY, where the gateway was started with one.")
"""What the API's documentation says of it; `KeyFirst` is who asks for it."""


class KeyFirst:
    """ASGI middleware that answers 401 to a request for one of `routes` without the key, before its body is read.

    Not a FastAPI dependency: FastAPI parses the body before it calls any. The routes themselves are asked whether they
    match, as a comparison of path strings could decide otherwise.
    """

    def __init__(self, app: ASGIApp, key: str, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self.key = key.encode()
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and not self.is_shown(request := Request(scope)):
            for route in self.routes:
                if route.matches(scope)[0] is Match.FULL:
                    scope["route"] = route  # as the router would, for who counts
                    message = "Send the gateway's key as `Authorization: Bearer KEY`."
                    app = error_response(request, GatewayError(401, "unauthorized", message))
        await app(scope, receive, send)

    def is_shown(self, request: Request) -> bool:
        """Whether the request has the key."""
        scheme, shown = get_authorization_scheme_param(request.headers.get("Authorization"))
        # compare_digest takes the same time wherever the keys differ, so that timing tells nothing of the key.
        return scheme.lower() == "bearer" and secrets.compare_digest(shown.encode(), self.key)
