"""Chapter 14: the judge, proved by services that are right and by others that are wrong in one stage each."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from desk import eventually
from typer.testing import CliRunner

from servebook.checkout import ROOT
from servebook.cli import app
from servebook.errors import ServebookError
from servebook.lab import check
from servebook.lab.capstone import judge
from servebook.lab.capstone.bench import Bench, Stream
from servebook.lab.capstone.contract import begin, command_of
from servebook.lab.capstone.judge import judge_service
from servebook.lab.capstone.stages import STAGES
from servebook.lab.feedback import NotYet
from servebook.lab.taps.http import Exchange
from servebook.launch import Server
from servebook.ways.metrics import metric

pytestmark = [pytest.mark.lane("own"), pytest.mark.timeout(600)]

MODEL = ROOT / "solutions/14_capstone"
ANSWERS = ROOT / "tests/capstone"
WRONG = tomllib.loads((ANSWERS / "answers.toml").read_text())["wrong"]


def right_ones() -> list[Any]:
    return [
        pytest.param(path.parent, id=path.parent.name) for path in (MODEL / "service.toml", *ANSWERS.glob("*/*.toml"))
    ]


@pytest.mark.parametrize("folder", right_ones())
def test_a_right_service_has_all_points(folder: Path, vllm: Server) -> None:
    verdict = judge_service(folder, vllm)
    assert verdict.passed, verdict.render()
    assert verdict.points == sum(stage.points for stage in STAGES)
    eventually(lambda: metric(vllm.url, "vllm:num_requests_running") == 0, "an idle engine")


@pytest.mark.parametrize("wrong", [pytest.param(each, id=each["name"].replace(" ", "_")) for each in WRONG])
def test_a_wrong_service_fails_its_stage_and_is_told_the_cause(
    wrong: dict[str, Any], vllm: Server, tmp_path: Path
) -> None:
    source = (MODEL / "service.py").read_text()
    for old, new in wrong["edits"]:
        assert old in source, old
        source = source.replace(old, new)
    shutil.copy(MODEL / "service.toml", tmp_path)
    (tmp_path / "service.py").write_text(source)
    verdict = judge_service(tmp_path, vllm, last=wrong["stage"])
    failed = verdict.first_wrong
    assert failed is not None, verdict.render()
    assert failed.stage.number == wrong["stage"], verdict.render()
    assert wrong["cause"] in failed.cause, verdict.render()
    for text in (failed.expected, failed.got, failed.stage.hint):
        assert text, verdict.render()
        assert text.splitlines()[0] in verdict.render()
    assert "Traceback" not in verdict.render()


CANNED = """
import os
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
app = FastAPI()

@app.post("/generate")
async def generate(request: Request):
    if (await request.json()).get("stream"):
        events = ['data: {"text": " blue"}\\n\\n', "data: [DONE]\\n\\n"]
        return StreamingResponse(iter(events), media_type="text/event-stream")
    return {"response": " blue"}

