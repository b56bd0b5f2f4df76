"""Checks of lab 01: vLLM's OpenAI API over plain HTTP and through the SDK."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from servebook.lab.feedback import NotYet, require
from servebook.lab.rest import answer_to, had_room, key_of, sends, sends_key, through
from servebook.lab.submission import Submission
from servebook.lab.taps.http import Exchange, Tap


def check_01_1(submission: Submission) -> None:
    """Plain HTTP: the request as asked for, and the text out of the answer."""
    complete, vllm = submission.function("complete"), submission.server("vllm")
    key = key_of(vllm)
    with Tap(vllm.url) as tap:
        for prompt, max_tokens in (("The capital of France is", 7), ("Bread is made of", 21)):

            def ask(prompt: str = prompt, max_tokens: int = max_tokens) -> Any:
                return complete(tap.url, key, vllm.model, prompt, max_tokens)

            text, (exchange, *_) = through(
                tap, submission, ask, {KeyError: "the answer has no such field: print response.json() and look"}
            )
            require(
                exchange.path == "/v1/completions",
                "POST /v1/completions",
                f"{exchange.method} {exchange.path}",
                "that is the chat API; this exercise continues a prompt",
            )
            sends_key(exchange, key)
            sends(
                exchange,
                {"max_tokens": "without max_tokens the server takes its own default (16 for completions)"}
                if "max_tokens" not in exchange.body
                else {},
                model=vllm.model,
                prompt=prompt,
                max_tokens=max_tokens,
            )
            right = answer_to(exchange)["choices"][0]["text"]
            altered = isinstance(text, str) and text.strip() == right.strip()
            require(
                text == right,
                right,
                text,
                "the text was trimmed: a leading space is part of it"
                if altered
                else "return the string in choices[0].text, nothing around it",
            )


def check_01_2(submission: Submission) -> None:
    """Usage and finish reason, of two answers that ended in different ways."""
    account, vllm = submission.function("account"), submission.server("vllm")
    from openai import OpenAI

    client = OpenAI(base_url=f"{vllm.url}/v1", api_key=key_of(vllm))
    requests: list[dict[str, Any]] = [
        {"prompt": "One, two, three,", "max_tokens": 6, "extra_body": {"ignore_eos": True}},
        {"prompt": "Say yes or no:", "max_tokens": 9, "extra_body": {"structured_outputs": {"choice": ["yes"]}}},
    ]
    for request in requests:
        answer = client.completions.create(model=vllm.model, temperature=0, **request).model_dump()
        usage, reason = answer["usage"], answer["choices"][0]["finish_reason"]
        right = (usage["prompt_tokens"], usage["completion_tokens"], reason == "length")
        got = submission.run(
            lambda answer=answer: account(answer),  # type: ignore[misc]
            {KeyError: "the answer has no such field: look at the one printed above", TypeError: "choices is a list"},
        )
        try:
            tokens, cut = tuple(got[:2]), got[2]
            length = len(got)
        except (TypeError, LookupError):
            raise NotYet(right, got, "return three values: prompt tokens, completion tokens, cut off or not") from None
        if tokens == right[:2]:
            cause = f'finish_reason is {reason!r} here: "length" means cut off by max_tokens, "stop" an end of its own'
        elif tokens == (usage["prompt_tokens"], usage["total_tokens"]):
            cause = "total_tokens counts the prompt too; the answer alone is completion_tokens"
        elif tokens == right[1::-1]:
            cause = "the first two values are the wrong way round"
        else:
            cause = "words, characters and chunks are not tokens: the server has counted, in usage"
        require(length == 3 and tokens == right[:2] and cut is right[2], right, got, cause)


def check_01_3(submission: Submission) -> None:
    """A second turn must carry the first one, and the caller's list stays as it was."""
    talk, vllm = submission.function("talk"), submission.server("vllm")
    from openai import OpenAI

    opening = [{"role": "system", "content": "Answer in one short sentence."}]
    with Tap(vllm.url) as tap:
        client = OpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0)
        history: list[dict[str, str]] = list(opening)
        for text in ("Name a colour.", "Name another one."):
            given = [dict(message) for message in history]

            def turn(given: list[dict[str, str]] = given, text: str = text) -> Any:
                return talk(client, vllm.model, given, text, 12)

            longer, (exchange, *_) = through(tap, submission, turn)
            require(
                exchange.path.endswith("/chat/completions"),
                "POST /v1/chat/completions",
                exchange.path,
                "a conversation goes to the chat API: client.chat.completions.create",
            )
            sends(exchange, {}, model=vllm.model, max_tokens=12)
            asked = [*history, {"role": "user", "content": text}]
            sent = [{"role": m.get("role"), "content": m.get("content")} for m in exchange.body.get("messages", [])]
            if sent != asked:
                cause = "send the whole history, then the new message with the role user"
                if sent == asked[-1:]:
                    cause = "only the new message was sent: the server keeps nothing, so every turn carries them all"
                elif sent == history:
                    cause = "the new message is not in the list that was sent: append it before the call"
                elif [m["content"] for m in sent] == [m["content"] for m in asked]:
                    cause = "a message has the wrong role: what the person says has the role user"
                raise NotYet(asked, sent, cause)
            require(
                given == history,
                "the caller's list as it was",
                f"{len(given)} messages where there were {len(history)}",
                "append changes the list that was handed in; make a new one: [*history, …]",
            )
            reply = answer_to(exchange)["choices"][0]["message"]["content"]
            right = [*asked, {"role": "assistant", "content": reply}]
            if longer != right:
                cause = "return a list of plain dicts with role and content"
                if longer == asked:
                    cause = "the reply is missing: it belongs to the history too, with the role assistant"
                elif isinstance(longer, str):
                    cause = "return the longer history, not the reply alone"
                elif isinstance(longer, list) and longer and not isinstance(longer[-1], dict):
                    cause = "the SDK's message is an object; take its content into a dict of role and content"
                elif isinstance(longer, list) and longer and longer[-1].get("role") != "assistant":
                    cause = "the model's reply has the role assistant"
                raise NotYet(right, longer, cause)
            history = right


