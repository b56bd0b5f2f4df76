"""KServe's ModelServer where the SDK falls short of production: one address, cancelled callers, named tensors."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from traceback import extract_tb
from typing import Any

import grpc
from fastapi import Request
from fastapi.dependencies.utils import request_body_to_args
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve import InferRequest, ModelRepository, ModelServer
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER
from kserve.errors import InferenceError, InvalidInput, ModelNotFound
from kserve.logging import logger, trace_logger
from kserve.model_server import app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest import server as rest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import VLLMError

from servebook.engine.arguments import KEEP_ALIVE_SECONDS
from servebook.settings import in_address
from servebook.ways.asgi import BodyLimit, CancelOnDisconnect, HeadAsGet, Protocol
from servebook.ways.kserve.server.openai import vllm_error
from servebook.ways.kserve.server.predictor import Predictor
from servebook.ways.limits import MOST_ENTRIES, check_entries
from servebook.ways.refusals import cut
from servebook.ways.v2.contract import BadRequest, check_description

MAX_MESSAGE_BYTES = 8 * 2**20
"""The largest gRPC message taken or sent, as in KServe's own server."""

MAX_BODY_BYTES = 2**20
"""The largest HTTP body taken: KServe's parser goes through one at 20 MB/s, and holds up everybody meanwhile."""

MOST_OF_EACH = 64
"""Inputs, outputs, and parameters of each, of a gRPC request, twice as many as there are: KServe goes through them all
before it looks for wrong ones, and of 8 MiB for 2.5 s (measured, Intel Xeon)."""

GRACE_SECONDS = 5

VERSION = "1"
"""Of the model, as in Triton's model repository."""

HALF = "has half of a surrogate pair"

NO_JSON = "the body: expected a JSON object, sent with `Content-Type: application/json`"

NO_LOADING = "this server loads its one model at its start, and keeps it"


class NamedDataPlane(DataPlane):  # type: ignore[misc]
    """KServe's data plane; ready only while its models are, and a bad binary body is the caller's error."""

    async def ready(self) -> bool:
        models = self.model_registry.get_models().values()
        return bool(models) and all([await model.healthy() for model in models])

    def decode_inference_request(self, body: Any, headers: dict[str, str], model_name: str) -> InferRequest:
        if isinstance(body, bytes) and INFERENCE_CONTENT_LENGTH_HEADER not in headers:
            raise InvalidInput(f"{NO_JSON}, or binary data with Inference-Header-Content-Length")
        names = "?"
        try:
            if isinstance(body, bytes):
                described = json.loads(body[: int(headers[INFERENCE_CONTENT_LENGTH_HEADER])])["inputs"]
                names = cut(", ".join(tensor["name"] for tensor in described), 80)
                for tensor in described:
                    check_description(tensor["name"], tensor["datatype"], tensor["shape"])
            request = super().decode_inference_request(body, headers, model_name)
            if any("\ud800" <= letter <= "\udfff" for letter in request.id or ""):
                raise BadRequest("id", HALF)  # the answer repeats it, when the engine has done its work
            return request
        except BadRequest as error:
            raise InvalidInput(str(error)) from None
        except InvalidInput:
            raise
        except Exception as error:  # whatever reading, slicing, unpacking and reshaping the bytes may raise
            # Not its cause: of bytes that are no text, error and log would repeat all, and the log several times.
            raise InvalidInput(f"{names}: the binary data does not fit its description ({cut(repr(error))})") from None


class NamedServicer(InferenceServicer):  # type: ignore[misc]
    """KServe's servicer with one version of each model, none to load, and errors that name the tensor."""

    @classmethod
    def validate_grpc_request(cls, request: ModelInferRequest) -> None:
        """Check version, numbers of entries, datatypes and shapes before anything is decoded."""
        check_version(request.model_name, request.model_version)
        tensors = [*request.inputs[: MOST_OF_EACH + 1], *request.outputs[: MOST_OF_EACH + 1]]
        lists = [request.inputs, request.outputs, request.parameters, *(tensor.parameters for tensor in tensors)]
        if max(map(len, lists)) > MOST_OF_EACH:
            raise InvalidInput(f"of inputs, outputs and parameters each there may be {MOST_OF_EACH}")
        super().validate_grpc_request(request)
        for tensor in request.inputs:
            try:
                check_description(tensor.name, tensor.datatype, list(tensor.shape))
            except BadRequest as error:
                raise InvalidInput(str(error)) from None

    async def ModelReady(self, request: Any, context: Any) -> Any:
        check_version(request.name, request.version)
        return await super().ModelReady(request, context)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        check_version(request.name, request.version)
        return await super().ModelMetadata(request, context)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_LOADING)

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_LOADING)


