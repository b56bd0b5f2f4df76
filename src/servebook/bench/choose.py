"""The decision guide of chapter 9: which path for which need, each line resting on a figure of a stored run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from servebook.bench.report import core_full_at, interval
from servebook.bench.results import Results
from servebook.bench.stats import Estimate
from servebook.bench.tensors import MIB


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
    many_users: bool = False


QUESTIONS = {
    "browsers": "Browsers or strangers call it directly",
    "own_rules": "It needs rules of its own: who may ask what, how much, with which prompt around it",
    "typed_contract": "Services in several languages call it, with deadlines and a contract that a compiler checks",
    "tokens_per_s": "Tokens a second through one server process",
    "other_models": "Models that are no LLMs are served beside it, or Triton runs already",
    "big_tensors": "Requests carry megabytes of numbers",
    "kserve_cluster": "It runs on Kubernetes with KServe",
    "token_ids": "The caller is a router that has tokenized already",
    "many_users": "One engine is not enough",
}
"""How each field of `Needs` is asked for."""


@dataclass(frozen=True)
class Rule:
    """One line of the guide: when `applies`, take `path` at its `place` on a request's way.

    `costs` is what is given up for it; `evidence` reads the figure that it rests on.
    """

    place: str
    path: str
    because: str
    costs: str
    chapter: str
    applies: Callable[[Needs], bool]
    evidence: Callable[[Results], str]


def tokens_ratio(run: Results, path: str) -> str:
    """The ratio of tokens/s that `path` has to its reference, at the most callers that were measured."""
    found = [each for each in run.engine if each.arm.path == path]
    if not found:
        return "not in this run"
    most = max(found, key=lambda each: each.concurrency)
    return f"tokens/s {interval(most.tokens_per_s)} @{most.concurrency}"


def cpu_ratio(run: Results, path: str) -> Estimate | None:
    """Server CPU per token / that of vLLM's SSE, protocol alone."""
    return next((each.front_cpu for each in run.protocol if each.arm.path == path), None)


def fills_a_core(run: Results, path: str) -> str:
    """At how many tokens a second the protocol work of `path`, one process, takes a whole core."""
    found = core_full_at(run, path)
    return f"{found[0]:,.0f} tokens/s in answers of {found[1]} fill a core" if found else "not in this run"


def tensor_ms(run: Results, server: str, encoding: str, size: int = 15 * MIB) -> str:
    """What a tensor of `size` takes, there and back."""
    for cost in run.tensors:
        if (cost.server, cost.encoding, cost.tensor_bytes) == (server, encoding, size):
            return f"{cost.median_ms:.0f} ms"
    return "too slow to be measured"


def _gateway(run: Results) -> str:
    more = [
        f"{each.ttft_p50_ms.value:+.1f} ms @{each.concurrency}" for each in run.engine if each.arm.path == "gateway"
    ]
    return f"TTFT {', '.join(more)}; {tokens_ratio(run, 'gateway')}"


def _grpc(run: Results) -> str:
    return f"server CPU per token {interval(cpu_ratio(run, 'grpc'))} of SSE's; {tokens_ratio(run, 'grpc')}"


def _busy(run: Results) -> str:
    return f"SSE: {fills_a_core(run, 'sse')}; gRPC: {fills_a_core(run, 'grpc')}"


def _tensors(run: Results) -> str:
    times = {name: tensor_ms(run, "triton", name) for name in ("JSON list", "HTTP binary", "gRPC raw")}
    return "15 MiB: " + ", ".join(f"{name} {ms}" for name, ms in times.items())


BUSY_TOKENS_PER_S = 5000
"""From here on the protocol takes a good part of a core in one process (chapter 8, section 8)."""

DEFAULT = Rule(
    "protocol",
    "vLLM's REST and SSE",
    "Every SDK and tool speaks it, and nothing measured here was worth giving that up for",
    "A schema that a compiler checks; an eighth of the bytes",
    "01, 02",
    lambda needs: True,
    lambda run: f"gRPC instead: {tokens_ratio(run, 'grpc')}",
)

