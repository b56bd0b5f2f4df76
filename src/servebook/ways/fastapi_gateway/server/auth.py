"""The key that callers show."""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from servebook.ways.fastapi_gateway.server.config import Config
from servebook.ways.fastapi_gateway.server.errors import GatewayError

bearer = HTTPBearer(auto_error=False, description="SERVEBOOK_API_KEY, where the gateway was started with one.")


def require_key(request: Request, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
    """Let a request through if it shows the key, or if there is none.

    Raises:
        GatewayError: 401, the key is missing or wrong.
    """
    config: Config = request.app.state.config
    # compare_digest takes the same time wherever the keys differ, so that timing tells nothing of the key.
    if config.key and not (shown and secrets.compare_digest(shown.credentials.encode(), config.key.encode())):
        raise GatewayError(401, "unauthorized", "Send the gateway's key as `Authorization: Bearer KEY`.")
