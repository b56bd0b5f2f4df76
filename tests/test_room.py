"""A room of learners: JupyterHub, a desk and a key for each, one engine that nobody can take from the rest."""

from __future__ import annotations

import csv
import json
import os
import pwd
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import psutil
import pytest
import requests
from classroom import Door, Kernel, LearnersDesk, answer_of, bearer, save
from desk import eventually
from playwright.sync_api import Browser, Locator, Page, expect

from servebook.checkout import ROOT
from servebook.lab.manifest import find_exercise
from servebook.launch import Server
from servebook.processes import can_bind, free_port, marked
from servebook.room import tls
from servebook.room.hub import view, why_not_apart
from servebook.settings import load_settings

pytestmark = [pytest.mark.lane("own"), pytest.mark.timeout(600)]

KEY = "the-instructors-key"
LAB = "01_openai_rest"
NOTEBOOK = f"labs/{LAB}/{LAB}.ipynb"
ANSWER = answer_of(ROOT / "solutions", LAB, "01-1")
TRIMMED = ANSWER.replace('["text"]', '["text"].strip()')
"""An answer that its check does not pass."""
CPU_SECONDS = 120
SECONDS_A_TRY = 6
"""After so long one more wrong try is heard; ten are at once."""
PROCESSES = 300


class Room:
    """A room that `servebook room start` keeps, in a state folder of its own, on the run's engine."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder = folder
        self.url = f"https://127.0.0.1:{free_port()}"
        cert, secret = folder.with_name("room.pem"), folder.with_name("room.key")
        tls.make(cert, secret, "127.0.0.1")
        self.front = f"http://127.0.0.1:{free_port()}"
        settings = {
            "state_dir": str(folder),
            "engine_url": engine,
            "api_key": KEY,
            "hub_http_port": self.url.rpartition(":")[2],
            "front_http_port": self.front.rpartition(":")[2],
            "hub_routes_port": str(free_port()),
            "hub_api_port": str(free_port()),
            "room_cpu_seconds": str(CPU_SECONDS),
            "room_memory_gib": "2",
            "room_processes": str(PROCESSES),
            "room_tls_cert": str(cert),
            "room_tls_key": str(secret),
        }
        self.env = os.environ | {f"SERVEBOOK_{name.upper()}": value for name, value in settings.items()}
        self.output = folder.with_suffix(".log")
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*CLI, "room", "start"], env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def opened(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        return "Learners sign up" in self.output.read_text()

    def desk(self, name: str, password: str = "a password of their own") -> LearnersDesk:
        return LearnersDesk(self.url, self.code(), name, password)

    def code(self) -> str:
        return (self.folder / "room" / "join.code").read_text()

    def run(self, *words: str | Path, seconds: float = 60) -> str:
        """A `servebook room` command of the instructor's, in a terminal that knows the state folder alone.

        What is graded is served by the run's engine, which nothing but this room's settings name.
        """
        env = self.env if words[0] == "collect" else os.environ | {"SERVEBOOK_STATE_DIR": str(self.folder)}
        done = subprocess.run([*CLI, "room", *words], env=env, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def learners(self) -> list[dict[str, Any]]:
        """What the front knows of them."""
        return list(requests.get(f"{self.front}/room/learners", headers=bearer(KEY), timeout=60).json())

    def hub(self) -> psutil.Process:
        """The hub's process."""
        found = [p for p in self.family() if "jupyterhub_config.py" in " ".join(p.cmdline())]
        assert len(found) == 1, found
        return found[0]

    def family(self, home: Path | None = None) -> list[psutil.Process]:
        """Every process that belongs to this room; with `home`, to that desk."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                env = process.environ()
                at_desk = Path(env.get("HOME", "/")).is_relative_to(home or self.folder)
                if at_desk or (home is None and env.get("SERVEBOOK_STATE_DIR") == str(self.folder)):
                    found.append(process)
        return found

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()


CLI = [sys.executable, "-c", "from servebook.cli import main; main()"]


@pytest.fixture(scope="module")
def room(vllm: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    room = Room(tmp_path_factory.mktemp("room") / "state", vllm.url)
    try:
        with pytest.MonkeyPatch.context() as browsers:  # they know the room's certificate, and no other
            for variable in ("REQUESTS_CA_BUNDLE", "WEBSOCKET_CLIENT_CA_BUNDLE"):
                browsers.setenv(variable, str(room.folder.with_name("room.pem")))
            eventually(room.opened, "the room", seconds=120)
            yield room
    finally:
        room.process.send_signal(signal.SIGINT)
        room.process.wait(60)
        own = view(load_settings(state_dir=room.folder))["accounts"]  # others may get accounts meanwhile
        for name in [each.pw_name for each in pwd.getpwall() if each.pw_name.startswith(f"{own}-")]:
            subprocess.run(["userdel", name], check=True)


def sit_down(room: Room, name: str) -> Kernel:
    """A learner at a desk, in lab 01 with its setup cell run."""
    desk = room.desk(name)
    desk.open()
    kernel = Kernel(desk)
    for cell in desk.notebook(NOTEBOOK).cells:
        if cell.id in ("parameters", "setup"):
            kernel.run(cell.source)
    return kernel


@pytest.fixture(scope="module")
def kernels(room: Room) -> dict[str, Kernel]:
    """Three learners who stay to the end."""
    names = ["ada", "alan", "grace"]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sit_down(room, name), names), strict=True))


@pytest.fixture
def window(chromium: Browser) -> Iterator[Callable[[], Page]]:
    """New browser windows, each of a person of its own; all are closed with the test."""
    contexts = []

    def opened() -> Page:
        contexts.append(chromium.new_context(ignore_https_errors=True, viewport={"width": 1280, "height": 900}))
        contexts[-1].set_default_timeout(120_000)  # JupyterLab loads beside nine desks that start
        return contexts[-1].new_page()

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def apart(room: Room) -> None:
    """Skips, and says why, where desks cannot be kept apart."""
    if why := why_not_apart(load_settings(state_dir=room.folder)):
        pytest.skip(f"desks cannot be kept apart here: {why}")


def solve(kernel: Kernel) -> None:
    """Do the first exercise and have it checked."""
    kernel.run(ANSWER)
    assert "✓ 01.1" in kernel.run('check("01.1")')


def test_names_that_are_none_are_refused_with_the_rule(room: Room) -> None:
    door = Door(room.url)
    rule = "A name has 1 to 23 letters a to z, digits, _ and -, and begins with a letter or digit."
    for name in ("x\n", "root", "a" * 60, "../x", "-x", "x y", "", "ñ"):
        assert door.sign_in(name, "long enough", room.code()) == (403, rule), name
    assert door.sign_in("daemon", "long enough", room.code())[1].startswith("daemon is an account of this machine.")


class Guess(NamedTuple):
    began: float
    status: int
    said: str


def until_refused(guess: Callable[[int], tuple[int, str]]) -> list[Guess]:
    """Guess on until one is refused unheard. Before that ten are heard, and as many as are given back meanwhile."""
    guesses: list[Guess] = []
    while not guesses or guesses[-1].status == 403:
        began = time.monotonic()
        guesses.append(Guess(began, *guess(len(guesses))))
    assert guesses[-1].status == 429
    assert len(guesses) - 1 <= 10 + (time.monotonic() - guesses[0].began) / SECONDS_A_TRY
    return guesses


def test_only_who_has_the_code_signs_up_and_a_guesser_does_not_lock_the_door(room: Room) -> None:
    stranger, learner = Door(room.url, "127.0.0.66"), Door(room.url, "127.0.0.2")
    assert stranger.sign_in("mallory", "long enough")[0] == 403

    def guess(number: int) -> tuple[int, str]:  # each as if it came from elsewhere
        names = {name: f"10.0.0.{number}" for name in ("X-Real-IP", "X-Forwarded-For", "x-forwarded-for")}
        stranger.browser.headers.update(names)
        return stranger.sign_in("mallory", "long enough", f"AAAA-{number:04}")

    guesses = until_refused(guess)
    assert (guesses[0].status, guesses[0].said) == (403, "That is not the join code of this room.")
    assert "Too many wrong tries from here. Wait" in guesses[-1].said
    assert learner.sign_in("emmy", "short", room.code())[1].startswith("A password has 8 to 128 characters.")
    assert learner.sign_in("emmy", "long enough", f" {room.code().lower().replace('-', ' ')}") == (302, "")


GUESSING = """
from door import REMEMBERED, HTTPError, Tries
def compared(who):
    try:
        tries.take(who)
    except HTTPError as refused:
        assert refused.status_code == 429
        return False
    return True
