"""Chapter 4: our own gRPC server, over real sockets, with a real engine."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest
import requests
from desk import eventually, spared
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from servebook import launch, serve
from servebook.engine.quiet_compiler import TITLE
from servebook.errors import ServebookError
from servebook.processes import free_port
from servebook.protos.llm.v1 import llm_pb2 as pb
from servebook.protos.llm.v1 import llm_pb2_grpc
from servebook.settings import LOOPBACK, Settings
from servebook.ways.custom_grpc.aio_client import GrpcAioClient
from servebook.ways.custom_grpc.certificates import Certificates, make_certificates
from servebook.ways.custom_grpc.client import GrpcClient
from servebook.ways.custom_grpc.frames import Frame, listen_in
from servebook.ways.custom_grpc.server import calls, metrics, serving, transport
from servebook.ways.custom_grpc.server import health as health_service
from servebook.ways.custom_grpc.server.errors import Refusal
from servebook.ways.custom_grpc.server.health import Health
from servebook.ways.custom_grpc.server.servicer import LLMServicer
from servebook.ways.custom_grpc.steps import Ladder, ladder
from servebook.ways.limits import GIVEN_UP
from servebook.ways.metrics import metric
from servebook.workbook.notebook import measure_pace

pytestmark = pytest.mark.timeout(900)

FOREVER = pb.Sampling(ignore_eos=True)
KOREAN = "안녕하세요 세계 👋🏽 잘 지내요?"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SOON_TOKENS = 50
"""What the engine may still write for a call that has ended, of some 2,000 that its context has place for; on a quiet
machine it writes three or four. A clock would go on where a busy one stands still."""
IDLE_SECONDS = 60
"""How long a busy machine may take where the speed is not what is tested."""


def figures(server: launch.Server, *names: str) -> list[float]:
    """Figures of the metrics page, read once and without parsing it all: these tests ask often."""
    lines = requests.get(f"http://{server.metrics}/metrics", timeout=60).text.splitlines()
    return [sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}[{{ ]", line)) for name in names]


def open_calls(server: launch.Server) -> int:
    """Calls that the server counts."""
    return int(figures(server, "servebook_grpc_open_calls")[0])


def running(server: launch.Server) -> int:
    """Requests that the engine itself counts, running or waiting."""
    return int(sum(figures(server, "vllm:num_requests_running", "vllm:num_requests_waiting")))


def is_idle(server: launch.Server) -> bool:
    return not any(
        figures(server, "servebook_grpc_open_calls", "vllm:num_requests_running", "vllm:num_requests_waiting")
    )


def health_of(channel: grpc.Channel, service: str = "") -> int:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
    return int(answer.status)


def stub_on(channel: grpc.Channel) -> Any:
    """A stub; untyped, because the types of its calls lack half of their methods."""
    return llm_pb2_grpc.LLMServiceStub(channel)


def any_method(channel: Any, name: str) -> Any:
    """A method by its name, which takes and gives bytes."""
    return channel.unary_stream(f"/llm.v1.LLMService/{name}")


def detail(error: Any, kind: type[Any]) -> Any:
    """The one `google.rpc` detail of `error`, which must be of `kind`."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    [packed] = status.details
    message = kind()
    assert packed.Unpack(message), packed.type_url
    return message


@pytest.fixture(scope="module")
def client(grpc_server: launch.Server) -> Iterator[GrpcClient]:
    with GrpcClient(grpc_server.grpc) as client:
        yield client


@pytest.fixture
async def aio(grpc_server: launch.Server) -> AsyncIterator[GrpcAioClient]:
    async with GrpcAioClient(grpc_server.grpc) as client:
        yield client


# What it answers


def test_notebook(run_notebook: Callable[[str], None]) -> None:
    run_notebook("04_custom_grpc")


def test_unary_and_stream_agree(client: GrpcClient) -> None:
    request = pb.GenerateRequest(prompt="The capital of France is", max_tokens=12, temperature=0)
    whole = stub_on(client.channel).Generate(request, timeout=60)
    pieces = list(stub_on(client.channel).StreamGenerate(as_stream(request), timeout=60))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == list(whole.token_ids)
    assert [piece.sequence for piece in pieces] == list(range(len(pieces)))
    assert [piece.is_finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].finish_reason == whole.finish_reason == pb.FINISH_REASON_LENGTH
    assert pieces[-1].usage == whole.usage == pb.Usage(prompt_tokens=5, completion_tokens=12)
    assert not any(piece.finish_reason or piece.HasField("usage") for piece in pieces[:-1])


def test_a_chats_greedy_text_is_that_of_vllms_own_server(client: GrpcClient, vllm: launch.Server) -> None:
    def ask(path: str, **body: Any) -> Any:
        headers = {"Authorization": f"Bearer {vllm.settings.key}"} if vllm.settings.key else {}
        body |= {"model": vllm.model, "max_tokens": 24, "temperature": 0}
        return requests.post(f"{vllm.url}/v1/{path}", json=body, headers=headers, timeout=60).json()

    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    rest = ask("chat/completions", messages=messages)
    chat = pb.Chat(messages=[pb.ChatMessage(**turn) for turn in messages])
    answer = stub_on(client.channel).Generate(pb.GenerateRequest(chat=chat, max_tokens=24, temperature=0), timeout=60)
    assert answer.text == rest["choices"][0]["message"]["content"]
    assert answer.usage.prompt_tokens == rest["usage"]["prompt_tokens"]
    assert answer.finish_reason == pb.FINISH_REASON_STOP


def test_token_ids_continue_like_their_text(client: GrpcClient) -> None:
    first = client.generate("One, two, three,", max_tokens=4, temperature=0)
    ids = pb.TokenIds(ids=first.token_ids)
    by_ids = stub_on(client.channel).Generate(
        pb.GenerateRequest(prompt_token_ids=ids, max_tokens=4, temperature=0), timeout=60
    )
    by_text = client.generate(first.text, max_tokens=4, temperature=0)
    assert by_ids.usage.prompt_tokens == 4
    assert by_ids.text == by_text.text


def test_zero_temperature_is_not_unset(client: GrpcClient) -> None:
    assert pb.GenerateRequest(temperature=0).HasField("temperature")
    greedy = {client.generate("My favourite number is", max_tokens=12, temperature=0).text for _ in range(2)}
    free = {client.generate("My favourite number is", max_tokens=12).text for _ in range(3)}
    assert len(greedy) == 1
    assert len(free) > 1


def test_a_seed_repeats(client: GrpcClient) -> None:
    texts = {client.generate("Once", max_tokens=12, sampling=pb.Sampling(seed=7, top_p=0.9)).text for _ in range(3)}
    assert len(texts) == 1


