"""What surrounds the labs: manifest and notebooks agree, the command line, the bundle, nbgrader."""

from __future__ import annotations

import ast
import csv
import json
import os
import platform
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call, patch

import nbformat
import psutil
import pytest
from desk import TINY, Desk, eventually
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde
from nbgrader.converters.base import BaseConverter
from nbgrader.preprocessors import Execute
from traitlets.config import Config

from servebook import launch
from servebook.checkout import ROOT
from servebook.environment import short_tmpdir
from servebook.errors import ServebookError
from servebook.lab import checking, record
from servebook.lab.capstone.stages import STAGES
from servebook.lab.dry_run import load as dry_run
from servebook.lab.feedback import Result
from servebook.lab.handout import autograde, confine, landlock, provided
from servebook.lab.handout.blanks import student_notebook
from servebook.lab.handout.bundle import write_bundle
from servebook.lab.handout.remarks import not_graded, remarks
from servebook.lab.manifest import Lab, find_exercise, load_labs
from servebook.lab.record import Store
from servebook.lab.shell import LabShell, again, exercise_of, read_notebook
from servebook.processes import free_port, marked
from servebook.room import grading
from servebook.settings import Settings, load_settings

LABS = [pytest.param(lab, id=lab.stem) for lab in load_labs()]
STEM, OTHER = "01_openai_rest", "02_sse_streaming"
KEY = "the-instructors-key"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`servebook …` as a learner with no progress yet."""
    environment = os.environ | {"SERVEBOOK_STATE_DIR": str(tmp_path / "state")}
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)

    def run(*words: object, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        program = "import sys; from servebook.cli import main; sys.argv[0] = 'servebook'; main()"
        argv = [sys.executable, "-c", program, *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment | more, timeout=500)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def cells_of(path: Path) -> dict[str, Any]:
    return {cell.id: cell for cell in nbformat.read(path, as_version=4).cells}


@pytest.mark.parametrize("lab", LABS)
def test_notebook_agrees_with_the_manifest(lab: Lab) -> None:
    """Each exercise has its cells, in order, with the manifest's title, points and minutes."""
    by_id = cells_of(ROOT / "solutions" / lab.path)
    order = [cell_id for cell_id in by_id if exercise_of(by_id[cell_id])]
    assert [cell_id for cell_id in order if cell_id.endswith("-check")] == [f"{e.cell}-check" for e in lab.exercises]
    for exercise in lab.exercises:
        head = f"## {exercise.id} · {exercise.title}\n*{exercise.kind.capitalize()} · {exercise.worth} · about "
        assert by_id[f"{exercise.cell}-brief"].source.startswith(
            head + f"{exercise.minutes} minutes · {exercise.difficulty} · {exercise.importance}*"
        )
        answer, check = by_id[f"{exercise.cell}-answer"], by_id[f"{exercise.cell}-check"]
        assert order.index(check.id) == order.index(answer.id) + 1
        assert answer.metadata.nbgrader.solution
        assert not answer.metadata.nbgrader.grade
        assert check.metadata.nbgrader.grade
        assert check.metadata.nbgrader.locked
        assert check.metadata.nbgrader.points == exercise.points
        assert check.source == f'check("{exercise.id}")'
    assert {"intro", "parameters", "setup"} <= by_id.keys()
    assert 3 <= len(lab.exercises) <= 7
    assert 20 <= lab.minutes <= 65


def test_nothing_is_orphaned() -> None:
    """Every solution, lab and check function belongs to the manifest. The capstone has a solution, and is no lab:

    it is one service in ten stages, which `tests/test_14_capstone.py` proves, and neither cells nor exercises.
    """
    labs = load_labs()
    assert {path.name for path in (ROOT / "solutions").iterdir()} == {lab.stem for lab in labs} | {"14_capstone"}
    assert {path.name for path in (ROOT / "labs").iterdir()} == {lab.stem for lab in labs}
    checks = ROOT / "src/servebook/lab/checks"
    assert {path.stem for path in checks.glob("c[0-9]*.py")} == {f"c{lab.stem}" for lab in labs}
    for lab in labs:
        functions = re.findall(r"^def check_(\d\d_\d)\(", (checks / f"c{lab.stem}.py").read_text(), re.M)
        assert functions == [exercise.id.replace(".", "_") for exercise in lab.exercises]