tries = Tries()
print(sum(compared(("code", "127.0.0.66")) for _ in range(1000)), compared(("code", "127.0.0.2")))
for number in range(2 * REMEMBERED):
    compared(("password", "127.0.0.66", f"name-{number}"))
print(len(tries.left) <= REMEMBERED)
"""


@pytest.mark.usefixtures("room")
def test_of_a_thousand_guesses_ten_are_compared_and_they_fill_no_memory() -> None:
    python = load_settings().room.env / "bin" / "python"
    told = subprocess.run([python, "-c", GUESSING], cwd=ROOT / "jupyterhub", capture_output=True, text=True, timeout=60)
    assert told.stdout == "10 True\nTrue\n", told.stderr


CALLED = """
import sys
from types import SimpleNamespace
from proxy import SIGN, Handler
from tornado.httputil import HTTPHeaders
HUB = "http://127.0.0.1:8102"
for behind, caller in ((True, "127.0.0.1"), (True, "10.0.0.1"), (False, "127.0.0.1")):
    handler = Handler.__new__(Handler)
    headers = HTTPHeaders({"X-Forwarded-For": "10.0.0.9", "X-Real-Ip": "10.0.0.8", SIGN: "made up"})
    handler.request = SimpleNamespace(headers=headers, uri="/", remote_ip=caller, method="GET", body=b"")
    handler.proxy = SimpleNamespace(custom_headers={}, x_forward=True, proxy_timeout=1)
    handler.proxy.options = {"behind": behind, "hub_url": HUB, "sign": "the sign"}
    for place in (f"{HUB}/hub/login", "http://127.0.0.1:81021/user/ada/", "http://127.0.0.1:9/"):
        sent = handler._get_proxy_request(place).headers
        print(sent["X-Forwarded-For"], sent.get("X-Real-Ip"), sent.get_list(SIGN), sep=" | ")