def test_characters_of_several_tokens_arrive_whole(client: GrpcClient) -> None:
    choice = pb.Sampling(choice=pb.Choice(options=[KOREAN]))
    pieces = list(client.stream("Say hello:", temperature=0, sampling=choice))
    assert "".join(piece.text for piece in pieces) == KOREAN
    assert any(not piece.text for piece in pieces), "no character was split over tokens"
    assert sum(piece.tokens for piece in pieces) > len(KOREAN)


def test_stop_strings_split_over_tokens_never_show(client: GrpcClient) -> None:
    sampling = pb.Sampling(choice=pb.Choice(options=[KOREAN]), stop=["세계 👋"])
    pieces = list(client.stream("Say hello:", temperature=0, sampling=sampling))
    assert "".join(piece.text for piece in pieces) == KOREAN.split("세계")[0]
    assert pieces[-1].finish_reason == "stop"


def test_constraints_hold(client: GrpcClient) -> None:
    schema = json.dumps({"enum": [{"n": 7}, {"n": 8}]})
    answer = client.generate("A JSON object:", max_tokens=60, temperature=0, sampling=pb.Sampling(json_schema=schema))
    assert answer.finish_reason == "stop"
    assert json.loads(answer.text)["n"] in (7, 8)
    digits = client.generate("A year:", sampling=pb.Sampling(regex=r"(19|20)\d\d"))
    assert len(digits.text) == 4
    assert digits.text.isdecimal()


async def test_a_dear_schema_is_refused_and_holds_up_no_other(aio: GrpcAioClient, grpc_server: launch.Server) -> None:
    """Its compiler has ten seconds of what is left of the cores; others get their constraints and their tokens."""
    sampling = pb.Sampling(json_schema=json.dumps({"type": "string", "pattern": "." * 16_000}))
    dear = asyncio.create_task(aio.generate("x", max_tokens=1, sampling=sampling, timeout=120))

    def compilers() -> list[psutil.Process]:
        family = psutil.Process(grpc_server.pid).children(recursive=True)
        return [process for process in family if process.name() == TITLE]

    await asyncio.to_thread(eventually, compilers, "a process that compiles")
    [compiler] = compilers()
    assert os.sched_getscheduler(compiler.pid) == os.SCHED_IDLE
    year = await aio.generate("A year:", sampling=pb.Sampling(regex=r"(17|18)[0-9][0-9]"))
    assert year.text[:2] in ("17", "18")
    assert compiler.is_running(), "still beside them"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await dear
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == f"sampling.json_schema: {GIVEN_UP}"
    assert not compiler.is_running()


async def test_32_streams_neither_mix_nor_skip(aio: GrpcAioClient) -> None:
    async def one(number: int) -> None:
        mine = f"stream number {number:02d} of thirty-two"
        sampling = pb.Sampling(choice=pb.Choice(options=[mine]))
        request = pb.StreamGenerateRequest(prompt="Who are you?", sampling=sampling)
        pieces = [piece async for piece in aio.stub.StreamGenerate(request, timeout=60)]
        assert "".join(piece.text for piece in pieces) == mine
        assert [piece.sequence for piece in pieces] == list(range(len(pieces)))

    await asyncio.gather(*(one(number) for number in range(32)))


# How it refuses


REF_LOOP = json.dumps({"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}})
NAMES: dict[str, Any] = {f"p{number}": {} for number in range(201)}


def invalid_requests() -> dict[str, tuple[pb.GenerateRequest, str]]:
    def request(**fields: Any) -> pb.GenerateRequest:
        defaults: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
        return pb.GenerateRequest(**defaults | fields)

    def sampling(**fields: Any) -> pb.GenerateRequest:
        return request(sampling=pb.Sampling(**fields))

    return {
        "no input": (pb.GenerateRequest(), "prompt"),
        "empty prompt": (request(prompt=""), "prompt"),
        "empty token ids": (pb.GenerateRequest(prompt_token_ids=pb.TokenIds()), "prompt_token_ids"),
        "unknown token": (pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[2**32 - 1])), "prompt_token_ids"),
        "many token ids": (pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[1] * 1_000_000)), "prompt_token_ids"),
        "empty chat": (pb.GenerateRequest(chat=pb.Chat()), "chat.messages"),
        "many messages": (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 513)), "chat.messages"),
        "long prompt": (request(prompt="word " * 3000), "prompt"),
        "very long prompt": (request(prompt="x" * 4_000_000), "prompt"),
        "zero max_tokens": (request(max_tokens=0), "max_tokens"),
        "negative max_tokens": (request(max_tokens=-1), "max_tokens"),
        "beyond the context": (request(max_tokens=2048), "max_tokens"),
        "negative temperature": (request(temperature=-0.1), "temperature"),
        "no number": (request(temperature=float("nan")), "temperature"),
        "hot": (request(temperature=float("inf")), "temperature"),
        "top_p": (sampling(top_p=0), "sampling.top_p"),
        "top_k": (sampling(top_k=-1), "sampling.top_k"),
        "a seed that is none": (sampling(seed=-1), "sampling.seed"),
        "empty stop": (sampling(stop=[""]), "sampling.stop"),
        "many stops": (sampling(stop=["x"] * 17), "sampling.stop"),
        "bad regex": (sampling(regex="("), "sampling.regex"),
        "a regex that fills the status": (sampling(regex="([" * 3500), "sampling.regex"),
        **{
            regex: (sampling(regex=regex), "sampling.regex")
            for regex in ("foo**", r"\p{L}+", "(?P<a>x)", "(?i)a", "a++")
        },
        "many copies": (sampling(regex="(a{30}){30}"), "sampling.regex"),
        "long regex": (sampling(regex="x" * 20_000), "sampling.regex"),
        "bad schema": (sampling(json_schema="{"), "sampling.json_schema"),
        "a schema for a billion items": (sampling(json_schema='{"minItems": 1000000000}'), "sampling.json_schema"),
        "a schema for no text": (sampling(json_schema='{"enum": []}'), "sampling.json_schema"),
        "a $ref to itself": (sampling(json_schema=REF_LOOP), "sampling.json_schema"),
        "many properties": (sampling(json_schema=json.dumps({"properties": NAMES})), "sampling.json_schema"),
        "no choice": (sampling(choice=pb.Choice()), "sampling.choice"),
        "many choices": (sampling(choice=pb.Choice(options=["x"] * 501)), "sampling.choice"),
        "long stop": (sampling(stop=["x" * 257]), "sampling.stop"),
    }


