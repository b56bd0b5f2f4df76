"""Checks of lab 01: vLLM's OpenAI API over plain HTTP and through the SDK."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from openai import AsyncOpenAI, OpenAI

from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.rest import asked, asked_to_continue, had_room, key_of, reply_of, sends, sends_key, through
from servebook.lab.submission import Submission
from servebook.lab.taps.http import Exchange, Tap, answering, said
from servebook.processes import wait_until

CHAT = "/v1/chat/completions"


def check_01_1(submission: Submission) -> None:
    """Plain HTTP: the request as asked for, the text out of the answer, and an error for a refusal."""
    complete, vllm = submission.function("complete"), submission.server("vllm")
    key = key_of(vllm)
    look = {KeyError: "the answer has no such field: print response.json() and look"}
    with Tap(vllm.url) as tap:
        for prompt, max_tokens in (("The capital of France is", 7), ("Bread is made of", 21)):
            text, made = through(tap, submission, complete, tap.url, key, vllm.model, prompt, max_tokens, causes=look)
            exchange = asked_to_continue(made)
            sends_key(exchange, key)
            default = "without max_tokens the server takes its own default (16 for completions)"
            causes = {} if "max_tokens" in (exchange.body or {}) else {"max_tokens": default}
            sends(exchange, causes, model=vllm.model, prompt=prompt, max_tokens=max_tokens)
            right = reply_of(exchange)
            judge(
                right,
                text,
                (
                    lambda got, right: got.strip() == right.strip(),
                    "the text was trimmed: a leading space is part of it",
                ),
                (text is None, "the function returns nothing: `return` is missing"),
                otherwise="return the string in choices[0].text, nothing around it",
            )

        def refused() -> Any:
            try:
                return complete(tap.url, key, "no-such-model", "Hello", 4)
            except NotImplementedError:
                raise
            except Exception:  # of whichever library
                return refused

        got = submission.run(refused, busy=tap.busy)
        cause = "a refusal (404) was taken for an answer: response.raise_for_status() before you read it"
        require(got is refused, "an error for a model that the server does not have", got, cause)


def check_01_2(submission: Submission) -> None:
    """Usage and finish reason, of two answers that ended in different ways."""
    account, vllm = submission.function("account"), submission.server("vllm")
    client = OpenAI(base_url=f"{vllm.url}/v1", api_key=key_of(vllm))
    requests: list[dict[str, Any]] = [
        {"prompt": "The capital of France is", "max_tokens": 6, "extra_body": {"ignore_eos": True}},
        {"prompt": "Say yes or no:", "max_tokens": 9, "extra_body": {"structured_outputs": {"choice": ["yes"]}}},
        {"prompt": "Bread is made of", "max_tokens": 4, "extra_body": {"ignore_eos": True}},
    ]
    earlier: list[Any] = []
    looks = {KeyError: "the answer has no such field: look at the one printed above", TypeError: "choices is a list"}
    for request in requests:
        answer = client.completions.create(model=vllm.model, temperature=0, **request).model_dump()
        usage, reason = answer["usage"], answer["choices"][0]["finish_reason"]
        right = (usage["prompt_tokens"], usage["completion_tokens"], reason == "length")
        got = submission.call(account, deepcopy(answer), causes=looks)
        ended = f'finish_reason is {reason!r} here: "length" means cut off by max_tokens, "stop" an end of its own'
        judge(
            right,
            tuple(got) if isinstance(got, list) else got,
            (
                not isinstance(got, tuple | list) or len(got) != 3,
                "return three values: prompt tokens, completion tokens, cut off or not",
            ),
            (
                lambda got, right: got[:2] == right[:2] and not isinstance(got[2], bool),
                "the third value is True or False",
            ),
            (lambda got, right: got[:2] == right[:2], ended),
            (
                isinstance(got, tuple | list) and usage["total_tokens"] in got[1:2],
                "total_tokens counts the prompt too; the answer alone is completion_tokens",
            ),
            (lambda got, right: got[:2] == right[1::-1], "the first two values are the wrong way round"),
            (
                lambda got, _: got in earlier,
                "that was another answer, such as the one printed above: read the one that your function is given",
            ),
            otherwise="words, characters and chunks are not tokens: the server has counted, in usage",
            fits=lambda got, right: got == right and isinstance(got[2], bool),
        )
        earlier.append(right)


def check_01_3(submission: Submission) -> None:
    """A second turn must carry the first one, and the caller's list stays as it was."""
    talk, vllm = submission.function("talk"), submission.server("vllm")
    history: list[dict[str, str]] = [{"role": "system", "content": "Answer in one short sentence."}]
    with Tap(vllm.url) as tap:
        client = OpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0)
        for text in ("Name a colour.", "Name another one."):
            given = [dict(message) for message in history]
            longer, made = through(tap, submission, talk, client, vllm.model, given, text, 12)
            exchange = asked(made, CHAT, "a conversation goes to the chat API: client.chat.completions.create")
            sends(exchange, model=vllm.model, max_tokens=12)
            turn = [*history, {"role": "user", "content": text}]
            sent = [{"role": m.get("role"), "content": said(m)} for m in exchange.body.get("messages", [])]
            judge(
                turn,
                sent,
                (
                    sent == turn[-1:],
                    "only the new message was sent: the server keeps nothing, so every turn carries them all",
                ),
                (sent == history, "the new message is not in the list that was sent: append it before the call"),
                (
                    [m["content"] for m in sent] == [m["content"] for m in turn],
                    "a message has the wrong role: what the person says has the role user",
                ),
                otherwise="send the whole history, then the new message with the role user",
            )
            require(
                given == history,
                "the caller's list as it was",
                f"{len(given)} messages where there were {len(history)}",
                "append changes the list that was handed in; make a new one: [*history, …]",
            )
            right = [*turn, {"role": "assistant", "content": reply_of(exchange)}]
            judge(
                right,
                longer,
                (longer == turn, "the reply is missing: it belongs to the history too, with the role assistant"),
                (isinstance(longer, str), "return the longer history, not the reply alone"),
                (
                    lambda got, right: len(got) < len(right) and all(message in right for message in got),
                    "a part of the conversation is missing: return the history, the person's message and the reply",
                ),
                (
                    lambda got, _: not isinstance(got[-1], dict),
                    "the SDK's message is an object; take its content into a dict of role and content",
                ),
                (lambda got, _: got[-1].get("role") != "assistant", "the model's reply has the role assistant"),
                (
                    lambda got, right: got[:-1] == right[:-1] and got[-1].keys() == right[-1].keys(),
                    "the reply is not the model's text as it came",
                ),
                otherwise="return a list of plain dicts with role and content",
            )
            history = right


