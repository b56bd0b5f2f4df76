"""Chapter 12: the notebook; quantiles and alarms by Prometheus' own answers; spans; and what ships with the chapter."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from aiohttp import web
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import Message, Receive, Scope, Send

from servebook.errors import ServebookError
from servebook.launch import Server
from servebook.settings import Settings
from servebook.ways.fastapi_gateway.server.app import create_app
from servebook.ways.fastapi_gateway.server.config import Config
from servebook.ways.fastapi_gateway.server.tracing import Traced
from servebook.ways.metrics import samples
from servebook.ways.watch_it import prometheus
from servebook.ways.watch_it.alarm import DASHBOARD, RULES, Rule, evaluate, increase, read_rule
from servebook.ways.watch_it.histogram import quantile
from servebook.ways.watch_it.pages import Page, parse, read, record
from servebook.ways.watch_it.traces import Collector, Span, collect, waterfall

pytestmark = [pytest.mark.lane("one"), pytest.mark.timeout(600)]

INF = math.inf
TTFT = "vllm:time_to_first_token_seconds"
RULE = Rule("FirstTokenSlow", "wait", share=0.95, window=10, limit=1, hold=3)


def page(at: float, fast: int, slow: int) -> Page:
    """A page on which `fast` waited up to a second and `slow` up to five, since the server started."""
    text = f"""# TYPE wait histogram
wait_bucket{{le="1.0"}} {fast}
wait_bucket{{le="5.0"}} {fast + slow}
wait_bucket{{le="+Inf"}} {fast + slow}
wait_count {fast + slow}
wait_sum 1
"""
    return parse(text, at)


def states(rule: Rule, pages: list[Page]) -> list[str]:
    return [moment.state for moment in evaluate(rule, pages)]


# A quantile from buckets.


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.5, 0.3), (0.25, 0.08), (0.4, 0.17), (0.4375, 0.2), (0.9375, 1), (0.95, 1), (1, 1)],
)
def test_a_quantile_is_what_prometheus_says(share: float, expected: float) -> None:
    """`promtool test rules` of Prometheus 2.42 gives these for histogram_quantile over the same buckets."""
    assert quantile(share, {0.1: 5, 0.2: 7, 1: 15, INF: 16}) == pytest.approx(expected)


def test_an_empty_histogram_has_no_quantile() -> None:
    assert math.isnan(quantile(0.95, {1: 0, INF: 0}))
    assert math.isnan(quantile(0.95, {})), "one with labels has no buckets before its first observation"


def test_a_histogram_without_bounds_has_no_quantile() -> None:
    """Prometheus gives NaN too: its `histogram_quantile` wants two buckets."""
    assert math.isnan(quantile(0.95, {INF: 16}))


# Pages.


def test_a_page_sums_what_has_the_labels() -> None:
    text = """# TYPE hits counter
hits_total{path="/a",status="200"} 3
hits_total{path="/a",status="503"} 1
hits_total{path="/b",status="200"} 5
# TYPE silent counter
"""
    found = parse(text, 0)
    assert found.value("hits_total") == 9
    assert found.value("hits_total", status="200") == 8
    assert found.value("hits_total", status="404") == 0
    assert found.value("silent_total") == 0, "a counter by label begins without samples"
    with pytest.raises(ServebookError, match=r"no hits\.\n→ .*_total"):
        found.value("hits")
    with pytest.raises(ServebookError, match="no hits_bucket"):
        found.buckets("hits")


@pytest.mark.parametrize("text", ["<!doctype html>\n<title>Sign in</title>", '{"detail": "Not Found"}', "ok so far"])
def test_a_page_of_another_kind_is_said_to_be_one(text: str) -> None:
    with pytest.raises(ServebookError, match=rf"no Prometheus page.*{re.escape(text[:9])}"):
        parse(text, 0)
    with pytest.raises(ServebookError, match="no Prometheus page"):
        samples(text, "up")


def test_buckets_of_several_labels_are_added() -> None:
    text = """# TYPE wait histogram
