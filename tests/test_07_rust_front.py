"""Chapter 7: vLLM's Rust front end, text and token ids over gRPC, and REST on the other port."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import requests
from desk import eventually
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from servebook import launch
from servebook.engine.model import model_path
from servebook.engine.rust_front import rust_front
from servebook.errors import LaunchError
from servebook.lab.taps.http import Exchange
from servebook.launch import find_server
from servebook.processes import free_port
from servebook.protos.vllm import inference_pb2 as pb
from servebook.settings import Settings, load_settings
from servebook.ways.client import Answer, Piece
from servebook.ways.custom_grpc.certificates import Certificates, make_certificates
from servebook.ways.vllm_native_grpc.hop import router_over_grpc
from servebook.ways.vllm_native_grpc.inference_client import (
    SERVICE,
    InferenceClient,
    read_answer,
    read_piece,
    request,
)
from servebook.workbook.notebook import measure_pace

PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
ENDLESS: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
KOREAN = "안녕하세요, 세계 👋🏽"
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
KEY = "a key for a test"
engine = pytest.mark.engine


@pytest.fixture(scope="module")
def client(vllm_rs: launch.Server) -> Iterator[InferenceClient]:
    with InferenceClient(vllm_rs.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def rest(vllm_rs: launch.Server) -> dict[str, Any]:
    """The greedy answer of the other port, with its token ids."""
    body = {"model": vllm_rs.model, "prompt": PROMPT, "return_token_ids": True, **GREEDY}
    return dict(requests.post(f"{vllm_rs.url}/v1/completions", json=body, timeout=60).json())


@pytest.fixture(scope="module")
def right(rest: dict[str, Any]) -> Answer:
    """The same as an Answer."""
    choice, usage = rest["choices"][0], rest["usage"]
    ids = tuple(choice["token_ids"])
    return Answer(choice["text"], usage["completion_tokens"], usage["prompt_tokens"], choice["finish_reason"], ids)


def running(server: launch.Server) -> int:
    """How many requests the engine works on."""
    lines = requests.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return int(float(next(line.split()[-1] for line in lines if line.startswith("vllm:num_requests_running"))))


def control(channel: grpc.Channel, method: str, message: bytes = b"") -> bytes:
    """A call of the other service, vllm.Control; most of its messages are empty."""
    call = channel.unary_unary(f"/vllm.Control/{method}", bytes, bytes)
    return bytes(call(message, timeout=60))


def refused(ask: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        ask()
    return caught.value


# One engine, two ports


def test_a_reason_that_is_not_told_is_no_error() -> None:
    """As by the other ways: it is empty."""
    untold = pb.Generated(text="a", finish_info=pb.FinishInfo())
    assert read_answer(pb.GenerateResponse(outputs=[untold])).finish_reason == ""
    assert read_piece(untold).finish_reason == ""


@pytest.mark.parametrize(
    "two", [{"regex": "a", "json": "{}"}, {"choice": ["a"], "grammar": "g"}, {"choice": ["a"], "regex": ""}]
)
def test_of_two_constraints_none_is_dropped(two: dict[str, Any]) -> None:
    """The message keeps one of them, and says nothing of the others: the answer was of another form."""
    with pytest.raises(TypeError, match="at most one of choice, regex, json and grammar"):
        request(PROMPT, **two)
    assert request(PROMPT, choice=[], regex="a").decoding.regex == "a"


@engine
def test_text_ids_and_usage_are_those_of_rest(client: InferenceClient, right: Answer) -> None:
    assert client.generate(PROMPT, token_ids=True, **GREEDY) == right


@engine
def test_token_ids_in(client: InferenceClient, rest: dict[str, Any], right: Answer) -> None:
    ids = rest["choices"][0]["prompt_token_ids"]
    assert client.generate(ids, token_ids=True, **GREEDY) == right


@engine
def test_ids_come_only_where_they_are_asked_for(client: InferenceClient, right: Answer) -> None:
    assert client.generate(PROMPT, **GREEDY).token_ids == ()
    message = request(PROMPT, token_ids=True, **GREEDY)
    message.output.text = False
    (output,) = client.stub.Generate(message, timeout=60).outputs
    assert (output.text, tuple(output.token_ids)) == ("", right.token_ids)


@engine
def test_the_stream_is_the_prompt_then_a_message_a_token_then_the_reason(
    client: InferenceClient, right: Answer
) -> None:
    first, *messages = client.stub.GenerateStream(request(PROMPT, token_ids=True, **GREEDY), timeout=60)
    assert (first.prompt_info.num_prompt_tokens, list(first.outputs)) == (5, [])
    assert not any(message.HasField("prompt_info") for message in messages)
    outputs = [output for message in messages for output in message.outputs]
    assert [output.HasField("finish_info") for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].finish_info.num_output_tokens == sum(output.num_tokens for output in outputs) == 12
    assert tuple(each for output in outputs for each in output.token_ids) == right.token_ids


@engine
def test_pieces_add_up_to_the_answer(client: InferenceClient, right: Answer) -> None:
    pieces = list(client.stream(PROMPT, **GREEDY))
    assert "".join(piece.text for piece in pieces) == right.text
    assert sum(piece.tokens for piece in pieces) == right.tokens
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


@engine
def test_characters_come_whole(client: InferenceClient) -> None:
    pieces = list(client.stream("Say hello: ", choice=[KOREAN], max_tokens=80))
    assert "".join(piece.text for piece in pieces) == KOREAN
    assert Piece("", 1) in pieces, "no character needed a second token, so this proves nothing"
    assert not any("\ufffd" in piece.text for piece in pieces)


# The end of an answer


@engine
def test_a_stop_string_ends_it_and_is_left_out(client: InferenceClient) -> None:
    answer = client.generate(PROMPT, stop=["."], **GREEDY)
    assert (answer.finish_reason, answer.text) == ("stop", " Paris")


@engine
def test_without_max_tokens_it_goes_on(client: InferenceClient) -> None:
    """REST's default of 16 tokens is not gRPC's."""
    pieces = client.stream("Once upon a time", **ENDLESS)
    assert sum(piece.tokens for piece, _ in zip(pieces, range(25), strict=False)) > 16
    pieces.close()


@engine
def test_leaving_the_loop_stops_the_engine(client: InferenceClient, vllm_rs: launch.Server) -> None:
    pieces = client.stream("Once upon a time", **ENDLESS)
    next(pieces)
    eventually(lambda: running(vllm_rs) == 1, "the request in the engine")
    pieces.close()
    eventually(lambda: running(vllm_rs) == 0, "an idle engine")


@engine
def test_a_deadline_stops_the_engine(client: InferenceClient, vllm_rs: launch.Server) -> None:
    pace = measure_pace(lambda tokens: client.generate("Once", max_tokens=tokens, ignore_eos=True))
    seconds = pace.seconds(500, at_most=0.3)  # long before the context is full, on any machine
    error = refused(lambda: list(client.stream("Once upon a time", timeout=seconds, **ENDLESS)))
    # CANCELLED where the server's own clock is first.
    assert error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
    eventually(lambda: running(vllm_rs) == 0, "an idle engine")


@engine
def test_anybody_may_abort_by_the_id(client: InferenceClient) -> None:
    messages: Any = client.stub.GenerateStream(request("Once", request_id="to-be-aborted", **ENDLESS), timeout=60)
    for _ in range(2):  # about the prompt, and a first token
        next(messages)
    control(client.channel, "Abort", b"\n\x0dto-be-aborted")  # field 1: the id
    *_, last = messages
    assert last.outputs[0].finish_info.finish_reason == pb.FINISH_REASON_ABORTED


# Behind a router


@engine
def test_vllms_router_asks_it_over_grpc(vllm_rs: launch.Server, rest: dict[str, Any], right: Answer) -> None:
    """A chat and token ids come through; what this path lacks, chapter 07 says, and the router refuses."""
    chat = {"model": vllm_rs.model, "messages": [{"role": "user", "content": PROMPT}], **GREEDY}
    ids = {"model": vllm_rs.model, "prompt": rest["choices"][0]["prompt_token_ids"], **GREEDY}

    def ask(url: str, path: str, body: dict[str, Any]) -> requests.Response:
        return requests.post(f"{url}/v1/{path}", json=body, timeout=60)

    with router_over_grpc(vllm_rs, load_settings()) as router:
        ours, theirs = (ask(url, "chat/completions", chat).json() for url in (router, vllm_rs.url))
        assert ours["choices"][0]["message"]["content"] == theirs["choices"][0]["message"]["content"]
        assert ours["choices"][0]["finish_reason"] == theirs["choices"][0]["finish_reason"]
        stream = ask(router, "chat/completions", chat | {"stream": True}).content
        events = Exchange("POST", "", {}, None, 0, answer=stream).events()
        pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(pieces) == theirs["choices"][0]["message"]["content"]
        answer = ask(router, "completions", ids).json()
        assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == (right.text, right.tokens)
        refused = {
            "token-id prompt": ("completions", ids | {"prompt": PROMPT}),
            "n > 1": ("chat/completions", chat | {"n": 2}),
            "logprobs": ("chat/completions", chat | {"logprobs": True}),
            "tool": ("chat/completions", chat | {"tools": [TOOL]}),
        }
        for word, (path, body) in refused.items():
            said = ask(router, path, body)
            assert (said.status_code, word in said.text) == (400, True), said.text


# Structured output


@engine
def test_json_by_schema(client: InferenceClient) -> None:
    properties = {"age": {"enum": [7, 8]}}
    schema = {"type": "object", "properties": properties, "required": ["age"], "additionalProperties": False}
    answer = client.generate("A person as JSON: ", json=json.dumps(schema), temperature=0)
    assert json.loads(answer.text)["age"] in (7, 8)


@engine
@pytest.mark.parametrize("constraint", [{"regex": "(yes|no)"}, {"grammar": 'root ::= "yes" | "no"'}])
def test_regex_and_grammar(client: InferenceClient, constraint: dict[str, str]) -> None:
    assert client.generate("Is water wet? ", **GREEDY | constraint).text in ("yes", "no")


# Mistakes


@engine
@pytest.mark.parametrize(
    ("prompt", "sampling", "code", "details"),
    [
        ("", {}, "INVALID_ARGUMENT", "empty prompt"),
        ([], {}, "INVALID_ARGUMENT", "at least one prompt token"),
        ([49_999_999], {}, "INVALID_ARGUMENT", "out of vocabulary"),
        ("word " * 3000, {}, "INVALID_ARGUMENT", "maximum context length"),
        ("x", {"temperature": -1}, "INVALID_ARGUMENT", "temperature must be in [0, 2]"),
        ("x", {"top_p": 7}, "INVALID_ARGUMENT", "top_p must be in (0, 1]"),
        ("x", {"json": "{"}, "INVALID_ARGUMENT", "invalid json schema"),
        ("x", {"grammar": "(("}, "INTERNAL", "engine failed"),
        ("x", {"model": "another"}, "NOT_FOUND", "`another` not found"),
    ],
)
def test_bad_requests(
    client: InferenceClient, prompt: str | list[int], sampling: dict[str, Any], code: str, details: str
) -> None:
    error = refused(lambda: client.generate(prompt, **{"max_tokens": 2} | sampling))
    assert (error.code().name, details in str(error.details())) == (code, True), error
    assert client.generate(PROMPT, max_tokens=1).tokens == 1, "the engine is well"


@engine
def test_no_prompt_and_no_sense(client: InferenceClient) -> None:
    assert refused(lambda: client.stub.Generate(pb.GenerateRequest(), timeout=60)).code() is (
        grpc.StatusCode.INVALID_ARGUMENT
    )
    call = client.channel.unary_unary(f"/{SERVICE}/Generate", bytes, bytes)
    assert refused(lambda: call(b"\xff\xff", timeout=60)).code() is grpc.StatusCode.INTERNAL


# What the server says of itself


@engine
def test_health_and_no_reflection(client: InferenceClient) -> None:
    assert all(client.serving(service) for service in ("", SERVICE, "vllm.Control"))
    assert refused(lambda: client.serving("llm.v1.LLMService")).code() is grpc.StatusCode.NOT_FOUND
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    assert refused(lambda: list(stub.ServerReflectionInfo(asked, timeout=60))).code() is grpc.StatusCode.UNIMPLEMENTED


@engine
def test_it_is_the_rust_front(vllm_rs: launch.Server) -> None:
    models = requests.get(f"{vllm_rs.url}/v1/models", timeout=60).json()
    assert models["data"][0]["owned_by"] == "vllm-frontend-rs"
    assert front_of(vllm_rs).memory_info().rss < 300 * 2**20


def test_it_stays_on_this_machine() -> None:
    with pytest.raises(LaunchError, match="vllm-rs does not check an API key"):
        launch.serve("vllm-rs", instance="vllm-rs-open", host="0.0.0.0", api_key=KEY)


# A server of its own: TLS, certificates, a key, its end


def front_of(server: launch.Server) -> psutil.Process:
    """The Rust process; the engine's is another."""
    return next(child for child in psutil.Process(server.pid).children(recursive=True) if child.name() == "vllm-rs")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def guarded(certificates: Certificates) -> launch.Server:
    """A server with mutual TLS and a key; the last test of it ends it."""
    return launch.serve(
        "vllm-rs",
        instance="vllm-rs-guarded",
        api_key=KEY,
        tls_cert=certificates.server_cert,
        tls_key=certificates.server_key,
        tls_client_ca=certificates.ca,
    )


