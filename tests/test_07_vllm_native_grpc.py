"""Chapter 7: vLLM's own gRPC server in Python, which speaks token ids, and REST's endpoint that does the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
import requests
from desk import eventually
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from servebook import launch
from servebook.engine.model import model_path
from servebook.errors import LaunchError
from servebook.lab.checks.c07_vllm_native_grpc import _judge_answer, _judge_text
from servebook.lab.feedback import NotYet
from servebook.lab.taps.grpc import Call
from servebook.settings import load_settings
from servebook.ways.client import Answer
from servebook.ways.vllm_native_grpc.aio_client import VllmGrpcAioClient
from servebook.ways.vllm_native_grpc.client import ENGINE, VllmGrpcClient, decoder_after
from servebook.workbook.notebook import measure_pace

PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
ENDLESS: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True}
KOREAN = "안녕하세요, 세계 👋🏽"
engine = pytest.mark.engine


@pytest.fixture(scope="module")
def client(vllm_grpc: launch.Server) -> Iterator[VllmGrpcClient]:
    with VllmGrpcClient(vllm_grpc.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def rest_choice(vllm: launch.Server) -> dict[str, Any]:
    """The greedy answer of vLLM's own REST endpoint, with its token ids."""
    body = {"model": vllm.model, "prompt": PROMPT, "return_token_ids": True, **GREEDY}
    return dict(requests.post(f"{vllm.url}/v1/completions", json=body, timeout=60).json()["choices"][0])


# Parity


@engine
def test_greedy_text_and_ids_are_those_of_rest(client: VllmGrpcClient, rest_choice: dict[str, Any]) -> None:
    assert client.tokenizer.encode(PROMPT).ids == rest_choice["prompt_token_ids"]
    answer = client.generate(PROMPT, **GREEDY)
    assert answer == Answer(rest_choice["text"], 12, 5, "length", tuple(rest_choice["token_ids"]))


@engine
def test_stream_is_chunks_and_one_complete(client: VllmGrpcClient) -> None:
    messages = list(client.stream_ids(client.tokenizer.encode(PROMPT).ids, ignore_eos=True, **GREEDY))
    assert [message.WhichOneof("response") for message in messages[:-1]] == ["chunk"] * (len(messages) - 1)
    assert sum(len(message.chunk.token_ids) for message in messages) == 12
    complete = messages[-1].complete
    assert (complete.finish_reason, complete.prompt_tokens) == ("length", 5)
    # In a stream it counts the last step only: whoever bills by this field bills too little.
    assert complete.completion_tokens == len(messages[-2].chunk.token_ids)


@engine
def test_unary_style_call_is_one_complete_with_all_ids(client: VllmGrpcClient, rest_choice: dict[str, Any]) -> None:
    request = pb.GenerateRequest(
        request_id="whole",
        tokenized=pb.TokenizedInput(input_ids=client.tokenizer.encode(PROMPT).ids),
        sampling_params=pb.SamplingParams(**GREEDY),
    )
    (message,) = client.stub.Generate(request, timeout=60)
    assert list(message.complete.output_ids) == rest_choice["token_ids"]


# Text is the client's work


@engine
def test_no_broken_characters_on_the_way(client: VllmGrpcClient) -> None:
    pieces = list(
        client.stream("Say hello: ", temperature=0, max_tokens=80, choice=pb.ChoiceConstraint(choices=[KOREAN]))
    )
    assert "".join(piece.text for piece in pieces) == KOREAN
    assert not any("\ufffd" in piece.text for piece in pieces)
    one_by_one = "".join(client.tokenizer.decode([each]) for piece in pieces for each in piece.token_ids)
    assert "\ufffd" in one_by_one, "the characters came whole anyway, so this proves nothing"


@engine
def test_a_stop_string_is_named_and_still_in_the_text(client: VllmGrpcClient) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "stop": ["."]}
    answer = client.generate(PROMPT, **asked)
    assert answer.finish_reason == "stop"
    assert answer.text.endswith("."), "it is cut now, as in every other way: `stream` and `generate` say otherwise"
    *_, last = client.stream_ids(client.tokenizer.encode(PROMPT).ids, **asked)
    assert last.complete.matched_stop_str == "."


def like_llama() -> Tokenizer:
    """A tokenizer whose decoder drops a blank in front, as Llama's, Mistral's and Gemma's do."""
    words = ("<unk>", "▁The", "▁capital", "▁is", "▁Paris", ".")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


