"""Checks of lab 03: a model's interface, a repository that loads, tensors, a stream read to its end and one left."""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton_grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor

from servebook.engine.model import model_path
from servebook.lab.dry_run.load import Refused, engine_facts, loaded_config, vllm_process
from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.rest import asked_there
from servebook.lab.submission import Causes, Submission
from servebook.lab.taps.grpc import RESTRICTED, Call, Lost
from servebook.lab.taps.triton import Stream, TritonTap, is_final, text_of
from servebook.launch import Server
from servebook.processes import wait_until
from servebook.settings import TENSOR_MODEL_NAME
from servebook.ways.metrics import metric
from servebook.ways.triton_grpc.backend.declaration import FLAGS
from servebook.ways.triton_grpc.client import infer_inputs

MODEL = "short_model"
LEFT_OUT = "JSON leaves out what is false, and in some models it is: .get(…, False), or read the message itself"
BY_NAME = "nothing has reached your code: the callback is called by name, with result=… and error=…; or it raises"


@contextmanager
def client_of(tap: TritonTap) -> Iterator[Any]:
    """A client for the learner's code; a stream that is left open in it ends with it."""
    client = triton_grpc.InferenceServerClient(tap.address)
    try:
        yield client
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def check_03_1(submission: Submission) -> None:
    """Names, types and the decoupled policy, as a server says; an unknown model is None, other errors pass."""
    describe, triton = submission.function("describe"), submission.server("triton")
    vllm_process()  # has a few minutes now, until 03.2 needs it
    with triton_grpc.InferenceServerClient(triton.grpc) as client:
        inputs = list(client.get_model_config(TENSOR_MODEL_NAME).config.input)
        types = {output.name: output.datatype for output in client.get_model_metadata(TENSOR_MODEL_NAME).outputs}
    keys = {"required", "outputs", "decoupled"}
    causes: Causes = {
        (KeyError, "optional|decoupled|model_transaction_policy"): LEFT_OUT,
        (InferenceServerException, RESTRICTED): "this Triton lets nobody list or load its models: ask about this one",
    }
    with TritonTap(triton.grpc) as tap, triton_grpc.InferenceServerClient(tap.address) as client:
        got = submission.call(describe, client, TENSOR_MODEL_NAME, causes=causes)
        asked_there(tap.calls, got, "a question to the server that was handed in")
        named = isinstance(got, dict) and got.keys() == keys
        require(named, "a dict with required, outputs and decoupled", got, "return exactly these three keys")
        required = [entry.name for entry in inputs if not entry.optional]
        _judge_required(got["required"], required)
        judge(
            types,
            got["outputs"],
            (
                lambda got, _: any(str(value).startswith("TYPE_") for value in got.values()),
                "TYPE_STRING is the configuration's word; a client needs the metadata's, BYTES",
            ),
            (
                lambda got, _: any(isinstance(value, int) for value in got.values()),
                "the configuration has its types as numbers; the metadata has the words that a client needs",
            ),
            otherwise="the name and the datatype of every output, as a dict",
        )
        _judge_policy(tap, got, True)
        absent = "for a model that is not there the server answers NOT_FOUND: that is None"
        got = submission.call(describe, client, "no_such_model", causes={InferenceServerException: absent})
        require(got is None, "None for a model that is not there", got, "ask the server, and return what it says")
    with TritonTap(triton.grpc, alter=_coupled) as tap, triton_grpc.InferenceServerClient(tap.address) as client:
        got = submission.call(describe, client, TENSOR_MODEL_NAME, causes=causes)
        other = got if isinstance(got, dict) else {}
        _judge_policy(tap, other, False)
        _judge_required(other.get("required"), [*required, inputs[-1].name])
    with triton_grpc.InferenceServerClient(tap.address) as client:  # nobody listens there any more

        def outcome() -> Any:
            try:
                return describe(client, TENSOR_MODEL_NAME)
            except InferenceServerException as error:
                return error.status()

        got = submission.run(outcome)
        require(
            got == "StatusCode.UNAVAILABLE",
            "the error UNAVAILABLE, where no server answers",
            got,
            "only NOT_FOUND means that there is no such model: look at error.status(), raise everything else again",
        )


