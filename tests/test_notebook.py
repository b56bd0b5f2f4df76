"""The display helpers, and reading a metric."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from xml.etree import ElementTree

import grpc
import pytest
import requests
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from servebook import ServebookError
from servebook.bench import pictures
from servebook.bench.tensors import TensorCost
from servebook.settings import load_settings
from servebook.ways.metrics import metric
from servebook.workbook import notebook
from servebook.workbook.notebook import (
    Pace,
    bars,
    curves,
    difference,
    expect_error,
    machine_card,
    measure_pace,
    pieces,
    show,
    show_difference,
    squares,
    timeline,
    until,
    versions,
    wire,
)


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What was displayed, as MIME bundles."""
    bundles: list[dict[str, str]] = []
    monkeypatch.setattr(notebook, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def test_until_asks_again_and_has_an_end() -> None:
    answers = iter([0, 0, 1])
    until(lambda: next(answers))
    with pytest.raises(TimeoutError, match=r"has not come in 0 s.*servebook status"):
        until(lambda: False, seconds=0.01)


def test_expected_error_is_printed_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with expect_error(ValueError, KeyError) as caught:
        int("x")
    assert capsys.readouterr().out == "ValueError: invalid literal for int() with base 10: 'x'\n"
    assert isinstance(caught.value, ValueError)
    with expect_error():
        int("x")


def test_no_error_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="meant to end in KeyError, and no error came"), expect_error(KeyError):
        pass


def test_another_error_goes_through() -> None:
    with pytest.raises(ZeroDivisionError), expect_error(KeyError):
        _ = 1 / 0


def test_grpc_error_is_its_code_and_details(capsys: pytest.CaptureFixture[str]) -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel, expect_error(grpc.RpcError):
        channel.unary_unary("/llm.v1.LLMService/Generate", None, None)(b"", timeout=60)
    assert capsys.readouterr().out.startswith("_InactiveRpcError: UNAVAILABLE: failed to connect")


def test_show_names_the_place_and_keeps_the_text(displayed: list[dict[str, str]], tmp_path: Path) -> None:
    config = tmp_path / "config.pbtxt"
    config.write_text('backend: "vllm"\n')
    show(notebook.picture, config)
    source, text = displayed
    assert re.match(r"src/servebook/workbook/notebook\.py, line \d+\ndef picture\(", source["text/plain"])
    assert "<style" not in source["text/html"], "JupyterLab strips stylesheets from untrusted outputs"
    assert text["text/plain"] == 'config.pbtxt\nbackend: "vllm"\n'


def test_show_of_a_method_is_not_indented(displayed: list[dict[str, str]]) -> None:
    show(expect_error.__enter__)
    assert "\ndef __enter__(self)" in displayed[0]["text/plain"]