"""


@pytest.mark.usefixtures("room")
def test_a_web_server_before_the_room_is_believed_and_nobody_else() -> None:
    python = load_settings().room.env / "bin" / "python"
    told = subprocess.run([python, "-c", CALLED], cwd=ROOT / "jupyterhub", capture_output=True, text=True, timeout=60)
    assert told.stdout.splitlines() == [
        f"{caller} | None | {sign}"
        for caller in ("10.0.0.9, 127.0.0.1", "10.0.0.1", "127.0.0.1")
        for sign in (["the sign"], [], [])  # the hub's alone: a desk hears from the proxy, too
    ], told.stderr


PAST_THE_PROXY = """
import asyncio, sys
from types import SimpleNamespace
from door import SCRYPT, SIGN, Door, HTTPError, digest
SCRYPT["n"] = 2**4  # quick
door = Door(folder=sys.argv[1], proxys_sign="the sign")
salt = b"salt"
kept = asyncio.run(digest("the right one", salt))
def compared(shown):
    count = 0
    for number in range(150):
        context = SimpleNamespace(address=("127.0.0.1", 5000 + number))
        request = SimpleNamespace(headers=shown, connection=SimpleNamespace(context=context))
        request.remote_ip = f"10.0.0.{number}"  # as Tornado has it from X-Forwarded-For
        handler = SimpleNamespace(request=request, get_secure_cookie=lambda _: None)
        try:
            asyncio.run(door.sign_in(handler, "ada", "wrong", salt, kept))
        except HTTPError as refused:
            count += refused.status_code == 403
    return count
print(compared({}), compared({SIGN: "made up"}), compared({SIGN: "the sign"}))
"""


@pytest.mark.usefixtures("room")
def test_who_asks_the_hub_past_its_proxy_is_one_caller_and_a_name_is_not_guessed_from_everywhere(
    tmp_path: Path,
) -> None:
    python = load_settings().room.env / "bin" / "python"
    words, place = [str(python), "-c", PAST_THE_PROXY, str(tmp_path)], ROOT / "jupyterhub"
    told = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=120)
    past, made_up, from_everywhere = map(int, told.stdout.split() or pytest.fail(told.stderr))
    assert 10 <= past <= 12, "of 150, and what is given back meanwhile"
    assert made_up <= 2
    assert 85 <= from_everywhere <= 95, "of 150, and of the hundred ten were taken before"


@pytest.mark.usefixtures("room")
def test_a_stranger_sends_no_book_to_the_door(tmp_path: Path) -> None:
    """The proxy keeps a body until it is whole, so it looks at its length first."""
    python, port = load_settings().room.env / "bin" / "python", free_port()
    options = {"port": port, "routes_port": free_port(), "host": "127.0.0.1", "hub_url": "http://127.0.0.1:1"}
    words = [str(python), str(ROOT / "jupyterhub/proxy.py"), json.dumps(options | {"behind": False, "cert": ""})]
    env = os.environ | {"CONFIGPROXY_AUTH_TOKEN": "of-this-test", "SERVEBOOK_PROXY_SECRET": "of-this-test"}
    with subprocess.Popen(words, env=env, cwd=tmp_path) as proxy:
        try:
            eventually(lambda: not can_bind("127.0.0.1", port), "the proxy", seconds=60)
            answers = []
            for size in (1 << 20, 40 << 20):
                with socket.create_connection(("127.0.0.1", port), timeout=30) as stranger:
                    head = f"POST /hub/login HTTP/1.1\r\nHost: room\r\nContent-Length: {size}\r\n\r\n"
                    stranger.sendall(head.encode() + b"x" * min(size, 1 << 20))
                    answers.append(stranger.recv(64).split(b"\r\n")[0])
        finally:
            proxy.terminate()
    # No hub is there: what is let through is told so.
    assert answers == [b"HTTP/1.1 503 Service Unavailable", b"HTTP/1.1 400 Bad Request"]


FORKING = """
import os, time
os.setuid(int(os.environ["ANOTHER"]))
end = time.monotonic() + 60
print("forking", flush=True)
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
"""
ENDING = """
import os
from desks import end_all
print(end_all(int(os.environ["ANOTHER"])))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to act as another user")
@pytest.mark.usefixtures("room")
def test_what_forks_and_ends_all_the_time_does_not_outlive_its_desk() -> None:
    another = 65000 + os.getpid() % 500
    env = os.environ | {"ANOTHER": str(another)}
    with subprocess.Popen([sys.executable, "-c", FORKING], env=env, stdout=subprocess.PIPE, text=True) as forking:
        assert forking.stdout
        assert forking.stdout.readline() == "forking\n"
        python = load_settings().room.env / "bin" / "python"
        words, place = [str(python), "-c", ENDING], ROOT / "jupyterhub"
        told = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=40)
        assert told.stdout == "True\n", told.stderr
        began = time.monotonic()
        assert forking.stdout.read() == ""  # its other end is closed once the last of them has ended
        assert time.monotonic() - began < 40  # of the minute after which it ends by itself