@pytest.mark.parametrize("name", invalid_requests())
def test_invalid_argument_names_the_field(client: GrpcClient, name: str) -> None:
    request, field = invalid_requests()[name]
    with pytest.raises(grpc.RpcError) as caught:
        stub_on(client.channel).Generate(request, timeout=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    [violation] = detail(caught.value, error_details_pb2.BadRequest).field_violations
    assert violation.field == field
    assert caught.value.details() == f"{violation.field}: {violation.description}"
    with pytest.raises(grpc.RpcError) as streamed:
        list(stub_on(client.channel).StreamGenerate(as_stream(request), timeout=60))
    assert (streamed.value.code(), streamed.value.details()) == (caught.value.code(), caught.value.details())


def test_a_stream_is_refused_like_a_unary_call(client: GrpcClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        next(client.stream("x", max_tokens=0))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail(caught.value, error_details_pb2.BadRequest).field_violations[0].field == "max_tokens"


def test_a_models_own_limit_of_tokens_is_a_default() -> None:
    from servebook.ways.custom_grpc.server.inputs import Inputs  # imports vLLM, which takes seconds

    inputs = Inputs(None, 100, {"max_tokens": 7, "top_p": 0.5})  # nothing is tokenized
    unset, three = pb.GenerateRequest(prompt="x"), pb.GenerateRequest(prompt="x", max_tokens=3)
    for request, prompt_tokens, wanted in ((unset, 5, 7), (three, 5, 3), (unset, 96, 4)):
        params = inputs.params(request, prompt_tokens, stream=False)
        assert (params.max_tokens, params.top_p) == (wanted, 0.5)


def test_a_seed_that_vllm_takes_for_none_is_refused() -> None:
    from servebook.ways.custom_grpc.server.inputs import Inputs  # imports vLLM, which takes seconds

    inputs = Inputs(None, 100, {})  # nothing is tokenized
    with pytest.raises(Refusal, match=r"sampling\.seed: must not be -1") as caught:
        inputs.params(pb.GenerateRequest(prompt="x", sampling=pb.Sampling(seed=-1)), 5, stream=False)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert inputs.params(pb.GenerateRequest(prompt="x", sampling=pb.Sampling(seed=0)), 5, stream=False).seed == 0


async def test_an_error_without_a_word_is_a_refusal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chat template's, say, which may raise what it likes."""
    from servebook.ways.custom_grpc.server import inputs  # imports vLLM, which takes seconds

    class Silent:
        def __init__(self, **_: Any) -> None:
            raise ValueError

        @staticmethod
        async def render_cmpl_async(_: Any) -> Any:
            raise ValueError

    monkeypatch.setattr(inputs, "SamplingParams", Silent)
    converter = inputs.Inputs(Silent, 100, {})
    with pytest.raises(Refusal) as caught:
        await converter.prompt(pb.GenerateRequest(prompt="x"))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(Refusal) as caught:
        converter.params(pb.GenerateRequest(prompt="x"), 5, stream=False)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("left", "told"), [(0.03, "DEADLINE_EXCEEDED"), (-1, "DEADLINE_EXCEEDED"), (5, "CANCELLED"), (None, "CANCELLED")]
)
async def test_a_call_that_the_clients_clock_has_ended_is_late(left: float | None, told: str) -> None:
    def counted() -> float:
        return float(metrics.CALLS.labels("Generate", told)._value.get())

    context: Any = SimpleNamespace(set_trailing_metadata=lambda _: None, time_remaining=lambda: left)
    before = counted()
    with pytest.raises(asyncio.CancelledError):
        async with calls.Calls(1).admit("Generate", context):
            raise asyncio.CancelledError
    assert counted() == before + 1


async def test_a_call_that_grpc_had_taken_before_the_end_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not open yet for those who count calls. And one who watches health, and never leaves, is not waited for."""
    monkeypatch.setattr(serving, "SETTLE_SECONDS", 0.5)
    taken, handed_over, begun, may_end = (asyncio.Event() for _ in range(4))
    seen = []

    class Slow(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            if handler_call_details.method.endswith("/Generate"):
                taken.set()
                await handed_over.wait()
            return await continuation(handler_call_details)

    class Engine:
        errored = False

        async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
            begun.set()
            await may_end.wait()
            seen.append("answered")
            completion = SimpleNamespace(text="word", token_ids=[1], finish_reason="stop")
            yield SimpleNamespace(outputs=[completion], finished=True)

        async def prompt(self, request: Any) -> Any:
            return {"prompt_token_ids": [1]}

        def params(self, request: Any, prompt_tokens: int, stream: bool) -> Any:
            return SimpleNamespace(max_tokens=1)

    async def stop(grace: float) -> None:
        if not grace:
            seen.append("cut")
        await server.stop(grace)

    account, health = calls.Calls(1), Health()
    servicer = LLMServicer(account)
    servicer.attach(Engine(), Engine())  # type: ignore[arg-type]
    server = grpc.aio.server(interceptors=[Slow()])
    llm_pb2_grpc.add_LLMServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(60):
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        generate: Any = llm_pb2_grpc.LLMServiceStub(channel).Generate
        call = generate(pb.GenerateRequest(prompt="Once"))
        await taken.wait()
        stopped: Any = SimpleNamespace(stop=stop)
        draining = asyncio.create_task(serving.drain(stopped, account, 600))
        handed_over.set()
        beginning = asyncio.create_task(begun.wait())
        await asyncio.wait({draining, beginning}, return_when=asyncio.FIRST_COMPLETED)
        may_end.set()
        assert (await call).text == "word"
        await draining
    beginning.cancel()
    assert seen == ["answered", "cut"]


async def test_a_stream_that_nobody_reads_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "READER_SECONDS", 0.3)
    ending, may_end = asyncio.Event(), asyncio.Event()
    ended = []

    class Endless:
        errored = False

        async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
            try:
                while True:
                    await asyncio.sleep(0)
                    completion = SimpleNamespace(text="x" * 2000, token_ids=[1], finish_reason=None)
                    yield SimpleNamespace(outputs=[completion], finished=False)
            finally:
                ending.set()
                await may_end.wait()  # as an abort waits for an engine that is busy
                ended.append(request_id)

        async def prompt(self, request: Any) -> Any:
            return {"prompt_token_ids": [1]}

        def params(self, request: Any, prompt_tokens: int, stream: bool) -> Any:
            return SimpleNamespace(max_tokens=10**9)

    account = calls.Calls(1)
    servicer = LLMServicer(account)
    servicer.attach(Endless(), Endless())  # type: ignore[arg-type]
    server = grpc.aio.server()
    llm_pb2_grpc.add_LLMServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        begin: Any = llm_pb2_grpc.LLMServiceStub(channel).StreamGenerate
        call = begin(pb.StreamGenerateRequest(prompt="Once"))
        await call.read()
        account.end_unread()
        assert account.open, "not at once"
        async with asyncio.timeout(30):
            while not ending.is_set():
                await asyncio.sleep(0.02)
                account.end_unread()
            account.end_unread()
            await asyncio.sleep(0)  # a second cancellation would arrive here
            may_end.set()
            await account.none_open.wait()
        assert len(ended) == 1, "what the engine had to end was not cut short"
        with suppress(grpc.aio.AioRpcError):  # as some reads end, and others do not
            while hasattr(await call.read(), "text"):  # and not the mark of the end
                pass
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await call.details() == "Nobody has read this stream for 0.3 s."
    await server.stop(None)


async def test_a_call_that_is_just_being_refused_takes_no_place() -> None:
    account, told, may_end = calls.Calls(1), asyncio.Event(), asyncio.Event()

    async def abort(*_: Any) -> None:
        await told.wait()  # until the refusal is on its way
        raise grpc.aio.AbortError

    context: Any = SimpleNamespace(set_trailing_metadata=lambda _: None, abort=abort)

    async def call() -> None:
        async with account.admit("Generate", context):
            await may_end.wait()

    before = gauge("servebook_grpc_open_calls")
    refused = []
    for _ in range(3):  # the first two leave the place to the third
        begun = [asyncio.create_task(call()) for _ in range(2)]
        await asyncio.sleep(0)
        assert len(account.admitted) == 1
        assert gauge("servebook_grpc_open_calls") == before + 1
        refused.append(begun[1])
        may_end.set()
        await begun[0]
        may_end.clear()
    assert account.open == 3
    assert not account.none_open.is_set(), "whoever drains waits for the refusals"
    told.set()
    await asyncio.gather(*refused, return_exceptions=True)
    assert account.none_open.is_set()
    assert gauge("servebook_grpc_open_calls") == before


def gauge(name: str) -> float:
    """A gauge of this process."""
    return REGISTRY.get_sample_value(name) or 0


def test_too_large_a_message(client: GrpcClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.generate("x" * 5 * 2**20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.generate("x", max_tokens=1).tokens == 1


def test_the_status_carries_an_id_that_the_log_has_without_the_prompt(
    client: GrpcClient, grpc_server: launch.Server
) -> None:
    secret = f"secret-{random.getrandbits(64):x}"
    _, call = stub_on(client.channel).Generate.with_call(pb.GenerateRequest(prompt=secret, max_tokens=2), timeout=60)
    request_id = dict(call.trailing_metadata())["x-request-id"]
    with pytest.raises(grpc.RpcError):
        client.generate(secret, sampling=pb.Sampling(regex=f"{secret}("))
    eventually(lambda: '"code": "INVALID_ARGUMENT"' in grpc_server.tail(50), "the call in the log")
    lines = [json.loads(line) for line in grpc_server.tail(50).splitlines() if line.startswith("{")]
    [line] = [line for line in lines if line.get("id") == request_id]
    assert (line["method"], line["code"], line["completion_tokens"]) == ("Generate", "OK", 2)
    assert secret not in grpc_server.tail(1000)


def as_stream(request: pb.GenerateRequest) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest.FromString(request.SerializeToString())  # the same fields by the same numbers


SCHEMAS = st.recursive(
    st.sampled_from(["string", "integer", "array", "object", 7]).map(lambda name: {"type": name})
    | st.dictionaries(st.sampled_from(["minItems", "maxLength", "minimum", "multipleOf"]), st.integers(), max_size=2),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(lambda named: {"properties": named})
        | st.lists(inner, max_size=2).map(lambda each: {"anyOf": each})
        | st.just({"$ref": "#"})
    ),
    max_leaves=4,
)
texts = st.text(max_size=40)
fields = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(-(2**31), 2**31 - 1),
        "temperature": st.floats(width=32),
    },
)
samplings = st.builds(
    pb.Sampling,
    top_p=st.none() | st.floats(width=32),
    top_k=st.none() | st.integers(-(2**31), 2**31 - 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(texts, max_size=20),
)
constraints = st.one_of(
    st.builds(dict),
    st.builds(lambda text: {"regex": text}, texts | st.text(alphabet="a(){}[]*+?|\\p19,", max_size=12)),
    st.builds(lambda schema: {"json_schema": json.dumps(schema)}, SCHEMAS),
    st.builds(lambda options: {"choice": pb.Choice(options=options)}, st.lists(texts, max_size=4)),
)
inputs = st.one_of(
    st.builds(lambda prompt: {"prompt": prompt}, texts),
    st.builds(lambda ids: {"prompt_token_ids": pb.TokenIds(ids=ids)}, st.lists(st.integers(0, 2**32 - 1), max_size=20)),
    st.builds(
        lambda turns: {"chat": pb.Chat(messages=[pb.ChatMessage(role=role, content=text) for role, text in turns])},
        st.lists(st.tuples(st.sampled_from(["user", "system", "assistant", "", "\0"]), texts), max_size=3),
    ),
)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(inputs, fields, samplings, constraints)
def test_any_request_is_served_or_refused_never_failed(
    client: GrpcClient,
    given_input: dict[str, Any],
    given_fields: dict[str, Any],
    sampling: pb.Sampling,
    constraint: dict[str, Any],
) -> None:
    sampling.MergeFrom(pb.Sampling(**constraint))
    request = pb.StreamGenerateRequest(**given_input, **given_fields, sampling=sampling)
    call = stub_on(client.channel).StreamGenerate(request, timeout=60)
    with suppress(grpc.RpcError):
        next(call)
        call.cancel()
    assert call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), request


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_hurt_nobody(client: GrpcClient, junk: bytes) -> None:
    call = any_method(client.channel, "StreamGenerate")(junk, timeout=60)
    with suppress(grpc.RpcError):
        next(call)
        call.cancel()
    if call.code() is grpc.StatusCode.UNKNOWN:  # grpc.aio's own answer to bytes that its deserializer refuses
        assert "Error parsing message" in call.details(), junk
    else:
        assert call.code().name in {"CANCELLED", "OK", "INVALID_ARGUMENT"}, junk
    assert health_of(client.channel) == SERVING


def test_a_connection_that_speaks_no_http2_hurts_nobody(grpc_server: launch.Server, client: GrpcClient) -> None:
    host, port = grpc_server.grpc.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        while connection.recv(4096):
            pass
    assert client.generate("x", max_tokens=1).tokens == 1


def test_unknown_method(client: GrpcClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(any_method(client.channel, "Nothing")(b"", timeout=60))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# When calls end early


async def cancelled(aio: GrpcAioClient, after: int) -> None:
    """Read `after` messages of an endless stream, then leave it."""
    async with aclosing(aio.stream("Once upon a time", timeout=120, sampling=FOREVER)) as stream:
        for _ in range(after):
            await anext(stream)


@pytest.mark.survives("200 callers who leave at random", "grpc", lost="nothing")
async def test_200_cancels_at_random_leave_the_engine_idle(aio: GrpcAioClient, grpc_server: launch.Server) -> None:
    chance = random.Random(4)
    for _ in range(25):
        await asyncio.gather(*(cancelled(aio, chance.randint(1, 6)) for _ in range(8)))
        await asyncio.to_thread(
            eventually, lambda: is_idle(grpc_server), "the engine idle after 8 cancels", IDLE_SECONDS
        )


async def test_a_cancel_before_the_first_token_counts_too(aio: GrpcAioClient, grpc_server: launch.Server) -> None:
    calls = [aio.stub.Generate(pb.GenerateRequest(prompt="Once", sampling=FOREVER)) for _ in range(8)]
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.to_thread(eventually, lambda: open_calls(grpc_server) == 8, "8 open calls", IDLE_SECONDS)
    for call in calls:
        call.cancel()
    assert {type(end) for end in await asyncio.gather(*tasks, return_exceptions=True)} == {asyncio.CancelledError}
    await asyncio.to_thread(eventually, lambda: is_idle(grpc_server), "the engine idle", IDLE_SECONDS)


def endless(client: GrpcClient, seconds: float) -> Any:
    """A stream that has begun, and goes on to the end of the context."""
    call = stub_on(client.channel).StreamGenerate(
        pb.StreamGenerateRequest(prompt="Once", sampling=FOREVER), timeout=seconds
    )
    next(call)
    return call


def written(server: launch.Server) -> float:
    """Tokens that the engine has written for anybody."""
    return figures(server, "vllm:generation_tokens_total")[0]


def written_for_nobody(server: launch.Server) -> float:
    """Tokens that the engine writes from now on until neither it nor the server has a call."""
    before = written(server)
    eventually(lambda: is_idle(server), "no call in server and engine", IDLE_SECONDS)
    return written(server) - before


def test_a_cancel_reaches_the_engine_at_once(client: GrpcClient, grpc_server: launch.Server) -> None:
    for _ in range(3):
        endless(client, seconds=60).cancel()
        assert written_for_nobody(grpc_server) < SOON_TOKENS


def test_a_deadline_reaches_the_engine_at_once(client: GrpcClient, grpc_server: launch.Server) -> None:
    # No engine is at the end of its context after 500 tokens. A busy one takes seconds for the first.
    pace = measure_pace(lambda n: client.generate("Once", max_tokens=n, sampling=FOREVER))
    call = endless(client, pace.seconds(500, at_most=5))
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert written_for_nobody(grpc_server) < SOON_TOKENS
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


DROPPED = """
import os, signal, sys
from servebook.protos.llm.v1 import llm_pb2 as pb
from servebook.ways.custom_grpc.client import GrpcClient
stream = GrpcClient(sys.argv[1]).stream("Once", sampling=pb.Sampling(ignore_eos=True))
next(stream)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_dropped_connection_reaches_the_engine(grpc_server: launch.Server) -> None:
    with spared(lambda: written(grpc_server), lambda: not is_idle(grpc_server), wanted=2000):  # the rest of the context
        ended = subprocess.run([sys.executable, "-c", DROPPED, grpc_server.grpc], check=False, timeout=60)
        assert ended.returncode == -signal.SIGKILL


@pytest.mark.survives("a reader who does not read", "grpc", lost="nothing")
def test_a_slow_reader_gets_merged_messages_and_loses_nothing(grpc_server: launch.Server, client: GrpcClient) -> None:
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64)]  # a small window: soon full
    request = pb.StreamGenerateRequest(prompt="Once", max_tokens=60, sampling=FOREVER)  # done before READER_SECONDS
    with grpc.insecure_channel(grpc_server.grpc, options) as channel:
        call = stub_on(channel).StreamGenerate(request, timeout=200)
        pieces = [next(call)]
        assert client.generate("x", max_tokens=4, sampling=FOREVER).tokens == 4, "others go on"
        eventually(lambda: running(grpc_server) == 0, "the engine done, reader or not", 150)
        assert open_calls(grpc_server) == 1
        pieces += call
    assert sum(len(piece.token_ids) for piece in pieces) == pieces[-1].usage.completion_tokens == 60
    assert max(len(piece.token_ids) for piece in pieces) > 1
    assert [piece.sequence for piece in pieces] == list(range(len(pieces)))


