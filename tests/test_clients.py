"""Every way has a client, and one for asyncio, of one shape; and what they tell of one engine is the same."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import re
import socket
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import requests
from openai import APIConnectionError, APITimeoutError
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tritonclient.grpc import InferenceServerClient, model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from servebook.bearer import bearer
from servebook.clients import CLIENTS
from servebook.launch import SERVERS, Server
from servebook.processes import free_port
from servebook.protos.llm.v1 import llm_pb2
from servebook.protos.vllm import inference_pb2
from servebook.settings import Settings
from servebook.ways.client import AioClient, Answer, Client, Piece
from servebook.ways.fastapi_gateway.client import GatewayAioClient, GatewayClient
from servebook.ways.kserve.client import V2Client
from servebook.ways.more_than_text import others
from servebook.ways.more_than_text.carries import Cell
from servebook.ways.openai_rest.client import OpenAIAioClient, OpenAIClient
from servebook.ways.triton_grpc.aio_client import TritonAioClient
from servebook.ways.triton_grpc.client import TritonClient
from servebook.ways.vllm_native_grpc.aio_client import VllmGrpcAioClient
from servebook.ways.vllm_native_grpc.client import VllmGrpcClient

MESSAGE = "Count from 1 to 100."
GREEDY = {"max_tokens": 24, "temperature": 0}
TIMEOUTS = (APITimeoutError, httpx.TimeoutException, grpc.RpcError, InferenceServerException)
"""What the clients' libraries say of time that is over; the last two with a status."""


def test_every_server_has_clients() -> None:
    """A room's front and its hub are no ways of their own."""
    assert CLIENTS.keys() == SERVERS.keys() - {"front", "hub"}


def shape(method: Callable[..., Any]) -> object:
    """What a caller may rely on: names, kinds and defaults of the parameters, and what comes back."""
    signature = inspect.signature(method)
    parameters = [(each.name, each.kind, each.default) for each in signature.parameters.values()]
    return parameters, signature.return_annotation


@pytest.mark.parametrize("name", CLIENTS)
async def test_clients_have_one_shape(name: str, settings: Settings) -> None:
    server = Server(name, "m", {"http": "127.0.0.1:9", "grpc": "127.0.0.1:9"}, settings)
    with CLIENTS[name].client(server) as client:
        assert shape(type(client).generate) == shape(Client.generate)
        assert shape(type(client).stream) == shape(Client.stream)
        assert inspect.isgeneratorfunction(client.stream)
    async with CLIENTS[name].aio_client(server) as aio_client:
        assert shape(type(aio_client).generate) == shape(AioClient.generate)
        assert shape(type(aio_client).stream) == shape(AioClient.stream)
        assert inspect.iscoroutinefunction(aio_client.generate)
        assert inspect.isasyncgenfunction(aio_client.stream)


def put_together(pieces: list[Piece], prompt_tokens: int) -> Answer:
    """The answer that came in pieces, of which the last one alone says why it ended."""
    *earlier, last = pieces
    assert last.finish_reason
    assert not [piece for piece in earlier if piece.finish_reason]
    text, tokens = "".join(piece.text for piece in pieces), sum(piece.tokens for piece in pieces)
    return Answer(text, tokens, prompt_tokens, last.finish_reason)


def told(answer: Answer) -> Answer:
    """Without the token ids, which some ways carry and others do not."""
    return Answer(answer.text, answer.tokens, answer.prompt_tokens, answer.finish_reason)


def by_hand(vllm: Server, chats: bool) -> Answer:
    """What vLLM's own REST API answers."""
    path, ask = (
        ("chat/completions", {"messages": [{"role": "user", "content": MESSAGE}]})
        if chats
        else ("completions", {"prompt": MESSAGE})
    )
    headers = {"Authorization": f"Bearer {vllm.settings.key}"} if vllm.settings.key else {}
    body = {"model": vllm.model, **ask, **GREEDY}
    answer = requests.post(f"{vllm.url}/v1/{path}", json=body, headers=headers, timeout=60).json()
    choice, usage = answer["choices"][0], answer["usage"]
    text = choice["message"]["content"] if chats else choice["text"]
    return Answer(text, usage["completion_tokens"], usage["prompt_tokens"], choice["finish_reason"])