def test_of_two_who_choose_one_name_at_once_one_gets_it(room: Room) -> None:
    doors = [Door(room.url, f"127.0.0.{number}") for number in (4, 5)]
    with ThreadPoolExecutor() as pool:
        came = list(pool.map(lambda door: door.sign_in("twin", f"the password of {id(door)}", room.code()), doors))
    assert sorted(status for status, _ in came) == [302, 403], came
    assert any("taken" in said for _, said in came)


def test_who_guesses_a_password_does_not_lock_its_learner_out(room: Room) -> None:
    """The learner comes from elsewhere; or from the same address, with the browser that has signed in before."""
    emmy, elsewhere = Door(room.url), Door(room.url, "127.0.0.2")

    def wrong(stranger: Door, number: int) -> tuple[int, str]:
        return stranger.sign_in("emmy", f"wrong {number}")

    assert emmy.sign_in("emmy", "long enough", room.code()) == (302, "")
    while True:
        stranger = Door(room.url)
        guesses = until_refused(partial(wrong, stranger))
        assert guesses[0].status == 403
        if stranger.sign_in("emmy", "long enough")[0] == 429:
            break  # what is right is not told either
        # Its time must have been over by then: "Wait 3 s." leaves more than two.
        waited = time.monotonic() - guesses[-1].began
        assert waited > int(re.findall(r"Wait (\d+) s\.", guesses[-1].said)[0]) - 1, "what is right is told"
    emmy.browser.get(f"{room.url}/hub/logout", timeout=60)
    assert emmy.sign_in("emmy", "long enough") == (302, "")
    assert elsewhere.sign_in("emmy", "long enough") == (302, "")


def test_a_password_that_was_forgotten_is_chosen_anew_and_a_new_code_replaces_the_old(room: Room) -> None:
    old = room.code()
    emmy = Door(room.url, "127.0.0.2")
    assert emmy.sign_in("emmy", "long enough") == (302, "")
    signed_in = emmy.browser.get(f"{room.url}/hub/home", allow_redirects=False, timeout=60)
    told = room.run("reset", "Emmy")
    assert told.startswith(f"emmy has no password now: sign up anew with the join code {old}; signed out")
    signed_out = emmy.browser.get(f"{room.url}/hub/home", allow_redirects=False, timeout=60)
    assert (signed_in.status_code, signed_out.status_code) == (200, 302)
    told = room.run("code", "--new")
    assert f"Learners sign up at {room.url} with the join code {room.code()}." in told
    assert "SHA-256 fingerprint" in told
    assert old not in told
    door = Door(room.url, "127.0.0.3")
    assert door.sign_in("emmy", "another one", old)[0] == 403
    assert door.sign_in("emmy", "another one", room.code()) == (302, "")
    assert stat.S_IMODE((room.folder / "room").stat().st_mode) == 0o700
    assert b"another one" not in (room.folder / "room" / "passwords.sqlite").read_bytes()


def join(page: Page, room: Room, name: str) -> None:
    """Sign up by the address in the picture; the first notebook opens."""
    page.goto(f"{room.url}/hub/login#{room.code()}")
    expect(page.get_by_label("Join code")).to_have_value(room.code())
    page.get_by_label("Join code").fill(room.code().lower())  # as if by hand: it is not lost where a password is
    for password in ("short", "long enough"):
        page.get_by_label("Username").fill(name)
        page.locator("#password_input").fill(password)
        page.get_by_role("button", name="Sign in").click()
        if password == "short":
            expect(page.get_by_text("A password has 8 to 128 characters.")).to_be_visible()
            expect(page.get_by_label("Join code")).to_have_value(room.code().lower())
            expect(page.get_by_text("password of 8 characters or more")).to_be_visible()
    expect(page.get_by_role("tab", name="00_start_here.ipynb")).to_be_visible(timeout=120_000)