def frame(kind: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2 for the whole connection, without flags."""
    return len(payload).to_bytes(3, "big") + bytes([kind, 0]) + bytes(4) + payload


def test_a_pinging_client_may_wait_in_silence(grpc_server: launch.Server) -> None:
    """By itself gRPC's server ends a connection at the fifth ping without data, with "too_many_pings".

    The frames are written here: gRPC's own client sends one ping in a second, and a busy one fewer.
    """
    settings, ping, goaway = 4, 6, 7
    host, port = grpc_server.grpc.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30) as connection, connection.makefile("rb") as said:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings))
        for number in range(10):
            connection.sendall(frame(ping, payload := bytes([number]) * 8))
            answered = False
            while not answered:
                head = said.read(9)
                assert head, "the server has closed the connection"
                body = said.read(int.from_bytes(head[:3], "big"))
                assert head[3] != goaway, body
                answered = (head[3], body) == (ping, payload)


@pytest.mark.survives("2,000 short calls", "grpc", lost="nothing")
async def test_2000_short_calls_leave_nothing_behind(aio: GrpcAioClient, grpc_server: launch.Server) -> None:
    def standing() -> dict[str, float]:
        names = ("servebook_grpc_asyncio_tasks", "process_open_fds", "process_resident_memory_bytes")
        return dict(zip(names, figures(grpc_server, *names), strict=True))

    async def one(number: int) -> None:
        if number % 4 == 0:
            await cancelled(aio, 1)
        elif number % 4 == 1:
            answer = await aio.generate("x", timeout=120, max_tokens=1)
            assert answer.tokens == 1
        else:
            assert [piece.finish_reason async for piece in aio.stream("x", timeout=120, max_tokens=1)] == ["length"]

    async def some(first: int, last: int) -> None:
        places = asyncio.Semaphore(32)

        async def placed(number: int) -> None:
            async with places:
                await one(number)

        await asyncio.gather(*(placed(number) for number in range(first, last)))
        await asyncio.to_thread(eventually, lambda: is_idle(grpc_server), "idle", IDLE_SECONDS)

    await some(0, 200)  # the first calls fill caches
    before = await asyncio.to_thread(standing)
    await some(200, 2000)
    after = await asyncio.to_thread(standing)
    growth = {name: after[name] - before[name] for name in before}
    assert growth["servebook_grpc_asyncio_tasks"] <= 0, growth
    assert growth["process_open_fds"] <= 1, growth  # the connection of whoever reads the metrics
    assert growth["process_resident_memory_bytes"] < 20e6, growth


# Who listens in on a connection


def test_who_listens_in_hears_nothing_where_nobody_comes_and_where_no_server_is() -> None:
    def waiting() -> bool:
        return any(frame.f_code.co_name == "accept" for frame in sys._current_frames().values())

    nobody = f"127.0.0.1:{free_port()}"
    with listen_in(nobody):
        eventually(waiting, "a thread waits for a caller")
    eventually(lambda: not waiting(), "and then no more")
    with listen_in(nobody) as (address, frames):
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as caller:
            assert caller.recv(1) == b"", "the caller is told that nobody is there"
    assert frames == list[Frame]()


# Health, reflection, metrics


def deaf_watcher(port: int) -> socket.socket:
    """Somebody who watches health, and opens no window for what is written (HTTP/2's SETTINGS_INITIAL_WINDOW_SIZE)."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/grpc.health.v1.Health/Watch",
        b":authority": b"x",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    packed = b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in headers.items())
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, struct.pack(">HI", 4, 0)))
    connection.sendall(frame(1, 4, 1, packed) + frame(0, 1, 1, bytes(5)))
    return connection


