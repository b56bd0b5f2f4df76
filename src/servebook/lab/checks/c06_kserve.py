"""Checks of lab 06: V2's metadata, a request by hand, an answer by name, one client for two servers, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import requests
import tritonclient.grpc as v2
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from tritonclient.utils import InferenceServerException

from servebook.lab.feedback import NotYet, require
from servebook.lab.rest import answer_to, through
from servebook.lab.submission import Submission
from servebook.lab.taps.grpc import Call, GrpcTap
from servebook.lab.taps.http import Tap
from servebook.settings import TENSOR_MODEL_NAME as MODEL
from servebook.ways.kserve.client import tensor

PROMPT = "The capital of France is"
SERVERS = {"kserve": "KServe", "triton": "Triton"}


def check_06_1(submission: Submission) -> None:
    """The inputs of the model on two servers, of which one takes more; and a model that neither has."""
    signature = submission.function("signature")
    for name, title in SERVERS.items():
        with Tap(submission.server(name).url) as tap:
            got, (exchange, *_) = through(
                tap,
                submission,
                lambda url=tap.url: signature(url, MODEL),  # type: ignore[misc]
                {KeyError: "the answer has no such field: print response.json() and look"},
            )
            require(
                exchange.path.rstrip("/") == f"/v2/models/{MODEL}",
                f"GET /v2/models/{MODEL}",
                f"{exchange.method} {exchange.path}",
                "the metadata of a model is at /v2/models/ and its name",
            )
            metadata = answer_to(exchange)
            right = {each["name"]: (each["datatype"], each["shape"]) for each in metadata["inputs"]}
            outputs = {each["name"] for each in metadata["outputs"]}
            cause = "for each input: its name, and (datatype, shape) from the metadata"
            if isinstance(got, dict) and outputs & got.keys():
                cause = "these are outputs: the request is made of inputs"
            same = isinstance(got, dict) and {key: _pair(value) for key, value in got.items()} == right
            require(same, f"{right} ({title})", got, cause)
            refusal = "a server says by its status that it has no such model: look at it before you read the answer"
            missing = submission.run(
                lambda url=tap.url: signature(url, "nope"),  # type: ignore[misc]
                {KeyError: refusal, requests.HTTPError: refusal},
                tap.busy,
            )
            require(missing is None, f"None for a model that {title} does not have", missing, refusal)

    def broken() -> Any:
        try:
            return signature(f"{tap.url}/not-v2", MODEL)
        except Exception:  # of whichever library
            return "an error"

    got = submission.run(broken)  # the tap is gone: nobody answers
    require(got == "an error", "an error where nobody answers", got, "only 404 stands for: no such model")


def _pair(value: Any) -> Any:
    return (value[0], list(value[1])) if isinstance(value, tuple | list) and len(value) == 2 else value


def check_06_2(submission: Submission) -> None:
    """Three tensors in JSON, and the text out of the answer."""
    infer = submission.function("infer")
    with Tap(submission.server("kserve").url) as tap:
        for prompt, max_tokens in ((PROMPT, 7), ("Bread is made of", 5)):
            text, (exchange, *_) = through(
                tap,
                submission,
                lambda prompt=prompt, limit=max_tokens: infer(tap.url, MODEL, prompt, limit),  # type: ignore[misc]
                {
                    KeyError: "the answer has no such field: print response.json() and look",
                    json.JSONDecodeError: "there is no JSON in this answer: look at the path, and at response.text",
                },
            )
            require(
                exchange.path == f"/v2/models/{MODEL}/infer",
                f"POST /v2/models/{MODEL}/infer",
                f"{exchange.method} {exchange.path}",
                "V2 has one way to ask: /v2/models/ and the model's name, then /infer",
            )
            given = {each["name"]: each["data"] for each in exchange.body["inputs"]}
            sampling = json.loads(given.get("sampling_parameters", ["{}"])[0])
            require(
                sampling.get("max_tokens") == max_tokens,
                f'sampling_parameters with "max_tokens": {max_tokens}',
                f"sampling_parameters {sampling}",
                "without it 16 tokens come; pass on what your function is given, as JSON inside the tensor",
            )
            require(
                given["text_input"] == [prompt],
                f"text_input {prompt!r}",
                given["text_input"],
                "the prompt goes into text_input as it is",
            )
            outputs = {each["name"]: each["data"] for each in answer_to(exchange)["outputs"]}
            right = outputs["text_output"][0].removeprefix(prompt)
            cause = "return the one string in text_output"
            if text == prompt + right:
                cause = "the prompt stands in front of the answer unless exclude_input_in_output is true"
            elif text == [right]:
                cause = "data is a list, here of one element: return the element"
            elif isinstance(text, str) and text.strip() == right.strip():
                cause = "the text was trimmed: a leading space is part of it"
            require(text == right, right, text, cause)


def check_06_3(submission: Submission) -> None:
    """Answers of one and of two texts, with the outputs at other places each time."""
    read_answer, server = submission.function("read_answer"), submission.server("kserve")
    flags = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
    for choices, asked in ((1, flags), (1, flags[2:]), (2, flags), (2, flags[:2])):
        fields = {"max_tokens": 3, "n": choices, "ignore_eos": True}
        inputs = [_json_tensor("text_input", PROMPT), _json_tensor("sampling_parameters", json.dumps(fields))]
        inputs += [_json_tensor(flag, True) for flag in asked]
        answer = requests.post(f"{server.url}/v2/models/{MODEL}/infer", json={"inputs": inputs}, timeout=60).json()
        outputs = {each["name"]: each["data"] for each in answer["outputs"]}
        counts = outputs.get("num_output_tokens")
        right = (outputs["text_output"], sum(counts) if counts else None)
        missing = "this answer has no num_output_tokens, because nobody asked for it: None then"
        got = submission.run(
            lambda answer=answer: read_answer(answer),  # type: ignore[misc]
            dict.fromkeys((KeyError, IndexError, StopIteration), "not every answer has every output: look by name"),
        )
        cause = "return the list of texts, and the number of tokens"
        if isinstance(got, tuple | list) and len(got) == 2:
            got = (got[0], got[1])
            if got[0] == right[0][0] or got[0] == right[0][:1] != right[0]:
                cause = "text_output has one element for each of the n texts: return all of them"
            elif counts is None:
                cause = missing
            elif got[1] == outputs.get("num_input_tokens", [None])[0]:
                cause = "that is the prompt's count: take the output by its name"
            elif got[1] == counts[0]:
                cause = "one number for each text: add them up"
            elif got[0] == right[0]:
                cause = "outputs have no fixed place: take num_output_tokens by its name"
        require(got == right, right, got, cause)


def _json_tensor(name: str, value: str | bool) -> dict[str, Any]:
    return {"name": name, "datatype": "BOOL" if isinstance(value, bool) else "BYTES", "shape": [1], "data": [value]}


def under_way(tap: GrpcTap) -> bool:
    """Whether a server works for the learner; an open stream whose answers have all come does not count."""
    return any(not call.done.is_set() and len(call.requests) > len(_finals(call)) for call in list(tap.calls))


def _finals(call: Call) -> list[bytes]:
    if call.method != "ModelStreamInfer":
        return call.responses

    def final(message: bytes) -> bool:
        answer = ModelStreamInferResponse.FromString(message)
        flag = answer.infer_response.parameters["triton_final_response"].bool_param
        return bool(answer.error_message or flag)

    return [message for message in call.responses if final(message)]


def answered_text(call: Call) -> str:
    """The text that a server has sent in a call, in one response or in several."""
    if call.method == "ModelStreamInfer":
        answers = [ModelStreamInferResponse.FromString(message).infer_response for message in call.responses]
    else:
        answers = [ModelInferResponse.FromString(message) for message in call.responses]
    texts = [v2.InferResult(answer).as_numpy("text_output") for answer in answers]
    return "".join(text[0].decode() for text in texts if text is not None and len(text))


def sampling_of(call: Call) -> dict[str, Any]:
    """The sampling parameters that a request carries."""
    request = ModelInferRequest.FromString(call.requests[0])
    raw = dict(zip((each.name for each in request.inputs), request.raw_input_contents, strict=False))
    # A BYTES element is its length in four bytes, then itself.
    sampling: dict[str, Any] = json.loads(raw.get("sampling_parameters", b"\0\0\0\0{}")[4:])
    return sampling


def check_06_4(submission: Submission) -> None:
    """The same function, twice on each server; and an error that comes through."""
    generate = submission.function("generate")
    causes = {
        TimeoutError: "on a stream, an answer or an error comes to the callback: wait for the first of the two",
        InferenceServerException: "UNIMPLEMENTED: this server has no such call for this model; ask it before",
    }
    for name, title in SERVERS.items():
        with GrpcTap(submission.server(name).grpc) as tap, v2.InferenceServerClient(tap.address) as client:
            for prompt, max_tokens in ((PROMPT, 7), ("Bread is made of", 4)):
                ask = partial(generate, client, MODEL, prompt, max_tokens)
                got = _ask_both(submission, tap, causes, ask)
                calls = tap.of("ModelInfer") + tap.of("ModelStreamInfer")
                answers = [call for call in calls if call.responses]
                require(
                    bool(answers),
                    f"an answer from {title}",
                    got,
                    "the text does not come from that server: use the client that your function is given",
                )
                call = answers[-1]
                sent = sampling_of(call).get("max_tokens")
                cause = "pass on what your function is given, in the tensor sampling_parameters"
                require(sent == max_tokens, f"max_tokens {max_tokens} ({title})", f"max_tokens {sent}", cause)
                whole = answered_text(call)
                right = whole.removeprefix(prompt)
                cause = "return the first element of text_output as text"
                if got == whole:
                    cause = "the prompt stands in front of the answer unless exclude_input_in_output is true"
                elif isinstance(got, bytes):
                    cause = "BYTES arrive as bytes: decode them"
                elif not got:
                    cause = "the answer comes to the callback, later: wait for it"
                elif isinstance(got, str) and got.strip() == right.strip():
                    cause = "the text was trimmed: a leading space is part of it"
                elif isinstance(got, str) and got in right:
                    cause = "with stream on, every response is a part: join them up to the final one"
                require(got == right, f"{right!r} ({title})", f"{got!r}", cause)

            def refused(client: v2.InferenceServerClient = client) -> Any:
                try:
                    return generate(client, MODEL, PROMPT, -1)
                except InferenceServerException as failure:
                    return failure

            error = _ask_both(submission, tap, causes, refused)
            require(
                isinstance(error, InferenceServerException) and "max_tokens" in error.message(),
                f"{title}'s error for max_tokens -1, raised",
                f"{error!r}",
                "an error on a stream is handed to the callback: raise it in your function",
            )


def _ask_both(
    submission: Submission, tap: GrpcTap, causes: dict[type[BaseException], str], action: Callable[[], Any]
) -> Any:
    try:
        return submission.run(action, causes, lambda: under_way(tap))
    except NotYet as fault:
        if "already running" in str(fault.got):
            cause = "a client has one stream at a time: stop_stream() when the answer has come, or when it failed"
            raise NotYet(fault.expected, fault.got, cause) from None
        # A stream that the server refused may be found broken before anything was asked on it.
        refused = any(words in str(fault.got) for words in ("UNIMPLEMENTED", "no longer in valid state"))
        if not refused and fault.cause == causes[InferenceServerException]:
            raise NotYet(fault.expected, fault.got, "the server refused this request: its message says why") from None
        raise


def check_06_5(submission: Submission) -> None:
    """What goes wrong on a real server, and what it is called over HTTP."""
    ask, kserve = submission.function("ask"), submission.server("kserve")
    uncaught = {InferenceServerException: "catch InferenceServerException and look at its status()"}
    short, long = '{"max_tokens": 3}', '{"max_tokens": 100, "ignore_eos": true}'
    number = v2.InferInput("text_input", [1], "FP32")
    number.set_data_from_numpy(np.array([1.5], np.float32))
    square = v2.InferInput("text_input", [1, 1], "BYTES")
    square.set_data_from_numpy(np.array([[PROMPT.encode()]], np.object_))
    text = tensor("text_input", PROMPT)
    cases: list[tuple[int, str, str, list[v2.InferInput], float]] = [
        (400, "datatype FP32 for text_input", MODEL, [number], 60),
        (400, "shape [1, 1] for text_input", MODEL, [square], 60),
        (404, "a model that is not there", "nope", [text], 60),
        (504, "100 tokens within 0.1 s", MODEL, [text, tensor("sampling_parameters", long)], 0.1),
    ]
    with GrpcTap(kserve.grpc) as tap, v2.InferenceServerClient(tap.address) as client:
        inputs = [text, tensor("sampling_parameters", short)]
        got = submission.run(lambda: ask(client, MODEL, inputs, 60), uncaught, tap.busy)
        require(bool(tap.of("ModelInfer")), "a call of ModelInfer", got, "use the client that your function is given")
        call = tap.calls[-1]
        call.done.wait(2)
        cause = "the server refused this request, which was in order as it was handed in: its message says why"
        require(bool(call.responses), "a request that the server accepts", call.details, cause)
        right = (200, answered_text(call))
        require(_same_pair(got, right), right, got, "200, and the first element of text_output, decoded")
        for status, what, model, inputs, seconds in cases:
            got = submission.run(
                lambda m=model, i=inputs, s=seconds: ask(client, m, i, s),  # type: ignore[misc]
                uncaught,
                tap.busy,
            )
            call = tap.calls[-1]
            call.done.wait(2)
            _judge_status(status, what, got, call.details)
    with v2.InferenceServerClient("127.0.0.1:1") as nobody:  # nobody listens on it
        got = submission.run(lambda: ask(nobody, MODEL, [text], 60), uncaught)
        _judge_status(503, "nobody there", got, "")

    def passed_on() -> Any:
        try:
            return ask(triton, MODEL, [text], 60)
        except InferenceServerException as error:
            return error.status()

    with v2.InferenceServerClient(submission.server("triton").grpc) as triton:
        got = submission.run(passed_on)
        require(
            got == "StatusCode.UNIMPLEMENTED",
            "UNIMPLEMENTED, which is not in the table, goes on to the caller",
            got,
            "raise what you have no status for: a number made up hides a fault of your own program",
        )


def _same_pair(got: Any, right: tuple[int, str]) -> bool:
    return isinstance(got, tuple | list) and tuple(got) == right


def _judge_status(status: int, what: str, got: Any, details: str) -> None:
    is_pair = isinstance(got, tuple | list) and len(got) == 2
    cause = "see the table in the brief"
    if is_pair and got[0] == 200 and status == 504:
        cause = "the server must know until when to work: pass client_timeout="
    elif is_pair and got[0] == 400:
        cause = "400 tells the caller to mend the request: here the request is in order"
    elif is_pair and isinstance(got[0], int) and got[0] >= 500 and status < 500:
        cause = "a status from 500 on blames the server, and clients try again: here the caller is at fault"
    require(is_pair and got[0] == status, f"{status}: {what}", got, cause)
    if details and status < 500:
        cause = "the server's message names the tensor or the model: hand it on with error.message()"
        require(details in str(got[1]), f"the message {details!r}", got[1], cause)