class LabInWindow:
    """Lab 01 in a learner's JupyterLab, its cells run up to the first exercise."""

    def __init__(self, page: Page, desk: str) -> None:
        self.page = page
        self.ids = [cell.id for cell in nbformat.read(ROOT / NOTEBOOK, as_version=4).cells]
        page.goto(f"{desk}/lab/tree/{NOTEBOOK}?reset")
        self.expect_idle()
        self.cell("parameters").locator(".cm-content").click()
        self.run(2)

    def expect_idle(self) -> None:
        """Wait for the kernel: it drops what it is asked to run before there is one, and in the instant of an error."""
        expect(self.page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=120_000)

    def cell(self, name: str) -> Locator:
        return self.page.locator(f'.jp-Cell[data-windowed-list-index="{self.ids.index(name)}"]')

    def run(self, cells: int) -> None:
        for _ in range(cells):
            self.page.keyboard.press("Shift+Enter")

    def answer(self, text: str) -> Locator:
        """Type the first exercise's answer, run it and its check; return where the check says what it thinks."""
        self.expect_idle()
        self.cell("01-1-answer").locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(text)
        self.run(2)
        return self.cell("01-1-check").locator(".jp-OutputArea")

    def save(self) -> None:
        with self.page.expect_response(lambda answer: answer.request.method == "PUT" and NOTEBOOK in answer.url):
            self.page.keyboard.press("Control+s")


def pass_and_leave(room: Room, name: str) -> str:
    """Pass the first exercise, and go home; return the desk's key."""
    kernel = sit_down(room, name)
    solve(kernel)
    key = kernel.run("print(key)").strip()
    kernel.desk.close()
    return key


def read_the_first_chapter(kernel: Kernel) -> None:
    """Run all of chapter 00 at this desk, then ask for labs that are there already."""
    chapter = Kernel(kernel.desk)
    for cell in kernel.desk.notebook("notebooks/00_start_here.ipynb").cells:
        if cell.cell_type == "code":
            chapter.run(cell.source)
    command = "subprocess.run(['servebook', 'labs', 'init', 'labs'], capture_output=True, text=True)"
    assert "left as they were" in kernel.run(f"import subprocess\nprint({command}.stdout)")


def lose_everything(kernel: Kernel) -> None:
    """Delete all that is on the desk, go away, and come back to a desk as it was handed out."""
    desk = kernel.desk
    kernel.run(
        "import os, shutil\nhome = os.path.expanduser('~')\nos.chdir('/')\n"
        "for path in os.scandir(home): shutil.rmtree(path) if path.is_dir() else os.remove(path)"
    )
    desk.close()
    desk.open()
    handed_out = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    assert [cell.source for cell in desk.notebook(NOTEBOOK).cells] == [cell.source for cell in handed_out.cells]