async def test_no_watcher_of_health_keeps_it_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one who does not read, nor one who leaves, nor one who wants many."""
    monkeypatch.setattr(health_service, "MAX_WATCHERS", 2)
    health, server = Health(), grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with deaf_watcher(port):
            await asyncio.to_thread(eventually, lambda: health.watchers.total() == 1, "the deaf one")
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch
                leaves, stays = (watch(health_pb2.HealthCheckRequest(service=name), timeout=60) for name in ("", "x"))
                assert (await leaves.read()).status == NOT_SERVING
                assert (await stays.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await watch(health_pb2.HealthCheckRequest(), timeout=60).read()
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                apart = [("grpc.use_local_subchannel_pool", 1)]  # else it would be the same connection
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", apart) as another_client:
                    watching = health_pb2_grpc.HealthStub(another_client).Watch(health_pb2.HealthCheckRequest())
                    assert (await watching.read()).status == NOT_SERVING
                await asyncio.to_thread(eventually, lambda: health.watchers.total() == 3, "it has left")
                leaves.cancel()
                await asyncio.to_thread(eventually, lambda: health.watchers.total() == 2, "one less")
                another = watch(health_pb2.HealthCheckRequest(), timeout=60)
                assert (await another.read()).status == NOT_SERVING
                health.say(serving=True)
                assert (await another.read()).status == SERVING
                health.say(serving=False)
                assert (await another.read()).status == NOT_SERVING
    finally:
        await server.stop(0)


def test_who_asks_for_no_metrics_keeps_no_thread(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def threads() -> int:
        return sum("process_request_thread" in each.name for each in threading.enumerate())

    monkeypatch.setattr(transport, "BODY_SECONDS", 3)
    port = free_port()
    transport.show_metrics(port)
    idle = [socket.create_connection((LOOPBACK, port), timeout=30) for _ in range(5)]
    eventually(lambda: threads() == len(idle), "a thread for each")
    for each in idle:
        with each:
            assert each.recv(1) == b""
    eventually(lambda: not threads(), "none left")
    assert requests.get(f"http://{LOOPBACK}:{port}/metrics", timeout=30).status_code == 200
    assert capfd.readouterr().err == ""


def test_health_knows_the_server_and_the_service(client: GrpcClient) -> None:
    assert health_of(client.channel) == SERVING
    assert health_of(client.channel, "llm.v1.LLMService") == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health_of(client.channel, "llm.v1.Nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_tells_the_whole_contract(client: GrpcClient) -> None:
    database = ProtoReflectionDescriptorDatabase(client.channel)
    assert {"llm.v1.LLMService", "grpc.health.v1.Health"} <= set(database.get_services())
    told = database.FindFileByName(pb.DESCRIPTOR.name)
    ours = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(ours)
    assert told == ours


def test_metrics_count_calls_by_code(client: GrpcClient, grpc_server: launch.Server) -> None:
    def count(code: str) -> float:
        return metric(grpc_server.metrics, "servebook_grpc_calls_total", method="Generate", code=code)

    client.generate("x", max_tokens=1)
    with pytest.raises(grpc.RpcError):
        client.generate("")
    good, bad = count("OK"), count("INVALID_ARGUMENT")
    client.generate("x", max_tokens=1)
    with pytest.raises(grpc.RpcError):
        client.generate("")
    eventually(lambda: (count("OK"), count("INVALID_ARGUMENT")) == (good + 1, bad + 1), "both counted")


# A server of its own: TLS, certificates, keys, its queue, its end


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def starting(certificates: Certificates) -> Iterator[Future[launch.Server]]:
    """A server with mutual TLS, a key, and room for 4 calls, once it is ready; the last test of it ends it."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(
            serve,
            "grpc",
            instance=GUARDED,
            api_key=KEY,
            tls_cert=certificates.server_cert,
            tls_key=certificates.server_key,
            tls_client_ca=certificates.ca,
            engine_args="--max-calls 4 --grace 60",
        )