def svg_of(bundle: dict[str, str]) -> tuple[str, str]:
    """The alt text and the SVG of a displayed picture."""
    found = re.fullmatch(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"[^>]*>', bundle["text/html"])
    assert found
    svg = base64.b64decode(found[2]).decode()
    ElementTree.fromstring(svg)
    return found[1], svg


def test_show_difference_has_signs_for_who_sees_no_colours(displayed: list[dict[str, str]], tmp_path: Path) -> None:
    before, after = tmp_path / "one.py", tmp_path / "two.py"
    before.write_text("a = 1\nb = 2\nif a < b:\n    print(a)\n")
    after.write_text("a = 1\nb = 3\nif a < b:\n    print(a)\n    print(b)\n")
    show_difference(before, after)
    [bundle] = displayed
    title, *lines = bundle["text/plain"].splitlines()
    assert title == "one.py → two.py"
    assert lines == ["⋯", " a = 1", "-b = 2", "+b = 3", " if a < b:", "     print(a)", "+    print(b)"]
    spans = ElementTree.fromstring(f"<p>{bundle['text/html']}</p>").findall(".//pre/span")
    assert [span.text for span in spans] == lines
    grounds = [span.attrib["style"] for span in spans]
    assert len({grounds[0], grounds[2], grounds[3]}) == 3
    assert difference(before, before) == []


def test_timeline_says_what_it_shows(displayed: list[dict[str, str]]) -> None:
    timeline({"alone": [0.1, 0.2, 0.35], "refused": []})
    alt, svg = svg_of(displayed[0])
    assert alt == "Arrival of tokens. alone: 3 events from 0.10 s to 0.35 s."
    assert "seconds since the request was sent" in svg
    assert not [text for text in ("alone", "refused", "Arrival of tokens") if f">{text}<" not in svg]
    assert (marks(svg, "#1f4e79"), marks(svg, "#c55a11")) == (3, 1), "a stroke for each, and the first one's diamond"


def marks(svg: str, colour: str) -> int:
    """How many markers of a colour were drawn."""
    return len(re.findall(rf"<use [^>]*style=\"[^\"]*{colour}", svg))


def test_curves_and_bars_label_their_axes(displayed: list[dict[str, str]]) -> None:
    curves([1, 2, 4], {"REST": [20, 40, 80]}, xlabel="requests at once", ylabel="tokens/s", title="Throughput", log="x")
    bars({"raw": 9.5, "JSON": 1536.0}, xlabel="ms", title="Encoding")
    alt, svg = svg_of(displayed[0])
    assert alt == "Throughput: tokens/s over requests at once. REST: 20 at 1, 80 at 4."
    assert "requests at once" in svg
    assert "tokens/s" in svg
    assert marks(svg, "#1f4e79") == 3 + 1, "and that of the legend"
    alt, svg = svg_of(displayed[1])
    assert alt == "Encoding, ms: raw 9.5; JSON 1,536."
    assert not [text for text in ("raw", "9.5", "JSON", "1,536", "ms", "Encoding") if f">{text}<" not in svg]


def test_pieces_say_when_and_how_long(displayed: list[dict[str, str]]) -> None:
    pieces({"gateway": (0, 0.5), "  queue": (0.1, 0.35)}, title="One request")
    alt, svg = svg_of(displayed[0])
    assert alt == "One request: gateway from 0.000 s to 0.500 s; queue from 0.100 s to 0.350 s."
    assert not [text for text in ("seconds", "500 ms", "250 ms", "One request") if f">{text}<" not in svg]


def test_squares_are_as_many_as_there_are(displayed: list[dict[str, str]]) -> None:
    squares({"A": 2, "B": 3}, 182, unit="block", title="Blocks")
    alt, svg = svg_of(displayed[0])
    assert alt == "Blocks: 182 squares, one for each block. A has 2; B has 3; 177 are free."
    assert (svg.count(">A<"), svg.count(">B<")) == (2, 3)
    assert svg.count("fill: #ffffff; stroke: #7f7f7f") == 177
    with pytest.raises(ValueError, match="5 are more than 4"):
        squares({"A": 5}, 4, unit="block", title="Blocks")


def test_what_a_picture_cannot_tell_apart_is_refused(displayed: list[dict[str, str]]) -> None:
    """Not left out."""
    lines = {name: [1.0, 2.0] for name in "ABCDEFG"}
    with pytest.raises(ValueError, match="7 do not fit into one picture, which tells 6 apart"):
        curves([1, 2], lines, xlabel="s", ylabel="s", title="Too many")
    costs = [
        TensorCost(server="triton", encoding=name, tensor_bytes=1, request_bytes=1, median_ms=1, repeats=1)
        for name in lines
    ]
    with pytest.raises(ValueError, match="7 do not fit"):
        pictures.sweep(costs, title="Too many")
    with pytest.raises(ValueError, match="6 do not fit into one picture, which tells 5 apart"):
        squares(dict.fromkeys("ABCDEF", 1), 9, unit="block", title="Too many")
    assert not displayed


def test_the_same_data_give_the_same_picture(displayed: list[dict[str, str]]) -> None:
    for _ in range(2):
        bars({"a": 1.0}, xlabel="s", title="Twice")
    assert displayed[0] == displayed[1]


def test_versions_lists_packages_and_machine(displayed: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 3, 5})
    versions(load_settings(device="cpu"))
    rows = dict(line.split(": ", 1) for line in displayed[0]["text/plain"].splitlines())
    assert {"Python", "vLLM", "torch", "tritonclient", "KServe", "model", "device", "processor"} <= rows.keys()
    assert rows["device"] == "cpu"
    assert "not installed" not in rows.values()
    assert rows["processor"].endswith(", 3 cores"), "those that this process may use"


@pytest.mark.parametrize(("lines", "folded"), [(60, False), (61, True)])
def test_what_is_long_is_folded_away(displayed: list[dict[str, str]], tmp_path: Path, lines: int, folded: bool) -> None:
    file = tmp_path / "long.py"
    file.write_text("a = 1\n" * lines)
    show(file)
    assert ("<details><summary>" in displayed[0]["text/html"]) == folded


