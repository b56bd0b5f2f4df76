"""How much one request may ask of an engine: plain values in, a refusal out. For every server of the workbook.

And for how long they wait: for a caller, and with a connection to vLLM.

What is costly is costly for everybody else: a schema, regex or grammar is compiled on the cores that write tokens,
and a stop string is searched for after every token. vLLM 0.32 has limits of its own for few of these.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from servebook.engine.quiet_compiler import COMPILE_SECONDS

BODY_SECONDS = 10.0
"""How long a request's body may take to come."""
READER_SECONDS = 30.0
"""How long a caller may leave a full socket or stream unread before they count as gone."""
POOL_IDLE_SECONDS = 3
"""How long an unused connection stays in a client's pool: less than the 5 s after which a vLLM or uvicorn of somebody
else's closes it; ours wait `engine.arguments.KEEP_ALIVE_SECONDS`."""

BOUNDS = {
    *("minItems", "maxItems", "minContains", "maxContains"),
    *("minLength", "maxLength", "minProperties", "maxProperties"),
}
"""The keywords of JSON Schema that a compiler writes out as so many copies."""
COUNTED = r"(?P<repeat>\{\s*+-?\d*\s*+(?:,\s*+-?\d*\s*+)?\})"
"""`{3}`, `{3,}`, `{,5}`, `{3,5}`, and an EBNF's `{3,-1}`."""
STRING = r'"(?:\\.|[^"\\\r\n])*"?'
REGEX = re.compile(rf"(?s){COUNTED}|\\.|\[(?:\\.|[^]\\])*\]?|.")
EBNF = re.compile(
    rf"{COUNTED}|(?P<blank>\s|#[^\r\n]*)"
    rf"|(?<![\w.-])Regex\s*\(\s*(?P<regex>{STRING})(?:{STRING}|#[^\r\n]*|[^)\"#])*\)?|{STRING}"
    r"|\[(?:\\.|[^]\\\r\n])*\]?|(?s:.)"
)
LARK = re.compile(
    rf"{COUNTED}|(?P<tilde>~\s*+\d+(?:\s*+\.\.\s*+\d+)?)|(?P<blank>\s|(?:#|//)[^\r\n]*)"
    rf"|/(?P<regex>(?s:\\.|[^/\\])+)/?[a-z]*|{STRING}|(?s:.)"
)
"""The pieces of each notation, as xgrammar reads them (0.2.8): a repetition, a class, a string, a regex within a
grammar, blanks and comments, or one character. Of an escape in such a regex it is not asked whether it is a brace."""
EBNF_RULE = re.compile(r"^(?:(?!#|//|::=).)*::=", re.MULTILINE)
"""What makes a grammar an EBNF for vLLM, and no Lark."""
MOST_ENTRIES = 4096
"""Of all lists and objects of one request together, twice as many as LIMITS let a chat have. Who validates a body makes
errors of each wrong entry, 15 of a chat's message, and holds up everybody else meanwhile: pydantic for 80 µs an entry,
of which 1 MiB has half a million (measured, Intel Xeon)."""
TOKEN_IDS = {"prompt", "token_ids"}
"""The fields that may hold any number of entries, if those are whole numbers from 0: each of them is right."""
FAR_BEYOND = 10**9
"""What a number of more digits counts as; to convert it would take long."""


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    `n` answers, `prompts`, `stop` strings of `stop_chars` each, entries of `logit_bias`, `logprobs` for each token.
    A `request_id` has so many characters: vLLM repeats it in each event of an answer, and in its engine's messages.
    `messages` of a chat, and as many parts of them in all: a server looks at each on its event loop before it knows
    that they are too long, and 1 MiB holds 33,000 empty ones, 0.2 s for vLLM (measured, AMD EPYC).
    A schema, regex, grammar or choice takes `bytes` at most (UTF-8; a schema as JSON). In a schema: `depth` levels
    of brackets, `properties` and `enum` values in all; a choice has `enum` options too. `repeats` is what the counted
    repetitions add up to: `maxLength: 100` and `[a-z]{1,100}` are 100 each, `([a-z]{10}){10}` is 100. A compiler
    writes them out: xgrammar takes 20 ms of a core for each unit of a `maxLength` up to 128 (measured, AMD EPYC).
    What is dear in spite of all this is given up by the engine after COMPILE_SECONDS of a core, and so is what compiles
    soon and is dear for each token (`engine/quiet_compiler.py`).
    """

    n: int = 16
    prompts: int = 16
    request_id: int = 64
    messages: int = 512
    stop: int = 16
    stop_chars: int = 256
    logit_bias: int = 300
    logprobs: int = 20
    bytes: int = 16_384
    depth: int = 32
    properties: int = 200
    enum: int = 500
    repeats: int = 256


HALF = "may not have half of a surrogate pair"
"""Of text: JSON can say it, and neither the engine's messages nor an answer can repeat it."""
GIVEN_UP = f"takes more than {COMPILE_SECONDS} s of a core to compile, or too long a token, or no token fits it"
"""Of a constraint that the engine has given up, which does not say why."""