class ShortReasons(ExceptionToStatusInterceptor):  # type: ignore[misc]
    """KServe's statuses, with reasons that a client can take: as metadata gRPC cuts the call off at some KiB.

    KServe repeats the name of a model that there is not, and writes it into its log.
    """

    async def handle_exception(self, ex: Exception, *where: Any) -> None:
        if isinstance(ex, InferenceError | InvalidInput | ModelNotFound):
            ex.reason = cut(on_one_line(str(ex.reason)))
        await super().handle_exception(ex, *where)


class OneLine(logging.Filter):
    """Keeps what KServe logs on one line each: it names the path of a request, and what a caller has called a model."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = on_one_line(record.getMessage()), ()
        return True


def on_one_line(text: str) -> str:
    """`text` with its control characters written out: in a log, a line's end of a caller's would begin a line of it."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def check_version(model: str, version: str) -> None:
    """Refuse a version that is not served.

    Raises:
        ModelNotFound: it is not the one that there is.
    """
    if version not in ("", VERSION):
        raise ModelNotFound(f"{model}, version {cut(version, 20)}")


class V2Paths:
    """ASGI middleware: a model's one version has the paths of the model; models cannot be unloaded by strangers.

    And in OpenAI's API a model that is asked for by its name is described, where KServe says null, and one that is
    unknown is "not found", where KServe calls it "not ready".
    """

    def __init__(self, app: ASGIApp, models: ModelRepository) -> None:
        self.app = app
        self.models = models
        self.started = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.startswith("/v2/repository/"):
            await refuse(scope, HTTPStatus.NOT_FOUND, NO_LOADING)(scope, receive, send)
            return
        listed = re.match(r"/openai/v1/models/([^/]+)$", path)
        if listed and listed[1] not in self.models.get_models():
            reason = ModelNotFound(cut(listed[1], 80)).reason
            await refuse(scope, HTTPStatus.NOT_FOUND, reason)(scope, receive, send)
            return
        if listed and scope["method"] == "GET" and await self.models.is_model_ready(listed[1]):
            model_card = {"id": listed[1], "object": "model", "created": self.started, "owned_by": ""}
            await JSONResponse(model_card)(scope, receive, send)
            return
        if versioned := re.match(r"(/v2/models/([^/]+))/versions/([^/]+)(/.*)?$", path):
            model, name, version, rest = versioned.groups("")
            try:
                check_version(name, version)
            except ModelNotFound as error:
                await refuse(scope, HTTPStatus.NOT_FOUND, error.reason)(scope, receive, send)
                return
            scope = {**scope, "path": model + rest, "raw_path": (model + rest).encode()}
        await self.app(scope, receive, send)


class WholeCharacters:
    """ASGI middleware: half of a surrogate pair is the caller's error. JSON can say it, and no answer can repeat it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except UnicodeEncodeError:
            refusal = refuse(scope, HTTPStatus.BAD_REQUEST, f"a string {HALF}")
            await refusal(scope, receive, send)


class CancelTasks:
    """ASGI middleware that ends with a request the tasks in `scope["tasks"]`, and all that wait for its messages.

    vLLM's handlers of OpenAI's API work in a task of their own, beside another that waits for the caller to leave. Both
    would stay when `CancelOnDisconnect` cancels the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = scope["tasks"] = set()

        async def note_and_receive() -> Message:
            tasks.add(asyncio.current_task())
            return await receive()

        try:
            await self.app(scope, note_and_receive, send)
        finally:
            for task in tasks - {asyncio.current_task()}:
                task.cancel()


