"""A room of learners: JupyterHub, a desk and a key for each, one engine that nobody can take from the rest."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests
from classroom import Door, Kernel, LearnersDesk, answer_of, bearer
from desk import eventually
from playwright.sync_api import Browser, expect

from servebook.checkout import ROOT
from servebook.launch import Server
from servebook.launch.processes import free_port
from servebook.room import tls
from servebook.room.hub import why_not_apart
from servebook.settings import load_settings

KEY = "the-instructors-key"
LAB = "01_openai_rest"
CPU_SECONDS = 18
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

    def run(self, *words: str) -> str:
        """A `servebook room` command of the instructor's."""
        done = subprocess.run([*CLI, "room", *words], env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

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
    accounts = {account.pw_name for account in pwd.getpwall()}
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
        for name in {account.pw_name for account in pwd.getpwall()} - accounts:
            subprocess.run(["userdel", name], check=True)


@pytest.fixture(scope="module")
def kernels(room: Room) -> dict[str, Kernel]:
    """Three learners at their desks, each in lab 01 with its setup cell run."""

    def sit_down(name: str) -> Kernel:
        desk = room.desk(name)
        desk.open()
        kernel = Kernel(desk)
        for cell in desk.notebook(f"labs/{LAB}/{LAB}.ipynb").cells:
            if cell.id in ("parameters", "setup"):
                kernel.run(cell.source)
        return kernel

    names = ["ada", "alan", "grace"]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(sit_down, names), strict=True))


@pytest.fixture
def apart(room: Room) -> None:
    """Skips, and says why, where desks cannot be kept apart."""
    if why := why_not_apart(load_settings(state_dir=room.folder)):
        pytest.skip(f"desks cannot be kept apart here: {why}")


def solve(kernel: Kernel) -> None:
    """Do the first exercise and have it checked."""
    kernel.run(answer_of(ROOT / "solutions", LAB, "01-1"))
    assert "✓ 01.1" in kernel.run('check("01.1")')


def test_names_that_are_none_are_refused_with_the_rule(room: Room) -> None:
    door = Door(room.url)
    rule = "A name has 1 to 23 letters a to z, digits, _ and -, and begins with a letter or digit."
    for name in ("x\n", "root", "a" * 60, "../x", "-x", "x y", "", "ñ"):
        assert door.sign_in(name, "long enough", room.code()) == (403, rule), name
    assert door.sign_in("daemon", "long enough", room.code())[1].startswith("daemon is an account of this machine.")


def test_only_who_has_the_code_signs_up_and_a_guesser_does_not_lock_the_door(room: Room) -> None:
    stranger, learner = Door(room.url, "127.0.0.66"), Door(room.url, "127.0.0.2")
    assert stranger.sign_in("mallory", "long enough")[0] == 403
    guesses = [stranger.sign_in("mallory", "long enough", f"AAAA-{number:04}") for number in range(20)]
    assert guesses[0] == (403, "That is not the join code of this room.")
    assert guesses[-1][0] == 429
    assert "Too many wrong tries from here. Wait" in guesses[-1][1]
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


def test_of_two_who_choose_one_name_at_once_one_gets_it(room: Room) -> None:
    doors = [Door(room.url, f"127.0.0.{number}") for number in (4, 5)]
    with ThreadPoolExecutor() as pool:
        came = list(pool.map(lambda door: door.sign_in("twin", f"the password of {id(door)}", room.code()), doors))
    assert sorted(status for status, _ in came) == [302, 403], came
    assert any("taken" in said for _, said in came)


def test_who_guesses_a_password_does_not_lock_its_learner_out(room: Room) -> None:
    """The learner comes from elsewhere; or from the same address, with the browser that has signed in before."""
    emmy, stranger, elsewhere = Door(room.url), Door(room.url), Door(room.url, "127.0.0.2")
    assert emmy.sign_in("emmy", "long enough", room.code()) == (302, "")
    guesses = [stranger.sign_in("emmy", f"wrong {number}") for number in range(15)]
    assert guesses[0][0] == 403
    assert guesses[-1][0] == 429
    assert stranger.sign_in("emmy", "long enough")[0] == 429  # what is right is not told either
    emmy.browser.get(f"{room.url}/hub/logout", timeout=10)
    assert emmy.sign_in("emmy", "long enough") == (302, "")
    assert elsewhere.sign_in("emmy", "long enough") == (302, "")


