"""The key before every path of vLLM's, for a server that is opened to the network: `--middleware` loads the class.

vLLM's own check covers /v1, /v2, /inference and /cohere. Without this, /invocations would generate for anybody,
/tokenize would answer, and /metrics would tell how busy the engine is (chapter 01, section 7).
"""

from __future__ import annotations

import os
import secrets

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = "/health"
"""Load balancers ask it, and so does the launcher."""


class KeyOnEveryPath:
    """Answers 401 to whoever does not show VLLM_API_KEY, the environment variable in which vLLM gets its key too.

    Raises:
        KeyError: there is no such variable; vLLM then does not start.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.key = os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == OPEN or self.is_shown(Headers(scope=scope)):
            return await self.app(scope, receive, send)
        headers = {"WWW-Authenticate": "Bearer"}
        return await JSONResponse({"error": "Unauthorized"}, 401, headers)(scope, receive, send)  # in vLLM's words

    def is_shown(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode(), self.key)
