"""Checks of lab 08: numbers out of a stream, arms that take turns, and what a result does and does not say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import requests

from servebook.lab.feedback import NotYet, judge, require
from servebook.lab.rest import key_of
from servebook.lab.submission import Causes, Submission
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import events_of

Arrivals = list[tuple[float, int]]


@cache
def real_arrivals(url: str, key: str, model: str) -> tuple[float, Arrivals]:
    """When one real stream was asked for, and when each of its messages came with how many tokens.

    After the first message every two count as one, as it does for a reader who is slower than the engine.
    """
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 12, "stream": True}
    asked = time.perf_counter()
    with requests.post(
        f"{url}/v1/completions",
        headers={"Authorization": f"Bearer {key}"},
        json=body | {"ignore_eos": True, "return_token_ids": True},
        stream=True,
        timeout=60,
    ) as answer:
        answer.raise_for_status()
        single = [
            (time.perf_counter(), len(json.loads(event[5:])["choices"][0]["token_ids"]))
            for event in events_of(answer.iter_content(None))
            if event.startswith(b"data: {")
        ]
    merged = [single[0], *((late, n + m) for (_, n), (late, m) in zip(single[1::2], single[2::2], strict=False))]
    return asked, merged


def check_08_1(submission: Submission) -> None:
    """Three numbers that people quote, of a real stream with messages of one and of two tokens."""
    sum_up, vllm = submission.function("sum_up"), submission.server("vllm")
    asked, arrivals = real_arrivals(vllm.url, key_of(vllm), vllm.model)
    single = "with a single message no token came later: TPOT is None then"
    for given in (arrivals, arrivals[:1]):
        first, last = given[0][0], given[-1][0]
        tokens, later = sum(n for _, n in given), sum(n for _, n in given[1:])
        right: dict[str, float | None] = {
            "ttft": first - asked,
            "tpot": (last - first) / later if later else None,
            "tokens_per_s": tokens / (last - asked),
        }
        got = submission.call(
            sum_up, asked, list(given), causes={ZeroDivisionError: single, IndexError: "arrivals may have one message"}
        )
        shown = {name: None if value is None else round(value, 4) for name, value in right.items()}
        named = isinstance(got, dict) and got.keys() == right.keys()
        require(named, shown, got, "return a dict with these three names")
        known: dict[str, list[tuple[float, str]]] = {
            "ttft": [
                (1000 * (first - asked), "these are milliseconds; the brief asks for seconds"),
                (first, "the time to the first token counts from the moment of asking"),
                (last - asked, "that is the whole time: the first token came with the first message"),
            ],
            "tpot": [
                ((last - first) / (len(given) - 1 or 1), "that is the time per message: one may hold several tokens"),
                ((last - first) / tokens, "the tokens of the first message were there already: count those after it"),
                ((last - asked) / tokens, "the time to the first token is not part of it: begin at the first message"),
                (1000 * (last - first) / (later or 1), "these are milliseconds; the brief asks for seconds"),
                (later / (last - first or 1), "that is tokens per second: a time per token is the other way round"),
            ],
            "tokens_per_s": [
                (len(given) / (last - asked), "that is messages per second: count the tokens in them"),
                (tokens / (last - first or 1), "the wait for the first token is time, too: begin at the asking"),
                (later / (last - asked), "the tokens of the first message count as well"),
            ],
        }
        for name, value in right.items():
            judge(
                value,
                got[name],
                (isinstance(got[name], str), "a number, not a text: whoever reads it wants to reckon with it"),
                (value is None, single),
                *((lambda got, _, wrong=wrong: _close_to(got, wrong), cause) for wrong, cause in known[name]),
                otherwise="see the table in the brief",
                expected=f"{name}: {shown[name]}",
                shown=f"{name}: {got[name]!r}",
                fits=_close_to,
            )


def _close_to(got: Any, right: float | None) -> bool:
    return got is None if right is None else bool(abs(got - right) <= 1e-3 * abs(right))


class TooMany(Exception):
    """Ends a function that asks without end."""


def check_08_2(submission: Submission) -> None:
    """Turns in which neither path is the earlier one, on a line that gets slower with every request."""
    take_turns, vllm = submission.function("take_turns"), submission.server("vllm")
    rounds = 2
    order: list[str] = []
    spent: list[float] = []

    def slower(chunks: Iterator[bytes], _: Exchange) -> Iterator[bytes]:
        time.sleep(0.3 if len(order) <= 2 else 0.02 * len(order))
        yield from chunks

    with Tap(vllm.url, slower) as tap:

        def path(name: str) -> Callable[[], None]:
            def request() -> None:
                if len(order) == 4 * (2 + 4 * rounds):
                    raise TooMany
                order.append(name)
                started = time.perf_counter()
                requests.post(
                    f"{tap.url}/v1/completions",
                    headers={"Authorization": f"Bearer {key_of(vllm)}"},
                    json={"model": vllm.model, "prompt": "Hello", "max_tokens": 1},
                    timeout=60,
                ).raise_for_status()
                spent.append(time.perf_counter() - started)

            return request

        endless = "the calls never come to an end: there are 2 to warm up, and 4 in each round"
        causes: Causes = {TooMany: endless, TimeoutError: endless}
        got = submission.call(take_turns, path("A"), path("B"), rounds, causes=causes, busy=tap.busy)
    calls, wanted = "".join(order), f"A and B once each to warm up, then {rounds} rounds of A B B A"
    measured = calls[2:]
    judge(
        2 + 4 * rounds,
        len(calls),
        (
            len(calls) == 4 * rounds,
            "nothing warms up: the first call of each path pays for connections and caches, and is not measured",
        ),
        otherwise="each round has four calls, and before the first one each path is called once",
        expected=wanted,
        shown=f"{len(calls)} calls: {calls}",
    )
    require(set(calls[:2]) == {"A", "B"}, wanted, calls, "warm up both paths before the first round")
    places = {name: [i for i, each in enumerate(measured) if each == name] for name in "AB"}
    require(
        all(sorted(measured[i : i + 4]) == list("AABB") for i in range(0, len(measured), 4)),
        wanted,
        f"{calls[:2]} {measured}",
        "one path is measured before the other: whatever changes meanwhile looks like a difference",
    )
    require(
        sum(places["A"]) == sum(places["B"]),
        wanted,
        f"{calls[:2]} {measured}",
        "in A B A B the second is always the later one: turn every other pair round",
    )
    try:
        seconds = {name: [float(value) for value in values] for name, values in zip("AB", got, strict=True)}
    except (TypeError, ValueError):
        raise NotYet("two lists of seconds", got, "return the seconds of A, and those of B") from None
    right = {name: [spent[2 + i] for i in places[name]] for name in "AB"}
    judge(
        right,
        seconds,
        (
            [len(values) for values in seconds.values()] == [2 * rounds + 1] * 2,
            "the warm-up is among them: forget what it took",
        ),
        (
            _close(seconds["A"], right["B"]) and _close(seconds["B"], right["A"]),
            "the two lists are the wrong way round, or one call's time went to the other path",
        ),
        (_close([value / 1000 for value in seconds["A"]], right["A"]), "these are milliseconds"),
        otherwise="measure each call from just before to just after it, in seconds",
        expected={name: [round(value, 3) for value in values] for name, values in right.items()},
        shown={name: [round(value, 3) for value in values] for name, values in seconds.items()},
        fits=lambda got, right: all(_close(got[name], right[name]) for name in "AB"),
    )


def _close(some: list[float], others: list[float]) -> bool:
    return len(some) == len(others) and all(abs(a - b) < 0.008 for a, b in zip(some, others, strict=True))


def check_08_3(submission: Submission) -> None:
    """Results of which the truth is known, because they were drawn that way; small and certain, large and noisy."""
    reading = submission.function("reading")
    draw = np.random.default_rng(8)

    def arm(factor: float, spread: float) -> list[float]:
        return [float(value) for value in draw.normal(0.1 * factor, 0.1 * spread, 40)]

    sure, untrusted = 0.01, "not to be trusted"
    cases = [
        ("A is faster", arm(1, sure), arm(1.2, sure), arm(1, sure)),
        ("B is faster", arm(1, sure), arm(0.9, sure), arm(1, sure)),
        ("no difference shown", arm(1, 0.05), arm(1.002, 0.05), arm(1, sure)),
        (untrusted, arm(1, sure), arm(1.2, sure), arm(1.1, sure)),
        (untrusted, arm(1, sure), arm(1, sure), arm(0.9, sure)),
        ("A is faster", arm(1, 0.004), arm(1.02, 0.004), arm(1, 0.004)),
        ("B is faster", arm(1, 0.004), arm(0.98, 0.004), arm(1.01, 0.004)),
        ("no difference shown", arm(1, 0.004), [*arm(0.7, sure)[:20], *arm(1.46, sure)[:20]], arm(1, 0.004)),
        (untrusted, arm(1, 0.004), arm(1.2, 0.004), arm(1.05, 0.004)),
    ]
    for right, a, b, control in cases:
        means = [f"{name} {np.mean(values):.4f} s" for name, values in (("a", a), ("b", b), ("control", control))]
        judge(
            right,
            submission.call(reading, a, b, control),
            (lambda got, _: got is None, "no verdict: return one of the four sentences"),
            (right == untrusted, "a path differs from itself by more than 3 % here: then no difference means anything"),
            (
                lambda got, _: got == untrusted,
                "the control is fine here: ratio(control, a).value is within 3 % of 1, up or down",
            ),
            (
                right == "no difference shown",
                "the interval of the ratio holds 1: the difference may be chance, however large it looks",
            ),
            (
                lambda got, _: got in ("A is faster", "B is faster"),
                "these are seconds: the smaller ones are the faster path",
            ),
            (
                lambda got, _: got == "no difference shown",
                "the interval does not hold 1: the difference is real, however small it is",
            ),
            otherwise="see the three rules in the brief, in their order",
            expected=f"{right!r} for means of {', '.join(means)}",
        )
