"""Checks of lab 06: V2's metadata, a request by hand, an answer by name, one client for two servers, errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import requests
import tritonclient.grpc as v2
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from tritonclient.utils import InferenceServerException

from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.rest import answer_to, asked, asked_there, through
from servebook.lab.submission import Causes, Submission
from servebook.lab.taps.grpc import Call, GrpcTap
from servebook.lab.taps.http import Tap, answering
from servebook.processes import wait_until
from servebook.settings import TENSOR_MODEL_NAME as MODEL
from servebook.ways.kserve.client import tensor

PROMPT = "The capital of France is"
LOOK: dict[Any, str] = {KeyError: "the answer has no such field: print response.json() and look"}
PROMPT_IN_FRONT = "the prompt stands in front of the answer unless exclude_input_in_output is true"
A_LIST = "outputs is a list of tensors: look for the one with the name that you want"
TRIMMED = "the text was trimmed: a leading space is part of it"
DEADLINE = "pass client_timeout=, which is in seconds"
SERVERS = {"kserve": "KServe", "triton": "Triton"}


def check_06_1(submission: Submission) -> None:
    """The inputs of the model on two servers, of which one takes more; and a model that neither has."""
    signature = submission.function("signature")
    refusal = "a server says by its status that it has no such model: look at it before you read the answer"
    for name, title in SERVERS.items():
        with Tap(submission.server(name).url) as tap:
            got, made = through(tap, submission, signature, tap.url, MODEL, causes=LOOK)
            path = f"/v2/models/{MODEL}"
            # With a slash at its end KServe sends the caller elsewhere, past the tap.
            exchange = next((each for each in made if each.path == path), made[-1])
            require(
                exchange.path == path,
                f"GET {path}",
                f"{exchange.method} {exchange.path}",
                "the metadata of a model is at /v2/models/ and its name, and nothing behind it",
            )
            metadata = answer_to(exchange)
            _judge_signature(metadata, got, title)
            refused: Causes = {KeyError: refusal, requests.HTTPError: refusal}
            missing = submission.call(signature, tap.url, "nope", causes=refused, busy=tap.busy)
            require(missing is None, f"None for a model that {title} does not have", missing, refusal)

    def broken(url: str) -> Any:
        try:
            return signature(url, MODEL)
        except Exception:  # of whichever library
            return "an error"

    with answering(503) as url:  # as one does whose model is still being loaded
        for address, what in ((tap.url, "where nobody answers"), (url, "where the server says 503")):
            got = submission.run(partial(broken, address))  # the tap is gone
            require(got == "an error", f"an error {what}", got, "only 404 stands for: no such model")


def _judge_signature(metadata: Any, got: Any, title: str) -> None:
    right = {each["name"]: (each["datatype"], each["shape"]) for each in metadata["inputs"]}
    outputs = {each["name"] for each in metadata["outputs"]}
    judge(
        right,
        got,
        (lambda got, _: outputs & got.keys(), "these are outputs: the request is made of inputs"),
        (
            lambda got, right: (
                got.keys() == right.keys() and not any(isinstance(v, tuple | list) for v in got.values())
            ),
            "for each input two things: (datatype, shape) from the metadata",
        ),
        (
            lambda got, right: got.keys() == right.keys() and any(isinstance(v[1], int) for v in got.values()),
            "the shape is the whole list, [1] here: a tensor may have several dimensions",
        ),
        (isinstance(got, list | tuple), "return a dict: each input by its name"),
        otherwise="for each input: its name, and (datatype, shape) from the metadata",
        expected=f"{right} ({title})",
        fits=lambda got, right: {name: (kind, list(shape)) for name, (kind, shape) in got.items()} == right,
    )


def check_06_2(submission: Submission) -> None:
    """Three tensors in JSON, and the text out of the answer."""
    infer = submission.function("infer")
    causes = LOOK | {
        json.JSONDecodeError: "there is no JSON in this answer: look at the path, and at response.text",
        (TypeError, "indices"): A_LIST,
        TypeError: "json.dumps takes text, numbers and truth values: what is in a tensor's data is a list of those",
    }
    with Tap(submission.server("kserve").url) as tap:
        for prompt, max_tokens in ((PROMPT, 7), ("Bread is made of", 5)):
            text, made = through(tap, submission, infer, tap.url, MODEL, prompt, max_tokens, causes=causes)
            way = "V2 has one way to ask: /v2/models/ and the model's name, then /infer"
            exchange = asked(made, f"/v2/models/{MODEL}/infer", way)
            binary = "a client library has sent its tensors as bytes: this exercise is the request by hand, as JSON"
            body = exchange.body if isinstance(exchange.body, dict) else {}
            entries = body.get("inputs", [])
            given = {each.get("name"): each.get("data") for each in entries if isinstance(each, dict)}
            require(bool(given) and None not in given.values(), "tensors in JSON", "no data in the JSON", binary)
            sampling = _as_json(given.get("sampling_parameters"))
            judge(
                max_tokens,
                sampling.get("max_tokens"),
                (isinstance(sampling.get("max_tokens"), str), "a number is a number in JSON: no quotes around it"),
                otherwise="without it 16 tokens come; pass on what your function is given, as JSON inside the tensor",
                expected=f'sampling_parameters with "max_tokens": {max_tokens}',
                shown=f"sampling_parameters {sampling}",
            )
            judge(
                [prompt],
                given.get("text_input"),
                otherwise="the prompt goes into text_input as it is",
                expected=f"text_input {prompt!r}",
                fits=lambda got, right: _flat(got) == right,
            )
            outputs = {each["name"]: each["data"] for each in answer_to(exchange)["outputs"]}
            right = outputs["text_output"][0].removeprefix(prompt)
            judge(
                right,
                text,
                (text == prompt + right, PROMPT_IN_FRONT),
                (text == [right], "data is a list, here of one element: return the element"),
                (lambda got, right: got.strip() == right.strip(), TRIMMED),
                otherwise="return the one string in text_output",
            )


def _as_json(data: Any) -> dict[str, Any]:
    """The JSON inside a tensor of text, {} where there is none."""
    try:
        found = json.loads(_flat(data)[0])
    except (TypeError, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(data: Any) -> list[Any]:
    """A tensor's elements, however deep its lists are."""
    return [inner for each in data for inner in _flat(each)] if isinstance(data, list) else [data]


