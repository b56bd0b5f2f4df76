"""Checks of lab 13: a schema for a ticket, whether a proposed call may run, and a conversation that ends."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import requests
from jsonschema import Draft202012Validator

from servebook.bearer import bearer
from servebook.lab.feedback import NotYet, judge, require, shorten
from servebook.lab.rest import key_of, not_full
from servebook.lab.submission import Causes, Submission

TEAMS = (["network", "mail"], ["printing"])
TICKET = {"team": "network", "urgent": True, "summary": "No Wi-Fi in room 3"}


def check_13_1(submission: Submission) -> None:
    """What the schema lets through and what it keeps out, for two lists of teams; and whether the engine takes it."""
    ticket_schema, vllm = submission.function("ticket_schema"), submission.server("vllm")
    for teams in TEAMS:
        schema = submission.call(ticket_schema, list(teams))
        require(isinstance(schema, dict), "a dict", schema, "return the schema as a dict, not as a text")
        try:
            # On its way to the engine a tuple is a list.
            schema = json.loads(json.dumps(schema, default=_no_json))
        except (TypeError, ValueError) as error:
            plain = "a schema is JSON: dicts, lists, texts, numbers, True, False and None"
            raise NotYet("a dict that can be sent as JSON", f"{type(error).__name__}: {error}", plain) from None
        _judge_schema(schema, teams)
    form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": schema}}
    turn = [{"role": "user", "content": "The printer is on fire!"}]
    answer = requests.post(
        f"{vllm.url}/v1/chat/completions",
        auth=bearer(key_of(vllm)),
        json={"model": vllm.model, "messages": turn, "max_tokens": 1, "response_format": form},
        timeout=60,
    )
    not_full(answer.status_code)
    cause = "the schema is right, but the engine cannot make a grammar of it: say it in plainer words"
    require(answer.ok, "a schema that the engine takes", answer.text[:300], cause)


def _no_json(value: Any) -> None:
    raise TypeError(f"{shorten(value)} among the schema's values")


def _judge_schema(schema: dict[str, Any], teams: list[str]) -> None:
    def fits(instance: Any) -> bool:
        try:
            Draft202012Validator.check_schema(schema)
            return bool(Draft202012Validator(schema).is_valid(instance))
        except Exception as error:  # whatever a reference to nothing, or to itself, may raise
            no_list = "required" in getattr(error, "path", ()) and "required is a list of names, beside properties"
            cause = no_list or "this is no JSON schema"
            raise NotYet("a JSON schema", f"{type(error).__name__}: {error}"[:300], cause) from None

    ticket = TICKET | {"team": teams[-1]}
    nulls = [ticket | {name: None} for name in ticket]
    shorter = [{name: value for name, value in ticket.items() if name != without} for without in ticket]
    described = schema.get("properties")
    teams_in = described.get("team") if isinstance(described, dict) else None
    listed = teams_in.get("enum") if isinstance(teams_in, dict) else None
    if described is None and schema.get("additionalProperties") is False:
        named = "no field is described: they stand in `properties`, or additionalProperties keeps all of them out"
    elif isinstance(listed, list) and teams in listed:
        named = "enum is the list of the teams itself, and not a list with that list in it"
    else:
        named = "the teams are those that the function is given"
    cases = [
        ("text", False, 'the type is missing: without "type": "object", any text or list fits'),
        (ticket, True, named),
        (ticket | {"team": teams[0]}, True, "every team of the list may be named, the first one too"),
        (ticket | {"summary": "x" * 40}, True, "40 characters are allowed"),
        (ticket | {"summary": ""}, True, "an empty summary has at most 40 characters, too"),
        (ticket | {"urgent": False}, True, "urgent may be false"),
        *((short, False, "nothing says that every field must be there: look at required") for short in shorter),
        (ticket | {"colour": "red"}, False, "other fields get through: look at additionalProperties"),
        (ticket | {"urgent": "yes"}, False, "urgent is true or false, and no text"),
        (ticket | {"urgent": 1}, False, "urgent is true or false, and no number"),
        (ticket | {"summary": 7}, False, "summary is a text"),
        (ticket | {"summary": "x" * 41}, False, "nothing bounds the summary: maxLength, beside its type"),
        (ticket | {"team": "gardening"}, False, "any team gets through: an enum lists those that there are"),
        (ticket | {"team": f"{teams[-1]}s"}, False, "a pattern is found within a text, too: an enum lists whole ones"),
        (ticket | {"team": teams}, False, "team is one of the teams, not a list of them"),
        *((null, False, "null gets through, which is no team, no text, and neither true nor false") for null in nulls),
    ]
    for instance, right, cause in cases:
        judge(
            right,
            fits(instance),
            otherwise=cause,
            expected=f"{json.dumps(instance)} {'fits' if right else 'does not fit'}",
            shown=f"it {'does not' if right else 'does'}, by {json.dumps(schema, default=repr)}"[:400],
        )


WORD = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 20}, "times": {"type": "integer", "minimum": 1}},
    "required": ["word"],
    "additionalProperties": False,
}
TOOLS = {"repeat": WORD, "now": {"type": "object", "additionalProperties": False}, "anything": {}}


def check_13_2(submission: Submission) -> None:
    """Calls that may run, and what models have been seen to write instead."""
    judged = submission.function("judged")
    unknown, no_json, misfit = ({"error": what} for what in ("unknown tool", "not JSON", "does not fit"))
    runs = "this call may run: jsonschema.validate returns None then, and raises where something does not fit"
    known_only = "the name is looked up in tools, letter by letter: what is not there is an unknown tool"
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        ("repeat", '{"word": "ha", "times": 3}', {"arguments": {"word": "ha", "times": 3}}, runs),
        ("now", "{}", {"arguments": {}}, "no arguments are arguments, too: {} is not nothing"),
        ("rm", '{"word": "ha"}', unknown, known_only),
        ("rm", "oops", unknown, "whichever comes first: the name is looked at before the arguments"),
        ("Repeat", '{"word": "ha"}', unknown, known_only),
        ("repeat_all", '{"word": "ha"}', unknown, known_only),
        ("repeat", '{"word": "ha"', no_json, "a call that was cut off is no JSON: json.loads raises ValueError"),
        ("repeat", "{'word': 'ha'}", no_json, "that is Python, not JSON: a model's words are read, never evaluated"),
        ("repeat", "", no_json, "an empty text is no JSON"),
        (
            "repeat",
            "[" * 100_000,
            no_json,
            "for brackets that are nested too deep json.loads raises RecursionError, which is no ValueError",
        ),
        ("repeat", "{}", misfit, "a required argument is missing, and nobody has seen it"),
        ("repeat", '{"word": 7}', misfit, "the names are right and a value is not: let the schema judge all of it"),
        (
            "repeat",
            '{"word": "ha", "times": 0}',
            misfit,
            "a value is beyond its bounds: let the schema judge all of it",
        ),
        ("repeat", '{"word": "hahahahahahahahahahaha"}', misfit, "a text is too long: let the schema judge all of it"),
        ("repeat", '{"word": "ha", "path": "/"}', misfit, "an argument too many: the schema allows no others"),
        ("repeat", '["ha"]', misfit, "this is JSON, but no object"),
        (
            "repeat",
            '[["word", "ha"]]',
            misfit,
            "a list is no object: judge what json.loads gives, and make no dict of it",
        ),
        ("anything", '{"word": 7}', {"arguments": {"word": 7}}, "a schema may be empty, and its tool is there"),
    ]
    for name, arguments, right, cause in cases:
        call = {"name": name, "arguments": arguments}
        got = submission.call(
            judged,
            call,
            deepcopy(TOOLS),
            causes={Exception: f"it must not raise: {cause}"},
        )
        judge(
            right,
            got,
            (got is None, "the function returns nothing: `return` is missing"),
            (lambda got, _: isinstance(got["arguments"], str), "the arguments are still a text: return them as a dict"),
            (lambda got, right: got == right["arguments"], "the arguments stand under a name: {'arguments': …}"),
            (right == misfit and got == no_json, "this is JSON: a schema that it does not fit is another error"),
            (
                lambda got, _: got.keys() == {"error"} and got not in (unknown, no_json, misfit),
                "one of the three errors, word for word: programs compare them",
            ),
            otherwise=cause,
            expected=f"{right} for {shorten(call)}",
        )


QUESTION = [{"role": "system", "content": "Count."}, {"role": "user", "content": "How many?"}]


def _calls(*calls: tuple[str, str], content: str | None = None) -> dict[str, Any]:
    tool_calls = [
        {"id": f"call-{name}-{len(arguments)}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": tool_calls}


NO_ANSWER = "the model has not answered in so many rounds: return None"
BESIDE = "a model may say something beside its calls: tool_calls tells whether it has answered"
WANTS_NONE = 'a message without calls is an answer, be tool_calls missing, None or empty: ask message.get("tool_calls")'


def check_13_3(submission: Submission) -> None:
    """A model that answers at once, after one round, after two calls in one, and never."""
    answer = submission.function("answer")
    one, two = _calls(("count", '{"letter": "r"}')), _calls(("count", '{"letter": "a"}'), ("now", "{}"))
    talks = _calls(("count", '{"letter": "r"}'), content="Let me count.")
    text = {"role": "assistant", "content": "Three."}
    for script, rounds in (
        ([text], 3),
        ([text | {"tool_calls": []}], 1),
        ([text | {"tool_calls": None}], 1),
        ([one, text], 2),
        ([two, text], 3),
        ([one, two, text], 3),
        ([talks, text], 2),
        ([one, two, one], 3),
        ([talks], 1),
    ):
        _converse(submission, answer, script, rounds)


def _converse(submission: Submission, answer: Any, script: list[dict[str, Any]], rounds: int) -> None:
    asked: list[Any] = []
    ran: list[Any] = []

    def ask(messages: Any) -> dict[str, Any]:
        asked.append(deepcopy(messages))
        return deepcopy(script[len(asked) - 1]) if len(asked) <= len(script) else {"role": "assistant", "content": "!"}

    def run(name: Any, arguments: Any) -> str:
        ran.append((name, arguments))
        return f"{name} {arguments} done"

    wants_none = dict.fromkeys(((KeyError, "tool_calls"), (TypeError, "'NoneType'")), WANTS_NONE)
    causes: Causes = {} if script[0].get("tool_calls") else wants_none
    if script[-1].get("tool_calls"):  # what else raises has raised in the conversations before
        causes = {Exception: NO_ANSWER}
    got = submission.call(answer, ask, run, deepcopy(QUESTION), rounds, causes=causes)
    require(
        len(asked) <= rounds,
        f"{rounds} questions at most",
        f"{len(asked)}",
        "the model is asked more often than `rounds` says: one that always wants a tool would never end",
    )
    told = list(QUESTION)
    for number, message in enumerate(script):
        require(len(asked) > number, f"{number + 1} questions", f"{len(asked)}", "there were rounds left, so ask again")
        _judge_messages(asked[number], told)
        calls = message.get("tool_calls") or []
        if calls and number < len(script) - 1:
            wanted = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            made = ran[: len(wanted)]
            del ran[: len(wanted)]
            judge(
                wanted,
                made,
                (not made and got is not None and got == message["content"], BESIDE),
                (lambda made, wanted: len(made) < len(wanted), "a message may hold several calls: run each of them"),
                (
                    lambda made, _: any(not isinstance(arguments, str) for _, arguments in made),
                    "run takes the arguments as the text that they are",
                ),
                otherwise="run gets the name and the arguments of each call",
                fits=lambda made, wanted: sorted(made) == sorted(wanted),  # some let them run side by side
            )
            results = [f"{name} {arguments} done" for name, arguments in wanted]
            told += [message] + [
                {"role": "tool", "tool_call_id": call["id"], "content": result}
                for call, result in zip(calls, results, strict=True)
            ]
    final = None if script[-1].get("tool_calls") else script[-1]["content"]
    judge(
        final,
        got,
        (got is not None and any(m.get("tool_calls") and got == m["content"] for m in script), BESIDE),
        (
            lambda got, _: isinstance(got, dict),
            "that is the whole message: its content is wanted",
        ),
        (final is None, NO_ANSWER),
        (got is None and "tool_calls" in script[-1], WANTS_NONE),
        (got is None, "the function returns nothing: `return` is missing"),
        otherwise="return the content of the first message without calls",
    )


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "tool_calls"}


def _judge_messages(got: Any, right: list[dict[str, Any]]) -> None:
    roles = [each.get("role") if isinstance(each, dict) else None for each in (got if isinstance(got, list) else ())]
    tools = [message for message in right if message["role"] == "tool"]
    judge(
        right,
        got,
        (not isinstance(got, list), "ask takes the list of all messages"),
        (
            lambda got, right: "assistant" not in roles and "assistant" in [each["role"] for each in right],
            "the model's own message is missing: it stands before the results of its calls",
        ),
        (
            lambda got, right: len(got) == len(right) and roles != [each["role"] for each in right],
            "a result has the role `tool`, and stands behind the message that wanted it",
        ),
        (lambda got, right: len(got) < len(right), "a message is missing: one for each call, beside all that was said"),
        (lambda got, right: len(got) > len(right), "there are more messages than were said"),
        (
            lambda got, right: all(message in right for message in got) and all(message in got for message in right),
            "the results stand in the order of their calls, whichever was there first",
        ),
        (
            lambda got, _: (
                [each.get("tool_call_id") for each in got if each["role"] == "tool"]
                != [each["tool_call_id"] for each in tools]
            ),
            "tool_call_id says which call a result belongs to: the call's own id",
        ),
        (
            lambda got, _: (
                [each.get("content") for each in got if each["role"] == "tool"] != [each["content"] for each in tools]
            ),
            "the content is what run has returned, as it is",
        ),
        (
            lambda got, _: any(each.keys() - tools[0].keys() for each in got if each["role"] == "tool"),
            "a result's message has the three fields of the brief, and no others",
        ),
        (
            lambda got, right: len(got) == len(right) and [*map(_without_calls, got)] == [*map(_without_calls, right)],
            "the model's message as it came, with its tool_calls: else nobody knows what the results belong to",
        ),
        otherwise="the messages that were there, then the model's, then a result for each call",
        expected=json.dumps(right, ensure_ascii=False)[:400],
        shown=json.dumps(got, ensure_ascii=False, default=repr)[:400],
    )