def test_a_password_that_was_forgotten_is_chosen_anew_and_a_new_code_replaces_the_old(room: Room) -> None:
    old = room.code()
    assert old in room.run("code")
    room.run("reset", "emmy")
    room.run("code", "--new")
    door = Door(room.url, "127.0.0.3")
    assert door.sign_in("emmy", "another one", old)[0] == 403
    assert door.sign_in("emmy", "another one", room.code()) == (302, "")
    assert stat.S_IMODE((room.folder / "room").stat().st_mode) == 0o700
    assert b"another one" not in (room.folder / "room" / "passwords.sqlite").read_bytes()


@pytest.mark.browser
def test_a_browser_signs_up_by_the_pictures_address_and_finds_the_first_notebook(room: Room, chromium: Browser) -> None:
    page = chromium.new_page(ignore_https_errors=True)
    page.goto(f"{room.url}/hub/login#{room.code()}")
    expect(page.get_by_label("Join code")).to_have_value(room.code())
    page.get_by_label("Username").fill("hedy")
    page.locator("#password_input").fill("short")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("A password has 8 to 128 characters.")).to_be_visible()
    page.get_by_label("Username").fill("hedy")
    page.locator("#password_input").fill("long enough")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("tab", name="00_start_here.ipynb")).to_be_visible(timeout=120_000)
    room.desk("hedy", password="long enough").close()


def test_three_learners_run_the_first_notebook_and_pass_an_exercise(room: Room, kernels: dict[str, Kernel]) -> None:
    def work(kernel: Kernel) -> str:
        desk = kernel.desk
        chapter = Kernel(desk)
        for cell in desk.notebook("notebooks/00_start_here.ipynb").cells:
            if cell.cell_type == "code":
                chapter.run(cell.source)
        answer = kernel.run(
            "import subprocess\nprint(subprocess.run(['servebook', 'labs', 'init', 'labs'], capture_output=True, "
            "text=True).stdout)\nprint(url, key)"
        )
        assert "left as they were" in answer
        solve(kernel)
        return answer.split()[-1]

    with ThreadPoolExecutor() as pool:
        keys = list(pool.map(work, kernels.values()))
    assert len(set(keys)) == 3
    rows = requests.get(f"{room.front}/room/learners", headers=bearer(KEY), timeout=10).json()
    assert {row["name"] for row in rows if row["served"] > 2} == set(kernels)
    kept = room.folder / "room" / "keys.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    for text in (kept.read_text(), room.log("front"), room.log("hub"), room.output.read_text()):
        assert not any(key in text for key in [*keys, KEY])
    assert "capital of Japan" not in room.log("front")
    assert "instructor's notes" not in json.dumps(kernels["ada"].desk.notebook("notebooks/00_start_here.ipynb"))


@pytest.mark.browser
def test_the_instructor_sees_in_a_browser_who_is_where(
    room: Room, kernels: dict[str, Kernel], chromium: Browser
) -> None:
    kernels["grace"].run('check("01.2")')
    told = room.run("watch", "--once")
    where = told.split()[3]
    assert re.search(r"grace\W+01\.2\W+wrong", told), told
    assert re.search(r"ada\W+01\.1\W+passed", told)
    assert "grace" not in room.run("watch", "--once", "--hide-names")
    page = chromium.new_page(ignore_https_errors=True)
    page.goto(where)
    rows = page.locator("#learners tr")
    expect(rows.first).to_contain_text("grace01.2✗ not yet")
    expect(rows.first).to_contain_text("its cell has not run in this session")
    expect(rows.filter(has_text="ada")).to_contain_text("✓ passed")
    expect(page.get_by_role("status")).to_contain_text("engine ready")
    page.get_by_label("hide names").check()
    expect(rows.first).to_contain_text("learner")
    expect(rows.filter(has_text="grace")).to_have_count(0)
    assert page.url == f"{room.url}/services/watch/", "the key has left the address bar"
    page.close()
    stranger = chromium.new_page(ignore_https_errors=True)
    stranger.goto(f"{room.url}/services/watch/")
    expect(stranger.get_by_role("status")).to_contain_text("Open this page by the address of `servebook room watch`.")
    expect(stranger.locator("#learners tr")).to_have_count(0)