@pytest.fixture
def friend(guarded: launch.Server, certificates: Certificates) -> Iterator[InferenceClient]:
    credentials = grpc.ssl_channel_credentials(
        root_certificates=certificates.ca.read_bytes(),
        private_key=certificates.client_key.read_bytes(),
        certificate_chain=certificates.client_cert.read_bytes(),
    )
    with InferenceClient(guarded.grpc, credentials=credentials) as client:
        yield client


@engine
def test_rest_asks_for_the_key_and_grpc_does_not(
    guarded: launch.Server, friend: InferenceClient, certificates: Certificates
) -> None:
    own = (str(certificates.client_cert), str(certificates.client_key))
    for key, status in ((None, 401), ("wrong", 401), (KEY, 200)):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"https://{guarded.http}/v1/models"
        answer = requests.get(url, headers=headers, verify=str(certificates.ca), cert=own, timeout=60)
        assert answer.status_code == status
    assert friend.generate(PROMPT, max_tokens=1).tokens == 1
    assert friend.stub.Generate.with_call(request(PROMPT, max_tokens=1), timeout=60)[1].code() is grpc.StatusCode.OK
    control(friend.channel, "PauseGeneration")
    control(friend.channel, "ResumeGeneration")


@engine
def test_tls_is_asked_for_on_both_ports(guarded: launch.Server, certificates: Certificates) -> None:
    with pytest.raises(requests.ConnectionError):
        requests.get(f"https://{guarded.http}/health", verify=str(certificates.ca), timeout=60)
    without = grpc.ssl_channel_credentials(root_certificates=certificates.ca.read_bytes())
    for credentials in (None, without):
        with InferenceClient(guarded.grpc, credentials=credentials) as stranger:
            assert refused(stranger.serving).code() is grpc.StatusCode.UNAVAILABLE