@pytest.mark.survives("a learner deletes all at the desk", "room", lost="what was not collected; it is laid out anew")
@pytest.mark.browser
def test_ten_learners_join_work_get_stuck_hand_in_and_find_their_feedback(
    room: Room, kernels: dict[str, Kernel], window: Callable[[], Page]
) -> None:
    """A rehearsal: Hedy in a browser, nine by the pages and cookies that a browser has. Some go early: memory."""
    leavers = ["barbara", "donald", "edsger", "frances", "joan"]
    everybody = {"hedy", "ken", *leavers, *kernels}
    with ThreadPoolExecutor(2) as pool:
        sitting = pool.submit(sit_down, room, "ken")
        working = [pool.submit(solve, kernel) for kernel in kernels.values()]
        leaving = [pool.submit(pass_and_leave, room, name) for name in leavers]
        reading = pool.submit(read_the_first_chapter, kernels["ada"])
        hedys = window()
        join(hedys, room, "hedy")
        lab = LabInWindow(hedys, f"{room.url}/user/hedy")
        expect(lab.answer(TRIMMED)).to_contain_text("✗ 01.1", timeout=120_000)  # its first check, beside others' starts

        told = room.run("watch", "--once")
        assert re.search(r"hedy\W+01\.1\W+wrong", told), told
        assert "hedy" not in room.run("watch", "--once", "--hide-names")
        view = window()
        view.goto(told.split()[3])
        rows = view.locator("#learners tr")
        expect(rows.first).to_contain_text("hedy01.1✗ not yet")
        expect(rows.first).to_contain_text("the text was trimmed: a leading space is part of it")
        expect(view.get_by_role("status")).to_contain_text("engine ready")
        view.set_viewport_size({"width": 1024, "height": 768})  # a small projector's
        assert view.evaluate("document.documentElement.scrollWidth") == 1024, "the table's right edge is cut"
        view.get_by_label("hide names").check()
        expect(rows.first).to_contain_text("learner")
        expect(rows.filter(has_text="hedy")).to_have_count(0)
        assert view.url == f"{room.url}/services/watch/", "the key has left the address bar"
        stranger = window()
        stranger.goto(f"{room.url}/services/watch/")
        only = "Open this page by the address of `servebook room watch`."
        expect(stranger.get_by_role("status")).to_contain_text(only)
        expect(stranger.locator("#learners tr")).to_have_count(0)

        expect(lab.answer(ANSWER)).to_contain_text("✓ 01.1")
        lab.save()
        ken = sitting.result()
        solve(ken)
        save(ken.desk, NOTEBOOK, {"01-1-answer": ANSWER})
        foreign = {"type": "file", "format": "text", "content": "#!/bin/sh"}
        ken.desk.ask("PUT", f"api/contents/labs/{LAB}/run_me.sh", foreign)
        ken.run(f"import os; os.symlink('/etc/passwd', os.path.expanduser('~/labs/{LAB}/grades.csv'))")
        keys = [each.result() for each in leaving]
        for each in (*working, reading):
            each.result()
        keys += [kernel.run("print(key)").strip() for kernel in (ken, *kernels.values())]
        expect(rows.filter(has_text="✓ passed")).to_have_count(10)

        (ROOT / "scratch").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "scratch", prefix="course-") as folder:
            course = Path(folder)  # not below /tmp, which a submission may use
            told = room.run("collect", "--course", course)
            assert told.count(": 1 of ") == 2, told
            assert re.search(r"joan: 0 of \d+ labs; passed 1 on the board, nothing saved", told), told
            for name in ("run_me.sh", "grades.csv"):
                assert f"'{LAB}/{name}' was left: not handed out" in told
            losing = pool.submit(lose_everything, ken)
            told = room.run("collect", "--grade", "--course", course, seconds=400)
            losing.result()
            assert f"{LAB}: 2 graded\n" in told, told
            assert not list(course.rglob("run_me.sh"))
            with (course / "grades.csv").open(newline="") as file:
                rows_of_grades = list(csv.DictReader(file))
                scores = {row["student_id"]: float(row["score"]) for row in rows_of_grades if row["score"]}
            assert {row["student_id"] for row in rows_of_grades} == everybody
    _, first = find_exercise("01.1")
    assert scores == {"hedy": first.points, "ken": first.points}
    assert "✓ 01.1" in ken.desk.ask("GET", f"api/contents/feedback/{LAB}.html")["content"]
    ken.desk.close()
    hedys.goto(f"{room.url}/user/hedy/lab/tree/feedback/{LAB}.html?reset")
    expect(hedys.frame_locator("iframe").get_by_text("✓ 01.1").first).to_be_visible()
    room.desk("hedy", "long enough").close()
    page = room.folder / "room" / "desks" / "hedy" / "feedback" / f"{LAB}.html"
    assert page.stat().st_uid == page.parents[1].stat().st_uid

    assert len(set(keys)) == len(keys) == 9
    assert {row["name"] for row in room.learners() if row["served"]} == everybody
    kept = room.folder / "room" / "keys.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    for text in (kept.read_text(), room.log("front"), room.log("hub"), room.output.read_text()):
        assert not any(key in text for key in [*keys, KEY])
    assert "capital of Japan" not in room.log("front")
    assert "instructor's notes" not in json.dumps(kernels["ada"].desk.notebook("notebooks/00_start_here.ipynb"))


def test_a_runaway_loop_leaves_the_engine_to_the_others(kernels: dict[str, Kernel]) -> None:
    """It runs until the others have solved their exercise, and more of it was served than has a place at a time."""
    runaway, *others = kernels.values()
    runaway.run(
        """
        import threading, time
        seen, hints, enough, began = [], [], threading.Event(), time.monotonic()
        def loop():
            ask = {"model": vllm.model, "prompt": "Once", "max_tokens": 20, "ignore_eos": True}
            while not enough.is_set():
                answer = requests.post(f"{url}/v1/completions", json=ask, headers={"Authorization": f"Bearer {key}"})
                seen.append(answer.status_code)
                hints.append(answer.headers.get("Retry-After"))
        threads = [threading.Thread(target=loop) for _ in range(40)]
        for thread in threads:
            thread.start()
        """.replace("\n        ", "\n")
    )
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(solve, others))
        runaway.run("while seen.count(200) <= 16 or 429 not in seen: time.sleep(0.1)")
    finally:
        runaway.run("enough.set()\nfor thread in threads: thread.join()")
    seen = json.loads(
        runaway.run(
            "print(json.dumps([seen.count(200), seen.count(429), sum(h is not None for h in hints), len(seen), "
            "time.monotonic() - began]))"
        )
    )
    served, refused, hinted, all_of_them, seconds = seen
    assert served + refused == all_of_them
    assert 16 < served <= 120 + 2 * seconds  # a minute's share, and what the seconds add to it
    assert refused == hinted > 0


NEARLY = """
import resource, time
limit, most = resource.getrlimit(resource.RLIMIT_CPU)
resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 2, most))
print(limit)
"""
"""The desk's limit, and but two seconds of it left: nobody waits for all of it here."""


def test_a_notebook_that_never_ends_is_ended(kernels: dict[str, Kernel]) -> None:
    kernel = Kernel(kernels["alan"].desk)
    told = kernel.run(NEARLY)
    assert int(told) == CPU_SECONDS
    kernel.start("while True: pass")
    state = ""
    while state not in ("restarting", "autorestarting"):  # the channel's own time-out ends this wait
        message = json.loads(kernel.channel.recv())
        state = message["content"].get("execution_state", "")
    kernel.reconnect()
    assert kernel.run("print(6 * 7)") == "42\n"


