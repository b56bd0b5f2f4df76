"""An alarm on a service level: read from Prometheus' own file of rules, and evaluated here by the same rule."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from servebook.errors import ServebookError
from servebook.ways.watch_it.histogram import quantile
from servebook.ways.watch_it.pages import Page

FOLDER = Path(__file__).parent
RULES = FOLDER / "rules.yaml"
"""The file of rules that comes with the chapter."""
DASHBOARD = FOLDER / "dashboard.json"
"""The pictures that come with it, for Grafana."""

UNITS = {"s": 1, "m": 60, "h": 3600}
DURATION = re.compile(r"\d+[smh]")
FORM = re.compile(
    r"histogram_quantile\((?P<share>[\d.]+), sum by \(le\) "
    r"\(rate\((?P<metric>[\w:]+)_bucket\[(?P<window>\d+[smh])\]\)\)\) > (?P<limit>[\d.]+)"
)
"""The one form of PromQL that is evaluated here. A Prometheus knows the whole language."""


@dataclass(frozen=True)
class Rule:
    """The alarm `alert` goes off when the quantile `share` of a histogram's last `window` seconds has been above
    `limit` (in the histogram's unit) for `hold` seconds without a break."""

    alert: str
    metric: str
    share: float
    window: int
    limit: float
    hold: int

    @property
    def expression(self) -> str:
        """The same in PromQL, but for `hold`."""
        rate = f"rate({self.metric}_bucket[{self.window}s])"
        return f"histogram_quantile({self.share:g}, sum by (le) ({rate})) > {self.limit:g}"


@dataclass(frozen=True)
class Moment:
    """What the rule said at one time: the quantile (NaN without observations), and the state of its alarm."""

    at: float
    value: float
    state: Literal["inactive", "pending", "firing"]


def read_rule(alert: str, path: Path = RULES) -> Rule:
    """The rule called `alert` in a Prometheus file of rules.

    Raises:
        ServebookError: the file has none, or it is of another form than can be evaluated here.
    """
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    found = [rule for group in groups for rule in group["rules"] if rule.get("alert") == alert]
    if len(found) != 1:
        raise ServebookError(f"{path.name} has {len(found)} rules called {alert}.", "There has to be one.")
    expression = " ".join(found[0]["expr"].split())
    match = FORM.fullmatch(expression)
    if not match:
        raise ServebookError(f"{alert} is beyond this small evaluation: {expression}.", "Ask a Prometheus.")
    hold = str(found[0].get("for", "0s"))
    if not DURATION.fullmatch(hold):
        raise ServebookError(f"{alert} is beyond this small evaluation: for {hold}.", "Write it in s, m or h alone.")
    window = _seconds(match["window"])
    return Rule(alert, match["metric"], float(match["share"]), window, float(match["limit"]), _seconds(hold))


def evaluate(rule: Rule, pages: Sequence[Page]) -> Iterator[Moment]:
    """What the rule says at each page, from the second one on: each stands for one evaluation.

    The window begins at the last page that is as old as that, or at the first.
    """
    since: float | None = None
    for number, now in enumerate(pages[1:], 1):
        old = [page for page in pages[:number] if page.at <= now.at - rule.window]
        begin = old[-1] if old else pages[0]
        value = quantile(rule.share, increase(rule.metric, begin, now))
        if not value > rule.limit:  # also where it is NaN: nobody got a first token
            since = None
            yield Moment(now.at, value, "inactive")
            continue
        since = now.at if since is None else since
        yield Moment(now.at, value, "firing" if now.at - since >= rule.hold else "pending")


def increase(histogram: str, before: Page, after: Page) -> dict[float, float]:
    """The buckets of what was observed between two pages; all of the later one where the server began anew between."""
    old, new = before.buckets(histogram), after.buckets(histogram)
    if any(new[bound] < old.get(bound, 0) for bound in new):
        return new
    return {bound: count - old.get(bound, 0) for bound, count in new.items()}


def _seconds(duration: str) -> int:
    """Prometheus' "5m" in seconds."""
    return int(duration[:-1]) * UNITS[duration[-1]]