@pytest.mark.parametrize("lab", LABS)
def test_notebooks_are_python(lab: Lab) -> None:
    for folder in ("solutions", "labs"):
        for cell in cells_of(ROOT / folder / lab.path).values():
            if cell.cell_type == "code" and not cell.source.startswith("%%"):
                compile(cell.source, cell.id, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("lab", LABS)
def test_labs_are_fresh(lab: Lab) -> None:
    """`labs/` is what its solution gives, byte for byte, again and again."""
    made = student_notebook(ROOT / "solutions" / lab.path)
    assert made == student_notebook(ROOT / "solutions" / lab.path)
    assert made == (ROOT / "labs" / lab.path).read_text(), "run `make labs`"


@pytest.mark.parametrize("lab", LABS)
def test_released_blanks_say_what_to_do(lab: Lab) -> None:
    cells = cells_of(ROOT / "labs" / lab.path)
    assert "Replace each `raise NotImplementedError(…)`" in cells["how"].source
    for exercise in lab.exercises:
        source = cells[f"{exercise.cell}-answer"].source
        assert re.search(
            rf"(#|//) TODO\({exercise.id}\): .+ \(about \d+ lines?\)\n *(// )?raise NotImplemented", source
        )
        assert f'raise NotImplementedError("{exercise.id}")' in source


@pytest.mark.parametrize("lab", LABS)
def test_a_task_says_how_long_its_solution_is(lab: Lab) -> None:
    """Give or take two lines."""
    cells = cells_of(ROOT / "solutions" / lab.path)
    for exercise in lab.exercises:
        source = cells[f"{exercise.cell}-answer"].source
        (told,) = re.findall(r"BEGIN SOLUTION .+\(about (\d+) lines?\)\n(.*)\n.*END SOLUTION", source, re.DOTALL)
        assert abs(sum(bool(line.strip()) for line in told[1].split("\n")) - int(told[0])) <= 2, exercise.id


@pytest.mark.lifetime
def test_list_hint_and_progress(learner: Run) -> None:
    _, exercise = find_exercise("01.2")
    assert "0/3" in learner("labs", "list").stdout
    for number, text in enumerate(exercise.hints, 1):
        shown = learner("labs", "hint", "01.2").stdout
        assert text in shown
        assert all((other in shown) == (i <= number) for i, other in enumerate(exercise.hints, 1))
    assert "that was the last one" in learner("labs", "hint", "01.2").stdout
    assert "3/3" in learner("labs", "list", COLUMNS="200").stdout
    assert "Choose from 01.1, 01.2" in learner("labs", "hint", "01.9", code=1).stderr


@pytest.mark.engine
def test_init_check_and_reset(learner: Run, vllm: launch.Server, tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    here = {"SERVEBOOK_ENGINE_URL": vllm.url}
    assert f"{len(load_labs())} labs copied" in learner("labs", "init", copy).stdout
    opened = learner("labs", "check", "01.2", code=1, **here).stdout
    assert opened.startswith("○ 01.2 Read what it cost and how it ended: still open")
    assert "next hint     Which of the three numbers" in opened

    path = copy / STEM / f"{STEM}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    answer = next(cell for cell in notebook.cells if cell.id == "01-2-answer")
    stub, answer.source = answer.source, cells_of(ROOT / "solutions" / STEM / f"{STEM}.ipynb")["01-2-answer"].source
    nbformat.write(notebook, path)
    assert learner("labs", "check", "01.2", **here).stdout == "✓ 01.2 Read what it cost and how it ended (1 point)\n"
    assert "1 of " in learner("labs", "list").stdout

    assert "left as they were" in learner("labs", "init", copy).stdout
    assert cells_of(path)["01-2-answer"].source == answer.source
    learner("labs", "reset", "01.2")
    assert cells_of(path)["01-2-answer"].source == stub
    assert "0 of " in learner("labs", "list").stdout


@pytest.mark.lifetime
def test_a_reset_takes_both_parts_of_an_answer_that_was_split_and_no_copy(learner: Run, tmp_path: Path) -> None:
    learner("labs", "init", tmp_path)
    path = tmp_path / STEM / f"{STEM}.ipynb"
    blank = nbformat.read(path, as_version=4)
    notebook = deepcopy(blank)
    place = next(number for number, cell in enumerate(blank.cells) if cell.id == "01-2-answer")
    part, copy = deepcopy(notebook.cells[place]), deepcopy(notebook.cells[place])
    part.update(id="split", source="def account(answer):")  # as JupyterLab does both
    copy.update(id="pasted", source="my first try")
    del copy.metadata["deletable"]
    notebook.cells[place].source = "    return 1"
    notebook.cells[place:place] = [copy, part]
    nbformat.write(notebook, path)
    learner("labs", "reset", "01.2")
    blank.cells.insert(place, copy)
    assert nbformat.read(path, as_version=4).cells == blank.cells


@pytest.mark.lifetime
def test_a_check_that_cannot_run_says_what_to_do(learner: Run, tmp_path: Path) -> None:
    """The engine is out of reach, the set-up spoilt, the answer cell gone, the file torn: never a traceback."""
    learner("labs", "init", tmp_path)
    nowhere = f"http://127.0.0.1:{free_port()}"
    said = learner("labs", "check", "01.2", code=1, SERVEBOOK_ENGINE_URL=nowhere).stderr
    assert f"The cell 'setup' failed: LaunchError: No vLLM answers at SERVEBOOK_ENGINE_URL={nowhere}" in said
    assert "→ Start it there" in said

    path = tmp_path / STEM / f"{STEM}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["setup"].source = "nonsense"
    nbformat.write(notebook, path)
    said = learner("labs", "check", "01.2", code=1).stderr
    assert "The cell 'setup' failed: NameError: name 'nonsense' is not defined\n→ Run the notebook" in said

    cells["setup"].source = cells["01-2-given"].source = "pass"
    notebook.cells.remove(cells["01-2-answer"])
    nbformat.write(notebook, path)
    assert "has no answer cell for 01.2." in learner("labs", "check", "01.2", code=1).stderr

    path.write_text(path.read_text()[:1000])
    for command in ("check", "reset"):
        said = learner("labs", command, "01.2", code=1).stderr
        assert f"{path} cannot be read as a notebook: " in said
        assert f"→ Remove 01_openai_rest.ipynb and run `servebook labs init {tmp_path}` again." in said


def test_a_notebook_to_copy_from_is_not_to_be_copied_anew() -> None:
    lab = Path("labs") / STEM / f"{STEM}.ipynb"
    assert again(ROOT / lab) == f"Take {lab} anew from where the course came from, or by `git checkout` of it."


def test_a_check_builds_on_all_that_stands_above(tmp_path: Path) -> None:
    """An answer may use an earlier one. What belongs to that may fail, and what a learner tries; the set-up may not."""
    path = tmp_path / OTHER / f"{OTHER}.ipynb"
    path.parent.mkdir()
    notebook = nbformat.read(ROOT / "solutions" / OTHER / path.name, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["setup"].source = "from collections.abc import Iterable, Iterator"
    cells["02-1-given"].source = "1 / 0"
    place = notebook.cells.index(cells["02-2-brief"])
    notebook.cells[place:place] = [new_code_cell("1 / 0"), new_code_cell("tried = list(parse_sse([b'data: a\\n\\n']))")]
    nbformat.write(notebook, path)
    shell = LabShell(path)
    shell.prepare("02.2")
    assert shell.shell.user_ns["tried"] == ["a"]
    cells["setup"].source = "1 / 0"
    nbformat.write(notebook, path)
    with pytest.raises(ServebookError, match="The cell 'setup' failed"):
        LabShell(path).prepare("02.2")


@pytest.mark.lifetime
def test_a_check_ends_whatever_its_answer_has_left_at_work(learner: Run, tmp_path: Path) -> None:
    """Python waits at its end for the threads of a pool, and these wait for ever."""
    learner("labs", "init", tmp_path)
    path = tmp_path / OTHER / f"{OTHER}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = {each.id: each for each in notebook.cells}
    cells["setup"].source = cells["02-1-given"].source = "pass"
    threads = (
        "import concurrent.futures as pools, threading\npools.ThreadPoolExecutor().submit(threading.Event().wait)\n"
    )
    processes = "pools.ProcessPoolExecutor(1).submit(pow, 2, 2).result()\n"
    cells["02-1-answer"].source = f"{threads}{processes}exit()"
    cells["02-4-given"].source = "raise ValueError('torn')"
    nbformat.write(notebook, path)
    assert "SystemExit" in learner("labs", "check", "02.1", code=1).stdout
    assert "✗" in learner("labs", "list").stdout
    assert "torn" in learner("labs", "check", "02.4", code=1).stderr


@pytest.mark.lifetime
def test_an_interrupt_ends_a_check_and_is_no_attempt(learner: Run, tmp_path: Path) -> None:
    """Ctrl-C in the set-up, and in the answer."""
    learner("labs", "init", tmp_path)
    path = tmp_path / OTHER / f"{OTHER}.ipynb"
    ctrl_c = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    for cell in ("02-1-answer", "setup"):
        notebook = nbformat.read(path, as_version=4)
        cells = {each.id: each for each in notebook.cells}
        cells["setup"].source = cells["02-1-given"].source = "pass"
        cells[cell].source = ctrl_c
        nbformat.write(notebook, path)
        ended = learner("labs", "check", "02.1", code=130)
        assert "stopped" in ended.stderr
        assert not ended.stdout
        assert "✗" not in learner("labs", "list").stdout


@pytest.mark.lifetime
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_left_ends_by_sigpipe(unbuffered: str, learner: Run, tmp_path: Path) -> None:
    """As in `servebook labs check 02.1 | head -1`; the answer has left a thread at work, which waits for ever."""
    learner("labs", "init", tmp_path)
    path = tmp_path / OTHER / f"{OTHER}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = {each.id: each for each in notebook.cells}
    cells["setup"].source = cells["02-1-given"].source = "pass"
    at_work = "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
    cells["02-1-answer"].source = f"{at_work}raise ValueError"
    nbformat.write(notebook, path)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for words in (["labs", "check", "02.1"], ["labs", "check", "99.1"], ["labs", "list"], ["nonsense"]):
        reader, pipe = os.pipe()
        os.close(reader)
        try:
            argv = [sys.executable, "-c", "from servebook.cli import main; main()", *words]
            done = subprocess.run(argv, stdout=pipe, stderr=pipe, env=environment, timeout=100)
        finally:
            os.close(pipe)
        assert done.returncode == -signal.SIGPIPE, words
    assert "✗" in learner("labs", "list").stdout, "it was an attempt all the same"
    if unbuffered:
        return
    latin = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    closed = "import os, sys\nos.close(1)\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    for words, code, locale in ((["labs", "list"], 0, latin), (["labs", "check", "02.1"], 1, {})):
        whole = [sys.executable, "-c", closed, *argv[1:3], *words]
        done = subprocess.run(whole, stderr=subprocess.PIPE, env=os.environ | locale, timeout=100)
        assert (done.returncode, done.stderr) == (code, b""), "as a service of the machine's runs it"


INTERRUPTING = """
import json, os, signal, sys
held = ""
for line in sys.stdin:
    held += json.dumps({"model": line.strip()}) + "\\n"
    if "interrupted" in line:
        os.kill(os.getppid(), signal.SIGINT)
    else:
        print(held, end="", flush=True)
        held = ""
"""


def test_an_interrupt_leaves_no_engine_facts_for_the_next_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the interrupted question comes when the next one has been asked."""
    dry_run.end()
    monkeypatch.setattr(dry_run, "as_told", lambda _: [sys.executable, "-c", INTERRUPTING])
    try:
        with pytest.raises(KeyboardInterrupt):
            dry_run.engine_facts(Path("interrupted"))
        assert dry_run.engine_facts(Path("another")) == {"model": "another"}
    finally:
        dry_run.end()


def test_the_capstones_hints_name_sections_that_there_are() -> None:
    hints = " ".join(stage.hint for stage in STAGES)
    named = re.findall(r"[Cc]hapter (\d\d), section (\w+)", hints)
    assert named
    for chapter, section in named:
        (notebook,) = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
        heads = [cell.source.partition("\n")[0] for cell in cells_of(notebook).values()]
        assert [head for head in heads if head.startswith(f"## {section} · ")], (chapter, section)


def test_check_in_a_notebook_reports_and_under_nbgrader_raises(
    learner: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learner reads; nbgrader needs an error to give no points."""
    checking.check("01.1")
    text = capsys.readouterr().out
    assert text.splitlines()[0] == "✗ 01.1 Ask with plain HTTP"
    assert "its cell has not run" in text
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    with pytest.raises(ServebookError, match="its cell has not run"):
        checking.check("01.1")


class Room(BaseHTTPRequestHandler):
    """A room's front and engine: refuses what asks for more than the share that a learner has left."""

    share = 3000

    def do_GET(self) -> None:
        self.say(200, {"data": [{"id": "smollm2", "max_model_len": 2048}]})

    def do_POST(self) -> None:
        ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = ask.get("max_tokens", 16)
        status = 429 if tokens > self.share else 200 if 0 < tokens <= 2048 else 400
        self.say(status, {"choices": [{"text": " a", "message": {"content": "a"}, "finish_reason": "length"}]})

    def say(self, status: int, answer: object) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


class FullRoom(Room):
    share = -1


class GoneRoom(Room):
    def do_POST(self) -> None:
        """Hang up without a word."""


class TerseRoom(Room):
    """Stops after a word unless told to write on, and then merges all words into two; whoever says hello waits until
    another one asks for sixty tokens."""

    sixty = threading.Event()

    def do_POST(self) -> None:
        ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if ask["max_tokens"] == 60:
            self.sixty.set()
        if ask.get("prompt") == "Hello":
            self.sixty.wait(60)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        words = [(" a", None), (" b", "length")] if ask.get("ignore_eos") else [(" a", "stop")]
        for word, reason in words:
            choice = {"index": 0, "text": word, "delta": {"content": word}, "finish_reason": reason}
            self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")


def check_in(room: type[Room], exercise_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Do an exercise as its solution does, and check it, where the engine is reached through such a room."""
    lab, _ = find_exercise(exercise_id)
    monkeypatch.chdir(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), room) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("SERVEBOOK_ENGINE_URL", f"http://127.0.0.1:{server.server_port}")
        shell = LabShell(ROOT / "solutions" / lab.path)
        shell.prepare(exercise_id)
        result = shell.check(exercise_id)
        server.shutdown()
    return result


@pytest.mark.lifetime
@pytest.mark.parametrize("exercise_id", ["04.3", "05.4"])
def test_what_is_asked_in_vain_fits_into_a_learners_share(
    exercise_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = check_in(Room, exercise_id, tmp_path, monkeypatch)
    assert result.passed, result.render()


@pytest.mark.lifetime
@pytest.mark.parametrize("exercise_id", ["04.3", "04.4", "05.3", "05.4", "08.2", "13.1"])
def test_a_full_room_is_not_held_against_the_learner(
    exercise_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = check_in(FullRoom, exercise_id, tmp_path, monkeypatch)
    assert (result.state, result.got.splitlines()[0]) == ("stuck", "ServebookError: The engine is full (429).")


@pytest.mark.lifetime
@pytest.mark.parametrize("exercise_id", ["01.1", "01.4", "05.4"])
def test_an_engine_that_has_gone_is_not_held_against_the_learner(
    exercise_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = check_in(GoneRoom, exercise_id, tmp_path, monkeypatch)
    assert result.state == "stuck"
    assert result.got.startswith("ServebookError: The server cannot serve, or does not answer.")
    assert "set-up cell starts what is not up" in result.got


@pytest.mark.lifetime
@pytest.mark.parametrize("exercise_id", ["02.2", "04.2", "05.2"])
def test_neither_a_word_nor_a_wait_is_held_against_the_learner(
    exercise_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TerseRoom.sixty.clear()
    result = check_in(TerseRoom, exercise_id, tmp_path, monkeypatch)
    assert result.passed, result.render()


@pytest.mark.lifetime
def test_bundle_holds_neither_solutions_nor_notes(learner: Run, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    learner("release", bundle)
    assert {"labs", "notebooks", "jupyter", "src", "Makefile"} <= {path.name for path in bundle.iterdir()}
    assert not {"solutions", "tests", "nbgrader_config.py"} & {path.name for path in bundle.iterdir()}
    assert {path.name for path in (bundle / "docs").iterdir()} == {"images", "cheatsheets"}, "no guide"
    solved = [
        cell.source
        for lab in load_labs()
        for cell in cells_of(ROOT / "solutions" / lab.path).values()
        if cell.id.endswith("-answer")
    ]
    marks = ("### BEGIN SOLUTION", "### END SOLUTION", "BEGIN HIDDEN TESTS")
    for path in bundle.rglob("*"):
        if path.is_file() and path.suffix in {".ipynb", ".md", ".toml"}:
            text = path.read_text()
            assert not [mark for mark in marks if mark in text], path
        if path.suffix == ".ipynb":
            for cell in cells_of(path).values():
                assert "instructor" not in cell.metadata.get("tags", []), path
                assert cell.source not in solved
    readme = (bundle / "README.md").read_text()
    assert not [word for word in ("make test", "make room", "CONTRIBUTING", "Dockerfile", ".github") if word in readme]
    assert "is not empty" in learner("release", bundle, code=1).stderr


@pytest.mark.lifetime
def test_after_the_course_the_bundle_has_solutions_and_still_no_notes(learner: Run, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    learner("release", bundle, "--solutions")
    for lab in load_labs():
        given, ours = cells_of(bundle / "solutions" / lab.path), cells_of(ROOT / "solutions" / lab.path)
        answers = [cell_id for cell_id in ours if cell_id.endswith("-answer")]
        assert answers
        assert {cell_id: given[cell_id].source for cell_id in answers} == {
            cell_id: ours[cell_id].source for cell_id in answers
        }
        notes = {cell_id for cell_id, cell in ours.items() if "instructor" in cell.metadata.get("tags", [])}
        assert notes
        assert not notes & given.keys()
        assert cells_of(bundle / "labs" / lab.path)[answers[0]].source != ours[answers[0]].source


def test_bundle_holds_only_what_git_tracks(tmp_path: Path) -> None:
    """Keys, grades and links may lie in the repository, and in each folder that is copied."""
    root = tmp_path / "root"
    for name in ("notebooks", "solutions/01_openai_rest", "src"):
        (root / name).mkdir(parents=True)
    for name in ("README.md", "src/ours.py"):
        (root / name).write_text("tracked")
    (root / "src/link").symlink_to("/etc/passwd")
    for lab in load_labs():
        (root / "solutions" / lab.path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "solutions" / lab.path, root / "solutions" / lab.path)
    with pytest.raises(ServebookError, match="Git does not say"):
        write_bundle(tmp_path / "bundle", root)
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", root, *words], check=True)
    for name in ("servebook.toml", "src/servebook.toml", "notebooks/grades.csv", "src/.git-credentials"):
        (root / name).write_text("secret")
    shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
    write_bundle(tmp_path / "bundle", root)
    files = {str(file.relative_to(tmp_path / "bundle")) for file in (tmp_path / "bundle").rglob("*") if file.is_file()}
    assert {file for file in files if not file.startswith("labs/")} == {"README.md", "src/ours.py"}


@pytest.mark.parametrize("target", ["", "dist", "notebooks/../dist", "solutions"])
def test_a_bundle_is_not_written_into_the_repository(target: str) -> None:
    before = (ROOT / "dist").exists()  # as after `uv build`
    with pytest.raises(ServebookError, match="lies in the repository"):
        write_bundle(ROOT / target)
    assert (ROOT / "dist").exists() == before


@pytest.mark.lifetime
def test_notebooks_without_cell_ids(learner: Run, tmp_path: Path) -> None:
    """As Colab and old versions of Jupyter save them."""
    learner("labs", "init", tmp_path / "course")
    path = tmp_path / "course" / next(lab.path for lab in load_labs() if lab.stem == "01_openai_rest")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        del cell["id"]
    notebook["nbformat_minor"] = 4
    path.write_text(json.dumps(notebook), encoding="utf-8")
    ids = [cell.id for cell in read_notebook(path).cells]
    assert ids == [cell.id for cell in nbformat.read(ROOT / "labs" / "01_openai_rest" / path.name, as_version=4).cells]
    learner("labs", "reset", "01.2")
    assert [cell.id for cell in nbformat.read(path, as_version=4).cells] == ids


@given(st.binary() | st.text().map(str.encode))
@example(b'{"":""}')
@hypothesis_settings(max_examples=50, deadline=None)
def test_a_record_of_any_content_is_kept_aside(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVEBOOK_STATE_DIR", folder)
        file = Path(folder, "labs.json")
        file.write_bytes(content)
        with Store() as progress:
            assert progress.records == {}
            progress.of("01.1").attempts = 1
        with Store() as progress:
            assert progress.of("01.1").attempts == 1
        kept = file.with_suffix(".unreadable")
        assert kept.exists() != (content.strip() == b"{}"), "an empty record, which can be read"
        assert not kept.exists() or kept.read_bytes() == content


@pytest.mark.parametrize("shown", [-1, 9])
def test_a_record_of_more_hints_than_there_are_is_no_error(
    shown: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path))
    _, exercise = find_exercise("01.2")
    with Store() as progress:
        progress.of("01.2").hints = shown
    said = checking.remember(Result(exercise, "wrong"))
    assert said.startswith(exercise.hints[0 if shown < 0 else -1])


def test_what_was_passed_once_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner who tries something else with an answer that was right loses no points."""
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path))
    exercise = find_exercise("01.2")[1]
    seen = []
    for state in ("wrong", "passed", "wrong", "stuck", "open"):
        checking.remember(Result(exercise, state))
        with Store() as progress:
            seen.append(progress.of("01.2").state)
    assert seen == ["tried", *["passed"] * 4]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", ["cannot be read", "cannot be put aside"])
def test_a_record_that_failed_once_holds_up_no_later_check(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path))
    wrong = tmp_path / ("labs.json" if fault == "cannot be read" else "labs.unreadable")
    if fault == "cannot be put aside":
        (tmp_path / "labs.json").write_text("{")
    (wrong / "full").mkdir(parents=True)
    failed = [Store(), Store()]  # which a notebook keeps, too, with its last traceback
    for store in failed:
        with pytest.raises(ServebookError, match="Progress cannot be kept"), store:
            pass
    shutil.rmtree(wrong)
    with Store() as progress:
        assert progress.records == {}


@pytest.mark.timeout(60)
def test_a_check_that_hangs_is_told_to_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.05)
    with Store(), pytest.raises(ServebookError, match=r"Another check has held .*labs\.lock"), Store():
        pass
    with Store():
        """The one that had it has left it."""


