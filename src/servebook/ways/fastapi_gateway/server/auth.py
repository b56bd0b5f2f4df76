"""The key that callers show."""

from __future__ import annotations

import secrets

from fastapi import Request
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.types import ASGIApp, Receive, Scope, Send

from servebook.ways.fastapi_gateway.server.errors import GatewayError, error_response

bearer = HTTPBearer(auto_error=False, description="SERVEBOOK_API_KEY, where the gateway was started with one.")
"""What the API's documentation says of it; `KeyFirst` is who asks for it."""


class KeyFirst:
    """ASGI middleware that answers 401 to a POST without the key, before anybody reads its body.

    No dependency of FastAPI's, which parses the body before it calls any.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["method"] == "POST" and not self.is_shown(request := Request(scope)):
            unauthorized = GatewayError(401, "unauthorized", "Send the gateway's key as `Authorization: Bearer KEY`.")
            app = error_response(request, unauthorized)
        await app(scope, receive, send)

    def is_shown(self, request: Request) -> bool:
        """Whether the request has the key."""
        scheme, shown = get_authorization_scheme_param(request.headers.get("Authorization"))
        # compare_digest takes the same time wherever the keys differ, so that timing tells nothing of the key.
        return scheme.lower() == "bearer" and secrets.compare_digest(shown.encode(), self.key)