uvicorn.run(app, port=int(os.environ["PORT"]))
"""


def test_a_service_that_never_asks_the_engine_is_judged_to_the_end(vllm: Server, tmp_path: Path) -> None:
    """The natural first step: answers of its own."""
    shutil.copy(MODEL / "service.toml", tmp_path)
    (tmp_path / "service.py").write_text(CANNED)
    verdict = judge_service(tmp_path, vllm)
    assert [each.state for each in verdict.outcomes] == ["wrong"] * 10, verdict.render()
    told = {each.stage.number for each in verdict.outcomes if "the text is to come from the engine" in each.cause}
    assert told == {2, 3, 4, 7}, verdict.outcomes


def test_what_the_judge_stumbles_over_costs_one_stage(
    vllm: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumbles(bench: Bench) -> None:
        raise IndexError("list index out of range")

    def full(bench: Bench) -> None:
        raise ServebookError("The engine is full (429).")

    begin(tmp_path)
    monkeypatch.setattr(judge, "STAGES", (replace(STAGES[0], judge=stumbles), replace(STAGES[1], judge=lambda _: None)))
    verdict = judge_service(tmp_path, vllm, last=2)
    assert [each.state for each in verdict.outcomes] == ["wrong", "passed"]
    assert "got           IndexError: list index out of range" in verdict.render()
    monkeypatch.setattr(judge, "STAGES", (replace(STAGES[0], judge=full),))
    with pytest.raises(ServebookError, match="full"):
        judge_service(tmp_path, vllm)


def test_the_beginning_is_a_service_with_much_left_to_do(vllm: Server, tmp_path: Path) -> None:
    """And what is there already is not written over."""
    folder = tmp_path / "capstone"
    assert begin(folder) == ["service.py", "service.toml"]
    verdict = judge_service(folder, vllm, last=4)
    assert [each.state for each in verdict.outcomes[:5]] == ["passed", "passed", "wrong", "wrong", "not judged"]
    (folder / "service.py").write_text("mine")
    begin(folder)
    assert (folder / "service.py").read_text() == "mine"


def test_what_cannot_start_is_told_why(
    vllm: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServebookError, match=r"no .*capstone/service.toml here"):
        check("14")
    begin()
    start = Path("capstone/service.toml")
    for nothing in ("5", '""', '" "', '"a\\u0000b"'):
        start.write_text(f"command = {nothing}")
        with pytest.raises(ServebookError, match="no command that can be read"):
            command_of(start.parent)
    start.write_text('command = "no-such-program"')
    check("14")
    said = capsys.readouterr().out
    assert said.startswith("14 Capstone: 0 of 20 points\n✗  1 Ready only when the engine is")
    assert "names no program that is here" in said
    told = CliRunner().invoke(app, ["labs", "check", "14"])
    assert (told.exit_code, told.stdout) == (1, said), "the command line says the same"
    start.write_text('command = "python service.py"')
    Path("capstone/service.py").write_text("import nothing_of_that_name")
    check("14")
    assert "got           ModuleNotFoundError: No module named 'nothing_of_that_name'" in capsys.readouterr().out


def stream_of(data: Iterable[bytes]) -> Stream:
    """A service's stream that comes so."""
    return Stream(Mock(status_code=200, headers={}, iter_content=lambda _: iter(data)))


def test_a_stream_that_pings_for_ever_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.lab.capstone.bench.STREAM_SECONDS", 0.2)
    stream = stream_of(chain([b'data: {"text": " sea"}\n\n'], repeat(b": ping\n\n", 10**6)))
    assert stream.piece() == " sea"
    with pytest.raises(NotYet, match="keeps its caller waiting") as told:
        stream.rest()
    assert told.value.expected == "a stream that ends"


def test_nothing_comes_after_done() -> None:
    stream = stream_of([b'data: {"text": " blue"}\r\n\r\n', b"data: [DONE]\n", b"\n"])
    stream.rest()
    assert (stream.text, stream.done) == (" blue", True)
    stream = stream_of([b'data: {"text": " blue"}\n\ndata: [DONE]\n\ndata: {"text": " sky"}'])
    with pytest.raises(NotYet, match="send it when all the text is out"):
        stream.rest()


def test_what_is_under_way_counts_as_at_work() -> None:
    def asked(started: float, ended: float | None) -> Exchange:
        return Exchange("POST", "/v1/completions", {}, None, started, ended=ended)

    made = [asked(1, 2), asked(2, 5), asked(3, None), asked(4, None)]
    assert Bench.most_at_once(made) == 3


def test_each_stage_has_its_hint_and_points() -> None:
    assert [stage.number for stage in STAGES] == list(range(1, 11))
    assert sum(stage.points for stage in STAGES) == 20
    assert all(stage.hint for stage in STAGES)
    assert {each["stage"] for each in WRONG} == {stage.number for stage in STAGES}


def test_notebook(vllm: Server, run_notebook: Callable[[str], None]) -> None:
    """It puts a beginning beside itself, which goes with this test where it came with it."""
    folder = ROOT / "notebooks/capstone"
    there = folder.exists()
    try:
        run_notebook("14_capstone")
    finally:
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