def test_bundle_has_every_file_that_it_names(tmp_path: Path) -> None:
    """What notebooks show of the repository, and what they and README link to."""
    write_bundle(tmp_path)
    named = [(tmp_path, link) for file in tmp_path.glob("*.md") for link in links(file.read_text())]
    shown = []
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        for cell in cells_of(path).values():
            if cell.cell_type == "code":
                shown += re.findall(r'(?:ROOT|MODEL_REPOSITORY) / "([^"]+)"', cell.source)
            else:
                named += [(path.parent, link) for link in links(cell.source)]
    assert {"kubernetes/kserve/custom-predictor.yaml", "vllm_model/config.pbtxt"} <= set(shown)
    assert {"BENCHMARKS.md", "images/01_openai_rest.svg"} <= {link for _, link in named}
    assert not [link for folder, link in named if not (folder / link).exists()]
    bases = (tmp_path, tmp_path / "triton/model_repository")
    assert not [name for name in shown if not any((base / name).exists() for base in bases)]
    ours, readme = (ROOT / "README.md").read_text(), (tmp_path / "README.md").read_text()
    for what in ("$ make test", "make room", "A room of learners"):
        assert what in ours
        assert what not in readme, "what a bundle does not have"
    assert "make lab" in readme


def links(markdown: str) -> list[str]:
    """The files that links and pictures lead to, from where the text lies."""
    return re.findall(r"\]\((?!https?:|#|attachment:)([^)#]+)", markdown)