@pytest.mark.parametrize("name", [name for name in CLIENTS if name not in ("grpc", "gateway", "vllm-rs")])
async def test_a_client_reads_one_answer(name: str, settings: Settings) -> None:
    """Where the server would take `n`, the client refuses it, before it asks anybody: nobody listens at port 9."""
    server = Server(name, "m", {"http": "127.0.0.1:9", "grpc": "127.0.0.1:9"}, settings)
    with CLIENTS[name].client(server) as client:
        for ask in (client.generate, lambda *args, **more: list(client.stream(*args, **more))):
            with pytest.raises(TypeError, match="one answer"):
                ask(MESSAGE, n=2)
    async with CLIENTS[name].aio_client(server) as aio_client:
        with pytest.raises(TypeError, match="one answer"):
            await aio_client.generate(MESSAGE, n=2)
        with pytest.raises(TypeError, match="one answer"):
            _ = [piece async for piece in aio_client.stream(MESSAGE, n=2)]


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing, as one that was stopped."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", CLIENTS)
async def test_a_calls_time_is_that_of_all_that_it_asks(name: str, settings: Settings, silent: str) -> None:
    """Also the first one's, which may have to ask for a model's name or a tokenizer first."""
    server = Server(name, "m", {"http": silent, "grpc": silent}, settings)
    with CLIENTS[name].client(server) as client:
        began = time.monotonic()
        for ask in (client.generate, lambda *args, **more: list(client.stream(*args, **more))):
            with pytest.raises(TIMEOUTS) as caught:
                ask(MESSAGE, timeout=0.3)
            assert re.search("timed? ?out|deadline", str(caught.value), re.I)
    async with CLIENTS[name].aio_client(server) as aio_client:
        with pytest.raises(TIMEOUTS):
            await aio_client.generate(MESSAGE, timeout=0.3)
        with pytest.raises(TIMEOUTS):
            _ = [piece async for piece in aio_client.stream(MESSAGE, timeout=0.3)]
    assert time.monotonic() - began < 25, "four calls of 0.3 s, not of the 30 s and more that there were"