def test_too_much_memory_is_an_error_of_that_cell_only(kernels: dict[str, Kernel]) -> None:
    assert "MemoryError" in kernels["alan"].run("try: bytearray(3 << 30)\nexcept MemoryError as e: print(repr(e))")
    solve(kernels["alan"])


SEEN = """
import json, os
def readable(path):
    try:
        return bool(os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(1))
    except OSError:
        return False
def refused(act):
    try:
        act()
    except OSError as error:
        return type(error).__name__
shm = os.statvfs("/dev/shm")
print(json.dumps({
    "uid": os.getuid(),
    "read": [path for path in PATHS if readable(path)],
    "environ": refused(lambda: open("/proc/HUB/environ").read()),
    "kill": refused(lambda: os.kill(HUB, 0)),
    "write": refused(lambda: open("ROOT/src/planted.py", "w")),
    "shm": shm.f_blocks * shm.f_frsize,
}))
"""


@pytest.mark.usefixtures("apart")
def test_a_desk_sees_neither_the_instructors_files_nor_anothers(room: Room, kernels: dict[str, Kernel]) -> None:
    within = room.folder / "room"
    mine = within / "desks" / "ada"
    secrets = [within / name for name in ("keys.json", "passwords.sqlite", "join.code", "hub.sqlite", "cookie_secret")]
    assert all(path.exists() for path in secrets)
    others = [within / "desks" / "alan", ROOT / "solutions", ROOT / "tests", ROOT / ".git", room.folder / "logs"]
    paths = [str(path) for path in (*secrets, *others, mine, ROOT / "labs")]
    asked = SEEN.replace("PATHS", repr(paths)).replace("HUB", str(room.hub().pid)).replace("ROOT", str(ROOT))
    seen = json.loads(kernels["ada"].run(asked))
    assert seen["read"] == paths[-2:]
    assert (seen["environ"], seen["kill"], seen["write"]) == ("PermissionError", "PermissionError", "OSError")
    assert seen["shm"] <= 2 << 30
    assert len({seen["uid"], os.getuid(), int(kernels["alan"].run("import os; print(os.getuid())"))}) == 3


@pytest.mark.usefixtures("apart")
def test_a_desks_kernel_needs_no_port_that_another_desk_may_have_taken(kernels: dict[str, Kernel]) -> None:
    asked = "import json, ipykernel\nprint(json.loads(ipykernel.get_connection_info())['transport'])"
    assert [kernel.run(asked) for kernel in kernels.values()] == ["ipc\n"] * len(kernels)


@pytest.mark.usefixtures("apart")
def test_a_desks_terminal_knows_the_command(kernels: dict[str, Kernel]) -> None:
    """JupyterLab opens a login shell where its own output is no terminal, and Debian's then forgets the path."""
    assert "/bin/servebook\r\n" in kernels["ada"].desk.terminal("command -v servebook")


@pytest.mark.usefixtures("apart")
def test_a_desk_that_forks_without_end_stops_at_its_limit(kernels: dict[str, Kernel]) -> None:
    told = kernels["ada"].run(
        "import subprocess\nmany = []\ntry:\n    while True: many.append(subprocess.Popen(['sleep', '600']))\n"
        "except OSError as error: print(len(many), type(error).__name__)\n"
        "for one in many: one.kill()\nfor one in many: one.wait()"
    )
    adjusted = kernels["ada"].run("print(open('/proc/self/oom_score_adj').read())")
    assert int(adjusted) == 1000, "where memory is short, Linux ends it before the engine"
    assert int(told.split()[0]) < PROCESSES
    assert told.split()[1] == "BlockingIOError"
    solve(kernels["alan"])


@pytest.mark.survives("the proxy killed (SIGKILL)", "room", lost="nothing: desks are back in seconds")
def test_desks_are_back_in_a_moment_when_the_proxy_is_killed(room: Room, kernels: dict[str, Kernel]) -> None:
    kernel = kernels["grace"]
    kernel.run("kept = 'through a new proxy'")
    [proxy] = [process for process in room.family() if "jupyterhub/proxy.py" in " ".join(process.cmdline())]
    proxy.kill()

    def reachable() -> bool:
        with suppress(requests.RequestException):
            return bool(kernel.desk.ask("GET", "api/kernels"))
        return False

    eventually(reachable, "the desk, behind a new proxy", seconds=120)  # 5 s where the machine has nothing else to do
    kernel.reconnect()
    assert kernel.run("print(kept)") == "through a new proxy\n"