def few_entries(body: bytes) -> None:
    """Refuse JSON of so many entries that its validation would hold up everybody else; the rest is KServe's to refuse.

    Raises:
        LimitExceeded: it has too many.
    """
    if body.count(b",") <= MOST_ENTRIES // 2:  # nearly all: of two entries one has a comma before it, or is nested
        return
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return
    check_entries(request)


def refuse(_: Scope, status: int, reason: str) -> ASGIApp:
    """An error in KServe's shape."""
    return JSONResponse({"error": reason}, status)


class BoundGRPCServer(GRPCServer):  # type: ignore[misc]
    """KServe's gRPC server on one address; its own listens on every interface."""

    def __init__(self, host: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host = host

    async def start(self, max_workers: int) -> None:
        self._server = grpc.aio.server(
            ThreadPoolExecutor(max_workers),
            interceptors=[ShortReasons()],
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
        for log in (logger, trace_logger):
            log.addFilter(OneLine())
        # The last one added is the outermost.
        app.add_middleware(WholeCharacters)
        app.add_middleware(CancelTasks)
        app.add_middleware(CancelOnDisconnect)
        app.add_middleware(BodyLimit, limit=MAX_BODY_BYTES, refuse=refuse, check=few_entries)
        app.add_middleware(V2Paths, models=self.registered_models)
        app.add_middleware(HeadAsGet)
        app.add_exception_handler(HTTPException, in_the_protocols_shape)
        app.add_exception_handler(RequestValidationError, malformed_request)
        app.add_exception_handler(VLLMError, vllm_error)
        for kind in (AttributeError, KeyError, TypeError):
            app.add_exception_handler(kind, broken_validator)
        # KServe adds these when it starts, and would put its own in the place of ours.
        rest.invalid_input_handler = rest.model_not_found_handler = callers_fault

    async def _serve(self) -> None:
        self._rest_server.config.host = self.host
        self._rest_server.config.http = Protocol
        self._rest_server.config.timeout_keep_alive = KEEP_ALIVE_SECONDS
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


async def callers_fault(_: Request, error: Exception) -> JSONResponse:
    """Answer as KServe does, without its traceback in the log, which has the caller's words with their line ends."""
    status = HTTPStatus.NOT_FOUND if isinstance(error, ModelNotFound) else HTTPStatus.BAD_REQUEST
    return JSONResponse({"error": cut(str(error))}, status)


async def in_the_protocols_shape(_: Request, error: Exception) -> JSONResponse:
    """Put what Starlette and FastAPI refuse, such as a path that there is not, under `error`: clients look there."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def malformed_request(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 and name the tensor, where FastAPI would answer 422 and count the list's elements."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    # The place begins with "body" and, where several types would do, the one that was tried.
    where = [part for part in problem["loc"] if part not in ("body", "InferenceRequest")]
    match where:
        case ["inputs", int(index), *inside] if name := _name(error.body, index):
            place = ".".join([name, *map(str, inside)])
        case []:
            return JSONResponse({"error": NO_JSON}, HTTPStatus.BAD_REQUEST)
        case [int(character)]:
            reason = f"the body is not JSON: {problem['ctx']['error']} at {character}"
            return JSONResponse({"error": reason}, HTTPStatus.BAD_REQUEST)
        case _:
            place = ".".join(map(str, where))
    return JSONResponse({"error": f"{place}: {problem['msg']}"}, status_code=HTTPStatus.BAD_REQUEST)


async def broken_validator(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 where a body was too odd for vLLM's own validators, such as `"messages": null`: they fail on it."""
    if not any(frame.name == request_body_to_args.__name__ for frame in extract_tb(error.__traceback__)):
        raise error
    return JSONResponse({"error": f"the body is malformed: {cut(str(error), 200)}"}, HTTPStatus.BAD_REQUEST)


def _name(body: Any, index: int) -> str | None:
    try:
        return str(body["inputs"][index]["name"])
    except (KeyError, IndexError, TypeError):
        return None


def serve(predictor: Predictor, host: str, http_port: int, grpc_port: int) -> None:
    """Serve until SIGTERM, then give calls in flight `GRACE_SECONDS` to end."""
    BoundModelServer(host, http_port, grpc_port).start([predictor])