def _coupled(messages: Iterator[bytes], call: Call) -> Iterator[bytes]:
    """A filter: the configuration of a model that has one response to each request, and needs its last input too."""
    for message in messages:
        if call.method == "ModelConfig":
            answer = service_pb2.ModelConfigResponse.FromString(message)
            answer.config.model_transaction_policy.decoupled = False
            answer.config.input[-1].optional = False
            message = answer.SerializeToString()
        yield message


def _judge_required(got: Any, right: list[str]) -> None:
    judge(
        right,
        got,
        (isinstance(got, str), "a list of names, even where it is one"),
        otherwise="only the configuration says which inputs are optional: see every entry of config.input",
        shown=f"required: {got}",
        fits=lambda got, right: isinstance(got, list | tuple | set) and sorted(got) == sorted(right),
    )


def _judge_policy(tap: TritonTap, got: dict[str, Any], right: bool) -> None:
    require(
        got.get("decoupled") is right and bool(tap.of("ModelConfig")),
        f"decoupled: {right}, from this model's configuration",
        f"decoupled: {got.get('decoupled')}, after {', '.join(call.method for call in tap.calls)}",
        "the policy stands in the configuration: model_transaction_policy.decoupled",
    )


def check_03_2(submission: Submission) -> None:
    """Triton loads the repository, and vLLM makes the wanted configuration of it."""
    write_repository, triton = submission.function("write_repository"), submission.server("triton")
    vllm_process()  # imports vLLM while Triton starts
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        repository.mkdir()
        # The same weights at a path that nobody can know beforehand.
        elsewhere = Path(folder) / "weights"
        elsewhere.mkdir()
        for file in Path(model_path(triton.settings)).iterdir():
            (elsewhere / file.name).symlink_to(file)
        there = "the folder is there already: make folders with parents=True, or one after the other"
        causes = {
            FileNotFoundError: "the folder of the model is not there yet: mkdir(parents=True)",
            FileExistsError: there,
            (TypeError, r"for \+"): 'folders are joined by /: repository / "short_model"',
            TypeError: "JSON has text and numbers, but no paths: str(weights)",
        }
        submission.call(write_repository, repository, elsewhere, causes=causes)
        _judge_repository(repository, elsewhere)