def check_06_3(submission: Submission) -> None:
    """Answers of one and of two texts, with the outputs at other places each time."""
    read_answer, server = submission.function("read_answer"), submission.server("kserve")
    by_name = "not every answer has every output: look by name"
    causes: Causes = {
        (TypeError, "indices"): A_LIST,
        **dict.fromkeys((KeyError, IndexError, StopIteration, TypeError), by_name),
    }
    flags = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
    for choices, asked_for in ((1, flags), (1, flags[2:]), (2, flags), (2, flags[:2])):
        answer = _answer(server.url, choices, asked_for)
        got = submission.call(read_answer, deepcopy(answer), causes=causes)
        _judge_reading(answer, got)


def _answer(url: str, choices: int, asked_for: Sequence[str]) -> Any:
    """A server's answer of so many texts, each with another number of tokens where it tells that."""
    for seed in range(50):
        fields = {"max_tokens": 12, "n": choices, "stop": ["e"], "seed": seed}
        inputs = [_json_tensor("text_input", PROMPT), _json_tensor("sampling_parameters", json.dumps(fields))]
        inputs += [_json_tensor(flag, True) for flag in asked_for]
        answer = requests.post(f"{url}/v2/models/{MODEL}/infer", json={"inputs": inputs}, timeout=60).json()
        counts: list[int] = next(
            (each["data"] for each in answer["outputs"] if each["name"] == "num_output_tokens"), []
        )
        if len(set(counts)) == len(counts):
            break
    return answer