async def test_a_blank_in_front_is_part_of_the_answer() -> None:
    tokenizer = like_llama()
    messages = [pb.GenerateResponse(chunk=pb.GenerateStreamChunk(token_ids=[each])) for each in (4, 5)]
    messages.append(pb.GenerateResponse(complete=pb.GenerateComplete(finish_reason="stop")))
    server = grpc.aio.server()

    class Engine(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
        async def Generate(self, request: pb.GenerateRequest, _: Any) -> AsyncIterator[pb.GenerateResponse]:
            assert list(request.tokenized.input_ids) == [1, 2, 3]
            for message in messages:
                yield message

    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(Engine(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        with VllmGrpcClient(address) as client:
            client.tokenizer = tokenizer
            answer = await asyncio.to_thread(client.generate, "The capital is")
            assert answer.text == " Paris."
        async with VllmGrpcAioClient(address) as aio_client:
            aio_client._tokenizer = tokenizer
            assert await aio_client.generate("The capital is") == answer
    finally:
        await server.stop(None)


@pytest.mark.parametrize("prompt", ["The capital is", "What does \ufffd mean?", "caf\ufffd", ""])
def test_an_answer_does_not_repeat_its_prompt(prompt: str) -> None:
    tokenizer = Tokenizer.from_file(str(model_path(load_settings()) / "tokenizer.json"))
    decoder = decoder_after(tokenizer.encode(prompt).ids, tokenizer)
    assert "".join(decoder.step(tokenizer, each) or "" for each in tokenizer.encode(" Paris.").ids) == " Paris."


def test_lab_07_takes_a_blank_in_front_and_goes_without() -> None:
    for pieces in ([" Paris", "."], ["Paris", "."]):
        _judge_text(like_llama(), [4, 5], pieces, "an answer", [1, 2, 3])
    with pytest.raises(NotYet):
        _judge_text(like_llama(), [4, 5], ["is Paris."], "an answer", [1, 2, 3])


def judged(tokenizer: Tokenizer, prompt: list[int], ids: list[int], text: object) -> None:
    """Judge 07.2's answer of these ids, which came in one chunk."""
    last = pb.GenerateComplete(finish_reason="length")
    messages = (pb.GenerateResponse(chunk=pb.GenerateStreamChunk(token_ids=ids)), pb.GenerateResponse(complete=last))
    call = Call("Generate", responses=[message.SerializeToString() for message in messages])
    got = {"text": text, "prompt_tokens": len(prompt), "completion_tokens": len(ids), "finish_reason": "length"}
    _judge_answer(prompt, call, got, tokenizer)


def test_lab_07_takes_the_text_of_an_incremental_detokenizer_for_the_whole() -> None:
    """After the prompt it keeps Llama's blank in front, and of a character that the limit cuts it gives nothing."""
    for text in (" Paris.", "Paris."):
        judged(like_llama(), [1, 2, 3], [4, 5], text)
    tokenizer = Tokenizer.from_file(str(model_path(load_settings()) / "tokenizer.json"))
    prompt, ids = tokenizer.encode(PROMPT).ids, tokenizer.encode("안녕 👋").ids[:-1]
    decoder = decoder_after(prompt, tokenizer)
    assert tokenizer.decode(ids).endswith("\ufffd")
    for text in (tokenizer.decode(ids), "".join(decoder.step(tokenizer, each) or "" for each in ids)):
        judged(tokenizer, prompt, ids, text)
    for wrong in ("".join(tokenizer.decode([each]) for each in ids), "안", None):
        with pytest.raises(NotYet, match="decode all ids together"):
            judged(tokenizer, prompt, ids, wrong)


# Abort, cancel, deadline


def begin_endless(client: VllmGrpcClient, request_id: str) -> Iterator[pb.GenerateResponse]:
    """An answer that would take a minute, after its first message."""
    messages = client.stream_ids(client.tokenizer.encode(PROMPT).ids, request_id=request_id, timeout=120, **ENDLESS)
    next(messages)
    return messages


def idle(client: VllmGrpcClient) -> bool:
    return int(client.load().num_running_reqs) == 0


@engine
def test_abort_by_id_ends_the_stream(client: VllmGrpcClient) -> None:
    messages = begin_endless(client, "to-be-aborted")
    client.abort("to-be-aborted")
    rest = list(messages)
    assert rest[-1].complete.finish_reason == "abort"
    assert sum(len(message.chunk.token_ids) for message in rest) < ENDLESS["max_tokens"] / 2
    eventually(lambda: idle(client), "an idle engine")


@engine
def test_leaving_the_loop_stops_the_engine(client: VllmGrpcClient) -> None:
    messages = begin_endless(client, "to-be-left")
    eventually(lambda: not idle(client), "the request in the engine")
    messages.close()  # type: ignore[attr-defined]
    eventually(lambda: idle(client), "an idle engine")


@engine
def test_deadline_stops_the_engine(client: VllmGrpcClient) -> None:
    pace = measure_pace(lambda n: client.generate(PROMPT, max_tokens=n, ignore_eos=True))
    with pytest.raises(grpc.RpcError) as caught:
        list(client.stream(PROMPT, timeout=pace.seconds(500, at_most=2), **ENDLESS))
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: idle(client), "an idle engine")


# What the server says of itself


@engine
def test_health_of_process_and_engine(client: VllmGrpcClient) -> None:
    assert client.serving("")
    assert client.serving(ENGINE)
    with pytest.raises(grpc.RpcError) as caught:
        client.serving("llm.v1.LLMService")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@engine
def test_model_and_server_info(client: VllmGrpcClient, vllm_grpc: launch.Server) -> None:
    info = client.model_info()
    assert info.served_model_name == vllm_grpc.model
    assert info.max_context_length == vllm_grpc.settings.max_model_len
    assert info.vocab_size == client.tokenizer.get_vocab_size()
    assert client.server_info().max_num_seqs == client.load().max_running_requests > 0


@engine
def test_load_counts_running_requests(client: VllmGrpcClient) -> None:
    streams = [begin_endless(client, f"load-{number}") for number in range(3)]
    eventually(lambda: client.load().num_running_reqs == 3, "three requests in the engine")
    assert client.load().token_usage > 0
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    eventually(lambda: idle(client), "an idle engine")


@engine
def test_reflection_lists_the_services(client: VllmGrpcClient) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=60)
    assert {service.name for service in answer.list_services_response.service} >= {ENGINE, "grpc.health.v1.Health"}


# Mistakes


@engine
@pytest.mark.parametrize(
    ("ids", "sampling", "details"),
    [
        ([], {}, "prompt"),
        ([0] * 3000, {}, "maximum"),
        ([49_999_999], {}, "out of vocabulary"),
        ([1], {"temperature": -1}, "temperature must be non-negative"),
        ([1], {"top_p": 7}, "top_p must be in (0, 1]"),
    ],
)
def test_bad_requests(client: VllmGrpcClient, ids: list[int], sampling: dict[str, Any], details: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(client.stream_ids(ids, **({"max_tokens": 4} | sampling)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details in str(caught.value.details())


@engine
def test_no_key_is_asked_for(vllm_grpc: launch.Server) -> None:
    """What vLLM's gRPC server lacks: it answers a caller without a key, and one with a wrong key."""
    with grpc.insecure_channel(vllm_grpc.grpc) as channel:
        call = channel.unary_unary(
            f"/{ENGINE}/GetModelInfo",
            request_serializer=pb.GetModelInfoRequest.SerializeToString,
            response_deserializer=pb.GetModelInfoResponse.FromString,
        )
        wrong = call(pb.GetModelInfoRequest(), metadata=(("authorization", "Bearer wrong"),), timeout=60)
    assert wrong.served_model_name == vllm_grpc.model


@pytest.mark.parametrize("name", ["vllm-grpc", "kserve"])
def test_server_without_keys_stays_on_this_machine(name: str) -> None:
    with pytest.raises(LaunchError, match=f"{name} does not check an API key"):
        launch.serve(name, instance=f"{name}-open", host="0.0.0.0", api_key="a-secret-of-this-test")


# The REST endpoint that does the same


@engine
def test_rest_token_endpoint_gives_the_same_ids(
    vllm: launch.Server, client: VllmGrpcClient, rest_choice: dict[str, Any]
) -> None:
    body = {"model": vllm.model, "token_ids": client.tokenizer.encode(PROMPT).ids, "sampling_params": GREEDY}
    answer = requests.post(f"{vllm.url}/inference/v1/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["token_ids"] == rest_choice["token_ids"]
    assert "text" not in choice


# Threads


@engine
def test_one_client_serves_many_threads(client: VllmGrpcClient) -> None:
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(client.generate(PROMPT, **GREEDY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answer.finish_reason for answer in answers] == ["length"] * 4


@engine
@pytest.mark.timeout(600)
def test_notebook(run_notebook: Callable[[str], None]) -> None:
    run_notebook("07_vllm_native_grpc")
