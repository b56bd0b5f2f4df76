"""Reads Prometheus pages, once or again and again while something runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from servebook.errors import ServebookError
from servebook.ways.metrics import families, page_text

EVERY_SECONDS = 0.25
"""Between two readings. A Prometheus takes 15 s or 60 s; this one watches a few seconds."""

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}
"""What the names of a metric's samples end in, by its type; those of all others are the metric's own name."""


Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """What a server said at one moment; `at` is in seconds since 1970.

    `samples` has every number, by its name and then by its labels. A name that the page knows and has counted nothing
    for, such as a counter by label in the beginning, has none.
    """

    at: float
    samples: Mapping[str, Mapping[Labels, float]]

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples called `name` that have `labels`; 0 where nothing was counted yet.

        Raises:
            ServebookError: the page has no such samples.
        """
        return sum(value for have, value in self._found(name).items() if labels.items() <= dict(have).items())

    def buckets(self, histogram: str) -> dict[float, float]:
        """How many observations of `histogram` were at most as large as each bound, all its labels together.

        Raises:
            ServebookError: the page has no such histogram.
        """
        found: dict[float, float] = {}
        for labels, value in self._found(f"{histogram}_bucket").items():
            bound = float(dict(labels)["le"])
            found[bound] = found.get(bound, 0) + value
        return dict(sorted(found.items()))

    def _found(self, name: str) -> Mapping[Labels, float]:
        if name not in self.samples:
            raise ServebookError(f"The page has no {name}.", "Open it and look: a counter's name ends in _total.")
        return self.samples[name]


def read(url: str, key: str | None = None) -> Page:
    """Read the page of the server at `url` once; `key` is shown to one that asks for it.

    Raises:
        ServebookError: it cannot be read, or is no Prometheus page.
    """
    return parse(page_text(url, key), time.time())


def parse(text: str, at: float) -> Page:
    """A page from its text.

    Raises:
        ServebookError: it is no Prometheus page.
    """
    samples: dict[str, dict[Labels, float]] = {}
    for family in families(text):
        for suffix in SUFFIXES.get(family.type, ("",)):
            samples.setdefault(f"{family.name}{suffix}", {})
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return Page(at, samples)


async def record(url: str, work: Coroutine[Any, Any, object], pages: list[Page], key: str | None = None) -> None:
    """Do `work`, and meanwhile add a page to `pages` every quarter of a second, the last one after it."""
    doing = asyncio.ensure_future(work)
    try:
        while not doing.done():
            pages.append(await asyncio.to_thread(read, url, key))
            await asyncio.wait([doing], timeout=EVERY_SECONDS)
        pages.append(await asyncio.to_thread(read, url, key))
    finally:
        doing.cancel()
        await asyncio.wait([doing])
    await doing