def check_01_4(submission: Submission) -> None:
    """One word for each way in which a call ends."""
    verdict, vllm = submission.function("verdict"), submission.server("vllm")
    release = threading.Event()

    def hold(chunks: Iterator[bytes], _: Exchange) -> Iterator[bytes]:
        release.wait(3)
        yield from chunks

    with Tap(vllm.url) as tap, Tap(vllm.url, hold) as slow, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, never listening: connections are refused
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}"

        def client(url: str, timeout: float = 30) -> OpenAI:
            return OpenAI(base_url=f"{url}/v1", api_key=key_of(vllm), max_retries=0, timeout=timeout)

        cases = [
            ("ok", client(tap.url), vllm.model, 4),
            ("no such model", client(tap.url), "no-such-model", 4),
            ("bad request", client(tap.url), vllm.model, -1),
            ("no server", client(closed), vllm.model, 4),
            ("too slow", client(slow.url, timeout=0.5), vllm.model, 4),
        ]
        for right, at, model, max_tokens in cases:
            what = f"{right!r} (model {model!r}, max_tokens {max_tokens}, {at.base_url}, time-out {at.timeout} s)"
            try:
                got = submission.call(verdict, at, model, max_tokens, busy=lambda: tap.busy() or slow.busy())
            except NotYet as fault:
                cause = f"this error belongs to the case {right!r}: catch it by its class"
                raise NotYet(what, fault.got, cause) from None
            finally:  # a word for a case may be wrong because the engine was full
                for exchange in tap.exchanges:
                    had_room(exchange)
            judge(
                right,
                got,
                (
                    right == "too slow" and got == "no server",
                    "APITimeoutError is a kind of APIConnectionError: "
                    "the first except that fits wins, so it goes first",
                ),
                (
                    got == "ok",
                    "the error was swallowed, or the call went by another client or time-out than the ones given: "
                    "only a call that came back is ok",
                ),
                (
                    right == "no such model" and got == "bad request",
                    "404 and 400 are both APIStatusError, and more than that: catch NotFoundError apart",
                ),
                (got is None, "no word for this case: return the one in the table"),
                (right == "ok", "this call succeeds: hand the model on as it was given, and return the table's word"),
                otherwise="each case has its own class in the SDK: see the table in the brief",
                expected=what,
            )
        release.set()
        require(
            len(tap.exchanges) >= 3,
            "a request through the client in each of the first three cases",
            f"{len(tap.exchanges)} in all",
            "decide from what the server answers, not from the arguments",
        )

    def passed_on() -> Any:
        try:
            return verdict(client(broken), vllm.model, 4)
        except NotImplementedError:
            raise
        except Exception as error:
            return type(error).__name__

    with answering(500) as broken:
        got = submission.run(passed_on)
    require(
        got == "InternalServerError",
        "the SDK's InternalServerError, which a server with a fault in it causes (500), goes on to the caller",
        got,
        "this error has no word in the table: let it go on (`raise`), or a fault of yours is called the caller's",
    )


