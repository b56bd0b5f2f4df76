"""Reads a server's Prometheus page, or one figure of it."""

from __future__ import annotations

import requests
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from servebook.bearer import bearer
from servebook.errors import ServebookError
from servebook.settings import url_of
from servebook.ways.refusals import cut


def page_text(url: str, key: str | None = None) -> str:
    """The Prometheus page at `url`, as it came.

    `url` is a server's root or its whole `/metrics` address; "host:port" is enough. `key` is shown to a server that
    asks for one, as a vLLM does that is open to the network.

    Raises:
        ServebookError: the page cannot be read.
    """
    page = f"{url_of(url).removesuffix('/metrics').rstrip('/')}/metrics"
    try:
        answer = requests.get(page, auth=bearer(key), timeout=30)
        answer.raise_for_status()
    except requests.HTTPError as error:
        refused = error.response.status_code
        advice = "Show it its key." if refused in (401, 403) else "Is that the address of a server that has metrics?"
        raise ServebookError(f"{page} answered with status {refused}.", advice) from None
    except requests.RequestException as error:
        raise ServebookError(f"There are no metrics at {page} ({type(error).__name__}).", "Is the server up?") from None
    return answer.text


def families(page: str) -> list[Metric]:
    """What the text of a page says, metric by metric.

    Raises:
        ServebookError: it is another kind of page, such as one for people.
    """
    try:
        return list(text_string_to_metric_families(page))
    except (ValueError, IndexError):  # the parser's own, at some texts
        raise ServebookError(
            f"What came is no Prometheus page; it begins with {cut(page.strip(), 40)!r}.",
            "Is that the address of a server that has metrics?",
        ) from None


def samples(page: str, name: str, **labels: str) -> list[float]:
    """The values of all samples `name` in the text of a page that have `labels`.

    Raises:
        ServebookError: it is no Prometheus page.
    """
    return [
        sample.value
        for family in families(page)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


def metric(url: str, name: str, *, key: str | None = None, **labels: str) -> float:
    """The value of the sample `name` on the page at `url`, as in `page_text`, summed over all that have `labels`.

    A counter's sample ends in `_total`, a histogram's in `_sum`, `_count` or `_bucket`, as the page has it.

    Raises:
        ServebookError: the page cannot be read, is no Prometheus page, or has no such sample.
    """
    found = samples(page_text(url, key), name, **labels)
    if not found:
        raise ServebookError(f"{url} has no sample {name} {labels or ''}".rstrip() + ".", "Open its page and look.")
    return sum(found)