LEAVES = """
import signal, subprocess, sys
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
for program in ("import time; print(flush=True); time.sleep(600)", deaf):
    words = [sys.executable, "-c", program, "left behind"]
    left = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    left.stdout.readline()
    print(left.pid)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait a while to be taken off the list."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def another() -> Iterator[subprocess.Popen[bytes]]:
    """A process of another submission."""
    with subprocess.Popen(["sleep", "600"], env=os.environ | {autograde.MARK: "another"}) as process:
        yield process
        process.kill()


@pytest.mark.lifetime
def test_what_a_submission_started_ends_with_it(
    another: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a session of its own, and deaf to SIGTERM too."""
    monkeypatch.setattr(autograde, "GRACE_SECONDS", 1.0)
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = new_notebook(cells=[new_code_cell(LEAVES)])
    executed, _ = autograde.ExecuteAndEnd().preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    printed = "".join(output.text for output in executed.cells[0].outputs)  # in one piece or in two
    pids = [int(pid) for pid in printed.split()]
    assert len(pids) == 2
    eventually(lambda: not any(map(alive, pids)), "the end of both, which were killed")
    assert another.poll() is None


@pytest.mark.parametrize("start", ["serve", "up"])
def test_a_submissions_server_ends_in_order(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """By its supervisor, also where it was to outlive its kernel; else `status` would say that it has failed."""
    shutil.copy(TINY, tmp_path)  # a submission cannot read the tests
    paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    for name, value in (desk.env | {"PYTHONPATH": paths, "JUPYTER_PREFER_ENV_PATH": "1"}).items():
        monkeypatch.setenv(name, value)
    kept = SimpleNamespace(copytree=shutil.copytree, rmtree=lambda *_, **__: None)
    monkeypatch.setattr(autograde, "shutil", kept)
    code = f"import tiny_server; tiny_server.install()\nfrom servebook import launch\nlaunch.{start}('vllm')"
    graded = autograde.ExecuteAndEnd()
    executed, _ = graded.preprocess(new_notebook(cells=[new_code_cell(code)]), {"metadata": {"path": str(tmp_path)}})
    files = launch.Files(graded.scratch / "state", "vllm")
    left = [path.exists() for path in (files.log, files.record)]
    shutil.rmtree(graded.scratch.parent)
    assert "ready: http" in str(executed.cells[0].outputs)
    assert marked(f"{autograde.MARK}={graded.mark}") == {}
    assert left == [True, False]
    assert desk.family() == []


LOOKS_AROUND = """
import json, os
from servebook import load_settings
from servebook.launch.files import Files
from servebook.launch.link import Link
settings = load_settings()
here = [settings.max_model_len, settings.host, settings.key, Link.open(Files(settings.state_dir, "vllm")) is not None]
os.symlink("GRADEBOOK", "notebook.ipynb")
print(json.dumps([here, dict(os.environ)]))
"""


@pytest.mark.lifetime
def test_a_submission_has_the_settings_and_the_servers_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A servebook.toml in the course stops nobody; a link in the submission's folder leads nbgrader nowhere."""
    course = tmp_path / "course"
    folder = course / "autograded/ada/lab"
    folder.mkdir(parents=True)
    (course / "servebook.toml").write_text(f'max_model_len = 1024\nhost = "0.0.0.0"\napi_key = "{KEY}"\n')
    (course / "servebook.toml").chmod(0o600)
    for name, value in {
        "SERVEBOOK_STATE_DIR": str(tmp_path / "state"),
        "HF_TOKEN": KEY,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "SERVEBOOK_API_KEY": KEY,
        "JUPYTERHUB_API_TOKEN": KEY,
        "JUPYTER_PREFER_ENV_PATH": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(course)
    judges = Mock()
    monkeypatch.setattr(autograde, "JudgeProcess", judges)
    files = launch.Files(tmp_path / "state", "vllm")
    files.make_folders()
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(files.socket))
        there.listen()
        executed, _ = autograde.ExecuteAndEnd().preprocess(
            new_notebook(cells=[new_code_cell(LOOKS_AROUND.replace("GRADEBOOK", str(course / "gradebook.db")))]),
            {"metadata": {"path": str(folder)}},
        )
    here, variables = json.loads("".join(output.text for output in executed.cells[0].outputs))
    assert here == [1024, "127.0.0.1", None, True]
    for given_to in (variables, judges.call_args.args[0]):
        assert KEY not in given_to.values()
        assert {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SERVEBOOK_API_KEY", "JUPYTERHUB_API_TOKEN"}.isdisjoint(given_to)
    assert list(folder.iterdir()) == []


@pytest.mark.lifetime
def test_who_grades_is_told_what_to_do_about_a_check_that_could_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, exercise = find_exercise("01.2")
    got = "LaunchError: The server vllm is gone.\n→ Start it with `servebook up vllm`.\nThe end of its log"
    judges = Mock()
    judges.return_value.judged.return_value = Result(exercise, "stuck", got=got)
    monkeypatch.setattr(autograde, "JudgeProcess", judges)
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "handed in").mkdir()
    check = new_code_cell('check("01.2")', metadata={"nbgrader": {"grade": True}})
    place = {"notebook": STEM, "assignment": STEM, "student": "ada"}
    resources = {"metadata": {"path": str(tmp_path / "handed in")}, "nbgrader": place}
    autograde.ExecuteAndEnd().preprocess(new_notebook(cells=[check]), resources)
    (said,) = remarks()[STEM]["ada"]
    assert (
        said
        == "the check of 01.2 could not run: LaunchError: The server vllm is gone. Start it with `servebook up vllm`."
    )


@pytest.mark.parametrize("room", [True, False])
def test_in_a_room_no_submission_answers_for_a_server_that_was_ended(
    room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submission can end one; by hand none may have been started, and then the submission does that."""
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv(confine.FROM, raising=False)
    if room:
        monkeypatch.setenv(confine.FROM, str(tmp_path))
    scratch = tmp_path / "submission/its"
    scratch.mkdir(parents=True)
    provided.make_folders(scratch)
    asked = launch.Files(provided.judges_state(scratch), "vllm").socket.readlink()
    assert asked == launch.Files(tmp_path / "state" if room else scratch / "state", "vllm").socket


@pytest.mark.lifetime
@pytest.mark.parametrize("room", [True, False])
def test_in_a_room_a_server_that_a_submission_ended_is_up_for_the_next(
    room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else everybody after it would get no points; by hand it is the affair of who grades."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(tmp_path))
    monkeypatch.delenv(confine.FROM, raising=False)
    if room:
        monkeypatch.setenv(confine.FROM, str(tmp_path))
    monkeypatch.setattr(provided, "launch", started := Mock())
    (tmp_path / "handed in").mkdir()
    resources = {"metadata": {"path": str(tmp_path / "handed in")}, "nbgrader": {"notebook": STEM}}
    autograde.ExecuteAndEnd().preprocess(new_notebook(), resources)
    assert started.serve.mock_calls == ([call("vllm")] if room else [])


@pytest.mark.lifetime
def test_the_servers_that_grade_have_the_settings_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no submission could attach to them: it has no key."""
    (tmp_path / "submitted/ada" / STEM).mkdir(parents=True)
    (tmp_path / "servebook.toml").write_text(f'max_model_len = 1024\napi_key = "{KEY}"\n')
    (tmp_path / "servebook.toml").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    served: list[Settings] = []
    serve = Mock(side_effect=lambda name: served.append(load_settings()))
    monkeypatch.setattr(provided, "launch", Mock(serve=serve))
    monkeypatch.setattr(grading, "launch", Mock())
    for name in ("grade_lab", "nbgrader"):
        monkeypatch.setattr(grading, name, Mock(return_value="done"))
    with patch.dict(os.environ, {"SERVEBOOK_STATE_DIR": str(tmp_path / "state"), "SERVEBOOK_API_KEY": KEY}):
        list(grading.grade(tmp_path, load_settings(), tmp_path / "desks"))
    (settings,) = served
    assert (settings.max_model_len, settings.key) == (1024, None)
    assert settings.state_dir == tmp_path / "state/grading"


def test_a_submission_has_the_key_of_an_engine_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a learner's desk has it; without such an engine nobody needs one."""
    monkeypatch.setenv("SERVEBOOK_API_KEY", KEY)
    assert "SERVEBOOK_API_KEY" not in provided.environment(tmp_path)
    monkeypatch.setenv("SERVEBOOK_ENGINE_URL", "http://127.0.0.1:9")
    environment = provided.environment(tmp_path)
    assert (environment["SERVEBOOK_API_KEY"], environment["SERVEBOOK_ENGINE_URL"]) == (KEY, "http://127.0.0.1:9")


def test_no_link_leads_a_submission_to_what_is_hidden(tmp_path: Path) -> None:
    for name in ("room/desks", "grading"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "room")
    assert list(confine.around(tmp_path, [tmp_path / "room"])) == [tmp_path / "grading"]


def test_where_nobody_may_list_the_homes_submissions_are_graded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("home/instructor", "home/student", "usr"):
        (tmp_path / name).mkdir(parents=True)
    listed = Path.iterdir

    def only_by_root(folder: Path) -> Iterator[Path]:
        if folder == tmp_path / "home":  # rwx--x--x
            raise PermissionError(folder)
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", only_by_root)
    assert list(confine.around(tmp_path, [tmp_path / "home/instructor"])) == [tmp_path / "usr"]


CONFINED = """
import json, os, sys
from functools import partial
from pathlib import Path
from servebook.lab.handout import confine, landlock
room, scratch, solution = map(Path, sys.argv[1:])
allowed = confine.folders(room, scratch)
told = scratch.parent / confine.NAMED
told.write_text(json.dumps(allowed))
landlock.confine(allowed)
folder = solution.parent
renamed = partial(folder.rename, room / "mine")
for attempt in (solution.read_text, solution.unlink, (folder / "mine").touch, folder.rmdir, renamed):
    try:
        attempt()
    except PermissionError:
        print("no")
os.environ |= {landlock.TOLD: str(told), "JUDGE": str(os.getpid())}
from servebook.lab.dry_run import load
print(load.loaded_config(scratch / "models", "mine").backend)
print(*(Path(word).name for word in load.vllm_process().args if word.endswith("landlock.py")))
load.end()
try:
    load.loaded_config(scratch / "spies", "spy")
except load.Refused:
    pass
print((scratch / "seen").read_text())
"""
SPY = """
import os
from pathlib import Path
class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        try:
            seen = os.open(f"/proc/{os.environ['JUDGE']}/fd/1", os.O_WRONLY)  # where verdicts are told
        except OSError as error:
            seen = type(error).__name__
        Path("SEEN").write_text(str(seen))
        return config
    def execute(self, requests):
        return []
"""


@pytest.mark.lifetime
def test_triton_loads_beside_what_is_hidden_in_tmp_and_sees_no_judge() -> None:
    """Its stub makes a folder in /tmp, which a submission may not write. A learner's model is a program, too: it may
    not look into the process that judges."""
    with tempfile.TemporaryDirectory(dir="/tmp") as room:
        scratch, solution = Path(room, "its/scratch"), Path(room, "solutions/solution")
        model, spy = scratch / "models/mine", scratch / "spies/spy"
        for folder in (model / "1", spy / "1", solution.parent):
            folder.mkdir(parents=True)
        (model / "config.pbtxt").write_text('backend: "vllm"\ninstance_group [{ count: 1, kind: KIND_MODEL }]')
        (model / "1/model.json").write_text('{"model": "unread"}')
        (spy / "config.pbtxt").write_text('backend: "python"\ninstance_group [{ count: 1, kind: KIND_CPU }]')
        (spy / "1/model.py").write_text(SPY.replace("SEEN", str(scratch / "seen")))
        solution.write_text("42")
        words = [sys.executable, "-P", "-c", CONFINED, room, str(scratch), str(solution)]
        environment = os.environ | {"TMPDIR": str(scratch)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100, check=False)
        right = [*["no"] * 5, "vllm", "landlock.py", "PermissionError"]
        assert done.stdout.split() == right, done.stdout + done.stderr


TRIES = """
import os, resource, sys
from functools import partial
from pathlib import Path
from servebook.checkout import ROOT
from servebook.launch.files import Files
from servebook.launch.link import Link
from servebook.lab.handout import confine, landlock, provided
course, scratch, home, state, cache = map(Path, sys.argv[1:])
provided.make_folders(scratch)
environment, judges = provided.environment(scratch), provided.judges_state(scratch)
confine.CONFIGURATION = home.parent / "etc"
landlock.confine(confine.folders(course, scratch))
os.environ |= environment
disk = next((each for each in Path("/dev").iterdir() if each.is_block_device()), None)
def attach(folder):
    if Link.open(Files(folder, "vllm")) is None:
        raise PermissionError
tries = {
    "read home": (home / "token").read_text,
    "configure Jupyter": (home / ".jupyter/jupyter_config.py").touch,
    "start with IPython": (home / ".ipython/startup.py").touch,
    "read the room": (state / "room/instructor.key").read_text,
    "read the labs where the instructor tries them": (ROOT / "labs/01_openai_rest/01_openai_rest.ipynb").read_text,
    "read the token of a hub": (cache / "huggingface/token").read_text,
    "read what an engine keeps": (cache / "vllm/compiled").read_text,
    "read a key that lies in what is given": (cache / "models/secret/room/instructor.key").read_text,
    "change the model": (cache / "models/model").touch,
    "change the kernel's settings": lambda: Path("/proc/self/oom_score_adj").write_text("0"),
    "read a disk": lambda: disk and disk.open("rb"),
    "plant a model for Triton": (state / "triton/repository-1/model.py").touch,
    "replace nbgrader's log": (state / "nbgrader.log").unlink,
    "replace a server's socket": (state / "servers/vllm.sock").unlink,
    "keep a server from starting": (state / "servers/triton.lock").touch,
    "write the instructor's progress": (state / "labs.json").touch,
    "replace the judge's server": (judges / "servers/vllm.sock").unlink,
    "write into the course": (course / "lab.ipynb").touch,
    "read what not everybody may": (home.parent / "etc/shadow").read_bytes,
    "look into services": partial(os.listdir, "/run"),
    "look into their files": partial(os.listdir, "/var/log"),
    "limit another program": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU),
    "end another program": lambda: os.kill(os.getppid(), 0),
    "read what everybody may": Path("/etc/passwd").read_bytes,
    "limit itself": lambda: resource.setrlimit(resource.RLIMIT_CPU, resource.getrlimit(resource.RLIMIT_CPU)),
    "end itself": lambda: os.kill(os.getpid(), 0),
    "read the model": (cache / "models/weights").read_text,
    "read a model of the hub": (cache / "huggingface/hub/weights").read_text,
    "attach to servers": lambda: attach(scratch / "state"),
    "attach as the judge does": lambda: attach(judges),
    "start servers": (scratch / "state/servers/triton.lock").touch,
    "write what is its own": (scratch / "home/.jupyter").mkdir,
    "write to nowhere": lambda: Path("/dev/null").write_text("x"),
}
for what, attempt in tries.items():
    try:
        attempt()
        print(what, "yes", sep=": ")
    except PermissionError:
        print(what, "no", sep=": ")
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapBnd")).split()[1])
"""


def test_what_is_hidden_and_what_a_client_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mode in (("secret", 0o600), ("everybodys", 0o644)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    (tmp_path / "keys").mkdir(mode=0o750)
    assert set(confine.not_for_everybody(tmp_path)) == {tmp_path / "secret", tmp_path / "keys"}
    elsewhere = {"SSL_CERT_FILE": tmp_path / "link", "REQUESTS_CA_BUNDLE": tmp_path / "everybodys"}
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    for variable, file in elsewhere.items():
        monkeypatch.setenv(variable, str(file))
    assert confine.certificates() >= {tmp_path / "secret", tmp_path / "everybodys"}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert confine.homes() == {tmp_path, Path(pwd.getpwuid(os.getuid()).pw_dir).resolve()}


@pytest.mark.lifetime
@pytest.mark.skipif(not landlock.possible(), reason="needs Landlock (Linux 6.2 or newer)")
def test_a_submission_leaves_nothing_that_others_run_and_reads_no_home(tmp_path: Path) -> None:
    names = ("course", "scratch", "home", "state", "cache")
    places = {name: tmp_path / name / ("it" if name == "scratch" else "") for name in names}
    for folder in (*places.values(), *(tmp_path / name for name in ("home/.jupyter", "home/.ipython"))):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("room", "servers", "triton/repository-1"):
        (places["state"] / name).mkdir(parents=True)
    for secret in (
        *("home/token", "state/room/instructor.key", "state/nbgrader.log"),
        *("cache/models/weights", "cache/huggingface/hub/weights", "cache/huggingface/token", "cache/vllm/compiled"),
        "cache/models/secret/room/instructor.key",
    ):
        (tmp_path / secret).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / secret).write_text("secret")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/shadow").touch(0o600)
    environment = os.environ | {
        "HOME": str(places["home"]),
        "SERVEBOOK_STATE_DIR": str(places["state"]),
        "SERVEBOOK_CACHE_DIR": str(places["cache"]),
        "HF_HOME": str(places["cache"] / "huggingface"),
        "HF_HUB_CACHE": "",
        confine.FROM: str(places["cache"] / "models/secret"),
    }
    words = [sys.executable, "-P", "-c", TRIES, *map(str, places.values())]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "state/servers/vllm.sock"))
        server.listen()
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    *told, capabilities = done.stdout.splitlines()
    answers = dict(line.split(": ") for line in told)
    assert [what for what, answer in answers.items() if answer == "yes"] == [
        *(["read a disk"] if not any(each.is_block_device() for each in Path("/dev").iterdir()) else []),
        *(["limit another program"] if platform.machine() != "x86_64" else []),
        *(["end another program"] if landlock.version() < landlock.VERSION_OF_SIGNALS else []),
        "read what everybody may",
        "limit itself",
        "end itself",
        "read the model",
        "read a model of the hub",
        "attach to servers",
        "attach as the judge does",
        "start servers",
        "write what is its own",
        "write to nowhere",
    ], done.stdout + done.stderr
    assert len(answers) == 33
    assert int(capabilities, 16) == 0 or os.getuid() != 0


