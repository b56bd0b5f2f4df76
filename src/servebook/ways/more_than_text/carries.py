"""Which way carries what: for each cell of the table a request is made now, and the answer decides.

A server's refusal is a "no", with its status; so is an answer (200) without what was asked for, and a contract whose
message has no field for it.
`OTHERS` has the rows of the ways whose servers a notebook need not start for this; `others.py` asks for those.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from servebook.bearer import bearer

ADAPTER = "caller"
"""The name of the adapter that is asked for."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}}
CALL = {"type": "function", "function": {"name": "weather"}}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
PROMPT = "Is it sunny?"
CHAT = [{"role": "user", "content": PROMPT}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]
FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
SHORT = {"max_tokens": 80, "temperature": 0}

HTTP: dict[str, tuple[str, dict[str, Any]]] = {
    "tools": ("/v1/chat/completions", {"messages": CHAT, "tools": [TOOL], "tool_choice": CALL, **SHORT}),
    "JSON": ("/v1/chat/completions", {"messages": CHAT, "response_format": FORM, **SHORT}),
    "embeddings": ("/v1/embeddings", {"input": PROMPT}),
    "adapter": ("/v1/completions", {"model": ADAPTER, "prompt": PROMPT, "max_tokens": 2}),
    "Responses": ("/v1/responses", {"input": PROMPT, "max_output_tokens": 2}),
    "Messages": ("/v1/messages", {"messages": CHAT, "max_tokens": 2}),
    "image": ("/v1/chat/completions", {"messages": IMAGE, "max_tokens": 2}),
}
"""What is asked of vLLM's HTTP server, by path and body."""

OTHERS: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("others.toml").read_text(encoding="utf-8"))
"""By way and feature: "yes", or "no" and why in short."""

WHY = {"contract": "field", "UNIMPLEMENTED": "UNIMPL.", "INVALID_ARGUMENT": "INVALID"}
"""A refusal's status in short; "field": the contract's message has none for it."""

TOLD = 300
"""Of a refusal, at most so many characters are kept."""


@dataclass(frozen=True)
class Cell:
    """Whether a way carried a feature just now, and what was `said`: the status, and of a refusal its reason."""

    carried: bool
    said: str


def over_http(
    url: str, *, model: str, key: str | None = None, prefix: str = "", stream: bool = False
) -> dict[str, Cell]:
    """Ask an OpenAI server at `url` for each feature, or with `stream` for its answer as server-sent events."""
    cells = {}
    for feature, (path, body) in HTTP.items():
        asked = {"model": model} | body | ({"stream": True} if stream else {})
        cells[feature] = post(f"{url}{prefix}{path}", asked, key, stream)
    return cells


def of_the_gateway(url: str, *, key: str | None = None) -> dict[str, Cell]:
    """Ask chapter 05's gateway: its own body with the feature's field beside, or the feature's own path."""
    cells = {}
    for feature, (path, body) in HTTP.items():
        if path in ("/v1/chat/completions", "/v1/completions"):
            extra = {name: value for name, value in body.items() if name in ("tools", "response_format", "model")}
            path, body = "/chat", {"message": PROMPT, **(extra or {"message": IMAGE[0]["content"]})}
        cells[feature] = post(url + path, body, key, stream=False)
    return cells


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Cells in short as text: a row for each way, a column for each feature."""
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{feature:14}" for feature in HTTP)]
    lines += [f"{way:{width}}" + "".join(f"{cells[feature]:14}" for feature in HTTP) for way, cells in rows.items()]
    return "\n".join(line.rstrip() for line in lines)


def in_short(cells: Mapping[str, Cell]) -> dict[str, str]:
    """What stands in the table: "yes", or "no" and the status."""
    why = {feature: cell.said.partition(":")[0] for feature, cell in cells.items()}
    return {feature: "yes" if cells[feature].carried else f"no {WHY.get(said, said)}" for feature, said in why.items()}


def post(url: str, body: dict[str, Any], key: str | None, stream: bool) -> Cell:
    """Ask an HTTP server for what is in `body`; with `stream` the answer must be server-sent events."""
    answer = requests.post(url, json=body, auth=bearer(key), timeout=60)
    if not answer.ok:
        return Cell(False, f"{answer.status_code}: {answer.text}"[:TOLD])
    kind = answer.headers["content-type"].partition(";")[0]
    if stream and kind != "text/event-stream":
        return Cell(False, f"{kind}: no events")
    if "response_format" not in body and "tools" not in body:
        return Cell(True, str(answer.status_code))
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")] if stream else [answer.text]
    calls, text = _written(events)
    return Cell(bool(calls) if "tools" in body else fits(text), f"{answer.status_code}: {calls or text}"[:TOLD])


def _written(events: list[str]) -> tuple[list[str], str]:
    """The names of the functions that an answer calls, or its events do, and its text."""
    choices = [choice for event in events for choice in json.loads(event).get("choices", [])]
    said = [choice.get("message") or choice.get("delta") or {} for choice in choices]
    calls = [call["function"].get("name") for each in said for call in each.get("tool_calls") or []]
    return list(filter(None, calls)), "".join(each.get("content") or "" for each in said)


def fits(text: str) -> bool:
    """Whether it is what the schema allows: an object with this one field."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["sunny"] and isinstance(found["sunny"], bool)