wait_bucket{engine="0",le="1.0"} 3
wait_bucket{engine="0",le="+Inf"} 4
wait_bucket{engine="1",le="1.0"} 10
wait_bucket{engine="1",le="+Inf"} 20
"""
    assert parse(text, 0).buckets("wait") == {1: 13, INF: 24}


async def test_the_record_begins_before_the_work_and_ends_after_it(vllm: Server) -> None:
    body = {"model": vllm.model, "prompt": "The sea", "max_tokens": 4, "ignore_eos": True}

    async def work() -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            (await http.post(f"{vllm.url}/v1/completions", json=body)).raise_for_status()

    pages: list[Page] = []
    await record(vllm.url, work(), pages)
    assert pages[-1].value(f"{TTFT}_count") - pages[0].value(f"{TTFT}_count") == 1
    assert sum(increase(TTFT, pages[0], pages[-1]).values()) >= 1
    assert [each.at for each in pages] == sorted(each.at for each in pages)


async def test_work_that_fails_fails_the_record(vllm: Server) -> None:
    async def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await record(vllm.url, work(), [])


# The alarm.


def test_the_alarm_is_pending_then_firing_then_over() -> None:
    slow = [page(at, fast=100, slow=10 * min(at, 6)) for at in range(30)]
    found = states(RULE, slow)
    assert found[:6] == ["pending"] * 3 + ["firing"] * 3
    over = found.index("inactive")
    assert set(found[3:over]) == {"firing"}
    assert set(found[over:]) == {"inactive"}
    assert over == 15, "page 16 is the first whose window has none of the slow ones"


def test_it_does_not_go_off_for_a_moment() -> None:
    assert "firing" not in states(replace(RULE, window=1), [page(at, 100, 5 * (at > 3)) for at in range(12)])


def test_a_break_begins_the_hold_anew() -> None:
    """Slow in the seconds 1, 2, 4, 5, 7, 8 …: never for three without a break."""
    slow = [at - at // 3 for at in range(20)]
    found = states(replace(RULE, window=1), [page(at, 0, count) for at, count in enumerate(slow)])
    assert found[:6] == ["pending", "pending", "inactive"] * 2
    assert "firing" not in found


def test_up_to_the_share_may_be_late() -> None:
    assert set(states(RULE, [page(at, 95 * at, 5 * at) for at in range(20)])) == {"inactive"}
    assert "firing" in states(RULE, [page(at, 94 * at, 6 * at) for at in range(20)])


def test_without_callers_nobody_is_woken() -> None:
    moments = list(evaluate(RULE, [page(at, 7, 7) for at in range(10)]))
    assert all(math.isnan(moment.value) and moment.state == "inactive" for moment in moments)


def test_a_server_that_began_anew_counts_from_nothing() -> None:
    assert increase("wait", page(0, 100, 50), page(1, 2, 3)) == {1: 2, 5: 5, INF: 5}
    nothing_yet = parse("# TYPE wait histogram\n", 0)
    assert increase("wait", nothing_yet, page(1, 2, 3)) == {1: 2, 5: 5, INF: 5}


def test_pages_far_apart_still_have_a_window() -> None:
    assert states(RULE, [page(at, 0, at) for at in range(0, 100, 20)]) == ["pending", "firing", "firing", "firing"]


def test_a_rule_written_for_prometheus_is_read_as_the_same(tmp_path: Path) -> None:
    rule = replace(read_rule("FirstTokenSlow"), limit=0.25, window=5, hold=1)
    config = prometheus.write_files(tmp_path, {"vllm": "127.0.0.1:1", "gateway": "127.0.0.1:2"}, rule, key="secret")
    assert read_rule("FirstTokenSlow", tmp_path / RULES.name) == rule
    written = yaml.safe_load(config.read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in written["scrape_configs"]}
    assert targets == {"vllm": ["127.0.0.1:1"], "gateway": ["127.0.0.1:2"]}
    assert written["scrape_configs"][0]["authorization"] == {"credentials": "secret"}


def test_the_rule_that_ships_is_read_in_seconds() -> None:
    assert read_rule("FirstTokenSlow") == Rule("FirstTokenSlow", TTFT, share=0.95, window=300, limit=0.5, hold=120)


def test_rules_that_cannot_be_read_say_why() -> None:
    with pytest.raises(ServebookError, match="0 rules called Nobody"):
        read_rule("Nobody")
    with pytest.raises(ServebookError, match=r"ServerGone is beyond this small evaluation: up == 0\.\n→ Ask"):
        read_rule("ServerGone")


@pytest.mark.parametrize("hold", ["1m30s", "1d", "500ms", "90"])
def test_a_hold_beyond_the_small_evaluation_is_said_too(tmp_path: Path, hold: str) -> None:
    rules = tmp_path / RULES.name
    rules.write_text(RULES.read_text().replace("for: 2m", f"for: {hold}"))
    with pytest.raises(ServebookError, match=rf"FirstTokenSlow is beyond this small evaluation: for {hold}\.\n→ Write"):
        read_rule("FirstTokenSlow", rules)


# What ships with the chapter.


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]|by \([^)]*\)|\{[^}]*\}', "", expression)
    return {name for name in re.findall(r"[a-z_:][\w:]*(?!\w*\()", bare) if name not in {"up"} and "_" in name}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])


def test_every_expression_reads_metrics_that_there_are(vllm: Server, gateway: Server, grpc_server: Server) -> None:
    there = {name for at in (vllm.url, gateway.url, grpc_server.metrics) for name in read(at).samples}
    wanted = {(title, name) for title, expression in expressions() for name in names_in(expression)}
    assert {(title, name) for title, name in wanted if name not in there} == set()
    assert len({name for _, name in wanted}) >= 9


def test_the_servers_are_read_at_their_usual_ports() -> None:
    config = yaml.safe_load(prometheus.CONFIG.read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    defaults = Settings.model_fields
    ports = {"vllm": "vllm_http_port", "gateway": "gateway_http_port", "grpc": "grpc_metrics_port"}
    assert targets == {job: [f"127.0.0.1:{defaults[port].default}"] for job, port in ports.items()}
    assert config["rule_files"] == [RULES.name]


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """What its import needs: panels with ids, places that do not overlap in 24 columns, and a source to choose."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert {"title", "uid", "schemaVersion", "templating", "time"} <= dashboard.keys()
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] in {"timeseries", "stat"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        (variable,) = dashboard["templating"]["list"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {f"${{{variable['name']}}}"}


async def test_a_real_prometheus_says_the_same(vllm: Server) -> None:
    if not prometheus.find():
        pytest.skip("there is no prometheus on the path (Debian: apt install prometheus)")
    rule = replace(read_rule("FirstTokenSlow"), limit=0.001, window=5, hold=1)
    body = {"model": vllm.model, "prompt": "The sea", "max_tokens": 1}
    with prometheus.run({"vllm": vllm.http}, rule) as url:
        started = deadline = time.time()
        deadline += 60
        query = 'ALERTS{alertname="FirstTokenSlow",alertstate="firing"}'
        async with httpx.AsyncClient(timeout=60) as http:
            while not (firing := prometheus.ask(url, query, started, time.time())):
                (await http.post(f"{vllm.url}/v1/completions", json=body)).raise_for_status()
                assert time.time() < deadline, "its alarm never went off"
        assert [series["metric"]["severity"] for series in firing] == ["page"]
        for _, expression in expressions():
            prometheus.ask(url, expression.replace("$__rate_interval", "5s"), started, time.time())


# Traces.


def span(name: str, start: float, end: float, parent: str = "", **attributes: Any) -> Span:
    return Span(name, "t", name, parent, start, end, attributes)


def test_the_parts_of_the_engines_span_end_with_it() -> None:
    parts = {
        "gen_ai.latency.time_in_queue": 1.0,
        "gen_ai.latency.time_in_model_prefill": 2.0,
        "gen_ai.latency.time_in_model_decode": 3.0,
    }
    rows = waterfall([span("engine", 101.0, 108.0, "gateway", **parts), span("gateway", 100.0, 109.0)])
    assert list(rows) == ["gateway", "engine", "  not yet taken in", "  queue", "  prefill", "  decode"]
    assert list(rows.values()) == [(0, 9), (1, 8), (1, 2), (2, 3), (3, 5), (5, 8)]


def test_the_collector_takes_what_opentelemetry_sends() -> None:
    with collect() as (collector, endpoint):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint, insecure=True)))
        tracer = provider.get_tracer("test")
        with tracer.start_as_current_span("outer") as outer, tracer.start_as_current_span("inner") as inner:
            inner.set_attributes({"text": "a", "number": 2, "part": 0.5, "true": True})
        provider.shutdown()
        found = collector.trace(f"{outer.get_span_context().trace_id:032x}", {"outer", "inner"})
    assert [each.name for each in found] == ["outer", "inner"]
    assert (found[0].parent, found[1].parent) == ("", found[0].span)
    assert found[1].attributes == {"text": "a", "number": 2, "part": 0.5, "true": True}
    assert found[0].start <= found[1].start <= found[1].end <= found[0].end


