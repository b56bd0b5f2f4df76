"""What a learner's request asks of the engine: how many answers, how many tokens, and nothing beyond the limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from servebook.room.limits import Refused
from servebook.ways import limits
from servebook.ways.limits import LimitExceeded

TOKEN_IDS = "/inference/v1/generate"
GENERATING = {
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
    TOKEN_IDS: ("max_tokens",),  # in its sampling_params
}
"""Where the engine writes, and the fields that say how much: vLLM takes the first one given, and ignores all others."""
DEFAULT_TOKENS = {"/v1/completions": 16}
"""vLLM's own where a request does not say; on the other paths, and for null, it may write to the end of the context."""
WITH_USAGE = {"/v1/completions", "/v1/chat/completions"}
"""Where a stream says how many tokens it had only if it is asked to."""
WITH_INTERVAL = {*WITH_USAGE, TOKEN_IDS}
"""Where vLLM has `stream_interval`; on the other paths it ignores it."""
PLAIN = ({"type": "text"}, {"format": {"type": "text"}})
"""What the fields for a form say where there is none."""
CONVERSATION = ("messages", "system", "documents")
"""The fields that vLLM goes through piece by piece."""
ITEMS = ("input", "previous_input_messages")
"""The same in the Responses API."""
MOST_ITEMS = 64
"""An item there may be of so many kinds that a wrong one makes 300 errors: 500 take 2 s (measured, Intel Xeon)."""
TOKENIZING = {"/tokenize", "/detokenize"}
"""Where vLLM turns text into tokens and back: of any length, and on the one thread that does it for everybody."""
TOKENIZING_BYTES = 1 << 16
"""Of a body there, 60 ms of that thread (measured, AMD EPYC); no lesson sends more than a few hundred."""
JSON = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """One request: `answers` are written at the same time, of `tokens` at most each.

    `interval` is how many tokens a piece of its stream may hold. `body` is what the engine gets: the same JSON; with
    `adds_usage`, it also asks for a last piece with the usage, which the learner did not ask for. `constraint` is the
    field that says which form the answer must have.
    """

    body: bytes
    answers: int = 1
    tokens: int = 0
    interval: int = 1
    adds_usage: bool = False
    constraint: str = ""


def read(path: str, body: bytes, context: int, places: int, id_sent: str | None = None) -> Ask:
    """Read a request to one of `GENERATING`; what is not JSON, or no object, asks for nothing: the engine refuses it.

    `context` is the engine's, in tokens: an answer is never longer. `places` is how many answers a learner may have
    written at a time, and so in one request. `id_sent` is its X-Request-Id.

    Raises:
        Refused: 400; a field is beyond a limit, or cannot be counted though vLLM might read it in a way of its own.
    """
    try:
        ask = json.loads(body)
    except RecursionError:
        raise Refused(400, "bad_request", "The body is nested too deeply.") from None
    except ValueError:
        return Ask(body)
    said = ask.get("sampling_params") if path == TOKEN_IDS and isinstance(ask, dict) else ask
    if not isinstance(said, dict):
        with as_refusals():
            limits.check_entries(ask)
        return Ask(body)
    if ask.get("background"):
        raise Refused(400, "bad_request", "background must be false: the room counts what is under way.", "background")
    name = next((name for name in GENERATING[path] if said.get(name) is not None), "")
    untold = context if GENERATING[path][0] in said else DEFAULT_TOKENS.get(path, context)
    length = whole(name, said[name]) if name else untold
    n = 1 if said.get("n") is None else whole("n", said["n"])
    prompts = count_prompts(ask.get("prompt"))
    with as_refusals():
        limits.check(limits.Limits(), request_id=id_sent, names={"request_id": "X-Request-Id"})
        check(said, ask, n, prompts, places)
        limits.check_entries(ask)
    answers = max(1, n) * prompts
    if answers > places:
        both = f"n × prompts may be {places} at most, your places in the engine; got {answers}."
        raise Refused(400, "limit_exceeded", both, "n")
    interval = said.get("stream_interval") if path in WITH_INTERVAL else None
    return with_usage(
        Ask(
            json.dumps(ask).encode(),
            answers,
            min(max(0, length), context),
            max(1, whole("stream_interval", interval)) if interval else 1,
            constraint=next((field for field, _, form in constraints(said, ask) if form and field != "tools"), ""),
        ),
        path,
        ask,
    )