def test_a_runaway_loop_leaves_the_engine_to_the_others(kernels: dict[str, Kernel]) -> None:
    runaway, *others = kernels.values()
    runaway.run(
        """
        import threading, time
        seen, hints, stop = [], [], time.monotonic() + 12
        def loop():
            ask = {"model": vllm.model, "prompt": "Once", "max_tokens": 20, "ignore_eos": True}
            while time.monotonic() < stop:
                answer = requests.post(f"{url}/v1/completions", json=ask, headers={"Authorization": f"Bearer {key}"})
                seen.append(answer.status_code)
                hints.append(answer.headers.get("Retry-After"))
        threads = [threading.Thread(target=loop) for _ in range(40)]
        for thread in threads:
            thread.start()
        """.replace("\n        ", "\n")
    )
    for kernel in others:
        solve(kernel)
    seen = json.loads(
        runaway.run(
            "for thread in threads: thread.join()\n"
            "print(json.dumps([seen.count(200), seen.count(429), sum(h is not None for h in hints), len(seen)]))"
        )
    )
    served, refused, hinted, all_of_them = seen
    assert served + refused == all_of_them
    assert 16 < served <= 150  # a minute's share, and what 12 s add to it
    assert refused == hinted > 0


def test_a_notebook_that_never_ends_is_ended(kernels: dict[str, Kernel]) -> None:
    kernel = Kernel(kernels["alan"].desk)
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
def test_a_desk_that_forks_without_end_stops_at_its_limit(kernels: dict[str, Kernel]) -> None:
    told = kernels["ada"].run(
        "import subprocess\nmany = []\ntry:\n    while True: many.append(subprocess.Popen(['sleep', '600']))\n"
        "except OSError as error: print(len(many), type(error).__name__)\n"
        "for one in many: one.kill()\nfor one in many: one.wait()"
    )
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

    eventually(reachable, "the desk, behind a new proxy", seconds=20)  # 5 s where the machine has nothing else to do
    kernel.reconnect()
    assert kernel.run("print(kept)") == "through a new proxy\n"


@pytest.mark.survives("the hub killed (SIGKILL)", "room", lost="nothing: desks go on")
def test_desks_outlive_a_hub_that_is_killed(room: Room, kernels: dict[str, Kernel]) -> None:
    kernel = kernels["grace"]
    kernel.run("kept = 'still here'")
    before = room.hub()
    before.kill()
    assert kernel.run("print(kept)") == "still here\n"  # through the proxy, without a hub
    solve(kernel)

    def back() -> bool:
        with suppress(requests.RequestException):
            return requests.get(f"{room.url}/hub/health", timeout=5).ok
        return False

    eventually(back, "the new hub", seconds=60)
    assert room.hub().pid != before.pid
    assert kernel.desk.servers()[""]["ready"]
    assert kernel.run("print(kept)") == "still here\n"
    assert kernel.desk.ask("GET", "api/kernels")


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
    kernel.desk.close()
    refused = kernel.desk.hub_ask("POST", "users/ada/server")
    assert (refused.status_code, refused.json()["message"]) == (403, "The instructor has revoked the key of ada.")
    shown = room.run("admit", "ada").split()
    assert requests.get(f"{room.front}/v1/models", headers=bearer(shown[-1].partition("=")[2]), timeout=10).ok


def test_learners_at_once_pass_every_check_of_labs_01_and_02(room: Room) -> None:
    told = room.run("load", "--learners", "3")
    assert "30 checks passed, 0 checks refused, 0 checks failed" in told
    assert "× 200" in told
    assert "load-" not in room.run("learners")


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
    assert room.process.wait(60) == 130, room.output.read_text()
    assert "Traceback" not in room.output.read_text()
    eventually(lambda: not room.family(), "the end of every process of the room")
