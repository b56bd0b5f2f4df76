"""The instructor's commands for a room, without one: what they say, ask and leave alone."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import requests
from nbgrader.api import Gradebook
from typer.testing import CliRunner, Result

from servebook import launch
from servebook.checkout import ROOT
from servebook.errors import LaunchError, ServebookError
from servebook.lab import feedback
from servebook.lab.handout import provided, remarks
from servebook.lab.manifest import load_labs
from servebook.room import admin, cli, collect, grading
from servebook.room.load import Checked, Outcome
from servebook.settings import Settings, load_settings

KEY = "the-instructors-key"
LAB = "01_openai_rest"
AWAY: dict[str, Any] = {"state": "stopped", "pid": None, "endpoints": {}}


class Answers(BaseHTTPRequestHandler):
    """What a room's front and hub would answer, by method and path, and what they were asked."""

    given: ClassVar[dict[str, tuple[int, str]]] = {}
    asked: ClassVar[list[str]] = []

    def answer(self) -> None:
        self.asked.append(f"{self.command} {self.path} {self.headers['Authorization']}")
        status, body = self.given.get(f"{self.command} {self.path}", (404, "{}"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_PUT = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of an instructor's terminal."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ |= {"SERVEBOOK_STATE_DIR": str(tmp_path / "state"), "SERVEBOOK_API_KEY": KEY}
    monkeypatch.setattr(cli.out, "width", 200)  # no line is cut
    return tmp_path / "state"


@pytest.fixture
def room(state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What `servebook status` has of a room that is up but for its engine; all that it is asked goes to `Answers`."""
    monkeypatch.setattr(Answers, "given", {})
    monkeypatch.setattr(Answers, "asked", [])
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        at = f"127.0.0.1:{server.server_port}"
        up: dict[str, Any] = {
            "vllm": AWAY,
            "front": {"state": "failed", "pid": 1, "endpoints": {"http": at}},
            "hub": {"state": "ready", "pid": 1, "endpoints": {"http": "127.0.0.1:8100", "api": at}},
        }
        monkeypatch.setattr(launch, "status", lambda _: [{"name": name} | entry for name, entry in up.items()])
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield up
        server.shutdown()
        thread.join()


def run(*words: str | Path) -> Result:
    """A `servebook room` command."""
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def learner(name: str, **more: Any) -> str:
    """A learner's line, as the front tells it."""
    row = {"name": name, "revoked": False, "under_way": 0, "served": 0, "refused": 0}
    return json.dumps(row | more)


def test_who_has_killed_the_engine_can_be_revoked(room: dict[str, Any]) -> None:
    Answers.given["DELETE /room/learners/mallory"] = (200, "{}")
    done = run("revoke", "mallory")
    assert done.exit_code == 0, done.exception
    assert "mallory: revoked" in done.output
    assert "`servebook room close mallory`" in done.output
    assert Answers.asked == [f"DELETE /room/learners/mallory Bearer {KEY}"]
    room["front"] = AWAY
    assert str(run("learners").exception).startswith("The room's front is away.\n→ See what the terminal")
    room["hub"] = AWAY
    assert str(run("learners").exception).startswith("The room is not up.\n→ Start it")


def test_a_name_that_was_mistyped_is_told_and_struck_off(room: dict[str, Any]) -> None:
    Answers.given |= {
        "GET /room/learners": (200, f"[{learner('ada')}]"),
        "PUT /room/learners/ada?again=true": (200, '{"key": "new"}'),
        "PUT /room/learners/adda?again=true": (200, '{"key": "new"}'),
        "DELETE /room/learners/adda?forget=true": (200, "{}"),
    }
    assert "File → Hub Control Panel → Stop My Server, then Start My Server" in run("admit", "ada").stderr
    assert run("admit", "adda").stderr == "new learner adda; `servebook room forget adda` strikes them off again\n"
    assert run("forget", "Adda").output == "adda: struck off\n", "as the door takes names"


def test_who_is_revoked_is_marked_on_the_board() -> None:
    engine = {"running": 0, "places": 9, "waiting": 0, "ready": True}
    numbers: dict[str, Any] = dict.fromkeys(("tries", "since", "quiet", "passed", "share"), 0)
    row = {"name": "ada", "revoked": True, "exercise": "", "state": "", "cause": "", "needs_help": False} | numbers
    board = {"engine": engine, "checks_per_minute": 0, "learners": [row]}
    with cli.out.capture() as shown:
        cli.out.print(cli.board_table(board, hide_names=True))
    assert "learner 1 (revoked)" in shown.get()


def test_a_desk_is_closed_by_its_learners_name_at_the_door(room: dict[str, Any]) -> None:
    Answers.given |= {
        "GET /hub/api/users/ada": (200, '{"servers": {"": {}}}'),
        "DELETE /hub/api/users/ada/server": (204, ""),
        "GET /hub/api/users/alan": (200, '{"servers": {}}'),
    }
    assert run("close", "Ada").output == "ada: the desk is closed\n"
    assert Answers.asked[-1] == f"DELETE /hub/api/users/ada/server token {KEY}"
    assert run("close", "alan").output == "alan: the desk was not open\n"
    assert str(run("close", "bob").exception).startswith("No bob has come in by the door.")


def test_the_key_is_not_sent_to_whoever_has_the_hubs_port(
    room: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("servebook.launch.probes.listeners", lambda *_: {64999})
    assert str(run("close", "ada").exception).startswith("The hub does not answer.")
    assert not Answers.asked


def passwords_of(state: Path, *names: str) -> None:
    """A hub's file of passwords, of these learners."""
    settings = load_settings(state_dir=state)
    settings.state_folder("room")
    with sqlite3.connect(state / "room" / "passwords.sqlite", isolation_level=None) as passwords:
        passwords.execute("create table password (name text primary key, salt blob, digest blob)")
        passwords.executemany("insert into password values (?, '', '')", [[name] for name in names])


def test_a_password_is_reset_by_the_name_as_it_is_written_and_what_then_is_told(
    room: dict[str, Any], state: Path
) -> None:
    passwords_of(state, "ada", "bob")
    told = run("reset", "Bob").output
    code = (state / "room" / "join.code").read_text()
    assert told == f"bob has no password now: sign up anew with the join code {code}\n"
    missed = run("reset", "bobby")
    assert str(missed.exception) == "No bobby has signed up.\n→ Who has: ada."


def test_who_is_signed_in_by_a_name_that_is_reset_is_signed_out(room: dict[str, Any], state: Path) -> None:
    passwords_of(state, "bob")
    Answers.given |= {
        "GET /hub/api/users/bob": (200, '{"servers": {"": {}}}'),
        "DELETE /hub/api/users/bob/server": (202, ""),
        "DELETE /hub/api/users/bob": (400, '{"message": "bob\'s server is in the process of stopping, please wait."}'),
    }
    refused = str(run("reset", "bob").exception)
    assert refused.startswith("bob has no password now, but is not signed out yet: bob's server is in the process")
    assert refused.endswith("\n→ `servebook room reset bob`")
    Answers.given["DELETE /hub/api/users/bob"] = (204, "")
    assert run("reset", "bob").output.endswith("; signed out, the desk closed\n")


def test_a_code_is_not_made_where_the_room_is_not_up(state: Path) -> None:
    settings = load_settings(state_dir=state)
    code = admin.join_code(settings)
    assert str(run("code", "--new").exception).startswith("The room is not up.")
    assert admin.join_code(settings) == code


@pytest.mark.parametrize(
    ("given", "alone"), [({}, True), ({"host": "0.0.0.0"}, False), ({"room": {"url": "https://x"}}, False)]
)
def test_a_room_that_no_other_machine_reaches_says_so(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: Any, alone: bool
) -> None:
    monkeypatch.setattr(cli, "why_not_apart", lambda _: "")
    monkeypatch.setattr(cli, "picture", lambda *_: "")
    cli.show_door(load_settings(**given), "8100")
    said = "Only this machine reaches it; for learners' machines: SERVEBOOK_HOST=0.0.0.0 make room"
    assert (said in capsys.readouterr().out) is alone


def test_a_second_start_says_that_the_room_is_up_and_ends(
    room: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "show_door", lambda *_: print("the door"))
    done = run("start")
    assert (done.exit_code, done.output) == (0, "the door\nThe room is up already; its own terminal ends it.\n")


def test_ctrl_c_is_a_planned_end(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def status(_: Settings) -> list[Any]:
        return [{"name": name} | AWAY for name in ("hub", "front", "vllm")]

    monkeypatch.setattr(launch, "status", status)
    monkeypatch.setattr(launch, "serve", lambda *_, **__: Mock(url="http://127.0.0.1:8100"))
    monkeypatch.setattr(launch, "down", lambda name, _: ended.append(name))
    monkeypatch.setattr(cli, "show_door", lambda *_: None)
    monkeypatch.setattr(cli, "describe", Mock(side_effect=[None, KeyboardInterrupt]))
    done = run("start")
    assert done.exit_code == 0, done.exception
    assert done.output.endswith("The room is closed; desks and passwords are kept for next time.\n")
    assert ended == ["hub", "front", "vllm"]


def test_who_has_passed_and_saved_nothing_is_named_and_a_new_course_too(
    room: dict[str, Any], state: Path, tmp_path: Path
) -> None:
    for name in ("ada", "alan"):
        (state / "room" / "desks" / name).mkdir(parents=True)
    board = f'{{"learners": [{learner("ada", passed=3)}, {learner("alan", passed=0)}]}}'
    Answers.given["GET /services/watch/board"] = (200, board)
    course, labs = tmp_path / "course", len(load_labs())
    told = run("collect", "--course", course).output
    assert f"new course folder {course}\n" in told
    assert f"ada: 0 of {labs} labs; passed 3 on the board, nothing saved\n" in told
    assert f"alan: 0 of {labs} labs\n" in told
    assert not course.stat().st_mode & 0o077, "no desk may read what others handed in"
    assert "new course folder" not in run("collect", "--course", course).output
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # below pytest's own everything is closed
        Path(folder).chmod(0o755)
        assert f"chmod 700 {folder}" in str(run("collect", "--course", folder).exception)
    (tmp_path / "a file").touch()
    assert run("collect", "--course", tmp_path / "a file").exit_code == 2
    del Answers.given["GET /services/watch/board"]
    assert f"ada: 0 of {labs} labs\n" in run("collect", "--course", course).output, "the board is not at hand"


def test_where_nobody_has_come_in_there_is_nothing_to_collect(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the room is up or not, and also where the hub has made the folder for desks."""
    (state / "room" / "desks").mkdir(parents=True)
    for hub, remedy in (({"name": "hub"}, "`servebook room code` shows how learners come in"), (None, "`make room`")):
        monkeypatch.setattr(cli, "describe", lambda _, hub=hub: hub)
        done = run("collect", "--course", tmp_path / "course")
        assert str(done.exception).startswith("Nobody has come in yet")
        assert remedy in str(done.exception)
    assert not (tmp_path / "course").exists()


def test_what_was_graded_is_not_served_again_and_who_has_a_desk_is_enrolled(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course, desks = tmp_path / "course", tmp_path / "desks"
    served: list[str] = []
    for name in ("ada", "alan"):
        (desks / name).mkdir(parents=True)

    def nbgrader(course: Path, _: Path, command: str, *_words: str) -> bool:
        """What it would leave of each hand-in, with its time."""
        for folder in (course / "submitted").glob(f"*/{LAB}") if command == "autograde" else ():
            for step in ("autograded", "feedback"):
                collect.hand_in(course / step / folder.parent.name / LAB, f"{LAB}.ipynb", b"")
            stamp = folder / "timestamp.txt"
            (course / "autograded" / folder.parent.name / LAB / stamp.name).write_text(stamp.read_text())
        return command != "export" or not (course / "a full disk").exists()

    monkeypatch.setenv("SERVEBOOK_ENGINE_URL", "http://127.0.0.1:1")

    def serve(name: str) -> None:
        assert load_settings().engine_url is None, "whoever has the engine asks for the key, which is given up"
        served.append(name)

    monkeypatch.setattr(provided, "launch", Mock(serve=serve))
    monkeypatch.setattr(grading, "launch", Mock())
    monkeypatch.setattr(grading, "nbgrader", nbgrader)

    def graded() -> list[str]:
        return list(grading.grade(course, load_settings(), desks))

    course.mkdir()
    assert [line.partition(" ")[0] for line in graded()] == ["grades"], "of nobody"
    collect.hand_in(course / "submitted" / "ada" / LAB, f"{LAB}.ipynb", b"answers")
    assert f"{LAB}: 1 graded" in graded()
    assert served.pop() == "vllm"
    assert f"{LAB}: nothing new" in graded()
    assert not served
    collect.hand_in(course / "submitted" / "ada" / LAB, f"{LAB}.ipynb", b"better answers")
    assert f"{LAB}: 1 graded" in graded()
    with Gradebook(f"sqlite:///{course}/gradebook.db", "servebook") as gradebook:
        assert [student.id for student in gradebook.students] == ["ada", "alan"]
    (course / "a full disk").touch()
    with pytest.raises(ServebookError, match=r"grades could not be written to .*grades\.csv"):
        graded()


def test_a_table_of_grades_that_breaks_off_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grades.csv").write_text("yesterday's")
    monkeypatch.setattr(remarks, "row", Mock(side_effect=[{"score": 1}, OSError("the gradebook is locked")]))
    with pytest.raises(OSError, match="locked"):
        remarks.GradesWithRemarks().export(Mock(assignments=[Mock()], students=[Mock(), Mock()]))
    assert (tmp_path / "grades.csv").read_text() == "yesterday's"


def test_every_command_stands_in_the_rooms_page() -> None:
    page = (ROOT / "docs" / "room.md").read_text()
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    assert [name for name in names if f"`servebook room {name}" not in page] == []


def test_a_loads_waits_are_told_by_nearest_rank(room: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    passed = feedback.Result(load_labs()[0].exercises[0], "passed")
    waited = Outcome(2, 30, [Checked(passed, seconds) for seconds in range(20, 0, -1)])
    monkeypatch.setattr("servebook.room.load.run", lambda *_: waited)
    done = run("load", "--learners", "2")
    assert done.exit_code == 0, done.exception
    (row,) = re.findall("a check.*", done.output)
    assert re.findall(r"\d+\.\d", row) == ["10.0", "19.0", "20.0", "20.0"]
    waited.metrics.update(
        {(f"{name}_bucket", bound): 0 for name in cli.HISTOGRAMS.values() for bound in ("0.01", "+Inf")}
    )
    assert "≤" not in run("load", "--learners", "2").output, "not a request was served"


@pytest.mark.parametrize(
    ("status", "desk", "advice"),
    [
        (401, "1", "File → Hub Control Panel"),
        (401, "", "Set SERVEBOOK_API_KEY"),
        (503, "1", "Wait a minute, then try again"),
        (503, "", "Wait a minute, then try again"),
        (429, "1", "Wait a minute, then try again"),
        (404, "", "Correct SERVEBOOK_ENGINE_URL"),
        (0, "1", "Wait a minute, then try again"),
        (0, "", "Start it there"),
    ],
)
def test_a_learner_whose_engine_does_not_serve_reads_what_a_learner_can_do(
    monkeypatch: pytest.MonkeyPatch, status: int, desk: str, advice: str
) -> None:
    answer = requests.Response()
    answer.status_code, answer.reason = status, "No"
    monkeypatch.setattr(
        requests, "get", Mock(side_effect=None if status else requests.ConnectionError, return_value=answer)
    )
    monkeypatch.delenv("SERVEBOOK_JUDGE_APART", raising=False)
    if desk:
        monkeypatch.setenv("SERVEBOOK_JUDGE_APART", desk)
    with pytest.raises(LaunchError, match=advice):
        launch.serve("vllm", settings=load_settings(engine_url="http://127.0.0.1:9"))
