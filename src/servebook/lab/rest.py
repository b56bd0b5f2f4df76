"""What the checks of the REST labs share: a learner's call through a tap, and the usual faults explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import requests

from servebook.errors import ServebookError
from servebook.lab.feedback import NotYet, require
from servebook.lab.submission import Submission
from servebook.lab.taps.http import Exchange, Tap
from servebook.launch import Server

STATUS_CAUSES = {
    401: "the key did not arrive: send the header Authorization with `Bearer `, then the key",
    404: "there is no such path, or no such model: both come out of the arguments",
    400: "the server read the request and refused it: its message names the field",
    405: "the path is there, but not for this method: POST it",
    415: "the body is not marked as JSON: requests does that with json=…",
    422: "the body is not the JSON that this path wants",
}


def key_of(server: Server) -> str:
    """The key that clients of this server send; any word does where it asks for none."""
    return server.settings.key or "no-key-needed"


def through(
    tap: Tap,
    submission: Submission,
    action: Callable[[], Any],
    causes: Mapping[type[BaseException], str] | None = None,
) -> tuple[Any, list[Exchange]]:
    """Run the learner's code against the tap; return its result and the requests that it made.

    Raises:
        NotYet: no request came, the server refused one, or the code raised.
    """
    before = len(tap.exchanges)
    try:
        result = submission.run(action, causes, tap.busy)
    except NotYet:
        # The server's own words say more than the error that followed from them.
        for exchange in tap.exchanges[before:]:
            accepted(exchange)
        raise
    made = tap.exchanges[before:]
    require(
        bool(made),
        "a request to the server that was handed in",
        f"no request, and the result {result!r}"[:200],
        "the answer does not come from that server: use the url or the client that your function is given",
    )
    for exchange in made:
        accepted(exchange)
    return result, made


def accepted(exchange: Exchange) -> None:
    """Require that the server did not refuse a request.

    Raises:
        NotYet: it refused.
        ServebookError: it has no room for anybody now, which is not the learner's fault.
    """
    had_room(exchange)
    if exchange.status >= 400:
        # vLLM says 400 where the standard has 415.
        status = 415 if b"Media Type" in exchange.answer else exchange.status
        raise NotYet(
            f"{exchange.method} that the server accepts",
            f"{exchange.method} {exchange.path} → {exchange.status} {exchange.answer.decode(errors='replace')[:200]}",
            STATUS_CAUSES.get(status, "the server refused the request"),
        )


def had_room(exchange: Exchange) -> None:
    """Raise ServebookError if the server refused a request because it is full."""
    not_full(exchange.status)


def not_full(status: int) -> None:
    """Raise ServebookError if a server that answers with this status is full."""
    if status in (429, 503):
        raise ServebookError(f"The engine is full ({status}).", "Wait a moment, then check again.")


def context_length(server: Server) -> int:
    """How many tokens of prompt and answer together the server's model has room for.

    Raises:
        ServebookError: the server is full.
    """
    headers = {"Authorization": f"Bearer {key_of(server)}"}
    answer = requests.get(f"{server.url}/v1/models", headers=headers, timeout=60)
    not_full(answer.status_code)
    return int(answer.json()["data"][0]["max_model_len"])


def answer_to(exchange: Exchange) -> Any:
    """The JSON that the server answered.

    Raises:
        NotYet: the learner's code did not wait for it.
    """
    answer = exchange.json()
    if answer is None:
        cause = "the call was given up before the server had answered: whoever waits gets the whole answer"
        raise NotYet("a request whose answer is read to the end", "the connection closed before that", cause)
    return answer


def sends(exchange: Exchange, causes: Mapping[str, str], **fields: Any) -> None:
    """Require `fields` in the request's JSON; `causes` explains by name why one may be missing or other."""
    body = exchange.body if isinstance(exchange.body, dict) else {}
    for name, value in fields.items():
        require(
            body.get(name) == value,
            f"{name} = {value!r} in the request's JSON",
            f"{name} = {body[name]!r}" if name in body else f"no {name}; it holds {', '.join(body) or 'nothing'}",
            causes.get(name, "pass on what your function is given, do not fix it in the code"),
        )


def sends_key(exchange: Exchange, key: str) -> None:
    """Require the key as a Bearer token."""
    got = {name.lower(): value for name, value in exchange.headers.items()}.get("authorization")
    require(
        got == f"Bearer {key}",
        f"the header Authorization: Bearer {key}",
        f"Authorization: {got}" if got else "no such header",
        "the key goes into the header Authorization, after the word Bearer; this server may not ask, the next one will",
    )