def check_01_5(submission: Submission) -> None:
    """All requests under way at once, the answers in the order of the questions."""
    ask_all, vllm = submission.function("ask_all", awaited=True), submission.server("vllm")
    questions = [f"What is {n} plus {n}?" for n in range(1, 7)]

    def together() -> bool:
        return tap.most_at_once >= len(questions)

    def reverse(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        """Hold every answer until all have asked, then let the last one out first."""
        if not wait_until(together, 5, 0.01):
            raise ConnectionError  # waiting for the rest would only cost time
        for later in tap.exchanges[tap.exchanges.index(exchange) + 1 :]:
            wait_until(later.done.is_set, 5, 0.01)
        yield from chunks

    loop = "define ask_all with async def, and await in it: the loop is running already"
    with Tap(vllm.url, reverse) as tap:
        client = AsyncOpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0)
        try:
            answers, made = through(
                tap,
                submission,
                ask_all,
                client,
                vllm.model,
                list(questions),
                12,
                causes={
                    (TypeError, "unhashable"): "gather takes the calls one by one, and no list: asyncio.gather(*calls)",
                    TypeError: "ask_all is awaited: define it with async def, and await the client's calls",
                    RuntimeError: loop,
                },
            )
        except NotYet as fault:
            if not tap.exchanges and any(word in str(fault.got) for word in ("Future", "<Task", "<coroutine")):
                never = "what was started is given back unfinished: await it, as in `await asyncio.gather(…)`"
                raise NotYet(fault.expected, fault.got, never) from None
            if not tap.exchanges or together():
                raise
            raise NotYet(
                f"{len(questions)} requests under way at once",
                f"{tap.most_at_once} at most",
                "awaiting in a loop asks one after the other: start all, then wait for all (asyncio.gather)"
                if tap.most_at_once == 1
                else "something limits how many are under way: start all before waiting for any",
            ) from None
    for exchange in made:
        chat = exchange.path.endswith("/chat/completions")
        require(chat, "chat requests to the engine", exchange.path, "the questions go to the chat API")
        sends(exchange, model=vllm.model, max_tokens=12)
    by_question = {said(exchange.body["messages"][-1]): reply_of(exchange) for exchange in made}
    own = "each request holds one question: make a list of messages of its own for each"
    asked_for = [exchange.body["messages"] for exchange in made]
    require(sorted(map(str, by_question)) == questions, questions, asked_for, own)
    right = [by_question.get(question) for question in questions]
    judge(
        right,
        list(answers) if isinstance(answers, tuple) else answers,
        (
            lambda got, right: sorted(map(str, got)) == sorted(map(str, right)),
            "the answers are in the order in which they came: gather keeps the order of the questions",
        ),
        otherwise="return a list of strings: the text of each reply, as it came",
    )