class LimitExceeded(ValueError):
    """A request asks for too much. `field` is what must be smaller, `limit` how far it may go."""

    def __init__(self, field: str, message: str, limit: int) -> None:
        super().__init__(message)
        self.field = field
        self.limit = limit

    def __str__(self) -> str:
        return f"{self.field} {self.args[0]}"


def check(
    limits: Limits,
    *,
    n: int | None = None,
    prompts: int | None = None,
    request_id: str | None = None,
    messages: object = None,
    stop: str | Sequence[str] | None = None,
    logit_bias: Sized | None = None,
    logprobs: int | None = None,
    schema: str | Mapping[str, Any] | bool | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    choice: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    """Refuse what goes beyond the limits; what is None is not looked at, and what is malformed is left to the engine.

    `prompts` is how many there are, `messages` is the field itself, as JSON has it; `logprobs` -1 means the whole
    vocabulary; of `logit_bias` only the size matters.
    `names` says what the caller calls a field, where that is another name: `{"schema": "sampling.json_schema"}`.

    Raises:
        LimitExceeded: with the field, the limit, and a message that has both and repeats nothing of the request.
    """
    fields = (
        *("n", "prompts", "request_id", "messages", "stop", "logit_bias", "logprobs"),
        *("schema", "regex", "grammar", "choice"),
    )
    called = {field: field for field in fields} | dict(names or {})
    for field, value in (("n", n), ("prompts", prompts), ("logprobs", logprobs)):
        most = getattr(limits, field)
        if isinstance(value, int) and (value > most or (field == "logprobs" and value < 0)):
            raise LimitExceeded(called[field], f"may be {most} at most, got {min(value, FAR_BEYOND)}", most)
    if isinstance(request_id, str):
        _count(called["request_id"], len(request_id), limits.request_id, "characters")
        if any("\ud800" <= letter <= "\udfff" for letter in request_id):
            raise LimitExceeded(called["request_id"], HALF, 0)
    if isinstance(messages, list):
        for what, count in (("messages", len(messages)), ("parts of messages", _parts(messages))):
            _count(called["messages"], count, limits.messages, what)
    if isinstance(stop, str | Sequence):
        strings = [stop] if isinstance(stop, str) else stop
        _count(called["stop"], len(strings), limits.stop, "strings")
        if any(len(string) > limits.stop_chars for string in strings if isinstance(string, str)):
            raise LimitExceeded(
                called["stop"], f"may have strings of {limits.stop_chars} characters at most", limits.stop_chars
            )
    if isinstance(logit_bias, Sized):
        _count(called["logit_bias"], len(logit_bias), limits.logit_bias, "entries")
    if schema is not None:
        _schema(called["schema"], schema, limits)
    for field, text in (("regex", regex), ("grammar", grammar)):
        if isinstance(text, str):
            _bytes(called[field], text, limits)
            notation = REGEX if field == "regex" else EBNF if EBNF_RULE.search(text) else LARK
            schemas = _schemas_within(called[field], text, limits) if notation is LARK else []
            _hold(called[field], schemas, limits, expansion(text, notation))
    if isinstance(choice, Sequence):
        _count(called["choice"], len(choice), limits.enum, "options")
        _bytes(called["choice"], "".join(option for option in choice if isinstance(option, str)), limits)


def check_entries(request: object, prefix: str = "") -> None:
    """Refuse a request, as JSON has it, that has more entries than any good one; before anybody validates it.

    Raises:
        LimitExceeded: with the field, behind `prefix`, in which there were too many.
    """
    entries = 0
    left: list[tuple[str, Any]] = [("", request)]
    while left:
        field, node = left.pop()
        inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
        if field in TOKEN_IDS and all(type(each) is int and each >= 0 for each in inner):
            continue
        entries += len(inner)
        if entries > MOST_ENTRIES:
            raise LimitExceeded(
                f"{prefix}{field}" if field else "the body",
                f"has too many entries: all lists and objects of a request may have {MOST_ENTRIES}",
                MOST_ENTRIES,
            )
        fields = list(map(str, node)) if isinstance(node, dict) and not field else repeat(field)
        left.extend(zip(fields, inner, strict=False))


def expansion(text: str, notation: re.Pattern[str] = REGEX) -> int:
    """What the counted repetitions of a regex or grammar add up to, those in a group as often as it is repeated."""
    opening, closing = ("([", ")]") if notation is LARK else ("(", ")")
    if notation is not REGEX:  # a comment may stand within a repetition
        text = notation.sub(lambda piece: " " if piece["blank"] else piece[0], text)
    groups, last = [0], 0  # what each open group adds up to, outermost first; the last piece's part in it
    for piece in notation.finditer(text):
        kind = piece.lastgroup
        if kind in ("repeat", "tilde") and (counts := re.findall(r"\d+", piece[0])):
            times = max(int(digits) if len(digits) < 10 else FAR_BEYOND for digits in counts)
            grown = max(last, 1) * times
            groups[-1] += grown - last
            last = grown
        elif kind == "regex":
            last = expansion(piece["regex"])
            groups[-1] += last
        elif piece[0] in opening:
            groups.append(0)
        elif piece[0] in closing and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif kind != "blank" and piece[0] not in "*+?":
            last = 0
    return sum(groups)


def _count(field: str, value: int, limit: int, what: str) -> None:
    if value > limit:
        raise LimitExceeded(field, f"may have {limit} {what} at most, got {min(value, FAR_BEYOND)}", limit)


def _bytes(field: str, text: str, limits: Limits) -> None:
    size = len(text.encode(errors="replace"))
    if size > limits.bytes:
        raise LimitExceeded(field, f"may take {limits.bytes} bytes at most, got {size}", limits.bytes)


def _parts(messages: list[Any]) -> int:
    """How many parts the messages' contents have, and those contents' parts in turn: a tool's result has some, too."""
    left, found = list(messages), 0
    while left:
        node = left.pop()
        content = node.get("content") if isinstance(node, dict) else None
        if isinstance(content, list):
            found += len(content)
            left.extend(content)
    return found


def _schema(field: str, schema: str | Mapping[str, Any] | bool, limits: Limits) -> None:
    try:
        if isinstance(schema, str):
            _bytes(field, schema, limits)
            schema = json.loads(schema)
        else:
            _bytes(field, json.dumps(schema, ensure_ascii=False), limits)
    except RecursionError:
        raise _too_deep(field, limits) from None
    except (TypeError, json.JSONDecodeError):
        return  # no JSON: the engine says so
    except ValueError as error:
        if isinstance(error, LimitExceeded):
            raise
        most = sys.get_int_max_str_digits()
        raise LimitExceeded(field, f"may have integers of {most} digits at most", most) from None
    _hold(field, [schema], limits)


def _hold(field: str, schemas: Sequence[Any], limits: Limits, repeats: int = 0) -> None:
    """Hold what schemas have in all to the limits, with the counted repetitions that stand beside them."""
    properties = enum = 0
    for depth, node in chain.from_iterable(map(_nodes, schemas)):
        if depth > limits.depth:
            raise _too_deep(field, limits)
        bounds = BOUNDS | {"min", "max"} if node.get("type") == "repeat" else BOUNDS  # the latter in a structural tag
        for keyword, value in node.items():
            if keyword in bounds and isinstance(value, int | float) and value > 0:
                repeats += int(min(value, FAR_BEYOND))
            elif keyword == "pattern" and isinstance(value, str):
                repeats += expansion(value)
            elif keyword == "grammar" and isinstance(value, str):
                repeats += expansion(value, EBNF)
            elif keyword in ("properties", "patternProperties") and isinstance(value, dict):
                properties += len(value)
                repeats += sum(map(expansion, value)) if keyword == "patternProperties" else 0
            elif keyword == "enum" and isinstance(value, list):
                enum += len(value)
    _count(field, properties, limits.properties, "properties")
    _count(field, enum, limits.enum, "enum values")
    _count(field, repeats, limits.repeats, "counted repetitions")
    if any(map(_refers_to_itself, schemas)):
        raise LimitExceeded(field, "may not have a $ref that leads to itself", 0)


def _schemas_within(field: str, grammar: str, limits: Limits) -> list[Any]:
    """The schemas of a Lark grammar: `%json {"type": "string"}`."""
    found = []
    for begin in re.finditer(r"%json\s*", grammar):
        try:
            schema, _ = json.JSONDecoder().raw_decode(grammar, begin.end())
        except RecursionError:
            raise _too_deep(field, limits) from None
        except ValueError:
            continue  # no JSON: the engine says so
        found.append(schema)
    return found


def _too_deep(field: str, limits: Limits) -> LimitExceeded:
    return LimitExceeded(field, f"may have {limits.depth} levels of brackets at most", limits.depth)


def _nodes(schema: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every object in a schema with its depth in brackets: 1 for the outermost."""
    left = [(1, schema)]
    while left:
        depth, node = left.pop()
        if isinstance(node, dict):
            yield depth, node
        if isinstance(node, dict | list):
            left.extend((depth + 1, inner) for inner in (node.values() if isinstance(node, dict) else node))


def _refers_to_itself(schema: Any) -> bool:
    """Whether a `$ref` comes back to itself with nothing read in between: no compiler would come to an end."""
    done: set[int] = set()
    for _, start in _nodes(schema):
        path: list[tuple[dict[str, Any], list[Any]]] = [(start, _same_place(start, schema))]
        on_path = {id(start)}
        while path:
            node, following = path[-1]
            if not following:
                path.pop()
                on_path.discard(id(node))
                done.add(id(node))
                continue
            target = following.pop()
            if not isinstance(target, dict) or id(target) in done:
                continue
            if id(target) in on_path:
                return True
            path.append((target, _same_place(target, schema)))
            on_path.add(id(target))
    return False


def _same_place(node: dict[str, Any], schema: Any) -> list[Any]:
    """The schemas that hold for the same value as this one."""
    found = [item for key in ("allOf", "anyOf", "oneOf") if isinstance(node.get(key), list) for item in node[key]]
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        target = schema
        for word in reference[1:].split("/")[1:]:
            word = word.replace("~1", "/").replace("~0", "~")
            target = target.get(word) if isinstance(target, dict) else None
        found.append(target)
    return found