@contextmanager
def as_refusals() -> Iterator[None]:
    """Turn what is beyond a limit into a Refused."""
    try:
        yield
    except LimitExceeded as beyond:
        raise Refused(400, "limit_exceeded", f"{beyond}.", beyond.field) from None


def with_usage(asked: Ask, path: str, ask: JSON) -> Ask:
    """The same, with a last piece that says what a stream came to.

    Raises:
        Refused: 400; whether the learner wants that piece is said in a way that only vLLM understands ("no").
    """
    options = ask.get("stream_options") or {}
    if path not in WITH_USAGE or not ask.get("stream") or not isinstance(options, dict):
        return asked
    wanted = options.get("include_usage")
    if wanted not in (None, True, False):
        field = "stream_options.include_usage"
        raise Refused(400, "bad_request", f"{field} must be true or false.", field)
    if wanted:
        return asked
    body = json.dumps(ask | {"stream_options": options | {"include_usage": True}}).encode()
    return replace(asked, body=body, adds_usage=True)


def count_prompts(prompt: object) -> int:
    """How many texts, or lists of token ids, a completion's prompt is."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    return 1 if all(isinstance(part, int) for part in prompts) else len(prompts)


def check(said: JSON, ask: JSON, n: int, prompts: int, places: int) -> None:
    """Hold everything that one request can make dear to the limits.

    Raises:
        LimitExceeded: with the field as the request has it.
    """
    most = limits.Limits(n=places, prompts=places)
    limits.check(most, n=n, prompts=prompts, request_id=ask.get("request_id"), names={"prompts": "prompt"})
    for field in (*CONVERSATION, *ITEMS):
        parts = replace(most, messages=MOST_ITEMS) if field in ITEMS else most
        limits.check(parts, messages=ask.get(field), names={"messages": field})
    for field in ("logprobs", "top_logprobs", "prompt_logprobs"):
        value = said.get(field)
        limits.check(most, logprobs=whole(field, value) if value is not None else None, names={"logprobs": field})
    for field in ("stop", "stop_sequences", "bad_words", "stop_token_ids", "logprob_token_ids"):
        limits.check(most, stop=said.get(field), names={"stop": field})
    for field in ("logit_bias", "allowed_token_ids"):
        limits.check(most, logit_bias=said.get(field), names={"logit_bias": field})
    for field, kind, value in constraints(said, ask):
        limits.check(most, **{kind: value}, names={kind: field})


def constraints(said: JSON, ask: JSON) -> Iterator[tuple[str, str, Any]]:
    """Each form that the answer must have: its field, whether it is a schema, regex, grammar or choice, and its value.

    Everything that vLLM may compile for one of `GENERATING`; a structural tag is a schema with more around it.
    """
    field = "structured_outputs"
    for forms in (said.get(field), ask.get(field)):
        if isinstance(forms, dict):
            for name, kind in (("json", "schema"), ("structural_tag", "schema"), ("regex", "regex")):
                yield f"{field}.{name}", kind, forms.get(name)
            yield f"{field}.whitespace_pattern", "regex", forms.get("whitespace_pattern")
            yield f"{field}.grammar", "grammar", forms.get("grammar")
            yield f"{field}.choice", "choice", forms.get("choice")
    for field, inner in (("response_format", "json_schema"), ("text", "format"), ("output_config", "format")):
        form = ask.get(field)
        yield field, "schema", form if form not in PLAIN else None
        within = form.get(inner) if isinstance(form, dict) else None
        yield f"{field}.{inner}.schema", "schema", within.get("schema") if isinstance(within, dict) else None
    tools = ask.get("tools")
    yield "tools", "schema", {"tools": tools}
    for tool in filter(lambda tool: isinstance(tool, dict), tools if isinstance(tools, list) else []):
        function = tool.get("function")
        for place in (tool, function if isinstance(function, dict) else {}):
            yield "tools", "schema", place.get("parameters") or place.get("input_schema")


def whole(name: str, value: object) -> int:
    """A JSON number as vLLM counts it.

    Raises:
        Refused: 400, it is not a whole number.
    """
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise Refused(400, "bad_request", f"{name} must be a whole number.", name)