async def test_what_the_tokenizer_took_is_not_given_to_the_answer() -> None:
    left: list[float] = []

    class Engine(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
        async def GetTokenizer(self, _: Any, context: Any) -> AsyncIterator[Any]:
            await asyncio.sleep(0.5)  # it is large
            left.append(context.time_remaining())
            bundle = io.BytesIO()
            with zipfile.ZipFile(bundle, "w") as files:
                files.writestr("tokenizer.json", Tokenizer(WordLevel({"a": 0}, unk_token="a")).to_str())
            yield common_pb2.GetTokenizerChunk(data=bundle.getvalue())

        async def Generate(self, _: Any, context: Any) -> AsyncIterator[Any]:
            left.append(context.time_remaining())
            yield vllm_engine_pb2.GenerateResponse(complete=vllm_engine_pb2.GenerateComplete(finish_reason="stop"))

    server = grpc.aio.server()
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(Engine(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        with VllmGrpcClient(address) as client:
            await asyncio.to_thread(client.generate, "a", timeout=5)
        async with VllmGrpcAioClient(address) as aio_client:
            await aio_client.generate("a", timeout=5)
    finally:
        await server.stop(None)
    assert len(left) == 4
    assert max(left) <= 4.6


HALF = (
    b'data: {"choices": [{"index": 0, "text": "half", "finish_reason": null}], "usage": {"completion_tokens": 1}}\n\n'
)


class Half(BaseHTTPRequestHandler):
    """As a proxy may pass on what an engine had said before it went: half a stream, and an end in order."""

    def do_GET(self) -> None:
        self.say(b'{"data": [{"id": "m"}]}', "application/json")

    def do_POST(self) -> None:
        self.say(HALF, "text/event-stream")

    def say(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


async def test_half_a_stream_that_ends_in_order_is_no_answer() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Half) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_address[1]}"
        pieces: list[Piece] = []
        with OpenAIClient(url) as client, pytest.raises(APIConnectionError, match="ended before the answer"):
            pieces.extend(client.stream("Once"))
        async with OpenAIAioClient(url) as aio:
            with pytest.raises(APIConnectionError, match="ended before the answer"):
                pieces.extend([piece async for piece in aio.stream("Once")])
        proxy.shutdown()
    assert [piece.text for piece in pieces] == ["half"]


class Says(BaseHTTPRequestHandler):
    """One thing to everybody, whatever is asked."""

    status, kind, said = 200, "text/html", b"<html>Sign in</html>"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", str(len(self.said)))
        self.end_headers()
        self.wfile.write(self.said)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def says() -> Iterator[Callable[..., str]]:
    """Begins to answer so, and gives the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Says) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        def begin(status: int, kind: str, said: str) -> str:
            server.RequestHandlerClass = type("Other", (Says,), {"status": status, "kind": kind, "said": said.encode()})
            return f"127.0.0.1:{server.server_port}"

        yield begin
        server.shutdown()


async def errors_of(url: str, kinds: tuple[type, type]) -> list[Exception]:
    """What the two clients at `url` raise, each asked for an answer and for a stream."""
    found: list[Exception] = []
    with kinds[0](url) as client:
        for ask in (client.generate, lambda prompt: list(client.stream(prompt))):
            with pytest.raises((openai.APIError, httpx.HTTPError)) as caught:
                ask("Once")
            found.append(caught.value)
    async with kinds[1](url) as aio_client:
        with pytest.raises((openai.APIError, httpx.HTTPError)) as caught:
            await aio_client.generate("Once")
        found.append(caught.value)
        with pytest.raises((openai.APIError, httpx.HTTPError)) as caught:
            _ = [piece async for piece in aio_client.stream("Once")]
        found.append(caught.value)
    return found


OVER_HTTP = [(OpenAIClient, OpenAIAioClient), (GatewayClient, GatewayAioClient)]


@pytest.mark.parametrize("kinds", OVER_HTTP, ids=["openai", "gateway"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("text/html", "<html>Sign in</html>"),
        *(("application/json", said) for said in ("null", "[]", "{}", '{"data": []}', '{"detail": "Not Found"}')),
        *(("text/event-stream", f"data: {said}\n\ndata: [DONE]\n\n") for said in ("null", "{", "{}", "[DONE]")),
    ],
)
async def test_what_is_no_answer_is_an_error_of_the_clients(
    kind: str, said: str, kinds: tuple[type, type], says: Callable[..., str]
) -> None:
    """Of another server at the address, or a page to sign in at; and no traceback from a parser."""
    errors = await errors_of(f"http://{says(200, kind, said)}", kinds)
    assert all(re.search(r"no list of models|no answer of the gateway's|text/event-stream", str(e)) for e in errors)


@pytest.mark.parametrize("said", ["<html>Sign in</html>", '{"data": []}', '{"choices": []}', "null", "[" * 100_000])
async def test_nor_where_only_the_model_was_known(said: str, says: Callable[..., str]) -> None:
    url = f"http://{says(200, 'application/json', said)}"
    with OpenAIClient(url) as client:
        client.model = "m"
        with pytest.raises(openai.APIResponseValidationError, match="no completion"):
            client.generate("Once")
    async with OpenAIAioClient(url) as aio_client:
        aio_client._model = "m"
        with pytest.raises(openai.APIResponseValidationError, match="no completion"):
            await aio_client.generate("Once")


@pytest.mark.parametrize("kinds", OVER_HTTP, ids=["openai", "gateway"])
@pytest.mark.parametrize("status", [200, 500])
async def test_nor_where_it_is_nested_too_deeply(
    status: int, kinds: tuple[type, type], says: Callable[..., str]
) -> None:
    deep = "[" * 100_000
    assert len(await errors_of(f"http://{says(status, 'application/json', deep)}", kinds)) == 4


@pytest.mark.parametrize("kinds", OVER_HTTP, ids=["openai", "gateway"])
async def test_a_proxys_page_of_an_error_is_one_with_its_status(
    kinds: tuple[type, type], says: Callable[..., str]
) -> None:
    assert all("502" in str(e) for e in await errors_of(f"http://{says(502, 'text/html', '<html>')}", kinds))


async def test_the_gateways_own_words_reach_who_asked(says: Callable[..., str]) -> None:
    error = {"code": "unauthorized", "message": "Send the gateway's key", "request_id": "1"}
    address = says(401, "application/json", json.dumps({"error": error}))
    for caught in await errors_of(f"http://{address}", OVER_HTTP[1]):
        assert str(caught).startswith(f"401 Unauthorized from http://{address}/chat")
        assert str(caught).endswith(": Send the gateway's key")


@pytest.mark.parametrize("form", ["{}", "http://{}/"])
async def test_an_address_may_lack_http_and_end_in_a_slash(form: str, says: Callable[..., str]) -> None:
    address = says(200, "application/json", json.dumps({"data": [{"id": "m"}]}))
    with OpenAIClient(form.format(address)) as client:
        assert client.model == "m"
        assert str(client.client.base_url) == f"http://{address}/v1/"
    async with OpenAIAioClient(form.format(address)) as aio_client:
        assert await aio_client.model() == "m"
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    address = says(200, "application/json", json.dumps({"response": "yes", "usage": usage, "finish_reason": "stop"}))
    with GatewayClient(form.format(address)) as gateway:
        assert gateway.generate("Here?").text == "yes"
    async with GatewayAioClient(form.format(address)) as aio_gateway:
        assert (await aio_gateway.generate("Here?")).text == "yes"


class HalfATriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The same on gRPC: a response that is not the last one, and an end in order."""

    def __init__(self) -> None:
        self.asked_for_status: list[bool] = []
        self.more = 0
        self.left_for_configuration: list[float] = []

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="triton", extensions=["model_configuration"])

    def ModelConfig(self, request: Any, context: Any) -> Any:
        self.left_for_configuration.append(context.time_remaining())
        policy = model_config_pb2.ModelTransactionPolicy(decoupled=True)
        return service_pb2.ModelConfigResponse(config=model_config_pb2.ModelConfig(model_transaction_policy=policy))

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        next(requests)
        self.asked_for_status.append(("triton_grpc_error", "true") in context.invocation_metadata())
        response = service_pb2.ModelStreamInferResponse()
        texts = {name: len(text).to_bytes(4, "little") + text for name, text in TOLD_BY_HALF.items()}
        for name, raw in {**texts, "num_output_tokens": (1).to_bytes(4, "little")}.items():
            datatype = "BYTES" if name in texts else "UINT32"
            response.infer_response.outputs.add(name=name, datatype=datatype, shape=[1])
            response.infer_response.raw_output_contents.append(raw)
        yield response
        for _ in range(self.more):
            response.infer_response.parameters["triton_final_response"].bool_param = True
            yield response


TOLD_BY_HALF = {"text_output": b"half", "finish_reason": b"None"}


@pytest.fixture
def half_a_triton() -> Iterator[tuple[str, HalfATriton]]:
    with ThreadPoolExecutor(4) as pool:
        server, servicer = grpc.server(pool), HalfATriton()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}", servicer
        server.stop(None).wait()