READING = """
import time
def reading(a, b, control):
    time.sleep(3)
    return "a verdict of mine"
"""


@pytest.mark.lifetime
def test_a_check_may_last_longer_than_a_cell_and_is_reached_from_a_long_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit for a cell is the learner's own cells'; a socket's path has 107 bytes."""
    long, handed_in = tmp_path / ("long" * 20), tmp_path / "handed-in"
    long.mkdir()
    handed_in.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    lab, _ = find_exercise("08.3")
    check = cells_of(ROOT / "labs" / lab.path)["08-3-check"]
    notebook = new_notebook(cells=[new_code_cell(READING), check])
    executed, _ = autograde.ExecuteAndEnd(timeout=2).preprocess(notebook, {"metadata": {"path": str(handed_in)}})
    (said,) = executed.cells[1].outputs
    assert "a verdict of mine" in said.evalue


def test_an_engines_sockets_fit_into_a_submissions_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would have /tmp for them, into which a submission may not write."""
    for folder in (Path("/tmp"), tmp_path):  # which has more than 16 characters
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        scratch = confine.scratch_folder()
        assert not short_tmpdir({"TMPDIR": str(scratch)}), scratch
        shutil.rmtree(scratch.parent)


def test_grading_is_nbgraders_but_for_the_end() -> None:
    assert autograde.ExecuteAndEnd(config=Config(Execute={"timeout": 7})).timeout == 7
    steps = Autograde.autograde_preprocessors.default_args[0]
    assert [Execute if step is autograde.ExecuteAndEnd else step for step in autograde.STEPS] == steps


def test_no_link_in_what_was_handed_in_leads_to_a_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nbgrader copies what a link leads to, with the rights of who grades, before anything is confined."""
    monkeypatch.chdir(tmp_path)
    Path("solution.ipynb").write_text("the solution")
    handed_in, copied = (Path(step, "ada", STEM) for step in ("submitted", "autograded"))
    (handed_in / "deep").mkdir(parents=True)
    (handed_in / f"{STEM}.ipynb").write_bytes((ROOT / "labs" / STEM / f"{STEM}.ipynb").read_bytes())
    (handed_in / "own.txt").touch()
    for name, where in {"notes.txt": "solution.ipynb", "deep/more.txt": "solution.ipynb", "folder": "."}.items():
        (handed_in / name).symlink_to(tmp_path / where)
    steps = SimpleNamespace(
        _format_source=lambda *_: str(handed_in),
        _format_dest=lambda *_: str(copied),
        coursedir=Mock(ignore=[]),
        log=Mock(),
    )
    BaseConverter.init_assignment(steps, STEM, "ada")
    assert (copied / "notes.txt").read_text() == "the solution", "what nbgrader does"
    resources = {
        "nbgrader": {"student": "ada", "assignment": STEM, "notebook": STEM},
        "metadata": {"path": str(handed_in)},
    }
    notebook = nbformat.read(handed_in / f"{STEM}.ipynb", as_version=4)
    autograde.MendStructure().preprocess(notebook, resources)
    assert [path.name for path in copied.rglob("*") if path.is_file()] == ["own.txt"]
    said = "{} is a link, and was left out"
    assert sorted(remarks()[STEM]["ada"]) == [said.format(name) for name in ("deep/more.txt", "folder", "notes.txt")]

    (handed_in / f"{STEM}.ipynb").unlink()
    (handed_in / f"{STEM}.ipynb").symlink_to(tmp_path / "solution.ipynb")
    with pytest.raises(ServebookError, match="may lead to a solution"):
        autograde.MendStructure().preprocess(notebook, resources)
    assert remarks()[STEM]["ada"] == [f"not graded: {STEM}.ipynb is a link"]


