"""Checks of lab 12: a rate that survives a restart, a promise kept by several replicas, and a trace's own times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from math import inf, isclose, isnan
from operator import itemgetter
from typing import Any

import requests

from servebook.bearer import bearer
from servebook.lab.feedback import ROUNDED, judge
from servebook.lab.rest import key_of
from servebook.lab.submission import Causes, Submission
from servebook.launch import Server
from servebook.ways.watch_it.alarm import increase
from servebook.ways.watch_it.pages import Page, read

TOKENS = "vllm:generation_tokens_total"
TTFT = "vllm:time_to_first_token_seconds"


@cache
def watched(url: str, key: str, model: str) -> list[Page]:
    """The engine's page before, between and after two requests."""
    pages = [read(url, key)]
    for _ in range(2):
        requests.post(
            f"{url}/v1/completions",
            auth=bearer(key),
            json={"model": model, "prompt": "The sea", "max_tokens": 3, "ignore_eos": True},
            timeout=60,
        ).raise_for_status()
        pages.append(read(url, key))
    return pages


def pages_of(vllm: Server) -> list[Page]:
    return watched(vllm.url, key_of(vllm), vllm.model)


def _same(got: Any, right: float) -> bool:
    return not isinstance(got, bool) and isclose(got, right, rel_tol=1e-6, abs_tol=1e-9)


def check_12_1(submission: Submission) -> None:
    """A counter that grows, that begins anew once or twice, and the engine's own."""
    rate, vllm = submission.function("rate"), submission.server("vllm")
    cases: list[list[tuple[float, float]]] = [
        [(0, 10), (15, 14), (30, 20)],
        [(0, 100), (15, 130), (30, 4), (45, 10)],
        [(100, 50), (110, 50), (130, 0), (140, 7)],
        [(0, 5), (60, 3), (120, 2)],
        [(page.at, page.value(TOKENS)) for page in pages_of(vllm)],
    ]
    for readings in cases:
        _judge_rate(readings, submission.call(rate, list(readings)))