@engine
def test_status_knows_it(guarded: launch.Server) -> None:
    (entry,) = [entry for entry in launch.status() if entry["name"] == guarded.name]
    assert (entry["state"], sorted(entry["endpoints"])) == ("ready", ["grpc", "http"])


@engine
def test_a_dead_front_ends_the_stream_and_the_server(guarded: launch.Server, friend: InferenceClient) -> None:
    pieces = friend.stream("Once upon a time", timeout=60, **ENDLESS)
    next(pieces)
    family = psutil.Process(guarded.pid).children(recursive=True)
    front_of(guarded).send_signal(signal.SIGKILL)
    assert refused(lambda: list(pieces)).code() is grpc.StatusCode.UNAVAILABLE
    eventually(lambda: not any(process.is_running() for process in family), "the end of every process", seconds=40)
    (entry,) = [entry for entry in launch.status() if entry["name"] == guarded.name]
    assert entry["state"] == "failed"
    launch.down(guarded.name)


@pytest.mark.lifetime
@pytest.mark.parametrize("mutual", [False, True])
def test_ready_with_tls_and_with_mutual_tls(certificates: Certificates, settings: Settings, mutual: bool) -> None:
    """Asked of the same program without an engine, which it calls `render`."""
    port = free_port()
    command: list[str | Path] = [
        rust_front(settings, lambda _: None),
        "render",
        model_path(settings),
        "--port",
        str(port),
    ]
    files: list[str | Path] = ["--ssl-certfile", certificates.server_cert, "--ssl-keyfile", certificates.server_key]
    ask: list[str | Path] = ["--ssl-ca-certs", certificates.ca, "--ssl-cert-reqs", "2"] if mutual else []
    ready, at = find_server("vllm-rs").ready, {"http": f"127.0.0.1:{port}"}
    assert not ready(at)
    with subprocess.Popen([*command, *files, *ask]) as server:
        try:
            eventually(lambda: ready(at), "a server that is ready")
            assert all(ready(at) for _ in range(20)), "sometimes only"
        finally:
            server.kill()
    assert not ready(at)