@pytest.mark.lifetime
def test_a_cell_that_was_pasted_split_or_made_text_in_jupyterlab_is_graded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JupyterLab gives each part the metadata of the whole; nbgrader would give up, and on all who follow."""
    monkeypatch.chdir(tmp_path)
    options = [f"--CourseDirectory.source_directory={ROOT / 'solutions'}", "--CourseDirectory.release_directory=out"]
    (tmp_path / "nbgrader_config.py").write_bytes((ROOT / "nbgrader_config.py").read_bytes())
    nbgrader(tmp_path, "generate_assignment", STEM, *options)
    submit(tmp_path / "ada", {"01-1-answer": "mine = 1\nmine = 2", "01-3-answer": "mine = 3"})
    notebook = nbformat.read(tmp_path / "ada" / f"{STEM}.ipynb", as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}

    def paste(cell_id: str, **changes: Any) -> None:
        new = nbformat.from_dict(deepcopy(cells[cell_id]) | {"id": f"new-{cell_id}", **changes})
        notebook.cells.insert(notebook.cells.index(cells[cell_id]), new)

    paste("01-1-answer", source="mine = 1")
    cells["01-1-answer"].source = "mine = 2"
    paste("01-2-check")
    cells["01-4-answer"].metadata.nbgrader.schema_version = 2
    cells["01-4-check"].metadata.nbgrader.schema_version = 9
    notebook.cells.append(new_code_cell('check("01.5")', metadata={"nbgrader": {}}))
    for cell_id in ("01-3-answer", "01-3-check"):
        cells[cell_id].cell_type = "markdown"
        del cells[cell_id]["outputs"], cells[cell_id]["execution_count"]
    place = {"student": "ada", "assignment": STEM, "notebook": STEM, "db_url": f"sqlite:///{tmp_path}/gradebook.db"}
    resources: Any = {"nbgrader": place, "metadata": {"path": str(tmp_path / "ada")}}
    count = len(notebook.cells)
    for step in autograde.SANITIZE_STEPS:
        notebook, resources = step().preprocess(notebook, resources)
    assert not remarks().get(STEM, {}).get("ada")
    assert len(notebook.cells) == count
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if cell.source.startswith("mine")] == ["mine = 1", "mine = 2", "mine = 3"]
    marks = [cell.metadata.nbgrader.grade_id for cell in code if "nbgrader" in cell.metadata]
    assert sorted(marks) == sorted(f"01-{k}-{what}" for k in range(1, 6) for what in ("answer", "check"))


@pytest.mark.parametrize("text", ["", '{"cells": [', "[]", "{}"])
def test_a_file_that_is_no_notebook_is_named_in_the_table_of_grades(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{STEM}.ipynb").write_text(text)
    assert not_graded(tmp_path, STEM) == f"not graded: {STEM}.ipynb is no notebook, or a damaged one"
    submit(tmp_path / "whole", {})
    assert not_graded(tmp_path / "whole", STEM) == ""


def nbgrader(course: Path, *words: str, code: int = 0) -> str:
    environment = os.environ | {"JUPYTER_PREFER_ENV_PATH": "1"}
    argv = [sys.executable, "-m", "nbgrader", *words]
    done = subprocess.run(argv, cwd=course, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == code, done.stderr
    return done.stderr


def submit(folder: Path, answers: dict[str, str], lost: tuple[str, ...] = (), name: str = STEM) -> None:
    """Put the released notebook there, some cells filled in, by id; `lost` ones are gone, or but bare."""
    notebook = nbformat.read(ROOT / "labs" / STEM / f"{STEM}.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id not in lost]
    for cell in notebook.cells:
        cell.source = answers.get(cell.id, cell.source)
        if f"{cell.id} bare" in lost:
            cell.metadata = {}
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


TAKES_OVER = """
import os, sys, servebook.lab.checking, servebook.lab.judge.learner
from servebook.checkout import ROOT
from servebook.lab.feedback import Result
os.environ.pop("NBGRADER_EXECUTION", None)
check = lambda exercise_id: None
servebook.lab.checking.evaluate = lambda exercise_id, names: Result(None, "passed")
servebook.lab.checking.check = check
class Equal(str):
    __eq__ = __ne__ = lambda self, other: True
    __hash__ = None