def test_wire_shows_a_binary_protocol_in_hexadecimal(capsys: pytest.CaptureFixture[str]) -> None:
    wire(b"\x00\x00\x00\x00\x05\n\x03abc" + b"z" * 8, limit=17)
    first, second, more = capsys.readouterr().out.splitlines()
    assert first == "   0  00 00 00 00 05 0a 03 61 62 63 7a 7a 7a 7a 7a 7a  ·······abczzzzzz"
    assert second.split() == ["16", "7a", "z"]
    assert more == "… and 1 bytes more"


def test_wire_shows_bytes_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    wire("data: é\r\n\r\n".encode() + b"x" * 600, limit=12)
    assert capsys.readouterr().out.splitlines() == [r"data: \xc3\xa9\r\n", r"\r\n", "… and 600 bytes more"]
    wire(b"""it's a "quote" and a \\' backslash\n""")
    assert capsys.readouterr().out == r"""it's a "quote" and a \\' backslash\n""" + "\n"


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """A Prometheus page with two engines on it."""
    registry = CollectorRegistry()
    running = Gauge("vllm:num_requests_running", "Requests in the batch", ["engine"], registry=registry)
    running.labels("0").set(1)
    running.labels("1").set(2)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_metric_sums_over_the_labels_not_given(page: str) -> None:
    assert metric(page, "vllm:num_requests_running") == 3
    assert metric(f"http://{page}/metrics", "vllm:num_requests_running", engine="1") == 2


def test_metric_shows_the_key_where_one_is_asked_for(page: str) -> None:
    seen: list[str | None] = []

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(requests.get(f"http://{page}/metrics", timeout=10).content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as door:
        Thread(target=door.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{door.server_port}"
        assert metric(url, "vllm:num_requests_running", key="sk-1", engine="1") == 2
        assert metric(url, "vllm:num_requests_running", key=None) == 3
        door.shutdown()
    assert seen == ["Bearer sk-1", None]


def test_metric_that_is_not_there(page: str) -> None:
    with pytest.raises(ServebookError, match="has no sample vllm:nothing"):
        metric(page, "vllm:nothing")
    with pytest.raises(ServebookError, match=r"no metrics at http://127.0.0.1:1/metrics .*\n→ Is the server up"):
        metric("127.0.0.1:1", "vllm:nothing")


@pytest.mark.parametrize(("status", "advice"), [(401, "Show it its key"), (404, "Is that the address of a server")])
def test_a_page_that_is_refused_is_no_server_that_is_down(status: int, advice: str) -> None:
    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as door:
        Thread(target=door.serve_forever, daemon=True).start()
        with pytest.raises(ServebookError, match=rf"/metrics answered with status {status}\.\n→ {advice}"):
            metric(f"127.0.0.1:{door.server_port}", "vllm:nothing")
        door.shutdown()


@pytest.mark.parametrize(("speed", "asked"), [(20, [32]), (1000, [32, 128, 512]), (300, [32, 128])])
def test_pace_looks_longer_where_the_engine_is_fast_and_again_where_others_had_the_processor(
    speed: int, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, said, others = [0.0], [], cycle((1.0, 0.0))

    def write(tokens: int) -> None:
        said.append(tokens)
        clock[0] += tokens / speed + next(others)

    monkeypatch.setattr(notebook, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert measure_pace(write).tokens_per_s == pytest.approx(speed)
    assert said == [4, *(tokens for tokens in asked for _ in range(2))]


@pytest.mark.parametrize(("speed", "seconds", "tokens"), [(25, 0.5, 96), (500, 0.5, 1500), (20_000, 0.025, 1500)])
def test_what_is_asked_for_outlasts_the_deadline(speed: float, seconds: float, tokens: int) -> None:
    pace = Pace(speed)
    assert pace.seconds(500, at_most=0.5) == seconds
    assert pace.tokens(3, at_least=96) == tokens
    assert tokens / speed > seconds


def test_what_is_asked_for_fits_into_a_small_context(displayed: list[dict[str, str]]) -> None:
    pace = machine_card(lambda tokens: None, load_settings(device="cpu", max_model_len=1024))
    assert pace.tokens(6, at_least=300) == 768
    assert machine_card(lambda tokens: None, load_settings(device="cpu")).tokens(6, at_least=300) == 1500


def test_the_machine_card_says_where_and_how_fast(displayed: list[dict[str, str]]) -> None:
    pace = machine_card(lambda tokens: None, load_settings(device="cpu"))
    assert displayed[0]["text/plain"].startswith("cpu: ")
    assert displayed[0]["text/plain"].endswith(f"· smollm2 · {pace.tokens_per_s:.0f} tokens/s for one caller")