RULES = (
    Rule(
        "gateway",
        "the gateway, in front of vLLM",
        "vLLM's key locks some paths only; limits, disconnects and your own API need a place",
        "One process more, with CPU for every token",
        "05",
        lambda needs: needs.browsers or needs.own_rules,
        _gateway,
    ),
    Rule(
        "router",
        "KServe",
        "The cluster's way to scale, roll out and route; stream over its OpenAI route",
        "A cluster, and people who know it",
        "06",
        lambda needs: needs.kserve_cluster,
        lambda run: tokens_ratio(run, "kserve-sse"),
    ),
    Rule(
        "router",
        "vLLM's router in front of replicas",
        "It balances, and asks another replica when one has died",
        "A hop, and a process that must not die",
        "10",
        lambda needs: needs.many_users,
        lambda run: "a property, shown by killing a replica under load",
    ),
    Rule(
        "server",
        "more server processes in front of the engine (--api-server-count)",
        "At this rate one process that writes every message becomes the limit, whatever it speaks",
        "Cores; memory for each process",
        "08",
        lambda needs: needs.tokens_per_s >= BUSY_TOKENS_PER_S,
        _busy,
    ),
    Rule(
        "server",
        "Triton with the vLLM backend",
        "One server, one metrics page and one client for all models; no faster than vLLM, and more to set up",
        "CPU for every token, several times that of SSE as it was measured",
        "03",
        lambda needs: needs.other_models,
        lambda run: f"server CPU per token {interval(cpu_ratio(run, 'triton'))} of SSE's",
    ),
    Rule(
        "protocol",
        "vLLM's own gRPC",
        "Token ids in and out: made for the hop between a router and the engine, not for end users",
        "The text is the caller's work; the contract changes with vLLM's",
        "07",
        lambda needs: needs.token_ids,
        lambda run: f"server CPU per token {interval(cpu_ratio(run, 'vllm-grpc'))} of SSE's",
    ),
    Rule(
        "protocol",
        "our own gRPC server",
        "A schema, deadlines and status codes that travel, in every language",
        "A proto and a server to maintain; browsers need a gateway",
        "04",
        lambda needs: needs.typed_contract,
        _grpc,
    ),
    Rule(
        "tensors",
        "binary tensors, over HTTP or gRPC (Triton, KServe)",
        "Numbers as text cost more than everything else together",
        "A request that nobody can read in a log",
        "08",
        lambda needs: needs.big_tensors,
        _tensors,
    ),
)
"""In the order in which requests pass the places; of rivals for one place, the earlier weighs more."""


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


@dataclass(frozen=True)
class Row:
    """One statement of the article, and what running it showed."""

    id: str
    claim: str
    verdict: str
    why: str
    evidence: Callable[[Results], str]


ARTICLE = (
    Row(
        "S14",
        "REST is simple and has the standard SDK",
        "confirmed",
        "one POST; the SDK works unchanged (chapter 01)",
        lambda run: "a property",
    ),
    Row(
        "S14, S18",
        "REST has overhead against gRPC",
        "corrected",
        "in bytes, much; in CPU, some; in tokens/s next to nothing with a real engine (chapter 08)",
        _grpc,
    ),
    Row(
        "S14",
        "Triton + vLLM: fast, complex set-up",
        "confirmed",
        "fast, but not faster than vLLM itself; a repository, a backend and a tensor protocol to learn (chapter 03)",
        lambda run: tokens_ratio(run, "triton"),
    ),
    Row(
        "S14",
        "own gRPC: full control, own maintenance",
        "confirmed",
        "health, cancellation, limits, TLS and status codes were all ours to write (chapter 04)",
        lambda run: "a property",
    ),
    Row(
        "S15",
        "quick PoC, plain chat service: REST",
        "confirmed",
        "and not for the quick ones only",
        lambda run: f"gRPC instead: {tokens_ratio(run, 'grpc')}",
    ),
    Row(
        "S15",
        "large production: Triton + vLLM or own gRPC",
        "corrected",
        "size alone asks for replicas and a router, and leaves the protocol as it is (chapter 10)",
        _busy,
    ),
    Row(
        "S15",
        "already on Triton: Triton + vLLM",
        "confirmed",
        "one server, one repository and one set of metrics for all models (chapter 03)",
        lambda run: "a property",
    ),
    Row(
        "S15",
        "extreme customisation: own gRPC",
        "corrected",
        "own rules need a server of your own, which may speak HTTP as well: the gateway (chapters 04, 05)",
        lambda run: tokens_ratio(run, "gateway"),
    ),
    Row(
        "S17",
        "gRPC comes through Triton or an own server",
        "corrected",
        "vLLM has a gRPC server of its own since 0.14 (chapter 07); KServe is the fourth way",
        lambda run: "a property",
    ),
    Row(
        "S18",
        "inference is the bottleneck, so the protocol hardly matters",
        "confirmed, with a limit",
        "until one process writes thousands of tokens a second",
        _busy,
    ),
    Row(
        "S19",
        "vLLM is for language models only, Triton for any model",
        "confirmed, with a limit",
        "vLLM also embeds, ranks, classifies and hears; Triton serves any tensors, vLLM among them (chapters 03, 08)",
        lambda run: "a property",
    ),
    Row(
        "S19",
        "gRPC need: low with vLLM, high with Triton",
        "confirmed, with a limit",
        "Triton streams over HTTP too (generate_stream), and its binary HTTP is as fast (chapters 03, 08)",
        _tensors,
    ),
    Row(
        "S20",
        "15 MB of pictures gain much from gRPC, text does not",
        "corrected",
        "they gain from binary: HTTP binary does as well, and gRPC with typed contents does not",
        _tensors,
    ),
)
"""The article's comparison (S14, S15, S17 to S20), row by row."""


def guide(run: Results, rules: Sequence[Rule] = (DEFAULT, *RULES)) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: every rule with what it costs, its chapter and its figure."""
    head = ("place", "take", "because", "costs", "chapter", "figure")
    return head, [
        (rule.place, rule.path, rule.because, rule.costs, rule.chapter, linked(rule.evidence(run))) for rule in rules
    ]


def article(run: Results) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: every statement with its verdict and figure."""
    head = ("item", "the article says", "verdict", "why", "figure")
    return head, [(row.id, row.claim, row.verdict, row.why, linked(row.evidence(run))) for row in ARTICLE]


def linked(figure: str) -> str:
    """A figure with a link to the table that it stands in; a property has none."""
    return figure if "a property" in figure else f"[{figure}](../BENCHMARKS.md)"
