"""What the checks of the REST labs share: a learner's call through a tap, and the usual faults explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import requests

from servebook.bearer import bearer
from servebook.errors import ServebookError
from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.submission import Causes, Submission
from servebook.lab.taps.http import Exchange, Tap, not_lost, said
from servebook.lab.taps.sse import streamed_text, text_of
from servebook.launch import Server

STATUS_CAUSES = {
    401: "the key did not arrive: send the header Authorization with `Bearer `, then the key",
    404: "there is no such path, or no such model: both come out of the arguments",
    400: "the server read the request and refused it: its message names the field",
    415: "the body is not marked as JSON: requests does that with json=…",
    422: "the body is not the JSON that this path wants",
}
NOT_THAT_SERVER = "the answer does not come from that server: use the url or the client that your function is given"
RELIABLE = {"temperature": 0, "ignore_eos": True}
"""For a tap to add: left to itself the model may stop after a word, or before it."""
PASS_ON = "pass on what your function is given, do not fix it in the code"


def key_of(server: Server) -> str:
    """The key that clients of this server send; any word does where it asks for none."""
    return server.settings.key or "no-key-needed"


def through(
    tap: Tap, submission: Submission, function: Callable[..., Any], *args: Any, causes: Causes | None = None
) -> tuple[Any, list[Exchange]]:
    """Call the learner's function against the tap; return its result and the requests that it made.

    Raises:
        NotYet: no request came, the server refused one, or the code raised.
    """
    before = len(tap.exchanges)
    try:
        result = submission.call(function, *args, causes=causes, busy=tap.busy)
    except NotYet:
        # The server's own words say more than the error that followed from them.
        for exchange in tap.exchanges[before:]:
            accepted(exchange)
        raise
    made = tap.exchanges[before:]
    asked_there(made, f"no request, and the result {result!r}"[:200])
    for exchange in made:
        accepted(exchange)
    return result, made


def asked_there(made: list[Any], got: Any, what: str = "a request to the server that was handed in") -> None:
    """Require that the learner's code made any requests at all."""
    require(bool(made), what, got, NOT_THAT_SERVER)


def asked(made: list[Exchange], path: str, cause: str) -> Exchange:
    """The last request to `path`; a look at another one, such as /health, does no harm.

    Raises:
        NotYet: there is none, for this cause.
    """
    found = [exchange for exchange in made if exchange.path.split("?")[0] == path]
    require(bool(found), f"POST {path}", f"{made[-1].method} {made[-1].path}", cause)
    return found[-1]


def asked_to_continue(made: list[Exchange]) -> Exchange:
    """The last request to the completions API.

    Raises:
        NotYet: there is none.
    """
    return asked(made, "/v1/completions", "that is the chat API; this exercise continues a prompt")


def accepted(exchange: Exchange) -> None:
    """Require that the server did not refuse a request.

    Raises:
        NotYet: it refused.
        ServebookError: it has no room for anybody now, or is gone, which is not the learner's fault.
    """
    had_room(exchange)
    if exchange.status >= 400:
        # vLLM says 400 where the standard has 415.
        status = 415 if b"Media Type" in exchange.answer else exchange.status
        right_method = "POST" if exchange.method == "GET" else "GET"
        raise NotYet(
            f"{exchange.method} that the server accepts",
            f"{exchange.method} {exchange.path} → {exchange.status} {exchange.answer.decode(errors='replace')[:200]}",
            f"the path is there, but not for this method: {right_method} it"
            if status == 405
            else STATUS_CAUSES.get(status, "the server refused the request"),
        )


def had_room(exchange: Exchange) -> None:
    """Raise ServebookError if the server refused a request because it is full, or is gone."""
    not_full(exchange.status)
    not_lost(exchange.lost)


def not_full(status: int) -> None:
    """Raise ServebookError if a server that answers with this status is full, or has lost its engine."""
    if status in (429, 503):
        what = "full" if status == 429 else "full, or is being started again"
        raise ServebookError(f"The engine is {what} ({status}).", "Wait a moment, then check again.")


def context_length(server: Server, replica: str = "") -> int:
    """How many tokens of prompt and answer together the server's model has room for.

    Of a router, one of its replicas is asked, at that URL.

    Raises:
        ServebookError: the server is full.
    """
    answer = requests.get(f"{replica or server.url}/v1/models", auth=bearer(key_of(server)), timeout=60)
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


def text_to_its_end(exchange: Exchange) -> str:
    """The text of a stream, all of which the learner's code has waited for.

    Raises:
        NotYet: it left before: the text so far would pass for the whole.
    """
    exchange.done.wait(60)
    text = streamed_text(exchange)
    reasons = [choice.get("finish_reason") for event in exchange.events() for choice in event["choices"]]
    require(
        exchange.ended is not None or any(reasons),
        "the engine's stream read to its end",
        f"it was left after {text!r}",
        "the text is not whole: read on until the event with a finish_reason, or until [DONE]",
    )
    return text


def reply_of(exchange: Exchange) -> str:
    """The text that the engine answered with, whole or as a stream."""
    if isinstance(exchange.body, dict) and exchange.body.get("stream"):
        return text_to_its_end(exchange)
    choice = answer_to(exchange)["choices"][0]
    return str(choice["message"]["content"] or "") if "chat" in exchange.path else text_of(choice)


def sends(exchange: Exchange, causes: Mapping[str, str] | None = None, **fields: Any) -> None:
    """Require `fields` in the request's JSON; `causes` explains by name why one may be missing or other."""
    body = exchange.body if isinstance(exchange.body, dict) else {}
    if "chat" in exchange.path and "max_completion_tokens" in body:  # today's name for the same
        body = {"max_tokens": body["max_completion_tokens"], **body}
    if isinstance(body.get("prompt"), list) and len(body["prompt"]) == 1:  # the API takes several; one is the same
        body = {**body, "prompt": body["prompt"][0]}
    for name, value in fields.items():
        judge(
            value,
            body.get(name),
            otherwise=(causes or {}).get(name, PASS_ON),
            expected=f"{name} = {value!r} in the request's JSON",
            shown=f"{name} = {body[name]!r}" if name in body else f"no {name}; it holds {', '.join(body) or 'nothing'}",
        )


def sends_question(exchange: Exchange, question: Any, cause: str = PASS_ON) -> None:
    """Require `question` as the text of a chat's last message."""
    last = exchange.body["messages"][-1]
    require(said(last) == question, question, last, cause)


def sends_key(exchange: Exchange, key: str) -> None:
    """Require the key as a Bearer token."""
    got = {name.lower(): value for name, value in exchange.headers.items()}.get("authorization")
    require(
        got == f"Bearer {key}",
        f"the header Authorization: Bearer {key}",
        f"Authorization: {got}" if got else "no such header",
        "the key goes into the header Authorization, after the word Bearer; this server may not ask, the next one will",
    )