def _judge_reading(answer: Any, got: Any) -> None:
    outputs = {each["name"]: each["data"] for each in answer["outputs"]}
    texts, counts = outputs["text_output"], outputs.get("num_output_tokens")
    prompt_count = outputs.get("num_input_tokens", [None])[0]
    judge(
        (texts, sum(counts) if counts else None),
        tuple(got) if isinstance(got, list) else got,
        (not isinstance(got, tuple | list) or len(got) != 2, "return two things: the texts, and the number of tokens"),
        (
            lambda got, right: got[0] == right[0][0] or got[0] == right[0][:1] != right[0],
            "text_output has one element for each of the n texts: return all of them",
        ),
        (counts is None, "this answer has no num_output_tokens, because nobody asked for it: None then"),
        (lambda got, _: got[1] == prompt_count is not None, "that is the prompt's count: take the output by its name"),
        (
            lambda got, _: counts and got[1] in (counts[0], counts[0] * len(counts)),
            "one number for each text: add them up",
        ),
        (lambda got, _: got[1] == counts, "the numbers of all texts together: add them up"),
        (
            lambda got, right: got[0] == right[0],
            "the server has counted: take num_output_tokens by its name, for outputs have no fixed place",
        ),
        otherwise="return the list of texts, and the number of tokens",
        fits=lambda got, right: (list(got[0]), got[1]) == right and not isinstance(got[0], str),
    )


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


def sent_by(call: Call) -> tuple[str, dict[str, Any]]:
    """The prompt and the sampling parameters that a request carries."""
    request = ModelInferRequest.FromString(call.requests[0])
    raw = dict(zip((each.name for each in request.inputs), request.raw_input_contents, strict=False))
    # A BYTES element is its length in four bytes, then itself.
    prompt = raw.get("text_input", b"\0\0\0\0")[4:].decode(errors="replace")
    return prompt, json.loads(raw.get("sampling_parameters", b"\0\0\0\0{}")[4:])


def check_06_4(submission: Submission) -> None:
    """The same function, twice on each server; and between them an error that comes through."""
    generate = submission.function("generate")
    causes: dict[Any, str] = {
        AttributeError: "on an error the callback gets result=None: look at error first",
        TimeoutError: "an answer or an error comes to the callback, as result=… and error=…: wait for the first",
        InferenceServerException: "UNIMPLEMENTED: this server has no such call for this model; ask it before",
    }
    for name, title in SERVERS.items():
        with GrpcTap(submission.server(name).grpc) as tap, v2.InferenceServerClient(tap.address) as client:

            def refused(client: v2.InferenceServerClient = client) -> Any:
                try:
                    return generate(client, MODEL, PROMPT, -1)
                except (InferenceServerException, ValueError, RuntimeError) as failure:
                    if "already running" in str(failure):  # of the stream before
                        raise
                    return failure

            for prompt, max_tokens in ((PROMPT, 7), ("Bread is made of", 4)):
                got = _ask_both(submission, tap, causes, partial(generate, client, MODEL, prompt, max_tokens))
                calls = tap.of("ModelInfer") + tap.of("ModelStreamInfer")
                answers = [call for call in calls if call.responses]
                asked_there(answers, got, f"an answer from {title}")
                call = answers[-1]
                text, sampling = sent_by(call)
                require(text == prompt, f"the prompt {prompt!r}", text, "pass on the prompt, in the tensor text_input")
                sent = sampling.get("max_tokens")
                cause = "pass on what your function is given, in the tensor sampling_parameters"
                require(sent == max_tokens, f"max_tokens {max_tokens} ({title})", f"max_tokens {sent}", cause)
                whole = answered_text(call)
                right = whole.removeprefix(prompt)
                judge(
                    right,
                    got,
                    (bool(got) and got == whole, PROMPT_IN_FRONT),
                    (isinstance(got, bytes), "BYTES arrive as bytes: decode them"),
                    (
                        got is None and call.method == "ModelInfer",
                        "the function returns nothing: `return` is missing",
                    ),
                    (not got, "the answer comes to the callback, later: wait for it"),
                    (lambda got, right: got.strip() == right.strip(), TRIMMED),
                    (
                        lambda got, right: got in right,
                        "with stream on, every response is a part: join them up to the final one",
                    ),
                    otherwise="return the first element of text_output as text",
                    expected=f"{right!r} ({title})",
                )
                if prompt != PROMPT:
                    continue
                error = _ask_both(submission, tap, causes, refused)
                require(
                    isinstance(error, InferenceServerException) and "max_tokens" in error.message(),
                    f"{title}'s error for max_tokens -1, raised",
                    f"{type(error).__name__}: {error}",
                    "raise the very error that came: who calls you catches InferenceServerException"
                    if isinstance(error, ValueError | RuntimeError)
                    else "that error is of a stream which this server does not have: stream only where there is one"
                    if not_there(error)
                    else "an error on a stream is handed to the callback: raise it in your function",
                )