def _judge_rate(readings: list[tuple[float, float]], got: Any) -> None:
    first, last = readings[0], readings[-1]
    seconds = last[0] - first[0]
    steps = [(now[0] - before[0], now[1] - before[1], now[1]) for before, now in pairwise(readings)]
    grown = sum(value if more < 0 else more for _, more, value in steps)
    right = grown / seconds
    began = max((place for place, (_, more, _) in enumerate(steps, 1) if more < 0), default=0)
    later = last[0] - readings[began][0]
    since = [last[1] / seconds, (last[1] - readings[began][1]) / (later or 1), last[1] / (later or 1)] if began else []
    again = sum(before[1] + now[1] if now[1] < before[1] else now[1] - before[1] for before, now in pairwise(readings))
    means = [sum((value if more < 0 else more) / took for took, more, value in steps) / len(steps)]
    judge(
        right,
        got,
        (got is None, "the function returns nothing: `return` is missing"),
        (lambda got, _: _same(got, grown), "that is the increase; a rate is for each second: divide by them"),
        (
            lambda got, _: _same(got, (last[1] - first[1]) / seconds),
            "the counter is lower than it was: the server began anew between two readings, and its counter at 0",
        ),
        (
            lambda got, _: _same(got, sum(max(0, more) for _, more, _ in steps) / seconds),
            "what was counted since the restart is lost: all of the lower reading came after it",
        ),
        (
            lambda got, _: any(_same(got, each) for each in since),
            "that is the growth since the restart alone: what was counted before it belongs here too",
        ),
        (
            lambda got, _: _same(got, steps[-1][1] / steps[-1][0]),
            "that is the last step alone: the growth from the first reading to the last is wanted",
        ),
        (
            lambda got, _: _same(got, again / seconds),
            "the lower reading was counted from 0: what the counter had before is in the earlier steps already",
        ),
        (lambda got, right: got == right // 1 != right, "rounded down: divide with /, not with //"),
        (lambda got, right: _same(got, 1000 * right), "the readings are in seconds: 1000 has no business here"),
        (
            lambda got, _: _same(got, sum(abs(more) for _, more, _ in steps) / seconds),
            "a counter never goes down: where it is lower, it began anew at 0",
        ),
        (
            lambda got, _: _same(got, (grown + first[1]) / seconds),
            "what the first reading has was counted before it: only the growth since then belongs here",
        ),
        (
            lambda got, _: got != 0 and any(_same(got, grown / count) for count in (len(readings), len(steps))),
            "that is for each reading; a rate is for each second",
        ),
        (lambda got, _: _same(got, grown / last[0]), "the seconds are those from the first reading to the last"),
        (
            lambda got, _: any(_same(got, each) for each in means),
            "the readings are not equally far apart: all growth, by all seconds",
        ),
        ROUNDED,
        otherwise="the growth from reading to reading, a lower one counted from 0, by the seconds from first to last",
        expected=f"{right:g} for {readings}",
        fits=_same,
    )


NOBODY = "nobody asked: no promise was kept, none was broken; add the buckets first, and for 0 return None"


def check_12_2(submission: Submission) -> None:
    """One replica, two unlike ones, one that nobody asked, one that kept no promise, none asked, and this engine."""
    kept, vllm = submission.function("kept"), submission.server("vllm")
    before, *_, after = pages_of(vllm)
    own = increase(TTFT, before, after)
    one = {0.1: 5.0, 0.5: 8.0, 1.0: 9.0, inf: 10.0}
    two = [{0.1: 90.0, 0.5: 97.0, inf: 100.0}, {0.1: 0.0, 0.5: 2.0, inf: 10.0}]
    idle = {0.1: 0.0, 0.5: 0.0, inf: 0.0}
    cases = [([one], 0.5), (two, 0.5), (two, 0.1), (two[1:], 0.1), ([idle, two[0]], 0.1)]
    cases += [([own], sorted(own)[-2]), ([idle], 0.5)]
    causes = {ZeroDivisionError: NOBODY, KeyError: "a bound is a number, the last one math.inf"}
    for replicas, limit in cases:
        _judge_kept(replicas, limit, submission.call(kept, [dict(each) for each in replicas], limit, causes=causes))


def _judge_kept(replicas: Sequence[Mapping[float, float]], limit: float, got: Any) -> None:
    asked = sum(each[inf] for each in replicas)
    right = sum(each[limit] for each in replicas) / asked if asked else None
    below = [max((bound for bound in each if bound < limit), default=0.0) for each in replicas]
    shares = [each[limit] / each[inf] for each in replicas if each[inf]]
    summed = sum(count for each in replicas for bound, count in each.items() if bound <= limit)
    everything = sum(count for each in replicas for count in each.values())
    finite = sum(each[sorted(each)[-2]] for each in replicas)
    judge(
        right,
        got,
        (right is None, NOBODY),
        (
            got is None and right == 0,
            "somebody asked, and got no promise kept: a share of 0; None is for nobody",
        ),
        (got is None, "somebody asked, and the function returns nothing: is `return` missing?"),
        (lambda got, right: _same(got, 100 * right), "that is in percent; the brief asks for a share, 0 to 1"),
        (lambda got, right: _same(got, 1 - right), "that is the share that had to wait longer"),
        (lambda got, right: _same(got, right * asked), "that is how many; the brief asks for their share"),
        (
            lambda got, _: _same(got, summed / asked) or _same(got, summed / everything),
            "each bucket has the smaller ones in it already: the bucket of the limit says it all",
        ),
        (
            lambda got, right: _same(got, right * asked / everything),
            "each bucket has the smaller ones in it already: all requests are in the last one, +Inf",
        ),
        (
            lambda got, right: finite and _same(got, right * asked / finite),
            "the last bucket, +Inf, has them all; the one before leaves out the slowest",
        ),
        (
            lambda got, _: _same(got, sum(each.get(b, 0) for each, b in zip(replicas, below, strict=True)) / asked),
            "a bucket holds what was at most its bound: the one of the limit itself belongs to it",
        ),
        (
            lambda got, _: len(replicas) > 1 and any(_same(got, each) for each in shares),
            "that is the share of one replica: add the buckets of all of them first",
        ),
        (
            lambda got, right: _same(got, right * asked / max(each[inf] for each in replicas)),
            "those are the requests of one replica: add up the last buckets of all of them",
        ),
        (
            lambda got, _: any(_same(got, sum(shares) / count) for count in (len(shares), len(replicas))),
            "shares cannot be averaged: a replica with few requests counts for few. Add the buckets first",
        ),
        (lambda got, _: isnan(got), "a replica that nobody asked divides by 0: add the buckets first"),
        ROUNDED,
        otherwise="the requests within the limit, of all replicas together, by all requests",
        expected=f"{right} for a limit of {limit:g} and {[dict(each) for each in replicas]}",
        fits=lambda got, right: got is None if right is None else got is not None and _same(got, right),
    )


CHILDLESS = "a span may have no children: then all of its time is its own"
ALONE: Causes = {
    IndexError: CHILDLESS,
    (ValueError, "empty"): CHILDLESS,
    KeyError: 'the parent of the first span is "", and that is the id of none',
}


def check_12_3(submission: Submission) -> None:
    """A chain and children in any order, side by side, with a gap between them, one in another, one that ends late."""
    own = submission.function("own_seconds")
    cases = [
        [("engine", "gateway", 3.0, 3.9), ("caller", "", 0.0, 4.1), ("gateway", "caller", 0.05, 4.05)],
        [
            ("page", "", 0.0, 10.0),
            ("search", "page", 2.0, 9.0),
            ("first", "search", 3.0, 4.0),
            ("second", "search", 6.0, 7.0),
        ],
        [("page", "", 0.0, 10.0), ("second", "page", 6.0, 7.0), ("first", "page", 3.0, 4.0)],
        [("page", "", 0.0, 10.0), ("left", "page", 1.0, 5.0), ("right", "page", 3.0, 8.0)],
        [("page", "", 0.0, 10.0), ("long", "page", 1.0, 8.0), ("short", "page", 2.0, 4.0)],
        [("page", "", 0.0, 2.0), ("log", "page", 1.0, 3.0)],
    ]
    for rows in cases:
        spans = [dict(zip(("span", "parent", "start", "end"), row, strict=True)) for row in rows]
        _judge_own(spans, submission.call(own, [dict(each) for each in spans], causes=ALONE))


def _judge_own(spans: list[dict[str, Any]], got: Any) -> None:
    right, whole, summed, hull, all_below, single, unsorted, forgetful = {}, {}, {}, {}, {}, {}, {}, {}
    parents = {each["span"]: each["parent"] for each in spans}
    for each in spans:
        name, length = each["span"], each["end"] - each["start"]
        children = [other for other in spans if other["parent"] == name]
        edges = sorted({each["start"], each["end"], *(t for c in children for t in (c["start"], c["end"]))})
        right[name] = sum(
            end - start
            for start, end in pairwise(edges)
            if each["start"] <= start < each["end"] and not any(c["start"] <= start < c["end"] for c in children)
        )
        whole[name] = length
        summed[name] = length - sum(c["end"] - c["start"] for c in children)
        most = max(c["end"] for c in children) - min(c["start"] for c in children) if children else 0.0
        hull[name] = length - most
        below = [other for other in spans if name in _ancestors(other["span"], parents)]
        all_below[name] = length - sum(other["end"] - other["start"] for other in below)
        single[name] = {length - (c["end"] - c["start"]) for c in children} or {length}
        unsorted[name] = _swept(each, children)
        forgetful[name] = _swept(each, sorted(children, key=itemgetter("start")), latest=lambda _, end: end)
    inside = {name: max(0.0, value) for name, value in summed.items()}
    judge(
        right,
        got,
        (got is None, "the function returns nothing: `return` is missing"),
        (not isinstance(got, dict) or got.keys() != right.keys(), "return a dict with the seconds of every span"),
        (
            lambda got, _: _near(got, whole),
            "that is how long each span is: take off the time in which a child is running",
        ),
        (
            lambda got, right: _near(got, {name: 1000 * value for name, value in right.items()}),
            "these are milliseconds; the brief asks for seconds",
        ),
        (
            lambda got, _: all_below != summed and _near(got, all_below),
            "a child's own children are in the child already: only those whose parent it is",
        ),
        (lambda got, _: _near(got, unsorted), "the children come in no order: sort them by their start"),
        (
            lambda got, _: _near(got, forgetful),
            "a child may end before one that began earlier: keep the later of the two ends",
        ),
        (
            lambda got, _: hull != summed and _near(got, hull),
            "between two children the span is alone: that time is its own",
        ),
        (
            lambda got, _: (
                any(each["end"] > _end(spans, each["parent"]) for each in spans)
                and (_near(got, summed) or _near(got, inside))
            ),
            "a child may go on after its parent: only what lies in the parent is taken off",
        ),
        (
            lambda got, _: _near(got, summed) or _near(got, inside),
            "two children at the same time: what they share is taken off once",
        ),
        (
            lambda got, _: all(any(_same(got[name], value) for value in values) for name, values in single.items()),
            "a span may have several children: take off all of them",
        ),
        otherwise="the self time of each span: the seconds in which none of its children is running",
        expected=f"{ {name: round(value, 6) for name, value in right.items()} } for {spans}",
        fits=_near,
    )


def _swept(
    span: Mapping[str, Any],
    children: Sequence[Mapping[str, Any]],
    latest: Callable[[float, float], float] = max,
) -> float:
    """What is left of a span, from child to child as they come; `latest` says which of two ends counts then."""
    own, at = 0.0, span["start"]
    for child in children:
        own += max(0.0, min(child["start"], span["end"]) - at)
        at = latest(at, child["end"])
    return float(own + max(0.0, span["end"] - at))


def _ancestors(span: str, parents: Mapping[str, str]) -> list[str]:
    """All that a span lies below."""
    above = parents.get(span, "")
    return [above, *_ancestors(above, parents)] if above else []


def _end(spans: list[dict[str, Any]], name: str) -> float:
    """When a span ends; never, for a parent that is not among them."""
    return next((float(each["end"]) for each in spans if each["span"] == name), inf)


def _near(got: Mapping[str, float], right: Mapping[str, float]) -> bool:
    return got.keys() == right.keys() and all(_same(got[name], value) for name, value in right.items())
