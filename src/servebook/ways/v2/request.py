"""Reads one request: tensors in, a checked `GenerateRequest` out. Nothing that is wrong gets past here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args

import msgspec
from pydantic import TypeAdapter, ValidationError
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from servebook.ways.limits import HALF, LimitExceeded, Limits, check, check_entries
from servebook.ways.refusals import reason
from servebook.ways.v2.contract import INPUTS, OPTIONAL_OUTPUTS, PROTOCOLS_OWN, BadRequest, UnsupportedRequest

SAMPLING = TypeAdapter(SamplingParams)
INTERNAL = {
    *("output_kind", "output_text_buffer_length", "skip_clone", "detokenize"),
    *("extra_args", "trace_decode_token_ids"),
}
"""Fields of SamplingParams that are the server's to set. What is wrong in the last two, vLLM finds out too late."""
KNOWN = {field.name for field in msgspec.structs.fields(SamplingParams) if field.name[0] != "_"} - INTERNAL
WITHIN = {
    field.name: {inner.name for inner in fields(kind) if inner.init}
    for field in msgspec.structs.fields(SamplingParams)
    for kind in get_args(field.type)
    if is_dataclass(kind)
}
"""The fields of SamplingParams that have fields of their own, and which."""
INT64 = 2**63
LIMITS = Limits()
CONSTRAINTS = {"json": "schema", "regex": "regex", "grammar": "grammar", "choice": "choice", "structural_tag": "schema"}
"""The kinds of structured outputs, and the limits that hold for each."""


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt, with everything that its answer depends on.

    `outputs` are the names of the optional outputs asked for; `echo` puts the prompt before the answer; `constraint`
    is the field that says which form the text must have, None where any will do.
    """

    prompt: str
    stream: bool
    echo: bool
    sampling: SamplingParams
    lora_name: str | None
    outputs: frozenset[str]
    constraint: str | None


MAX_PARAMETERS = 2**20
"""Characters of JSON, as much as a body over REST has: whoever reads them holds up everybody else, at 1 to 3 MB/s."""


def read_request(tensors: Mapping[str, Any], parameters: str) -> GenerateRequest:
    """Read a request from the one element of each input (bytes, str or bool) and its parameters, a JSON object.

    The parameters are sampling parameters where there is no tensor of that name.

    Raises:
        BadRequest: an input does not fit, or is beyond a limit.
        UnsupportedRequest: it asks for images or embeddings.
    """
    for name in ("image", "embedding_request"):
        if name in tensors:
            raise UnsupportedRequest(name, "this model generates text from text only")
    texts = {name: _text(name, value) for name, value in tensors.items() if INPUTS[name] == "BYTES"}
    flags = {name: bool(value) for name, value in tensors.items() if INPUTS[name] == "BOOL"}
    if not texts.get("text_input"):
        raise BadRequest("text_input", "the prompt is missing or empty")
    stream = flags.get("stream", False)
    exclude = flags.get("exclude_input_in_output", stream)
    if stream and not exclude:
        raise BadRequest("exclude_input_in_output", "When streaming, `exclude_input_in_output` = False is not allowed.")
    if "sampling_parameters" in texts:
        said = _json_object(texts["sampling_parameters"])
    else:
        given = _json_object(parameters).items()
        said = {name: value for name, value in given if name not in PROTOCOLS_OWN and not name.startswith("triton_")}
    lora_name = said.pop("lora_name", None)
    if lora_name is not None and not isinstance(lora_name, str):
        raise BadRequest("sampling_parameters.lora_name", "must be a string")
    sampling = _sampling(said, stream)
    kind = constraint_of(sampling)  # now: vLLM writes some kinds as another one
    return GenerateRequest(
        prompt=texts["text_input"],
        stream=stream,
        echo=not exclude,
        sampling=sampling,
        lora_name=lora_name,
        outputs=frozenset(name for name in OPTIONAL_OUTPUTS if flags.get(f"return_{name}")),
        constraint=kind and f"sampling_parameters.structured_outputs.{kind}",
    )


def refused(field: str, error: VLLMClientError, request: GenerateRequest | None = None) -> BadRequest:
    """vLLM's own refusal of `field`, or of the part of it that the error names, or else of `request`'s constraint."""
    parameter = getattr(error, "parameter", None)
    if parameter in KNOWN:
        field = f"{field}.{parameter}"
    elif request and request.constraint:
        field = request.constraint
    return BadRequest(field, reason(error))


def constraint_of(sampling: SamplingParams) -> str | None:
    """Which kind of structured outputs was asked for."""
    asked: StructuredOutputsParams | None = sampling.structured_outputs
    return next((kind for kind in CONSTRAINTS if asked and getattr(asked, kind) is not None), None)


def check_limits(sampling: SamplingParams, prefix: str = "") -> None:
    """Refuse what would keep the engine from everybody else, or cannot reach it; `prefix` stands before the names.

    Raises:
        LimitExceeded: with the field and the limit.
    """
    called = {name: prefix + name for name in ("n", "stop", "logit_bias", "logprobs")}
    check(
        LIMITS,
        n=sampling.n,
        stop=sampling.stop,
        logit_bias=sampling.logit_bias,
        logprobs=sampling.logprobs,
        names=called,
    )
    check(LIMITS, logprobs=sampling.prompt_logprobs, names={"logprobs": f"{prefix}prompt_logprobs"})
    for name in ("bad_words", "stop_token_ids", "logprob_token_ids", "allowed_token_ids"):
        check(LIMITS, logit_bias=getattr(sampling, name, None), names={"logit_bias": prefix + name})
    for word in sampling.bad_words or ():  # vLLM tokenizes each, twice
        check(LIMITS, stop=word, names={"stop": f"{prefix}bad_words"})
    if kind := constraint_of(sampling):
        limit = CONSTRAINTS[kind]
        value = getattr(sampling.structured_outputs, kind)
        check(LIMITS, **{limit: value}, names={limit: f"{prefix}structured_outputs.{kind}"})
    for name in sampling.__struct_fields__:
        try:
            msgspec.msgpack.encode(getattr(sampling, name), enc_hook=repr)  # as it goes to the engine
        except OverflowError:
            raise LimitExceeded(prefix + name, "may have integers of 64 bits at most", 64) from None
        except UnicodeEncodeError:
            raise LimitExceeded(prefix + name, HALF, 0) from None


def _text(name: str, value: str | bytes) -> str:
    try:
        if isinstance(value, bytes):
            return value.decode()
        value.encode()  # fails on half of a surrogate pair, which JSON lets through
    except UnicodeError as error:
        raise BadRequest(name, f"not UTF-8 ({error.reason} at {error.start})") from None  # type: ignore[attr-defined]
    return value


def _json_object(text: str) -> dict[str, Any]:
    if len(text) > MAX_PARAMETERS:
        raise BadRequest("sampling_parameters", f"longer than {MAX_PARAMETERS} characters")
    try:
        values = json.loads(text or "{}", parse_constant=_no_constant, parse_int=_int64, parse_float=_finite)
        json.dumps(values, ensure_ascii=False).encode()  # fails on half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise BadRequest("sampling_parameters", f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadRequest("sampling_parameters", f"must be a JSON object, got {type(values).__name__}")
    return {name: value for name, value in values.items() if value is not None}


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _int64(digits: str) -> int:
    # The engine's message format ends at 64 bits.
    if len(digits) > 20 or not -INT64 <= int(digits) < INT64:
        raise ValueError(f"{digits[:24]} does not fit into 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits} is not finite")
    return float(digits)


def _sampling(values: dict[str, Any], stream: bool) -> SamplingParams:
    # Clients of older containers say `guided_decoding`; both came as JSON within JSON there.
    if "guided_decoding" in values:
        values.setdefault("structured_outputs", values.pop("guided_decoding"))
    if isinstance(values.get("structured_outputs"), str):
        values["structured_outputs"] = _json_object(values["structured_outputs"])
    if unknown := values.keys() - KNOWN:
        raise BadRequest(f"sampling_parameters.{min(unknown)[:40]}", "vLLM has no such sampling parameter")
    for name, known in WITHIN.items():  # pydantic drops what it does not know
        given = values.get(name)
        if isinstance(given, dict) and (unknown := given.keys() - known):
            raise BadRequest(f"sampling_parameters.{name}.{min(unknown)[:40]}", "vLLM has no such sampling parameter")
    try:
        check_entries(values, "sampling_parameters.")
        sampling: SamplingParams = SAMPLING.validate_python(values)
        check_limits(sampling, "sampling_parameters.")
    except ValidationError as error:
        found = next(e for e in error.errors() if e["type"] != "is_instance_of")
        where = ".".join(str(part) for part in found["loc"][1:])
        raise BadRequest(f"sampling_parameters.{where}", found["msg"]) from None
    except LimitExceeded as error:
        raise BadRequest(error.field, str(error.args[0])) from None
    except VLLMClientError as error:
        raise refused("sampling_parameters", error) from None
    except (ValueError, TypeError) as error:
        raise BadRequest("sampling_parameters", str(error)) from None
    sampling.output_kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    return sampling