def check_01_4(submission: Submission) -> None:
    """One word for each way in which a call ends."""
    verdict, vllm = submission.function("verdict"), submission.server("vllm")
    from openai import OpenAI

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
                got = submission.run(lambda at=at, model=model, n=max_tokens: verdict(at, model, n))  # type: ignore[misc]
            except NotYet as fault:
                for exchange in tap.exchanges:
                    had_room(exchange)
                cause = f"this error belongs to the case {right!r}: catch it by its class"
                raise NotYet(what, fault.got, cause) from None
            cause = "each case has its own class in the SDK: see the ladder in the brief"
            if right == "too slow" and got == "no server":
                cause = (
                    "APITimeoutError is a kind of APIConnectionError: the first except that fits wins, so it goes first"
                )
            elif got == "ok":
                cause = "the error was swallowed: only a call that came back is ok"
            elif right == "no such model" and got == "bad request":
                cause = "404 and 400 are both APIStatusError, and more than that: catch NotFoundError apart"
            elif right == "ok":
                cause = "this call succeeds: is the model handed on as it was given?"
            require(got == right, what, got, cause)
        release.set()
        require(
            len(tap.exchanges) >= 3,
            "a request through the client in each of the first three cases",
            f"{len(tap.exchanges)} in all",
            "decide from what the server answers, not from the arguments",
        )


def check_01_5(submission: Submission) -> None:
    """All requests under way at once, the answers in the order of the questions."""
    ask_all, vllm = submission.function("ask_all"), submission.server("vllm")
    from openai import AsyncOpenAI

    questions = [f"What is {n} plus {n}?" for n in range(1, 7)]

    def together() -> bool:
        return tap.most_at_once >= len(questions)

    def reverse(chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        """Hold every answer until all have asked, then let the last one out first."""
        while not together():
            if time.monotonic() > tap.exchanges[0].started + 5:
                raise ConnectionError  # waiting for the rest would only cost time
            time.sleep(0.01)
        for later in tap.exchanges[tap.exchanges.index(exchange) + 1 :]:
            later.done.wait(5)
        yield from chunks

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{tap.url}/v1", api_key=key_of(vllm), max_retries=0) as client:
            answers: list[str] = await ask_all(client, vllm.model, questions, 12)
            return answers

    with Tap(vllm.url, reverse) as tap:
        try:
            answers, made = through(
                tap,
                submission,
                ask,
                {
                    TypeError: "ask_all is awaited: define it with async def, and await the client's calls",
                    RuntimeError: "the loop is running already: define ask_all with async def, and await in it",
                },
            )
        except NotYet:
            if not tap.exchanges or together():
                raise
            raise NotYet(
                f"{len(questions)} requests under way at once",
                f"{tap.most_at_once} at most",
                "awaiting in a loop asks one after the other: start all, then wait for all (asyncio.gather)"
                if tap.most_at_once == 1
                else "something limits how many are under way: start all before waiting for any",
            ) from None
    sends(made[0], {}, model=vllm.model, max_tokens=12)
    by_question = {
        exchange.body["messages"][-1]["content"]: answer_to(exchange)["choices"][0]["message"]["content"]
        for exchange in made
    }
    right = [by_question.get(question) for question in questions]
    cause = "return the replies' text as a list of strings"
    if isinstance(answers, list) and sorted(map(str, answers)) == sorted(map(str, right)):
        cause = "the answers are in the order in which they came: gather keeps the order of the questions"
    require(answers == right, right, answers, cause)
