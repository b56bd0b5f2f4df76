"""Bearer keys, checked before any servicer sees the call."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

OPEN_PREFIX = "/grpc.health.v1.Health/"
"""Health probes carry no key: kubelets and load balancers have none."""


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Let a call pass if its metadata has `authorization: Bearer <key>`; else UNAUTHENTICATED."""

    def __init__(self, key: str) -> None:
        self.expected = f"Bearer {key}".encode()
        self.refusal = grpc.stream_stream_rpc_method_handler(refuse)  # fits any method: it reads nothing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Choose the handler of one call."""
        if handler_call_details.method.startswith(OPEN_PREFIX):
            return await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        # compare_digest takes the same time however much of the key was guessed.
        if hmac.compare_digest(str(given).encode(), self.expected):
            return await continuation(handler_call_details)
        return self.refusal


async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """End the call, without telling a wrong key from a missing one."""
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "Send your key as metadata: authorization: Bearer <key>.")
