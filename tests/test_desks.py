"""A desk and its front without a room: what `jupyterhub/desks.py` and `servebook room start` do by themselves."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from desk import IPV6

from servebook import launch
from servebook.checkout import ROOT
from servebook.errors import LaunchError
from servebook.launch.files import Files
from servebook.room import cli
from servebook.settings import LOOPBACK, Settings, load_settings

KEY = "the-instructors-key"
DESK = """
import asyncio, os, sys
from types import SimpleNamespace
import desks

room = {"front": sys.argv[1], "key": "KEY", "folder": "/nowhere", "apart": {"accounts": "room0"}}
desk = desks.DeskSpawner(user=SimpleNamespace(name="ada"), room=room)
"""
ASKING = (
    DESK
    + """
if sys.argv[2] == "other":
    desks.os.getuid = lambda: 64999
try:
    print(asyncio.run(desk.key()))
except desks.HTTPError as error:
    assert error.jupyterhub_message == error.log_message, "else the page says: error"
    print(error.status_code, error.log_message)
"""
)
ENDING = (
    DESK
    + """
desks.is_account = lambda name: name == "room0-ada"
desks.pwd.getpwnam = lambda name: SimpleNamespace(pw_uid=64999)
desks.end_all = lambda uid: print("ended", uid) or True
from jupyterhub.utils import maybe_future


async def ended():
    await maybe_future(desk.run_post_stop_hook())


asyncio.run(ended())
"""
)


def at_a_desk(script: str, *words: str) -> str:
    """What the script prints, in the room's environment."""
    python = load_settings().room.env / "bin" / "python"
    if not python.is_file():
        pytest.skip("there is no room's environment: `make room` makes it")
    command = [str(python), "-c", script, *words]
    done = subprocess.run(command, cwd=ROOT / "jupyterhub", capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("whose", ["other", "nobody"])
@pytest.mark.parametrize("host", [LOOPBACK, "localhost"])
def test_the_instructors_key_is_not_sent_to_whoever_has_the_fronts_port(host: str, whose: str) -> None:
    with socket.create_server((LOOPBACK, 0)) as stranger:
        stranger.settimeout(0)
        url = f"http://{host}:{stranger.getsockname()[1]}"
        if whose == "nobody":
            stranger.close()
        told = at_a_desk(ASKING, url, whose)
        assert told == "503 The room's front is away, and is being started again. Open your desk in a minute."
        if whose == "other":
            with pytest.raises(BlockingIOError):
                stranger.accept()


@pytest.mark.parametrize("host", [LOOPBACK, pytest.param("::1", marks=IPV6)])
def test_who_listens_is_found(host: str) -> None:
    script = (
        "import desks, os, socket, sys\n"
        "family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
        "with socket.create_server((sys.argv[1], 0), family=family) as server:\n"
        "    print(desks.listeners(sys.argv[1], server.getsockname()[1]) == {os.getuid()})"
    )
    assert at_a_desk(script, host) == "True"


def test_a_desk_whose_jupyterlab_ended_by_itself_is_cleared_too() -> None:
    """The hub calls `stop` only where there is something to stop, and this hook in both cases."""
    assert at_a_desk(ENDING, "http://127.0.0.1:1") == "ended 64999"


FAILED = """
import logging, sys
from types import SimpleNamespace
from door import SIGN, log_request
from tornado.httputil import HTTPHeaders
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(message)s")
headers = HTTPHeaders({"User-Agent": "a browser", SIGN: "the sign"})
request = SimpleNamespace(method="POST", uri="/hub/login", headers=headers, remote_ip="::1", request_time=lambda: 1)
log_request(SimpleNamespace(request=request, current_user=None, get_status=lambda: 500, get=None, post=None))
"""


def test_after_an_error_of_its_own_the_hub_logs_headers_without_the_proxys_sign() -> None:
    told = at_a_desk(FAILED)
    assert "a browser" in told
    assert "the sign" not in told
    config = (ROOT / "jupyterhub" / "jupyterhub_config.py").read_text()
    assert 'c.JupyterHub.tornado_settings = {"log_function": log_request}' in config


FULL = """
import asyncio, shutil, sys
from types import SimpleNamespace
from door import Door, HTTPError
usage = shutil.disk_usage(sys.argv[1])
shutil.disk_usage = lambda _: usage._replace(free=100_000)
door = Door(folder=sys.argv[1], open_sign_up=True)
request = SimpleNamespace(body_arguments={"username": [b"ada"]}, headers={}, remote_ip="::1")
handler = SimpleNamespace(request=request, set_secure_cookie=lambda *_, **__: None)
try:
    print(asyncio.run(door.authenticate(handler, {"password": "long enough"})), "came in")
except HTTPError as error:
    print(error.status_code, error.log_message)
"""


def test_on_a_full_disk_the_door_says_so(tmp_path: Path) -> None:
    """A password could not be kept there; and whoever had one came in, and was asked to sign in again and again."""
    told = at_a_desk(FULL, str(tmp_path))
    assert told == "507 The disk of the room's machine is full: nobody can come in. Tell the instructor."


@pytest.mark.parametrize("host", [LOOPBACK, "0.0.0.0", "::", "localhost"])
def test_a_front_that_ends_is_brought_back_where_it_was(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(api_key=KEY, state_dir=tmp_path, host="0.0.0.0")
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    at = {"hub": "127.0.0.1:8100", "vllm": "127.0.0.1:8000", "front": f"127.0.0.1:{port}"}
    served: list[tuple[str, Settings]] = []
    rounds = iter([True, True, False])
    fronts = iter([{"host": host}, None])

    def status(_: Settings) -> list[Any]:
        pids = {"hub": 1 if served else None}
        return [{"name": name, "pid": pids.get(name, 1), "endpoints": {"http": where}} for name, where in at.items()]

    def describe(files: Files) -> Any:
        up = {"hub": rounds, "front": fronts}.get(files.instance)
        return next(up, {"host": host}) if up else {"host": LOOPBACK}

    def serve(name: str, settings: Settings) -> Any:
        served.append((name, settings))
        return SimpleNamespace(endpoints={"http": at[name]}, url="http://127.0.0.1:8100")

    monkeypatch.setattr(cli, "instructors_settings", lambda: settings)
    for name in ("require_safe", "show_door"):
        monkeypatch.setattr(cli, name, lambda *_: None)
    monkeypatch.setattr(cli, "describe", describe)
    monkeypatch.setattr(launch, "status", status)
    monkeypatch.setattr(launch, "serve", serve)
    monkeypatch.setattr(launch, "down", lambda *_: None)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(LaunchError, match="JupyterHub has ended"):
        cli.start(trusted=False)
    assert [name for name, _ in served] == ["hub", "front"]
    assert (served[1][1].front_http_port, served[1][1].host) == (port, host)
    assert "The front has ended, and is started again." in capsys.readouterr().out
    with socket.create_server((LOOPBACK, port)):
        monkeypatch.setattr(cli, "RETRY_SECONDS", 0)
        cli.bring_back("front", status(settings)[2], settings.model_copy(update={"host": LOOPBACK}))
    assert f"Port {port}, where desks ask for the front, is held by another program." in capsys.readouterr().out
