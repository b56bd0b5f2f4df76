"""Checks of lab 08: numbers out of a stream, arms that take turns, tails and promises, and what a result says."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count, pairwise
from typing import Any

import numpy as np
import requests

from servebook.bearer import bearer
from servebook.lab.feedback import ROUNDED, NotYet, judge, require
from servebook.lab.rest import key_of, not_full
from servebook.lab.submission import Causes, Submission
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import events_of
from servebook.processes import wait_until

Arrivals = list[tuple[float, int]]


@cache
def real_arrivals(url: str, key: str, model: str) -> tuple[float, Arrivals]:
    """When one real stream was asked for, and when each of its messages came with how many tokens.

    After the first message every two count as one, as it does for a reader who is slower than the engine. The answer is
    as long as it takes: a busy machine, or a fast one, puts a short one into a message or two.
    """
    for max_tokens in (12, 100, 1000):
        asked, single = _stream(url, key, model, max_tokens)
        if len(single) >= 5:
            break
    merged = [single[0], *((late, n + m) for (_, n), (late, m) in zip(single[1::2], single[2::2], strict=False))]
    return asked, merged


def _stream(url: str, key: str, model: str, max_tokens: int) -> tuple[float, Arrivals]:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": max_tokens, "stream": True}
    asked = time.perf_counter()
    with requests.post(
        f"{url}/v1/completions",
        auth=bearer(key),
        json=body | {"ignore_eos": True, "return_token_ids": True},
        stream=True,
        timeout=60,
    ) as answer:
        answer.raise_for_status()
        return asked, [
            (time.perf_counter(), len(json.loads(event[5:])["choices"][0]["token_ids"]))
            for event in events_of(answer.iter_content(None))
            if event.startswith(b"data: {")
        ]


def check_08_1(submission: Submission) -> None:
    """Three numbers that people quote: of a real stream, of its first message alone, and of an uneven stream."""
    sum_up, vllm = submission.function("sum_up"), submission.server("vllm")
    asked, arrivals = real_arrivals(vllm.url, key_of(vllm), vllm.model)
    single = "with a single message no token came later: TPOT is None then"
    uneven = [(asked + 0.5, 1), (asked + 0.6, 1), (asked + 1.2, 3)]
    for given in (arrivals, arrivals[:1], uneven):
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
        gaps = [(late - early) / (n or 1) for (early, _), (late, n) in pairwise(given)]
        known: dict[str, list[tuple[float, str]]] = {
            "ttft": [
                (1000 * (first - asked), "these are milliseconds; the brief asks for seconds"),
                (first, "the time to the first token counts from the moment of asking"),
                (last - asked, "that is the whole time: the first token came with the first message"),
                (asked - first, "later minus earlier: the first message came after the asking"),
            ],
            "tpot": [
                ((last - first) / (len(given) - 1 or 1), "that is the time per message: one may hold several tokens"),
                ((last - first) / len(given), "that is the time per message: one may hold several tokens"),
                (sum(gaps) / (len(gaps) or 1), "a mean of the messages' own: all the time, by all the tokens in it"),
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
                (value is None, single),
                *((lambda got, _, wrong=wrong: _close_to(got, wrong), cause) for wrong, cause in known[name]),
                ROUNDED,
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
    rounds = 3
    order: list[str] = []
    begun: list[float] = []
    ended: list[float] = []

    def slower(chunks: Iterator[bytes], _: Exchange) -> Iterator[bytes]:
        time.sleep(0.3 if len(order) <= 2 else 0.02 * len(order))
        yield from chunks

    with Tap(vllm.url, slower) as tap:

        @submission.lent
        def ask() -> None:
            answer = requests.post(
                f"{tap.url}/v1/completions",
                auth=bearer(key_of(vllm)),
                json={"model": vllm.model, "prompt": "Hello", "max_tokens": 1},
                timeout=60,
            )
            not_full(answer.status_code)
            answer.raise_for_status()

        def path(name: str) -> Callable[[], None]:
            def request() -> None:
                if len(order) == 4 * (2 + 4 * rounds):
                    raise TooMany
                order.append(name)
                begun.append(time.perf_counter())
                ask()
                ended.append(time.perf_counter())

            return request

        endless = "the calls never come to an end: there are 2 to warm up, and 4 in each round"
        causes: Causes = {TooMany: endless, TimeoutError: endless}
        got = submission.call(take_turns, path("A"), path("B"), rounds, causes=causes, busy=tap.busy)
    begun.append(time.perf_counter())
    _judge_order("".join(order), rounds)
    try:
        seconds = {name: [float(value) for value in values] for name, values in zip("AB", got, strict=True)}
    except (TypeError, ValueError):
        raise NotYet("two lists of seconds", got, "return the seconds of A, and those of B") from None
    # Of each call: what it took at least, and the time from the call before it to the one after it.
    spans = [(ended[i] - begun[i], begun[i + 1] - ended[i - 1]) for i in range(2, len(ended))]
    right = {name: [span for each, span in zip(order[2:], spans, strict=True) if each == name] for name in "AB"}
    judge(
        right,
        seconds,
        (
            [len(values) for values in seconds.values()] == [2 * rounds + 1] * 2,
            "the warm-up is among them: forget what it took",
        ),
        (
            _within(seconds["A"], right["B"]) and _within(seconds["B"], right["A"]),
            "the two lists are the wrong way round, or one call's time went to the other path",
        ),
        (_within([value / 1000 for value in seconds["A"]], right["A"]), "these are milliseconds"),
        (
            lambda got, right: (
                sum(map(sum, got.values())) < sum(low for each in right.values() for low, _ in each) / 10
            ),
            "hardly any time: a clock such as process_time stands still while code waits; take perf_counter",
        ),
        otherwise="measure each call from just before to just after it, in seconds",
        expected={name: [round(least, 3) for least, _ in values] for name, values in right.items()},
        shown={name: [round(value, 3) for value in values] for name, values in seconds.items()},
        fits=lambda got, right: all(_within(got[name], right[name]) for name in "AB"),
    )


def _judge_order(calls: str, rounds: int) -> None:
    """Judge in which order the two paths, A and B, were called."""
    wanted = f"A and B once each to warm up, then {rounds} rounds of A B B A"
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


CLOCKS_SECONDS = 0.002
"""How far two clocks may differ over a call."""


def _within(seconds: list[float], spans: list[tuple[float, float]]) -> bool:
    """Whether each lies between the least and the most that can have been measured; a core may be waited for."""
    return len(seconds) == len(spans) and all(
        least - CLOCKS_SECONDS <= each <= most + CLOCKS_SECONDS
        for each, (least, most) in zip(seconds, spans, strict=True)
    )


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
    sentences = {right for right, *_ in cases}
    for right, a, b, control in cases:
        means = [f"{name} {np.mean(values):.4f} s" for name, values in (("a", a), ("b", b), ("control", control))]
        judge(
            right,
            submission.call(reading, a, b, control),
            (lambda got, _: got is None, "no verdict: return one of the four sentences"),
            (lambda got, _: got not in sentences, "return one of the brief's four sentences, word for word"),
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
                "the interval does not hold 1: a difference is shown, however small it is",
            ),
            otherwise="see the three rules in the brief, in their order",
            expected=f"{right!r} for means of {', '.join(means)}",
        )


def check_08_4(submission: Submission) -> None:
    """Two workers of which one is slow, at times far too slow, and at times without an answer."""
    service = submission.function("service")
    draw = np.random.default_rng(84)
    quick = [float(value) for value in draw.gamma(20, 0.01, 148)]
    slow = [*map(float, draw.gamma(6, 0.1, 41)), *[None] * 11]
    seconds = 8.0
    cases: list[tuple[list[list[float | None]], float]] = [
        ([[*quick], slow], 0.35),
        ([[0.25], []], 0.25),
        ([[0.1, 0.9], [0.2], [0.3]], 0.25),  # of an even number the half is a whole rank
        ([[0.01 * n for n in range(1, 201)], []], 0.5),  # of 200 the rank of the p99 is whole, and not yet the last
    ]
    for workers, limit in cases:
        everything = [value for worker in workers for value in worker]
        values = sorted(value for value in everything if value is not None)
        kept, count = sum(value <= limit for value in values), len(everything)
        right = {
            "p50": values[math.ceil(len(values) * 0.5) - 1],
            "p99": values[math.ceil(len(values) * 0.99) - 1],
            "kept": kept / count,
            "goodput": kept / seconds,
        }
        missing = "a failed request has no time: leave the None out before you sort"
        any_number = "there may be any number of workers: take all of them, in a loop"
        single_cause = (
            "one answer is enough for both percentiles, and a worker may have none: put all into one list first"
        )
        got = submission.call(
            service,
            [list(worker) for worker in workers],
            limit,
            seconds,
            causes={
                (TypeError, "None"): missing,
                (ValueError, "unpack"): any_number,
                IndexError: single_cause,
                ZeroDivisionError: single_cause,
            },
        )
        shown = {name: round(value, 4) for name, value in right.items()}
        require(isinstance(got, dict) and got.keys() == right.keys(), shown, got, "return a dict with these four names")
        each = [[value for value in worker if value is not None] or [0.0] for worker in workers]
        of_two = [value is not None and value <= limit for worker in workers[:2] for value in worker]
        of_workers = np.mean([np.percentile(worker, 99, method="inverted_cdf") for worker in each])
        as_none = [0.0 if value is None else value for value in everything]
        falling = values[::-1]
        answered_only = "of the answered requests only: one that failed has no time"
        zeros = "a failed request has no time: a 0 makes it the fastest of all; leave the None out"
        wrong_end = "ranks are counted from the smallest value: sort them rising"
        interpolated = "that was interpolated between two: by nearest rank it is a value that was measured"
        one_too_far = "one too far: ranks are counted from 1, places in a list from 0"
        rounded_down = "the rank was rounded down: so few values are less than the share; math.ceil rounds up"
        known: dict[str, list[tuple[float, str]]] = {
            "p50": [
                (float(np.mean(values)), "that is the mean: the slow ones pull at it, and half of the requests do not"),
                (float(np.median(values)), interpolated),
                (values[len(values) // 2], one_too_far),
                (sorted(as_none)[math.ceil(count * 0.5) - 1], zeros),
                (values[min(math.ceil(count * 0.5), len(values)) - 1], answered_only),
                (falling[math.ceil(len(values) * 0.5) - 1], wrong_end),
                (values[max(len(values) // 2, 1) - 1], rounded_down),
            ],
            "p99": [
                (float(of_workers), "that is the mean of the workers' own: put all values together first"),
                (values[-1], "that is the slowest of all: one in a hundred may be slower than the p99"),
                (float(np.percentile(values, 99)), interpolated),
                (values[min(math.ceil(len(values) * 0.99), len(values) - 1)], one_too_far),
                (sorted(as_none)[math.ceil(count * 0.99) - 1], zeros),
                (falling[math.ceil(len(values) * 0.99) - 1], wrong_end),
                (values[max(99 * len(values) // 100, 1) - 1], rounded_down),
            ],
            "kept": [
                (float(np.mean(of_two)), any_number),
                (kept / len(values), "the failed ones are missing: who got nothing was not kept a promise either"),
                (len(values) / count, "that is the share that was answered: late ones did not keep the promise"),
                (100 * kept / count, "that is per cent; the brief asks for a share from 0 to 1"),
                (sum(value < limit for value in values) / count, "what takes the limit exactly is within it"),
            ],
            "goodput": [
                (len(values) / seconds, "that is all answers per second: only those within the limit count"),
                (count / seconds, "those are all requests per second: only the answers within the limit count"),
                (kept / count, "that is a share: goodput is requests per second"),
                (kept / seconds / len(workers), "of all workers together: do not divide by their number"),
                (sum(value < limit for value in values) / seconds, "what takes the limit exactly is within it"),
                (kept, "that is a number of requests: goodput is requests per second"),
            ],
        }
        for name, value in right.items():
            judge(
                value,
                got[name],
                (lambda got, _: math.isnan(got), missing),
                (lambda got, _: got == math.inf, answered_only),
                *((lambda got, _, wrong=wrong: _close_to(got, wrong), cause) for wrong, cause in known[name]),
                ROUNDED,
                otherwise="see the table in the brief",
                expected=f"{name}: {shown[name]}",
                shown=f"{name}: {got[name]!r}",
                fits=_close_to,
            )


LATE_SECONDS = 3.0
"""How long the check of 08.5 waits for the last question."""


def check_08_5(submission: Submission) -> None:
    """A server that answers nobody until the last one has asked: whoever waits for an answer waits in vain."""
    open_loop = submission.function("open_loop")
    # The first one is late whatever the machine: else who counts from the asking would be right on an idle one.
    at = [-0.1, *(0.05 * number for number in range(11))]
    everybody, too_late = threading.Event(), threading.Event()
    numbers = count()
    began: list[float] = []
    released: list[float] = []

    def ask() -> str:
        number = next(numbers)  # of one thread each, however they are switched
        began.append(time.perf_counter())
        if len(began) == len(at):
            everybody.set()
        if not wait_until(everybody.is_set, LATE_SECONDS):
            too_late.set()
            everybody.set()  # nobody waits any more
        released.append(time.perf_counter())
        if number == 3:
            raise ConnectionError("the server has closed the connection")
        return "an answer"

    causes: Causes = {
        ConnectionError: "a request that raises must not end the others: its place in the list has None",
        (ValueError, "non-negative"): "that moment is past: sleep until start + due, and not at all if that is over",
    }
    before = time.perf_counter()
    got = submission.call(open_loop, ask, list(at), causes=causes, busy=lambda: len(began) < len(at))
    after = time.perf_counter()
    wanted = f"{len(at)} questions, all of them asked before the first answer"
    early = sum(moment < before + due for moment, due in zip(sorted(began), at, strict=False))
    asked_in_time = len(began) if not too_late.is_set() else sum(moment < min(released) for moment in began)
    in_time = zip(sorted(began)[:asked_in_time], at, strict=False)
    late = max((moment - before - due for moment, due in in_time), default=0.0)
    judge(
        len(at),
        asked_in_time,
        (len(began) != len(at), "ask() is called once for each moment in at, and all have answered before you return"),
        (asked_in_time == 1, "that is a closed loop: the next question waits for the answer to the one before"),
        (late > LATE_SECONDS / 3, "later and later: sleep until start + due, not so long after the one before"),
        otherwise="too few threads: all of them were waiting for answers when the next question was due",
        expected=wanted,
        shown=f"{asked_in_time} were asked" + (f", and then none for {LATE_SECONDS:g} s" if too_late.is_set() else ""),
    )
    require(
        not early,
        f"the last question {at[-1]:g} s after the start",
        f"{early} questions came before they were due",
        "a question has its moment: sleep until start + due",
    )
    is_list = isinstance(got, list | tuple) and len(got) == len(at)
    require(is_list, f"a list of {len(at)}", got, "return one value for each moment, in the order of at")
    values = [value for value in got if value is not None]
    require(
        len(values) == len(at) - 1, "one None, for the question that raised", got, "None stands for what raised, alone"
    )
    in_numbers = all(isinstance(value, int | float) for value in values)
    require(in_numbers, "a number for each", got, "how long each took, in seconds: time.perf_counter() has numbers")
    least, most = min(released) - min(began), after - before

    def taken(values: list[float | None], clocks: list[float] = at, factor: float = 1.0) -> bool:
        """Whether that is how long each took, if the clock of each had begun so long after the start."""
        pairs = [(value, begun) for value, begun in zip(values, clocks, strict=True) if value is not None]
        slack = 0.001
        return all(least - slack <= value / factor + begun <= most + slack for value, begun in pairs)

    falling = sorted(values, reverse=True)
    judge(
        [round(least - due, 2) for due in at],
        list(got),
        (
            lambda got, _: taken(got, clocks=[0.0] * len(at)),
            "those are seconds since the start: count from the moment it was due",
        ),
        (
            lambda got, _: taken(got[:1], clocks=[0.0]),
            "those are seconds since the asking: a question that comes late counts from the moment when it was due, "
            "or a slow asker makes a server look fast",
        ),
        (lambda got, _: taken(got, factor=1000.0), "these are milliseconds"),
        (
            lambda got, _: any(taken([*falling[:place], None, *falling[place:]]) for place in range(len(at))),
            "the values are right, and in another order: that of at is wanted, not that of the answers",
        ),
        otherwise="count from the moment when the question was due to its answer, in seconds",
        fits=lambda got, _: taken(got),
    )


def check_08_6(submission: Submission) -> None:
    """Curves with a knee, a dip, a tie and a noisy tail."""
    read_curve = submission.function("read_curve")
    curves = [
        (0.25, (1, 4, 8, 16), (30, 100, 120, 122), (0.1, 0.2, 0.4, 0.9)),
        (0.5, (1, 2, 4, 8, 16, 32), (30, 55, 90, 130, 129, 131), (0.1, 0.12, 0.6, 0.4, 0.45, 1.2)),
        (0.45, (1, 4, 16, 64), (40, 120, 390, 410), (0.05, 0.1, 0.45, 2.0)),
        (0.1, (1, 8, 64), (30, 190, 150), (0.2, 0.5, 3.0)),
        (0.3, (1, 2, 4, 8), (30, 31, 120, 122), (0.1, 0.1, 0.2, 0.5)),
    ]
    for limit, callers, tokens, tails in curves:
        rows = [
            {"callers": n, "tokens_per_s": rate, "ttft_p99": tail}
            for n, rate, tail in zip(callers, tokens, tails, strict=True)
        ]
        most = max(tokens)
        knee = next(n for n, rate in zip(callers, tokens, strict=True) if rate >= most / 1.05)
        over = next((place for place, tail in enumerate(tails) if tail > limit), len(tails))
        capacity = callers[over - 1] if over else None
        within = [n for n, tail in zip(callers, tails, strict=True) if tail <= limit]
        strictly = [n for n, tail in zip(callers, tails, strict=True) if tail < limit]
        none = "no load keeps the limit here: the capacity is None then"
        nothing: Causes = {ValueError: none, IndexError: none} if capacity is None else {}
        got = submission.call(read_curve, [rows[place] for place in (-1, *range(len(rows) - 1))], limit, causes=nothing)
        given = f"tokens/s of {tokens} and a p99 of {tails} s at {callers} callers, limit {limit} s"
        pair = isinstance(got, list | tuple) and len(got) == 2
        require(pair, (knee, capacity), got, "return two numbers of callers: the knee, and the capacity")
        flat = next((n for n, rate, more in zip(callers, tokens, tokens[1:], strict=False) if more < rate * 1.05), None)
        judge(
            knee,
            got[0],
            (isinstance(got[0], dict), "that is a load: its callers are wanted"),
            (got[0] == capacity != got[1], "the knee comes first, and then the capacity"),
            (
                got[0] == flat,
                "a step that brings little may have others after it that bring more: the highest of all loads counts",
            ),
            (
                got[0] == callers[tokens.index(most)],
                "that is the highest of all: the knee has at least that / 1.05, with fewer callers",
            ),
            (got[0] == callers[-1], "the loads come in no order: sort them by callers"),
            (got[0] in tokens, "that is tokens/s: the answer is a number of callers"),
            otherwise="the fewest callers with at least the highest tokens/s / 1.05",
            expected=f"{knee} as the knee, for {given}",
        )
        judge(
            capacity,
            got[1],
            (capacity is None, none),
            (
                got[1] == max(within, default=None),
                "a smaller load is over the limit already: the capacity ends before it",
            ),
            (got[1] == max(strictly, default=None), "a p99 of the limit exactly is within it"),
            (
                got[1] in callers[over:],
                "that load is over the limit: the capacity is the one before the first of those",
            ),
            otherwise="walk up from the fewest callers, as long as ttft_p99 is at most the limit",
            expected=f"{capacity} as the capacity, for {given}",
        )