def test_what_a_model_is_is_asked_within_the_calls_time_too(half_a_triton: tuple[str, HalfATriton]) -> None:
    """It has 10 s for who asks nothing else."""
    address, servicer = half_a_triton
    with V2Client(address) as client, pytest.raises(InferenceServerException, match="ended before the answer"):
        client.generate("Once", timeout=8)
    (left,) = servicer.left_for_configuration
    assert left <= 8


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [TritonClient, V2Client])
def test_half_a_stream_of_tritons_is_no_answer_either(
    kind: type[TritonClient | V2Client], half_a_triton: tuple[str, HalfATriton]
) -> None:
    address, servicer = half_a_triton
    pieces: list[Piece] = []
    with kind(address) as client:
        with pytest.raises(InferenceServerException, match="ended before the answer") as caught:
            pieces.extend(client.stream("Once"))
        assert caught.value.status() == "StatusCode.INTERNAL"
        with pytest.raises(InferenceServerException, match="ended before the answer"):
            client.generate("Once")
    assert pieces == [Piece("half", 1)]
    assert servicer.asked_for_status == [True, True]


def test_several_responses_are_no_answer_of_infers(half_a_triton: tuple[str, HalfATriton]) -> None:
    """A decoupled model gives as many as it likes, Triton's `vllm` where it is asked to stream."""
    address, servicer = half_a_triton
    servicer.more = 1
    with V2Client(address) as client, pytest.raises(InferenceServerException, match=r"got 2: use stream\(\)"):
        client.infer("Once", stream=True)


async def test_nor_in_asyncio(half_a_triton: tuple[str, HalfATriton]) -> None:
    async with TritonAioClient(half_a_triton[0]) as aio:
        stream = aio.stream("Once")
        assert await anext(stream) == Piece("half", 1)
        with pytest.raises(InferenceServerException, match="ended before the answer") as caught:
            await anext(stream)
        assert caught.value.status() == "StatusCode.INTERNAL"
        with pytest.raises(InferenceServerException, match="ended before the answer"):
            await aio.generate("Once")