def _judge_repository(repository: Path, weights: Path) -> None:
    written = sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())
    for name, what in ((f"{MODEL}/config.pbtxt", "what Triton reads"), (f"{MODEL}/1/model.json", "what vLLM reads")):
        cause = f"{what} stands there: one folder for the model, in it one for the version, 1"
        require(name in written, f"the file {name}", ", ".join(written) or "no file at all", cause)
    try:
        config = loaded_config(repository, MODEL)
    except Refused as refusal:
        raise NotYet(f"a Triton that loads {MODEL}", str(refusal), _why_not_loaded(str(refusal))) from None
    require(config.backend == "vllm", 'backend: "vllm"', config.backend, "the program that runs the model is vllm")
    lost = sorted(config.parameters.keys() - set(FLAGS))
    require(
        not lost,
        f"no parameters in config.pbtxt but the backend's flags, {' and '.join(FLAGS)}",
        ", ".join(lost),
        "Triton hands these on and nobody reads them: engine arguments belong into 1/model.json",
    )
    groups = [(type(config.instance_group[0]).Kind.Name(group.kind), group.count) for group in config.instance_group]
    judge(
        [("KIND_MODEL", 1)],
        groups,
        (
            sum(count for _, count in groups) != 1,
            "each instance is an engine of its own with weights of its own: one is enough, it batches",
        ),
        otherwise="the engine decides where it runs, not Triton: kind: KIND_MODEL",
        expected="one instance, KIND_MODEL",
    )
    try:
        facts = engine_facts(repository / MODEL / "1")
    except Refused as refusal:
        raise NotYet("a model.json that vLLM takes", str(refusal)[-400:], _why_not_taken(str(refusal))) from None
    wanted = {"model": str(weights), "max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True}
    wanted["kv_cache_memory_bytes"] = 2**30
    causes = {"model": "the weights are those that your function is given, as text: str(weights)"}
    for name, value in wanted.items():
        cause = causes.get(name, f"the argument is called {name}, and stands in model.json")
        require(facts[name] == value, f"{name} = {value!r} in the engine", f"{facts[name]!r}", cause)
    flag = config.parameters["REPORT_CUSTOM_METRICS"].string_value
    cause = 'parameters { key: "REPORT_CUSTOM_METRICS" value: { string_value: "true" } } is for the backend'
    require(flag.lower() == "true", "vLLM's counters on the metrics port", f"the flag is {flag!r}", cause)


def _cause(message: str, causes: Mapping[str, str], otherwise: str) -> str:
    return next((cause for words, cause in causes.items() if words in message), otherwise)


def _why_not_loaded(refusal: str) -> str:
    causes = {
        "directory name": "the folder and the name in config.pbtxt have to be the same",
        "Error parsing": "config.pbtxt is protobuf's text format; the numbers are line and column",
        "unable to find backend": "no backend of that name: the folder in the backend directory is called vllm",
        "never becomes ready": 'Triton waits for a backend that finds nothing to run: is it backend: "vllm"?',
    }
    return _cause(refusal, causes, "Triton's log says what it is")


def _why_not_taken(refusal: str) -> str:
    causes = {
        "'REPORT_CUSTOM_METRICS'": "this flag is the backend's, not the engine's: parameters in config.pbtxt",
        "not supported between": "a number or a truth value stands in JSON without quotes",
        "is not JSON": "JSON is not Python: double quotes, lower-case true; json.dumps writes it",
        "no engine argument": "keys are spelled as in vLLM's Python API: underscores, no dashes in front",
    }
    return _cause(refusal, causes, "vLLM's own message says which value")


def request_content(request: Any) -> dict[str, Any]:
    """The inputs of a request by name: text of a BYTES tensor, bool of a BOOL one."""
    contents: dict[str, Any] = {}
    for entry, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if entry.datatype == "BYTES":
            contents[entry.name] = deserialize_bytes_tensor(raw)[0].decode(errors="replace")
        else:
            contents[entry.name] = any(raw)
    return contents


def check_03_3(submission: Submission) -> None:
    """The tensors reach the engine as meant: one answer, without the prompt, as long as it was told."""
    inputs_for, triton = submission.function("inputs_for"), submission.server("triton")
    prompt, sampling = "서울은 어디에 있습니까?", {"max_tokens": 3, "temperature": 0.0, "seed": 7, "ignore_eos": True}
    answers: list[Any] = []
    with TritonTap(triton.grpc) as tap, client_of(tap) as client:
        array = "the array does not fit: for BYTES objects of dtype=np.object_, for BOOL np.bool_, in one dimension"
        fill = partial(inputs_for, prompt, **sampling)
        inputs = submission.run(fill, dict.fromkeys((InferenceServerException, IndexError), array))

        def send() -> None:
            client.start_stream(lambda result, error: answers.append(error or result))
            try:
                client.async_stream_infer(TENSOR_MODEL_NAME, inputs)
            finally:
                client.stop_stream()

        kinds = "inputs_for returns a list of InferInput"
        submission.run(send, {TypeError: kinds, AttributeError: kinds}, tap.busy)
        require(bool(tap.streams and tap.streams[0].requests), "a list of InferInput", "nothing was sent", kinds)
        (request,) = tap.streams[0].requests
    require(bool(answers), "an answer", "none", "the server sent nothing for these inputs")
    answer, *more = answers
    if isinstance(answer, InferenceServerException):
        raise NotYet("a request that the server accepts", answer.message(), _why_refused(answer.message()))
    content = request_content(request)
    # The request says it, and not the count: the engine's outputs merge where nobody fetches them in time.
    streamed = bool(content.get("stream"))
    shown = "a request for a stream" if streamed else f"{len(answers)} responses"
    require(not streamed and not more, "one answer", shown, "that is a stream: leave the input stream away here")
    judge(
        prompt,
        content.get("text_input"),
        otherwise="text_input is the prompt that your function is given, encoded as UTF-8",
    )
    try:
        sent = json.loads(content.get("sampling_parameters", "{}"))
    except ValueError:
        sent = content["sampling_parameters"]
    judge(
        sampling,
        sent,
        (sent == {}, "the sampling parameters that your function is given are left away"),
        otherwise="all that your function is given by name goes into sampling_parameters, as one JSON object",
    )
    names = {output.name for output in answer.get_response().outputs}
    require(
        {"finish_reason", "num_output_tokens"} <= names,
        "the outputs finish_reason and num_output_tokens",
        ", ".join(sorted(names)),
        "these outputs come on request: the inputs return_finish_reason and return_num_output_tokens, true",
    )
    text = answer.as_numpy("text_output")[0].decode()
    require(
        not text.startswith(prompt),
        "the answer alone",
        text,
        "an answer that is not streamed begins with its prompt, unless exclude_input_in_output is true",
    )


def _why_refused(message: str) -> str:
    causes = {
        "unexpected shape": "one element, and no batch dimension in front: shape [1]",
        "not JSON": "sampling_parameters is JSON, and Python's own way to write a dict is not: json.dumps",
        "no such sampling parameter": "only sampling parameters go into sampling_parameters",
        "data-type": "the type in the request and the model's do not agree: BYTES for text, BOOL for flags",
        "unexpected inference input": "the model has no input of that name: 03.1 shows where the names stand",
    }
    return _cause(message, causes, "the server's message names the input")


def check_03_4(submission: Submission) -> None:
    """Deltas as they come, to the last response and no further; errors reach the caller; the client stays usable."""
    deltas, triton = submission.function("deltas"), submission.server("triton")
    first_read, early, paused = threading.Event(), threading.Event(), threading.Event()
    mode = "whole"

    def watch(response: Any, stream: Stream) -> None:
        """Fall silent after the first text, hold the last response back until that is read; or go after the third."""
        if mode == "whole" and stream.text and not paused.is_set():
            paused.set()
            if wait_until(first_read.is_set, 3):
                time.sleep(SILENCE_SECONDS)
        if mode == "whole" and is_final(response) and wait_until(first_read.is_set, 3):
            early.set()
        if mode == "broken" and (len(stream.responses) == 3 or is_final(response)):
            raise Lost

    def read(inputs: list[Any]) -> list[str]:
        pieces = []
        for piece in deltas(client, inputs):
            pieces.append(piece)
            if piece:
                first_read.set()
        return pieces

    def outcome(inputs: list[Any]) -> Any:
        try:
            return read(inputs)
        except NotImplementedError:
            raise
        except Exception as error:
            return error

    prompt = "One, two, three, four,"
    with TritonTap(triton.grpc, watch, cuts=True) as tap, client_of(tap) as client:
        long = infer_inputs(prompt, stream=True, max_tokens=20, temperature=0, ignore_eos=True)
        causes: dict[Any, str] = {
            TimeoutError: "nothing comes after the last response: triton_final_response says which one that is"
        }
        causes[queue.Empty] = SILENT
        causes[InferenceServerException] = "this request is in order: start_stream, then async_stream_infer"
        try:
            pieces = submission.run(lambda: read(long), causes, tap.busy)
        except NotYet as fault:
            if fault.cause != causes[TimeoutError] or first_read.is_set():
                raise
            raise NotYet(fault.expected, fault.got, BY_NAME) from None
        require(bool(tap.streams), "a request over a stream", pieces, "the text does not come from the server")
        _judge_pieces(pieces, tap.streams[0], early.is_set())

        mode = "refused"
        wrong = infer_inputs(prompt, stream=True, temperature=-1)
        silent = {TimeoutError: "on an error the callback gets error=…, and result=None: hand both on to your loop"}
        got = submission.run(lambda: outcome(wrong), silent, tap.busy)
        if isinstance(got, InferenceServerException) and "already running" in str(got):
            raise NotYet(
                "a client that can be used again",
                got.message(),
                "the stream of the call before is still open: stop_stream() when you are done, best in a finally",
            )
        require(
            isinstance(got, InferenceServerException) and "temperature" in str(got),
            "the server's error, raised (temperature=-1)",
            got if not isinstance(got, InferenceServerException) else got.message(),
            "raise the very error that the callback got: a caller asks for its status"
            if isinstance(got, Exception)
            else "the error was swallowed: the caller takes it for an answer. Raise what the callback got",
        )

        mode = "broken"
        whole = infer_inputs(prompt, stream=True, max_tokens=8, temperature=0, ignore_eos=True)
        got = submission.run(lambda: outcome(whole), silent, tap.busy)
        require(
            isinstance(got, InferenceServerException) and got.status() == "StatusCode.UNAVAILABLE",
            "the error UNAVAILABLE, raised, when the server goes away in the midst",
            got.message() if isinstance(got, InferenceServerException) else got,
            "after an error the stream has to be stopped too: stop_stream() in a finally"
            if isinstance(got, InferenceServerException)
            else "half an answer was taken for a whole one: raise what the callback got",
        )


def _judge_pieces(pieces: list[str], stream: Stream, early: bool) -> None:
    require(
        all(isinstance(piece, str) for piece in pieces),
        "pieces of text",
        pieces,
        "as_numpy gives an array of bytes: take its first element, and decode it",
    )
    whole = wait_until(lambda: bool(stream.responses) and is_final(stream.responses[-1]), 3)
    texts = [text_of(response) for response in stream.responses]
    right = stream.text + ("" if whole else " …")
    judge(
        right,
        "".join(pieces),
        (bool(pieces) and pieces[-1] == right, "each piece has all the text so far: yield only what is new"),
        (
            lambda got, _: not got and not texts[0] and len(pieces) < 2,
            "an empty piece is not the end: the text may be held back. triton_final_response says when it ends",
        ),
        (
            lambda got, right: whole and len(pieces) >= len(texts) - 1 and right.startswith(got),
            "the last response has text too: yield it before you end",
        ),
        (
            lambda got, right: right.startswith(got),
            "neither silence nor a count says that an answer has ended: triton_final_response does",
        ),
        otherwise="the text of each response, once, in order",
        shown="".join(pieces) or "no text",
    )
    require(
        early,
        "the first text while the engine is still writing",
        "the first text only after the last response",
        "everything is gathered first: stop_stream() waits for the whole answer, so yield before you call it",
    )


SILENCE_SECONDS = 2.5
"""How long an engine falls silent in the midst of a stream: longer than anybody waits at a guess."""
SILENT = "silence is not the end of an answer: triton_final_response says which response is the last"
LATE = 3
"""Responses that come after it was enough, before the next ones are held back for a caller who leaves."""
LEAVE_SECONDS = 3.0
"""How long they are held back: an engine may be faster than anybody leaves."""


class LeaveWatch:
    """Watches a stream that is to be left once `enough` is true of its text; `overrun` where it is not."""

    def __init__(self, enough: Callable[[str], bool]) -> None:
        self.enough = enough
        self.overrun = threading.Event()

    def watch(self, response: Any, stream: Stream) -> None:
        """Hold what comes too late back until its reader has left; break the stream off where they have not."""
        late = rest(stream, self.enough)
        held = late > LATE or (late and is_final(response))
        if held and not wait_until(stream.call.done.is_set, LEAVE_SECONDS):
            self.overrun.set()
            raise Lost


def check_03_5(submission: Submission) -> None:
    """The text until it is enough; then the engine stops, as its own count of running requests shows. And all of it."""
    until, triton = submission.function("until"), submission.server("triton")
    asked: list[str] = []

    def is_enough(text: str) -> bool:
        return len(text) >= 24

    def enough(text: str) -> bool:
        asked.append(text)
        return is_enough(text)

    require(
        wait_until(lambda: running(triton) == 0, 3),
        "an engine with nothing to do",
        f"{running(triton):.0f} requests in the engine",
        "an earlier stream still runs: wait for it, or restart the kernel",
    )
    leave = LeaveWatch(is_enough)
    overrun = leave.overrun
    inputs = infer_inputs("One, two, three, four,", stream=True, max_tokens=400, temperature=0, ignore_eos=True)
    with TritonTap(triton.grpc, leave.watch, cuts=True) as tap, client_of(tap) as client:

        def outcome() -> Any:
            try:
                return until(client, inputs, enough)
            except InferenceServerException as error:
                if overrun.is_set():
                    return error
                raise

        waits = "your code waits for an end that does not come: the request was cancelled"
        try:
            got = submission.run(outcome, {TimeoutError: waits}, lambda: tap.busy() and not overrun.is_set())
        except NotYet as fault:
            if fault.cause != waits or any(asked):
                raise
            raise NotYet(fault.expected, fault.got, BY_NAME) from None
        require(bool(tap.streams), "a request over a stream", got, "the text does not come from the server")
        stream = tap.streams[-1]
        # An engine without work is not all: a fast one has written to the end by now.
        wait_until(lambda: overrun.is_set() or (stream.call.done.is_set() and running(triton) == 0), 5)
        free = stream.call.done.is_set() and running(triton) == 0
        late = f"the engine writes on for nobody: {rest(stream, is_enough)} more responses by now"
        cause = "stop_stream() alone waits for all that is still to come: cancel_requests=True cancels it"
        joined = "enough was never asked about all the text so far: ask after every piece, with the pieces joined"
        if not any(map(is_enough, asked)):
            cause = joined
        require(free and not overrun.is_set(), "no request in the engine once it is enough", late, cause)
        pieces = [text_of(response) for response in stream.responses]
        texts = ["".join(pieces[:count]) for count in range(len(pieces) + 1)]
        right = next(filter(is_enough, texts), texts[-1])
        judge(
            right,
            got,
            # Of a fast engine, or a busy machine, one piece alone may be enough.
            (lambda *_: any(text not in texts for text in asked), joined),
            (lambda got, right: len(got) > len(right), "nothing is added after it was enough"),
            otherwise="return the text up to the piece with which it was enough, that one too",
        )
        passed_over = [text for text in texts if text and len(text) <= len(right) and text not in asked]
        each = "ask after every piece: one that makes it enough must not be passed over"
        require(not passed_over, "enough asked after every piece", asked, each)
    _judge_never(submission, triton, until)


def _judge_never(submission: Submission, triton: Server, until: Callable[..., Any]) -> None:
    """Judge what comes of an answer that ends before it is enough."""
    inputs = infer_inputs("One, two, three, four,", stream=True, max_tokens=8, temperature=0, ignore_eos=True)
    causes: Causes = {
        TimeoutError: "an answer that is never enough has an end, too: triton_final_response says which is the last",
        queue.Empty: SILENT,
        InferenceServerException: "the answer is whole: what cancelling its stream brings after that is no error of it",
    }
    before: list[str] = []

    def fall_silent(response: Any, stream: Stream) -> None:
        if stream.text and text_of(response) and not before:
            before.append(stream.text)
            stream.call.done.wait(SILENCE_SECONDS)

    with TritonTap(triton.grpc, fall_silent, cuts=True) as tap, client_of(tap) as client:
        got = submission.run(lambda: until(client, inputs, lambda _: False), causes, tap.busy)
        require([got] != before, "the text up to the last response", got, SILENT)
        judge(
            tap.streams[-1].text,
            got,
            (lambda got, right: right.startswith(got or ""), "it was never enough: all of the text is returned then"),
            otherwise="it was never enough: return all of this answer's text, and nothing else",
        )


def running(triton: Server) -> float:
    """How many requests are in Triton's engine."""
    return metric(triton.metrics, "vllm:num_requests_running")


def rest(stream: Stream, enough: Callable[[str], bool]) -> int:
    """How many responses have come since the text was enough."""
    text = ""
    for number, response in enumerate(stream.responses):
        if enough(text):
            return len(stream.responses) - number
        text += text_of(response)
    return 0