def not_there(error: object) -> bool:
    """Whether these are the words for a call that a server does not have."""
    # A stream that the server refused may be found broken before anything was asked on it.
    return any(words in str(error) for words in ("UNIMPLEMENTED", "no longer in valid state"))


def _ask_both(submission: Submission, tap: GrpcTap, causes: dict[Any, str], action: Callable[[], Any]) -> Any:
    try:
        return submission.run(action, causes, lambda: under_way(tap))
    except NotYet as fault:
        if "already running" in str(fault.got):
            cause = "a client has one stream at a time: stop_stream() when the answer has come, or when it failed"
            raise NotYet(fault.expected, fault.got, cause) from None
        if not not_there(fault.got) and fault.cause == causes[InferenceServerException]:
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
        (504, "100 tokens within 0.002 s", MODEL, [text, tensor("sampling_parameters", long)], 0.002),
    ]
    with GrpcTap(kserve.grpc) as tap, v2.InferenceServerClient(tap.address) as client:
        inputs = [text, tensor("sampling_parameters", short)]
        got = submission.call(ask, client, MODEL, inputs, 60, causes=uncaught, busy=tap.busy)
        require(bool(tap.of("ModelInfer")), "a call of ModelInfer", got, "use the client that your function is given")
        call = tap.calls[-1]
        wait_until(call.done.is_set, 2)
        cause = "the server refused this request, which was in order as it was handed in: its message says why"
        require(bool(call.responses), "a request that the server accepts", call.details, cause)
        # gRPC rounds a deadline up, to tenths of a second here.
        require(call.timeout is None or call.timeout < 61, "a deadline of 60 s", f"one of {call.timeout} s", DEADLINE)
        judge(
            (200, answered_text(call)),
            tuple(got) if isinstance(got, list) else got,
            (lambda got, right: got == right[1], "return two things: the status, and the text"),
            (lambda got, _: isinstance(got[1], bytes), "BYTES arrive as bytes: decode them"),
            otherwise="200, and the first element of text_output, decoded",
        )
        for status, what, model, inputs, seconds in cases:
            got = submission.call(ask, client, model, inputs, seconds, causes=uncaught, busy=tap.busy)
            call = tap.calls[-1]
            wait_until(call.done.is_set, 2)
            _judge_status(status, what, got, call.details)
    with v2.InferenceServerClient("127.0.0.1:1") as nobody:  # nobody listens on it
        got = submission.call(ask, nobody, MODEL, [text], 60, causes=uncaught)
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


def _judge_status(status: int, what: str, got: Any, details: str) -> None:
    judge(
        status,
        got[0] if isinstance(got, tuple | list) and len(got) == 2 else None,
        (not isinstance(got, tuple | list) or len(got) != 2, "return two things: the status, and a text"),
        (
            lambda got, right: (got, right) == (200, 504),
            f"the server must know until when to work: {DEADLINE}",
        ),
        (lambda got, _: got == 400, "400 tells the caller to mend the request: here the request is in order"),
        (
            lambda got, right: got >= 500 and right < 500,
            "a status from 500 on blames the server, and clients try again: here the caller is at fault",
        ),
        otherwise="see the table in the brief",
        expected=f"{status}: {what}",
        shown=got,
    )
    if details and status < 500:
        cause = "the server's message names the tensor or the model: hand it on with error.message()"
        require(details in str(got[1]), f"the message {details!r}", got[1], cause)
