"""The decision guide of chapter 9: which path for which need, each line resting on a figure of a stored run.

Its texts are in `choose.toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from pydantic import BaseModel, ConfigDict

from servebook.bench.report import at_most_callers, interval
from servebook.bench.results import Results
from servebook.bench.tensors import MIB

BUSY_TOKENS_PER_S = 4000
"""From here on the protocol takes nearly a core in one process (chapter 8, section 8)."""
ANSWER = 32
"""Tokens of an answer, where a figure depends on it: those of the benchmark have so many on average."""


@dataclass(frozen=True)
class Needs:
    """What is true of a service; nothing is, by default."""

    browsers: bool = False
    own_rules: bool = False
    typed_contract: bool = False
    tokens_per_s: float = 0
    other_models: bool = False
    big_tensors: bool = False
    kserve_cluster: bool = False
    token_ids: bool = False
    text_grpc: bool = False
    many_users: bool = False

    @property
    def busy(self) -> bool:
        """Whether one server process has more to write than is good for it."""
        return self.tokens_per_s >= BUSY_TOKENS_PER_S


class Rule(BaseModel):
    """One line of the guide: where one of `needs` is there, take `path` at its `place` on a request's way.

    `costs` is what is given up for it; `figure` is the name in FIGURES of what it rests on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    place: str
    path: str
    because: str
    costs: str
    chapter: str
    needs: tuple[str, ...] = ()
    figure: str

    def applies(self, needs: Needs) -> bool:
        """Whether one of its needs is among them; a rule without any always applies."""
        return not self.needs or any(getattr(needs, need) for need in self.needs)


class Pair(BaseModel):
    """Two paths that may both be chosen, and what to know about them together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    paths: tuple[str, str]
    note: str


class Row(BaseModel):
    """One statement of the article, and what running it showed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    claim: str
    verdict: str
    why: str
    figure: str


def tokens_ratio(run: Results, path: str) -> str:
    """The ratio of tokens/s that `path` has to its reference, at the most callers that were measured."""
    most = at_most_callers(run.engine, path)
    return f"tokens/s {interval(most.tokens_per_s)} @{most.concurrency}" if most else "not in this run"


def cpu_ratio(run: Results, path: str) -> str:
    """Server CPU per token / that of vLLM's SSE, protocol alone, at the most callers that were measured."""
    most = at_most_callers(run.protocol, path)
    if most is None or most.front_cpu is None:
        return "server CPU per token not in this run"
    return f"server CPU per token {interval(most.front_cpu)} of SSE's @{most.concurrency}"


def fills_a_core(run: Results, path: str) -> str:
    """At how many tokens a second the protocol work of `path`, one process, takes a whole core."""
    found = next((cost.core_full_at(ANSWER) for cost in run.costs if cost.path == path), None)
    return f"{found:,.0f} tokens/s in answers of {ANSWER} fill a core" if found else "not in this run"


def tensor_ms(run: Results, server: str, encoding: str, size: int = 15 * MIB) -> str:
    """What a tensor of `size` takes, there and back."""
    tried = {
        cost.tensor_bytes: cost.median_ms for cost in run.tensors if (cost.server, cost.encoding) == (server, encoding)
    }
    if not tried:
        return "not in this run"
    return f"{tried[size]:.0f} ms" if size in tried else "too slow to be measured"


def _gateway(run: Results) -> str:
    more = [
        f"{interval(each.ttft_p50_ms, 1)} ms @{each.concurrency}" for each in run.engine if each.arm.path == "gateway"
    ]
    return f"TTFT more by {', '.join(more)}; {tokens_ratio(run, 'gateway')}"


def _grpc(run: Results) -> str:
    return f"{cpu_ratio(run, 'grpc')}; {tokens_ratio(run, 'grpc')}"


def _busy(run: Results) -> str:
    return f"SSE: {fills_a_core(run, 'sse')}; gRPC: {fills_a_core(run, 'grpc')}"


def _rust(run: Results) -> str:
    return f"{cpu_ratio(run, 'rust-grpc')}; {tokens_ratio(run, 'rust-grpc')}"


def _tensors(run: Results) -> str:
    times = {name: tensor_ms(run, "triton", name) for name in ("JSON list", "HTTP binary", "gRPC raw")}
    return "15 MiB: " + ", ".join(f"{name} {ms}" for name, ms in times.items())


FIGURES: dict[str, Callable[[Results], str]] = {
    "busy": _busy,
    "gateway": _gateway,
    "gateway_tokens": lambda run: tokens_ratio(run, "gateway"),
    "grpc": _grpc,
    "grpc_instead": lambda run: f"gRPC instead: {tokens_ratio(run, 'grpc')}",
    "killed_replica": lambda run: "a property, shown by killing a replica under load",
    "kserve": lambda run: tokens_ratio(run, "kserve-sse"),
    "property": lambda run: "a property",
    "rust": _rust,
    "tensors": _tensors,
    "triton": lambda run: tokens_ratio(run, "triton"),
    "triton_cpu": lambda run: cpu_ratio(run, "triton"),
    "vllm_grpc_cpu": lambda run: cpu_ratio(run, "vllm-grpc"),
}
"""What a line may rest on, read from a run."""

_texts = tomllib.loads(files("servebook.bench").joinpath("choose.toml").read_text(encoding="utf-8"))
QUESTIONS: dict[str, str] = _texts["questions"]
"""How each field of `Needs` is asked for."""
DEFAULT = Rule(**_texts["default"])
"""What holds where nothing else asks for the place."""
RULES = tuple(Rule(**rule) for rule in _texts["rules"])
"""In the order in which requests pass the places; of rivals for one place, the earlier weighs more."""
PAIRS = tuple(Pair(**pair) for pair in _texts["pairs"])
"""What does not fit by itself, or needs a word."""
ARTICLE = tuple(Row(**row) for row in _texts["article"])
"""The article's comparison (S14, S15, S17 to S20), row by row."""


def choose(needs: Needs) -> list[Rule]:
    """One for each place that needs something, the weightiest; a protocol there always is."""
    taken: dict[str, Rule] = {}
    for rule in (*RULES, DEFAULT):
        if rule.applies(needs):
            taken.setdefault(rule.place, rule)
    return list(taken.values())


def outweighed(needs: Needs) -> list[tuple[Rule, Rule]]:
    """What was asked for and is not taken, each with the one that has its place; the default is always willing."""
    taken = {rule.place: rule for rule in choose(needs)}
    return [(rule, taken[rule.place]) for rule in RULES if rule.applies(needs) and taken[rule.place] is not rule]


def together(needs: Needs) -> list[str]:
    """What to know where two of the chosen paths meet."""
    taken = {rule.path for rule in choose(needs)}
    return [pair.note for pair in PAIRS if taken.issuperset(pair.paths)]


def guide(run: Results, rules: Sequence[Rule] = (DEFAULT, *RULES)) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: every rule with what it costs, its chapter and its figure."""
    head = ("place", "take", "because", "costs", "chapter", "figure")
    return head, [
        (rule.place, rule.path, rule.because, rule.costs, rule.chapter, linked(FIGURES[rule.figure](run)))
        for rule in rules
    ]


def article(run: Results) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: every statement with its verdict and figure."""
    head = ("item", "the article says", "verdict", "why", "figure")
    return head, [(row.id, row.claim, row.verdict, row.why, linked(FIGURES[row.figure](run))) for row in ARTICLE]


def linked(figure: str) -> str:
    """A figure with a link to the table that it stands in; a property has none."""
    return figure if "a property" in figure else f"[{figure}](../BENCHMARKS.md)"