complete = lambda *args: Equal()
"""
READS = """
import json
found = []
for folder in (ROOT, ROOT.parent, here):
    for path in folder.glob("solutions/01_openai_rest/*.ipynb"):
        try:
            found.append(path.read_text())
        except OSError as error:
            print(type(error).__name__)
for text in found:
    for cell in json.loads(text)["cells"]:
        if str(cell["id"]).endswith("-answer"):
            exec("".join(cell["source"]), globals())
"""
LOOKS = """
print("the key:", "KEY" in os.environ.values())
try:
    print("the room:", os.listdir("DESKS"))
except OSError as error:
    print("the room:", type(error).__name__)
def account(answer):
    frame = sys._getframe()
    while frame:
        if "right" in frame.f_locals:
            return frame.f_locals["right"]
        frame = frame.f_back
    return Equal(), Equal(), True
"""


@pytest.fixture
def course() -> Iterator[Path]:
    """An instructor's folder. Not below /tmp, which a submission may use: there lie the solutions."""
    (ROOT / "scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "scratch", prefix="course-") as folder:
        yield Path(folder)


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_nbgrader_hands_out_grades_and_reports(vllm: launch.Server, course: Path, learner: Run, tmp_path: Path) -> None:
    """One perfect, one partial and one empty submission get their points, whatever others do, or have lost."""
    desks = tmp_path / "state" / "room" / "desks"
    for name in (f"solutions/{STEM}/{STEM}.ipynb", f"labs/{STEM}/{STEM}.ipynb", "nbgrader_config.py"):
        (course / name).parent.mkdir(parents=True, exist_ok=True)
        (course / name).write_bytes((ROOT / name).read_bytes())
    with (course / "nbgrader_config.py").open("a") as config:
        # Only the cell that hangs is not waited for: importing what the setup needs takes as long as it takes.
        config.write("c.Execute.timeout_func = lambda cell: 5 if 'while True' in cell.source else c.Execute.timeout\n")
        config.write("autograde.GRACE_SECONDS = 5\n")
    (course / "servebook.toml").write_text(f'api_key = "{KEY}"')  # the instructor's, which no submission may read
    (course / "servebook.toml").chmod(0o600)
    (course / f"solutions/{STEM}/answer.py").write_text("# what a solution writes when it runs")
    nbgrader(course, "generate_assignment", STEM, "--force")
    assert [path.name for path in (course / "labs" / STEM).iterdir()] == [f"{STEM}.ipynb"]
    released = course / "labs" / STEM / f"{STEM}.ipynb"
    assert released.read_text() == (ROOT / "labs" / STEM / f"{STEM}.ipynb").read_text()

    solution = cells_of(ROOT / "solutions" / STEM / f"{STEM}.ipynb")
    perfect = {cell_id: cell.source for cell_id, cell in solution.items() if cell_id.endswith("-answer")}
    some = {"01-1-answer", "01-4-answer"}
    submit(desks / "crashes/labs" / STEM, {"01-1-answer": "import os\nos._exit(1)"})
    submit(desks / "empty/labs" / STEM, {"01-1-answer": LEAVES})
    submit(desks / "hangs/labs" / STEM, {"01-1-answer": "while True:\n    pass", "01-2-answer": perfect["01-2-answer"]})
    # A locked cell that was altered is put back before autograde.
    submit(desks / "partial/labs" / STEM, {k: v for k, v in perfect.items() if k in some} | {"01-5-check": "pass"})
    submit(desks / "perfect/labs" / STEM, perfect)
    looks = LOOKS.replace("KEY", KEY).replace("DESKS", str(desks))
    here = f"from pathlib import Path\nhere = Path({str(course)!r})\n"
    submit(desks / "cheats/labs" / STEM, {"01-1-answer": TAKES_OVER, "01-2-answer": looks, "01-3-answer": here + READS})
    submit(course / "submitted/renamed" / STEM, perfect, name="my lab")
    submit(desks / "torn/labs" / STEM, perfect, lost=("setup", "01-2-check bare", "01-4-check"))
    (desks / "empty/labs" / OTHER).mkdir()
    other = (ROOT / "labs" / OTHER / f"{OTHER}.ipynb").read_text()
    (desks / f"empty/labs/{OTHER}/{OTHER}.ipynb").write_text(f"{other} ")  # as it was handed out it would be no hand-in
    (desks / "empty/feedback").symlink_to(course)
    for number in range(1500):  # beside what no submission may read lies more than a variable of 128 KiB could name
        (tmp_path / f"{number:0100}").touch()
    told = learner(
        *("room", "collect", "--grade", "--course", course),
        **{"SERVEBOOK_ENGINE_URL": vllm.url, "SERVEBOOK_API_KEY": KEY},
    ).stdout
    assert (
        f"{STEM}: 6 graded, 2 not, and tried again at the next collection (crashes, renamed): grades.csv says why"
        in told
    ), told
    assert "  empty has no feedback: Not a directory" in told
    assert f"{OTHER}: 1 graded\n" in told
    said = (tmp_path / "state/grading/nbgrader.log").read_text()
    assert re.findall(r"error processing assignment '\w+' for student '(\w+)'", said) == ["crashes", "renamed"]
    assert len(re.findall(r"Ended what the submission had started: .* left behind", said)) == 2

    with Gradebook(f"sqlite:///{course}/gradebook.db", "servebook") as gradebook:
        scores = {
            student: gradebook.find_submission(STEM, student).score
            for student in ("cheats", "empty", "hangs", "partial", "perfect", "torn")
        }
        worth = gradebook.find_assignment(STEM).max_score
    lab, _ = find_exercise("01.1")
    points = {exercise.id: exercise.points for exercise in lab.exercises}
    assert worth == lab.points
    assert scores == {
        "cheats": 0,
        "torn": lab.points,
        "empty": 0,
        "hangs": points["01.2"],
        "partial": points["01.1"] + points["01.4"],
        "perfect": lab.points,
    }
    with (course / "grades.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = {row["student_id"]: (row["score"], row["remark"]) for row in lines if row["assignment"] == STEM}
    others = {row["student_id"]: row["score"] for row in lines if row["assignment"] == OTHER}
    assert (others["empty"], others["perfect"]) == ("0.0", ""), "graded, and not handed in"
    assert rows["perfect"] == (str(float(lab.points)), "")
    assert rows["empty"] == ("0.0", "")
    assert rows["crashes"] == ("", "not graded: the submission's kernel died")
    assert rows["renamed"] == ("", f"not graded: there is no {STEM}.ipynb, but my lab.ipynb")
    assert "the cell setup was missing, and was put back as it was handed out" in rows["torn"][1]
    assert "the cell 01-2-check had lost its metadata" in rows["torn"][1]
    assert "the cell 01-4-check was missing" in rows["torn"][1]
    assert not list(course.glob("*.html")), "a learner's link was followed"
    feedback = (desks / "partial/feedback" / f"{STEM}.html").read_text()
    assert "NotPassed: ○ 01.5" in feedback
    assert "Traceback (most recent call last)" not in feedback
    looked = (desks / "cheats/feedback" / f"{STEM}.html").read_text()
    assert "the key: False" in looked
    assert "the room: PermissionError" in looked
