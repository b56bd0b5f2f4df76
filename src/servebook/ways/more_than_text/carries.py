"""Which way carries what: for each cell of the table a request is made now, and the answer decides.

A refusal is a "no", with its status and reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests

ADAPTER = "pirate"
"""The name of the adapter that is asked for."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = {"type": "function", "function": {"name": "weather"}}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
PROMPT = "Is it sunny?"
CHAT = [{"role": "user", "content": PROMPT}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]
FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
SHORT = {"max_tokens": 40, "temperature": 0}

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

TOLD = 300
"""Of a refusal, at most so many characters are kept."""


@dataclass(frozen=True)
class Cell:
    """Whether a way carried a feature just now, and what was `said`: the status, and of a refusal its reason."""

    carried: bool
    said: str


def over_http(url: str, *, model: str, key: str | None = None, stream: bool = False) -> dict[str, Cell]:
    """Ask an OpenAI server at `url` for each feature, or with `stream` for its answer as server-sent events."""
    cells = {}
    for feature, (path, body) in HTTP.items():
        asked = {"model": model} | body | ({"stream": True} if stream else {})
        cells[feature] = _post(f"{url}{path}", asked, key, stream)
    return cells


def of_the_gateway(url: str, *, key: str | None = None) -> dict[str, Cell]:
    """Ask chapter 05's gateway: its own body with the feature's field beside, or the feature's own path."""
    cells = {}
    for feature, (path, body) in HTTP.items():
        if path in ("/v1/chat/completions", "/v1/completions"):
            extra = {name: value for name, value in body.items() if name in ("tools", "response_format", "model")}
            path, body = "/chat", {"message": PROMPT, **(extra or {"message": IMAGE[0]["content"]})}
        cells[feature] = _post(url + path, body, key, stream=False)
    return cells


def table(rows: Mapping[str, Mapping[str, Cell]]) -> str:
    """The cells as text: a row for each way, a column for each feature."""
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{feature:12}" for feature in HTTP)]
    for way, cells in rows.items():
        said = (_short(cells[feature]) if feature in cells else "" for feature in HTTP)
        lines.append(f"{way:{width}}" + "".join(f"{each:12}" for each in said))
    return "\n".join(line.rstrip() for line in lines)


def _short(cell: Cell) -> str:
    return "yes" if cell.carried else f"no {cell.said.partition(':')[0]}"[:11]


def _post(url: str, body: dict[str, Any], key: str | None, stream: bool) -> Cell:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = requests.post(url, json=body, headers=headers, timeout=60)
    if not answer.ok:
        return Cell(False, f"{answer.status_code}: {answer.text}"[:TOLD])
    kind = answer.headers["content-type"].partition(";")[0]
    if stream and kind != "text/event-stream":
        return Cell(False, f"{kind}: no events")
    if "response_format" not in body and "tools" not in body:
        return Cell(True, str(answer.status_code))
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")] if stream else [answer.text]
    text = "".join(map(_written, events))
    return Cell(_fits(text), str(answer.status_code) if _fits(text) else f"other: {text}"[:TOLD])


def _written(event: str) -> str:
    """What an answer, or an event of one, has of a tool's arguments, or else of the text."""
    parts = []
    for choice in json.loads(event).get("choices", []):
        said = choice.get("message") or choice.get("delta") or {}
        parts += [call["function"].get("arguments") or "" for call in said.get("tool_calls") or []]
        parts += [said.get("content") or ""]
    return "".join(parts)


def _fits(text: str) -> bool:
    """Whether it is what the schema allows: an object with this one field."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["sunny"] and isinstance(found["sunny"], bool)