@pytest.mark.survives("the hub killed (SIGKILL)", "room", lost="nothing: desks go on")
def test_desks_outlive_a_hub_that_is_killed(room: Room, kernels: dict[str, Kernel]) -> None:
    kernel = kernels["grace"]
    for each in kernels.values():
        each.reconnect()  # the test before has killed its way there
    kernel.run("kept = 'still here'")
    before = room.hub()
    before.kill()
    assert kernel.run("print(kept)") == "still here\n"  # through the proxy, without a hub
    with ThreadPoolExecutor() as pool:
        list(pool.map(solve, kernels.values()))

    def back() -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"{room.url}/hub/health", timeout=5).ok
        return False

    eventually(back, "the new hub", seconds=60)
    assert room.hub().pid != before.pid
    assert kernel.desk.servers()[""]["ready"]
    assert kernel.run("print(kept)") == "still here\n"
    assert kernel.desk.ask("GET", "api/kernels")


@pytest.mark.survives("the machine asleep (all stand still)", "room", lost="nothing: all go on where they were")
def test_a_room_whose_machine_slept_goes_on_where_it_was(room: Room, kernels: dict[str, Kernel]) -> None:
    """Everything stands still, as with the lid closed: hub, proxy, front, keeper, desks and kernels."""
    kernel = kernels["grace"]
    kernel.run("kept = 'slept well'")
    hub, asleep = room.hub().pid, room.family()
    try:
        for process in asleep:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        with pytest.raises(requests.Timeout):
            requests.get(f"{room.url}/hub/health", timeout=4)
    finally:
        for process in asleep:
            with suppress(psutil.NoSuchProcess):
                process.resume()
    assert kernel.run("print(kept)") == "slept well\n"
    solve(kernel)
    assert requests.get(f"{room.url}/hub/health", timeout=30).ok
    assert room.hub().pid == hub
    assert kernel.desk.servers()[""]["ready"]


def test_a_revoked_key_opens_nothing_any_more(room: Room, kernels: dict[str, Kernel]) -> None:
    kernel = kernels["ada"]
    kernel.reconnect()  # the tests before have killed its way there
    kernel.run(
        'writing = client.completions.create(model=vllm.model, prompt="Count:", max_tokens=1500, stream=True,\n'
        '                                    extra_body={"ignore_eos": True})\n'
        "first = next(iter(writing))"
    )
    room.run("revoke", "ada")
    ask = 'print(requests.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code)'
    assert kernel.run(ask) == "401\n"
    broken = "try:\n    for chunk in writing: pass\n    print('whole')\nexcept Exception as error: print('broken off')"
    assert kernel.run(broken) == "broken off\n"
    assert "revoked" in next(line for line in room.run("learners").splitlines() if "ada" in line)
    assert re.fullmatch(r"ada: the desk is clos(ed|ing)\n", room.run("close", "ada"))
    eventually(lambda: not kernel.desk.servers(), "the end of the desk")
    refused = kernel.desk.hub_ask("POST", "users/ada/server")
    said = "The instructor has revoked the key of ada."
    assert (refused.status_code, refused.json()["message"]) == (403, said)
    page = kernel.desk.browser.get(f"{room.url}/hub/spawn/ada", timeout=60)
    assert (page.status_code, said in unescape(page.text), ": error" in page.text) == (403, True, False), page.text
    shown = room.run("admit", "ada").split()
    assert requests.get(f"{room.front}/v1/models", headers=bearer(shown[-1].partition("=")[2]), timeout=60).ok


def test_a_load_that_is_killed_leaves_no_process_behind(room: Room) -> None:
    def asking() -> bool:
        return any(row["name"].startswith("load@") and row["served"] for row in room.learners())

    def left() -> list[str]:
        found = marked(f"SERVEBOOK_STATE_DIR={room.folder}").values()
        return [command for command in found if "forkserver" in command]

    output = subprocess.DEVNULL
    with subprocess.Popen(
        [*CLI, "room", "load", "--learners", "1"], env=room.env, stdout=output, stderr=output
    ) as load:
        eventually(asking, "an answer to the first of them", seconds=120)
        assert left()
        load.kill()
    eventually(lambda: not left(), "the end of its processes")


def test_the_evening_befores_rehearsal_passes_every_check_of_labs_01_and_02(room: Room) -> None:
    told = room.run("load", "--learners", "1", seconds=200)
    assert "10 checks passed, 0 checks refused, 0 checks failed" in told
    assert "× 200" in told
    assert not [row["name"] for row in room.learners() if row["name"].startswith("load@")]


def test_closing_a_desk_ends_all_of_it(room: Room, kernels: dict[str, Kernel]) -> None:
    home = room.folder / "room" / "desks" / "alan"
    assert room.family(home)
    kernels["alan"].reconnect()  # the tests before have killed its way there
    kernels["alan"].run("import subprocess; subprocess.Popen(['sleep', '601'], start_new_session=True)")
    kernels["alan"].desk.close()
    eventually(lambda: not room.family(home), "the end of every process of a desk")


def test_ctrl_c_ends_the_room(room: Room) -> None:
    assert room.family()
    room.process.send_signal(signal.SIGINT)
    assert room.process.wait(60) == 0, room.output.read_text()
    told = room.output.read_text()
    assert told.endswith("The room is closed; desks and passwords are kept for next time.\n"), told
    assert "Traceback" not in told
    eventually(lambda: not room.family(), "the end of every process of the room")