@pytest.fixture(scope="module")
def guarded(starting: Future[launch.Server]) -> launch.Server:
    return starting.result()


KEY = "a key for a test"
GUARDED = "grpc-guarded"


def credentials_of(certificates: Certificates, with_certificate: bool = True) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=certificates.ca.read_bytes(),
        private_key=certificates.client_key.read_bytes() if with_certificate else None,
        certificate_chain=certificates.client_cert.read_bytes() if with_certificate else None,
    )


@pytest.fixture
def friend(guarded: launch.Server, certificates: Certificates) -> Iterator[GrpcClient]:
    with GrpcClient(guarded.grpc, api_key=KEY, credentials=credentials_of(certificates)) as client:
        yield client


def test_one_that_starts_says_so(
    starting: Future[launch.Server], certificates: Certificates, settings: Settings
) -> None:
    """The first of its tests, before any has waited for it: health and callers are answered while the model loads."""

    def address() -> str:
        endpoints = {entry["name"]: entry["endpoints"] for entry in launch.status(settings)}
        return str(endpoints.get(GUARDED, {}).get("grpc", ""))

    eventually(lambda: bool(address()), "a port", IDLE_SECONDS)
    with_key = [("authorization", f"Bearer {KEY}")]
    often = [(f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("initial", "min", "max")]
    with grpc.secure_channel(address(), credentials_of(certificates), often) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        # Its port is not open yet, and then for a few seconds only before it is ready.
        first = health.Check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)
        assert first.status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub_on(channel).Generate(pb.GenerateRequest(prompt="x"), timeout=60, metadata=with_key)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "ENGINE_STARTING"
        starting.result(timeout=settings.start_timeout)
        assert health_of(channel) == SERVING


