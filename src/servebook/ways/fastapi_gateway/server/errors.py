"""What callers see when something goes wrong: one shape, our words, never the engine's."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

from servebook.ways.refusals import cut


class ErrorDetail(BaseModel):
    """What the body of every answer that is not a success, and the SSE event `error`, hold under `error`."""

    code: str = Field(description="A stable word for programs.", examples=["busy"])
    message: str = Field(description="What happened and what to do, for people.")
    request_id: str = Field(description="Also in the header X-Request-ID and in the gateway's log.")


class GatewayError(Exception):
    """An error that a caller is told of.

    `retry_after` is in seconds: when it makes sense to try again, None where it does not.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after


def error_body(error: GatewayError, request_id: str) -> dict[str, Any]:
    """`error` as a caller gets it."""
    return {"error": ErrorDetail(code=error.code, message=error.message, request_id=request_id).model_dump()}


def error_response(request: Request, error: GatewayError) -> JSONResponse:
    """`error` as an answer, with the headers that its status calls for."""
    headers = {"X-Request-ID": request.state.request_id}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error, request.state.request_id), error.status, headers)


def body_refused(scope: Scope, status: int, reason: str) -> ASGIApp:
    """What `asgi.BodyLimit` answers to a body that is too long, or comes too slowly."""
    return error_response(Request(scope), GatewayError(status, {408: "slow_request", 413: "too_large"}[status], reason))


def describe(error: RequestValidationError) -> str:
    """Say which fields are wrong and why, without repeating what was sent: it is private, and may not be UTF-8."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"The body is not JSON: {first['ctx']['error']}."
    if first["loc"] == ("body",):  # FastAPI reads no JSON where another type is said, as by curl -d
        return "The body must be a JSON object, sent with `Content-Type: application/json`."
    return cut(
        "; ".join(
            ": ".join(filter(None, [".".join(cut(str(part), 40) for part in each["loc"][1:]), each["msg"]]))
            for each in error.errors()
        )
    )


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` the same shape."""

    @app.exception_handler(GatewayError)
    async def known(request: Request, error: GatewayError) -> JSONResponse:
        return error_response(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(request, GatewayError(422, "invalid_request", describe(error)))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        answer = error_response(request, GatewayError(error.status_code, "http_error", str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unexpected(request: Request, _: Exception) -> JSONResponse:
        return error_response(request, GatewayError(500, "internal_error", "The gateway failed; its log says why."))


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a path operation, for its OpenAPI documentation: JSON, whatever the answer itself is."""
    schema = {"type": "object", "required": ["error"], "properties": {"error": ErrorDetail.model_json_schema()}}
    return {status: {"content": {"application/json": {"schema": schema}}} for status in statuses}