HALVES: dict[str, tuple[str, Any]] = {
    "grpc": (
        "llm.v1.LLMService/StreamGenerate",
        llm_pb2.StreamGenerateResponse(text="half", token_ids=[4]),
    ),
    "vllm-rs": (
        "vllm.Inference/GenerateStream",
        inference_pb2.GenerateResponse(outputs=[inference_pb2.Generated(text="half", num_tokens=1)]),
    ),
    "vllm-grpc": (
        "vllm.grpc.engine.VllmEngine/Generate",
        vllm_engine_pb2.GenerateResponse(chunk=vllm_engine_pb2.GenerateStreamChunk(token_ids=[0])),
    ),
}
"""A method that streams, and what it says before it ends in order and without the answer's end."""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("messages", [1, 0], ids=["half", "nothing"])
@pytest.mark.parametrize("name", HALVES)
async def test_nor_of_any_other_way_over_grpc(name: str, messages: int, settings: Settings) -> None:
    """And no IndexError where nothing came at all."""
    path, message = HALVES[name]
    service, method = path.split("/")

    async def half(*__: object) -> AsyncIterator[bytes]:
        for _ in range(messages):
            yield message.SerializeToString()

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(half)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    tokenizer = Tokenizer(WordLevel({"half": 0}, unk_token="half"))
    pieces: list[Piece] = []
    try:
        there = Server(name, "m", {"http": "127.0.0.1:9", "grpc": address}, settings)
        with CLIENTS[name].client(there) as client:
            vars(client)["tokenizer"] = tokenizer
            with pytest.raises(grpc.RpcError, match="ended before") as caught:
                await asyncio.to_thread(pieces.extend, client.stream("half"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        async with CLIENTS[name].aio_client(there) as aio:
            vars(aio)["_tokenizer"] = tokenizer
            with pytest.raises(grpc.aio.AioRpcError, match="ended before"):
                _ = [piece async for piece in aio.stream("half")]
    finally:
        await server.stop(None)
    assert [piece.text.strip() for piece in pieces] == ["half"][:messages]


@pytest.mark.timeout(60)
def test_a_triton_that_is_away_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where `tritonclient` knows it before the request is sent, and would say that the stream is not valid."""
    start_stream = InferenceServerClient.start_stream

    def and_fail(self: InferenceServerClient, *args: Any, **more: Any) -> None:
        start_stream(self, *args, **more)
        self._stream._handler.join()

    monkeypatch.setattr(InferenceServerClient, "start_stream", and_fail)
    with TritonClient(f"127.0.0.1:{free_port()}") as client, pytest.raises(InferenceServerException) as caught:
        client.generate("Once")
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert "refused" in caught.value.message()


@pytest.mark.timeout(60)
def test_nor_where_a_row_of_chapter_13_is_asked_for(half_a_triton: tuple[str, HalfATriton]) -> None:
    cell = others._infer(half_a_triton[0], {"sampling_parameters": b"{}"})
    assert cell == Cell(False, "INTERNAL: the stream ended before the answer did")


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password for every machine, which `requests` by itself would send in a key's place."""
    (tmp_path / "netrc").write_text("default login anonymous password a@b.c")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("netrc")
@pytest.mark.parametrize("key", ["sk-of-the-engine", None])
def test_a_password_for_every_machine_takes_no_keys_place(key: str | None) -> None:
    request = requests.Request("GET", "http://127.0.0.1:9/v1/models", auth=bearer(key))
    shown = requests.Session().prepare_request(request).headers.get("Authorization")
    assert shown == (f"Bearer {key}" if key else None)


@pytest.mark.engine
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in CLIENTS if name != "router"]
)
async def test_all_clients_tell_the_same_answer(name: str, vllm: Server, server_of: Callable[[str], Server]) -> None:
    """The router's turn is in test_10_scale_out.py, while its engines are up."""
    server = server_of(name)
    expected = by_hand(vllm, CLIENTS[name].chats)
    assert (expected.tokens, expected.finish_reason) == (24, "length")
    with CLIENTS[name].client(server) as client, closing(client.stream(MESSAGE, **GREEDY)) as stream:
        assert put_together(list(stream), expected.prompt_tokens) == expected
        assert told(client.generate(MESSAGE, **GREEDY)) == expected
    async with CLIENTS[name].aio_client(server) as aio, aclosing(aio.stream(MESSAGE, **GREEDY)) as aio_stream:
        assert put_together([piece async for piece in aio_stream], expected.prompt_tokens) == expected
        assert told(await aio.generate(MESSAGE, **GREEDY)) == expected