def test_key_and_certificate_open_the_server(friend: GrpcClient) -> None:
    assert friend.generate("x", max_tokens=1).tokens == 1
    assert next(friend.stream("x", max_tokens=1)).finish_reason == "length"


async def test_key_and_certificate_open_it_for_asyncio(guarded: launch.Server, certificates: Certificates) -> None:
    async with GrpcAioClient(guarded.grpc, api_key=KEY, credentials=credentials_of(certificates)) as aio:
        assert (await aio.generate("x", max_tokens=1)).tokens == 1
        assert [piece.finish_reason async for piece in aio.stream("x", max_tokens=1)] == ["length"]


@pytest.mark.parametrize("key", [None, "", "another key", f"{KEY} "])
def test_without_the_key_only_health_answers(guarded: launch.Server, certificates: Certificates, key: str) -> None:
    with GrpcClient(guarded.grpc, api_key=key, credentials=credentials_of(certificates)) as stranger:
        for ask in (
            lambda: stranger.generate("x", max_tokens=1),
            lambda: next(stranger.stream("x", max_tokens=1)),
            lambda: ProtoReflectionDescriptorDatabase(stranger.channel).get_services(),
            lambda: list(any_method(stranger.channel, "Nothing")(b"", timeout=60)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                ask()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert KEY not in str(caught.value)
        assert health_of(stranger.channel) == SERVING


def test_no_certificate_another_authority_or_no_tls_at_all(
    guarded: launch.Server, certificates: Certificates, tmp_path: Path
) -> None:
    other = make_certificates(tmp_path)
    for channel in (
        grpc.secure_channel(guarded.grpc, credentials_of(certificates, with_certificate=False)),
        grpc.secure_channel(guarded.grpc, credentials_of(other)),
        grpc.insecure_channel(guarded.grpc),
    ):
        with channel, pytest.raises(grpc.RpcError) as caught:
            health_of(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_full_queue_says_when_to_come_back(friend: GrpcClient, guarded: launch.Server) -> None:
    request = pb.StreamGenerateRequest(prompt="Once", sampling=FOREVER)
    calls = [stub_on(friend.channel).StreamGenerate(request, timeout=120) for _ in range(4)]
    for call in calls:
        next(call)
    with pytest.raises(grpc.RpcError) as caught:
        friend.generate("x", max_tokens=1)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(caught.value, error_details_pb2.RetryInfo).retry_delay.seconds == 1
    assert next(calls[0]).sequence == 1, "those inside go on"
    for call in calls:
        call.cancel()
    eventually(lambda: is_idle(guarded), "idle", IDLE_SECONDS)
    assert friend.generate("x", max_tokens=1).tokens == 1


def is_refused(client: GrpcClient) -> bool:
    """Whether a new call is turned away; one that comes in the same moment as the signal may still be taken."""
    try:
        return not client.generate("x", max_tokens=1, timeout=30)
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAVAILABLE)


@pytest.mark.survives(
    "SIGTERM with streams open", "grpc", lost="nothing that ends in the grace time; new calls are refused"
)
def test_sigterm_lets_open_calls_finish_and_refuses_new_ones(friend: GrpcClient, guarded: launch.Server) -> None:
    watch = health_pb2_grpc.HealthStub(friend.channel).Watch(health_pb2.HealthCheckRequest(), timeout=120)
    assert next(watch).status == SERVING
    pace = measure_pace(lambda n: friend.generate("Once", max_tokens=n, sampling=FOREVER))
    tokens = pace.tokens(2, at_least=60)  # still under way when the signal comes, and done within the grace time
    request = pb.StreamGenerateRequest(prompt="Once", max_tokens=tokens, sampling=FOREVER)
    calls = [stub_on(friend.channel).StreamGenerate(request, timeout=60) for _ in range(3)]
    for call in calls:
        next(call)
    process = psutil.Process(guarded.pid)
    family = [process, *process.children(recursive=True)]
    process.terminate()
    assert next(watch).status == NOT_SERVING
    eventually(lambda: is_refused(friend), "new calls refused", IDLE_SECONDS)
    for call in calls:
        last = list(call)[-1]
        assert last.is_finished
        assert last.usage.completion_tokens == tokens
    _, alive = psutil.wait_procs(family, timeout=IDLE_SECONDS)
    assert not alive
    said = guarded.tail(50)
    assert '"event": "stopped"' in said
    assert "Traceback" not in said


@pytest.mark.ends("grpc")
def test_a_dead_engine_is_told_to_every_caller_and_to_health(grpc_server: launch.Server) -> None:
    with grpc.insecure_channel(grpc_server.grpc) as channel:
        stub = stub_on(channel)
        assert health_of(channel) == SERVING
        request = pb.StreamGenerateRequest(prompt="Once", sampling=FOREVER)
        streams = [stub.StreamGenerate(request, timeout=60) for _ in range(4)]
        unary = [stub.Generate.future(pb.GenerateRequest(prompt="Once", sampling=FOREVER)) for _ in range(4)]
        for stream in streams:
            next(stream)
        eventually(lambda: running(grpc_server) == 8, "8 requests in the engine", IDLE_SECONDS)
        [core] = [child for child in psutil.Process(grpc_server.pid).children() if "EngineCore" in child.name()]
        core.kill()
        for call in (*streams, *unary):
            with pytest.raises(grpc.RpcError) as caught:
                _ = call.result(timeout=60) if call in unary else list(call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "ENGINE_DEAD"
        eventually(lambda: health_of(channel) == NOT_SERVING, "health turned")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(pb.GenerateRequest(prompt="x"), timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# What starts not at all


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--host", "0.0.0.0"], "opens the server to the network"),
        (["--tls-cert", "a.pem"], "go together"),
        (["--tls-cert", "no.pem", "--tls-key", "no.key", "--grpc-port", str(free_port())], "TLS files"),
    ],
)
def test_an_unsafe_start_is_refused(words: list[str], problem: str) -> None:
    command = [sys.executable, "-m", "servebook.ways.custom_grpc.server", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode != 0
    assert problem in ended.stderr


@pytest.mark.parametrize(("taken", "free"), [("grpc", "metrics"), ("metrics", "grpc")])
def test_a_taken_port_is_refused(grpc_server: launch.Server, taken: str, free: str) -> None:
    port = grpc_server.endpoints[taken].rsplit(":", 1)[1]
    ports = [f"--{taken}-port", port, f"--{free}-port", str(free_port())]
    command = [sys.executable, "-m", "servebook.ways.custom_grpc.server", *ports]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    assert f"Choose another --{taken}-port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_not_for_this_user_is_told_as_that(low_ports_barred: None) -> None:
    with pytest.raises(ServebookError, match=r"Cannot listen on 127.0.0.1:80: .*\n→ Choose another --grpc-port, from"):
        transport.require_port("127.0.0.1", 80, "--grpc-port")


# From what one writes first to this server


@pytest.fixture(scope="class")
def steps() -> Iterator[Ladder]:
    with ladder() as steps:
        yield steps


class Letters:
    """A renderer to which each letter is a token."""

    async def render_cmpl_async(self, prompts: list[dict[str, str]]) -> list[dict[str, Any]]:
        return [{"type": "token", "prompt_token_ids": [ord(each) for each in given["prompt"]]} for given in prompts]


class Echo:
    """An engine that says the tokens which it is given, and takes no text."""

    renderer = Letters()

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        completion = SimpleNamespace(text="".join(map(chr, prompt["prompt_token_ids"])))
        yield SimpleNamespace(outputs=[completion], finished=True)


@pytest.mark.parametrize("step", ["step_1_stream", "step_2_cancel", "step_3_status", "step_4_limits"])
async def test_every_step_hands_the_engine_tokens(step: str) -> None:
    """What vLLM tokenizes itself, it warns, it will not for much longer."""
    server, port = await import_module(f"servebook.ways.custom_grpc.steps.{step}").start(Echo())
    async with GrpcAioClient(f"127.0.0.1:{port}") as aio:
        assert [piece.text async for piece in aio.stream("Once", timeout=30, max_tokens=4)] == ["Once"]
    stopping = server.stop(None)
    await (stopping if inspect.isawaitable(stopping) else asyncio.to_thread(stopping.wait))


class TestSteps:
    """A class, for its engine to end with the last of these tests: memory is short."""

    def written_for_nobody(self, steps: Ladder, step: int, max_tokens: int) -> float:
        """How many answers the engine writes to the end when a caller leaves after the first message."""

        def figure(name: str, **labels: str) -> float:
            return metric(steps.metrics, name, **labels)

        before = figure("vllm:request_success_total", finished_reason="length")
        with GrpcClient(steps.grpc[step]) as client:
            stream = client.stream("Once", max_tokens=max_tokens, sampling=FOREVER)
            assert next(stream).finish_reason is None
            stream.close()  # this cancels the call
        eventually(lambda: not figure("vllm:num_requests_running"), "the engine idle", IDLE_SECONDS)
        return figure("vllm:request_success_total", finished_reason="length") - before

    @pytest.mark.parametrize("step", [1, 2, 3, 4])
    def test_every_step_streams(self, steps: Ladder, step: int) -> None:
        """Two tokens are a stream; step 3 has four seconds for it, on a busy machine too."""
        with GrpcClient(steps.grpc[step]) as client:
            pieces = list(client.stream("The capital of France is", max_tokens=2, temperature=0))
        assert "Paris" in "".join(piece.text for piece in pieces)
        assert [piece.finish_reason is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]

    def test_step_1_writes_on_for_who_has_left(self, steps: Ladder) -> None:
        assert self.written_for_nobody(steps, 1, max_tokens=100) == 1

    def test_step_2_stops_but_calls_every_fault_unknown(self, steps: Ladder) -> None:
        assert self.written_for_nobody(steps, 2, max_tokens=2000) == 0
        with GrpcClient(steps.grpc[2]) as client, pytest.raises(grpc.RpcError) as caught:
            list(client.stream("Hello", max_tokens=0))
        assert caught.value.code() is grpc.StatusCode.UNKNOWN

    def test_step_3_says_whose_fault_it_was_but_not_whether_it_serves(self, steps: Ladder) -> None:
        with GrpcClient(steps.grpc[3]) as client:
            for prompt, max_tokens in (("Hello", 0), ("word " * 5000, 1)):
                with pytest.raises(grpc.RpcError) as caught:
                    list(client.stream(prompt, max_tokens=max_tokens))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.RpcError) as caught:
                health_of(client.channel)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_step_3_allows_no_call_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With an engine that never ends: a fast one is at the end of its context in four seconds."""
        from servebook.ways.custom_grpc.steps import step_3_status  # imports vLLM

        ended = []

        class Stuck:
            renderer = Letters()

            async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
                try:
                    yield SimpleNamespace(outputs=[SimpleNamespace(text="x")], finished=False)
                    await asyncio.Event().wait()
                finally:
                    ended.append(request_id)

        assert step_3_status.MOST_SECONDS == 4
        monkeypatch.setattr(step_3_status, "MOST_SECONDS", 0.2)
        server, port = await step_3_status.start(Stuck())
        async with GrpcAioClient(f"127.0.0.1:{port}") as aio:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [piece async for piece in aio.stream("Once", max_tokens=2000)]
        await server.stop(None)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert caught.value.details() == "A call may take 0.2 s here."
        assert len(ended) == 1

    def test_step_4_has_limits_but_seems_dead_when_it_is_full(self, steps: Ladder) -> None:
        with GrpcClient(steps.grpc[4]) as client:
            assert health_of(client.channel) == SERVING
            database = ProtoReflectionDescriptorDatabase(client.channel)
            assert set(database.get_services()) == {"grpc.health.v1.Health", "llm.v1.LLMService"}
            with pytest.raises(grpc.RpcError) as caught:
                list(client.stream("x" * 70_000, max_tokens=1))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            # Those who watch its health hold its places for as long as this test wants, and cost the engine nothing.
            watch = health_pb2_grpc.HealthStub(client.channel).Watch
            four = [watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(4)]
            for call in four:
                assert next(call).status == SERVING
            for refused in (lambda: list(client.stream("Hello", max_tokens=1)), lambda: health_of(client.channel)):
                with pytest.raises(grpc.RpcError) as caught:
                    refused()
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            for call in four:
                call.cancel()
