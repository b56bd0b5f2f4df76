"""KServe's ModelServer where the SDK falls short of production: one address, cancelled callers, named tensors."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import grpc
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve import InferRequest, ModelServer
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER
from kserve.errors import InvalidInput
from kserve.model_server import app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import VLLMError

from servebook.settings import in_address
from servebook.ways.kserve.server.openai import vllm_error
from servebook.ways.kserve.server.predictor import Predictor
from servebook.ways.kserve.server.tensors import check_description

MAX_MESSAGE_BYTES = 8 * 2**20
"""The largest gRPC message taken or sent, as in KServe's own server."""

GRACE_SECONDS = 5


class CancelOnDisconnect:
    """ASGI middleware: a caller who hangs up cancels the handler.

    FastAPI lets a handler that does not stream run to its end, and with it the engine.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        received: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)  # one, so that a slow reader still slows the sender

        async def listen() -> None:
            message: Message = {"type": ""}
            while message["type"] != "http.disconnect":
                message = await receive()
                await received.put(message)

        handler = asyncio.ensure_future(self.app(scope, received.get, send))
        listener = asyncio.create_task(listen())
        try:
            await asyncio.wait({handler, listener}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listener.cancel()
            hung_up = not handler.done()
            if hung_up:
                handler.cancel()
        try:
            await handler
        except asyncio.CancelledError:
            if not hung_up:
                raise


class NamedDataPlane(DataPlane):  # type: ignore[misc]
    """KServe's data plane; ready only while its models are, and a bad binary body is the caller's error."""

    async def ready(self) -> bool:
        return all([await model.healthy() for model in self.model_registry.get_models().values()])

    def decode_inference_request(self, body: Any, headers: dict[str, str], model_name: str) -> InferRequest:
        names = "?"
        try:
            if isinstance(body, bytes):
                described = json.loads(body[: int(headers[INFERENCE_CONTENT_LENGTH_HEADER])])["inputs"]
                names = ", ".join(tensor["name"] for tensor in described)
                for tensor in described:
                    check_description(tensor["name"], tensor["datatype"], tensor["shape"])
            return super().decode_inference_request(body, headers, model_name)
        except InvalidInput:
            raise
        except Exception as error:  # whatever reading, slicing, unpacking and reshaping the bytes may raise
            raise InvalidInput(f"tensor {names}: the binary data does not fit its description ({error!r})") from error


class NamedServicer(InferenceServicer):  # type: ignore[misc]
    """KServe's servicer, which checks datatype and shape before decoding, so that errors name the tensor."""

    @classmethod
    def validate_grpc_request(cls, request: ModelInferRequest) -> None:
        super().validate_grpc_request(request)
        for tensor in request.inputs:
            check_description(tensor.name, tensor.datatype, list(tensor.shape))


class BoundGRPCServer(GRPCServer):  # type: ignore[misc]
    """KServe's gRPC server on one address; its own listens on every interface."""

    def __init__(self, host: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host = host

    async def start(self, max_workers: int) -> None:
        self._server = grpc.aio.server(
            ThreadPoolExecutor(max_workers),
            interceptors=[ExceptionToStatusInterceptor()],
            options=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a shared one
            ],
        )
        servicer = NamedServicer(self._data_plane, self._model_repository_extension)
        grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        self._server.add_insecure_port(f"{in_address(self.host)}:{self._port}")
        await self._server.start()
        await self._server.wait_for_termination()


class BoundModelServer(ModelServer):  # type: ignore[misc]
    """KServe's ModelServer on one address."""

    def __init__(self, host: str, http_port: int, grpc_port: int) -> None:
        super().__init__(
            http_port=http_port,
            enable_grpc=False,  # ours is started in _serve
            grace_period=GRACE_SECONDS,
        )
        self.host = host
        self.grpc_port = grpc_port
        self.dataplane = NamedDataPlane(model_registry=self.registered_models)
        app.add_middleware(CancelOnDisconnect)
        app.add_exception_handler(RequestValidationError, malformed_request)
        app.add_exception_handler(VLLMError, vllm_error)

    async def _serve(self) -> None:
        self._rest_server.config.host = self.host
        self._grpc_server = BoundGRPCServer(
            self.host,
            self.grpc_port,
            self.dataplane,
            self.model_repository_extension,
            kwargs={},
            grace_period=GRACE_SECONDS,
        )
        self.servers.append(self._grpc_server.start(self.max_threads))
        await super()._serve()


async def malformed_request(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 and name the tensor, where FastAPI would answer 422 and count the list's elements."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    # The place begins with "body" and, where several types would do, the one that was tried.
    where = [part for part in problem["loc"] if part not in ("body", "InferenceRequest")]
    match where:
        case ["inputs", int(index), *inside] if name := _name(error.body, index):
            place = " ".join(["tensor", name, *map(str, inside)])
        case _:
            place = ".".join(map(str, where))
    return JSONResponse({"error": f"{place}: {problem['msg']}"}, status_code=HTTPStatus.BAD_REQUEST)


def _name(body: Any, index: int) -> str | None:
    try:
        return str(body["inputs"][index]["name"])
    except (KeyError, IndexError, TypeError):
        return None


def serve(predictor: Predictor, host: str, http_port: int, grpc_port: int) -> None:
    """Serve until SIGTERM, then give calls in flight `GRACE_SECONDS` to end."""
    BoundModelServer(host, http_port, grpc_port).start([predictor])