def test_a_trace_that_does_not_come_is_said_in_words() -> None:
    with pytest.raises(ServebookError, match=r"Of trace abc there is nothing after 0\.01 s\.\n→ "):
        Collector().trace("abc", {"gateway"}, seconds=0.01)


@asynccontextmanager
async def engine_that_notes_headers() -> Any:
    """Where the gateway calls, and the headers that it sent there."""
    seen: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers)
        return web.json_response(
            {
                "choices": [{"message": {"content": "Tokyo"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1},
            }
        )

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


async def ask_gateway(config: Config, headers: dict[str, str]) -> int:
    app = create_app(config)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60) as client,
    ):
        return (await client.post("/chat", json={"message": "Japan?"}, headers=headers)).status_code


async def test_the_gateway_passes_the_trace_on_as_its_own_span() -> None:
    with collect() as (collector, endpoint):
        async with engine_that_notes_headers() as (upstream, seen):
            assert await ask_gateway(Config(upstream, traces_endpoint=endpoint), TRACEPARENT) == 200
        (own,) = await asyncio.to_thread(collector.trace, TRACE, {"gateway"})
    assert own.parent == CALLER
    assert seen[0]["traceparent"] == f"00-{TRACE}-{own.span}-01"
    assert own.attributes == {"http.response.status_code": 200, "http.route": "/chat"}


@pytest.mark.parametrize("end", [RuntimeError, asyncio.CancelledError])
async def test_a_span_that_fails_or_is_left_says_of_what(end: type[BaseException]) -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = SimpleNamespace(path="/chat")
        raise end

    async def unused(*_: object) -> Message:
        raise AssertionError

    scope = {"type": "http", "headers": []}
    with pytest.raises(end):
        await Traced(fails, provider.get_tracer("test"))(scope, unused, unused)  # type: ignore[arg-type]
    [span] = spans.get_finished_spans()
    assert span.attributes == {"http.route": "/chat"}


async def test_without_an_endpoint_the_gateway_traces_nobody() -> None:
    async with engine_that_notes_headers() as (upstream, seen):
        assert await ask_gateway(Config(upstream), TRACEPARENT) == 200
    assert "traceparent" not in seen[0]


@pytest.mark.lane("several")
def test_notebook(vllm: Server, gateway: Server, run_notebook: Callable[[str], None]) -> None:
    run_notebook("12_watch_it")
