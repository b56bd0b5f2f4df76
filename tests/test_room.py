"""A room of learners: JupyterHub, a desk and a key for each, one engine that nobody can take from the rest."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from aiohttp import web
from aiohttp.test_utils import BaseTestServer, TestServer
from classroom import Kernel, LearnersDesk, answer_of
from desk import eventually

from servebook.checkout import ROOT
from servebook.errors import LaunchError, ServebookError
from servebook.launch import Server
from servebook.launch.processes import free_port
from servebook.launch.table import find_server
from servebook.room.admin import instructors_key
from servebook.room.front import RELAYED, Front, asked_for
from servebook.room.keys import Roll
from servebook.room.limits import Bucket, Limits, Refused, Turnstile
from servebook.settings import Settings, load_settings

KEY = "the-instructors-key"
LAB = "01_openai_rest"
CPU_SECONDS = 18


class Room:
    """A room that `servebook room start` keeps, in a state folder of its own, on the run's engine."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self.front = f"http://127.0.0.1:{free_port()}"
        settings = {
            "state_dir": str(folder),
            "engine_url": engine,
            "api_key": KEY,
            "hub_http_port": self.url.rpartition(":")[2],
            "room_http_port": self.front.rpartition(":")[2],
            "hub_routes_port": str(free_port()),
            "hub_api_port": str(free_port()),
            "room_cpu_seconds": str(CPU_SECONDS),
            "room_memory_gib": "2",
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

    def desk(self, name: str) -> LearnersDesk:
        return LearnersDesk(self.url, KEY, name)

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
    room = Room(tmp_path_factory.mktemp("room") / "state", vllm.url)
    try:
        eventually(room.opened, "the room", seconds=60)
        yield room
    finally:
        room.process.send_signal(signal.SIGINT)
        room.process.wait(60)


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


def solve(kernel: Kernel) -> None:
    """Do the first exercise and have it checked."""
    kernel.run(answer_of(ROOT / "solutions", LAB, "01-1"))
    assert "✓ 01.1" in kernel.run('check("01.1")')


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
    for text in (kept.read_text(), room.log("room"), room.log("hub"), room.output.read_text()):
        assert not any(key in text for key in [*keys, KEY])
    assert "capital of Japan" not in room.log("room")
    assert "instructor's notes" not in json.dumps(kernels["ada"].desk.notebook("notebooks/00_start_here.ipynb"))


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


def test_a_revoked_key_opens_nothing_any_more(room: Room, kernels: dict[str, Kernel]) -> None:
    kernel = kernels["ada"]
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
    kernels["alan"].desk.close()
    eventually(lambda: not room.family(home), "the end of every process of a desk")


def test_ctrl_c_ends_the_room(room: Room) -> None:
    assert room.family()
    room.process.send_signal(signal.SIGINT)
    assert room.process.wait(60) == 130, room.output.read_text()
    assert "Traceback" not in room.output.read_text()
    eventually(lambda: not room.family(), "the end of every process of the room")


# --- the front, without an engine -------------------------------------------------------------------------------


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_counts_until_it_is_replaced_or_revoked(tmp_path: Path) -> None:
    roll = Roll(tmp_path / "keys.json")
    first = roll.issue("ada")
    second = roll.issue("ada")
    other = roll.issue("grace")
    assert [roll.name_of(key) for key in (first, second, other, "")] == [None, "ada", "grace", None]
    assert roll.revoke("ada")
    assert roll.revoked("ada")
    assert roll.name_of(second) is None
    again = Roll(tmp_path / "keys.json")
    assert again.name_of(other) == "grace"
    assert again.revoked("ada")
    assert not again.revoke("nobody")
    assert again.forget("grace")
    assert again.name_of(other) is None
    with pytest.raises(ValueError, match="cannot name a learner"):
        roll.issue("../x")


def test_a_bucket_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bucket = Bucket(per_minute=60)
    assert bucket.take(50) == 0
    assert bucket.take(20) == 10
    now = 10.0
    assert bucket.take(20) == 0
    now = 100.0
    assert bucket.take(10**6) == 0  # more than it ever holds: when it is full
    assert bucket.take(10**6) == 60
    assert bucket.take(1) == 1
    bucket.give_back(10**6)
    assert bucket.level == 60
    assert bucket.take(60) == 0
    bucket.give_back(20)
    assert bucket.take(20) == 0
    assert bucket.take(1) == 1


@pytest.mark.parametrize(
    ("path", "ask", "tokens"),
    [
        ("/v1/completions", {"prompt": "a"}, 16),
        ("/v1/chat/completions", {"messages": []}, 256),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 5, "n": 3}, 30),
        ("/v1/chat/completions", {"max_completion_tokens": 7, "max_tokens": 100}, 7),
        ("/v1/completions", {"max_completion_tokens": 7, "max_tokens": 100}, 100),  # the first is chat's alone
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        ("/v1/completions", {"prompt": [[1, 2, 3], [4]], "max_tokens": 5}, 10),
        ("/v1/chat/completions", {"prompt": [], "max_tokens": 5}, 5),
        ("/v1/completions", {"max_tokens": 5.0, "n": -1}, 5),
        ("/v1/completions", {"max_tokens": -1}, 0),
        ("/v1/completions", {"max_tokens": None}, 16),
        ("/v1/completions", [], 0),
        ("/v1/responses", {"max_output_tokens": 9, "max_tokens": 1}, 9),
        ("/v1/messages", {"max_tokens": 9}, 9),
        ("/inference/v1/generate", {"max_tokens": 1, "sampling_params": {"max_tokens": 9, "n": 2}}, 18),
        ("/inference/v1/generate", {"token_ids": [1]}, 0),
    ],
)
def test_tokens_count_as_asked_for(path: str, ask: object, tokens: int) -> None:
    assert asked_for(path, json.dumps(ask).encode()) == tokens


class StandIn:
    """In the place of vLLM: notes what reaches it, and answers with `status`."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.status = 200

    async def answer(self, request: web.Request) -> web.Response:
        self.seen.append(request.raw_path)
        return web.json_response({}, status=self.status)


class Caller:
    """A learner with a key, in front of a front with these limits."""

    def __init__(self, front: BaseTestServer, key: str) -> None:
        self.front = front
        self.key = key

    async def ask(self, method: str, path: str, body: object = None, key: str | None = None) -> tuple[int, Any, str]:
        """Status, JSON and Retry-After of the answer. The path goes out as it is; a body of bytes does, too."""

        def send() -> tuple[int, Any, str]:
            connection = HTTPConnection("127.0.0.1", self.front.port, timeout=30)
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, raw, bearer(self.key if key is None else key))
            with closing(connection), connection.getresponse() as answer:
                return answer.status, json.loads(answer.read()), answer.headers.get("Retry-After", "")

        return await asyncio.to_thread(send)

    async def counted(self) -> list[str]:
        """The front's counters of requests."""
        page = await asyncio.to_thread(requests.get, str(self.front.make_url("/room/metrics")), timeout=10)
        return [line for line in page.text.splitlines() if line.startswith("room_requests_total")]

    async def complete(self, max_tokens: int) -> tuple[int, Any, str]:
        return await self.ask("POST", "/v1/completions", {"max_tokens": max_tokens})


@pytest.fixture
async def engine() -> AsyncIterator[tuple[StandIn, str]]:
    stand_in, app = StandIn(), web.Application()
    app.add_routes([web.route("*", "/{path:.*}", stand_in.answer)])
    async with TestServer(app) as server:
        yield stand_in, str(server.make_url(""))


@asynccontextmanager
async def caller(folder: Path, upstream: str, limits: Limits | None = None) -> AsyncIterator[Caller]:
    roll = Roll(folder / "keys.json")
    async with TestServer(Front(upstream, KEY, roll, limits or Limits()).app()) as server:
        yield Caller(server, roll.issue("ada"))


async def test_what_the_engine_refused_costs_no_tokens(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url) as ada:
        stand_in.status = 400
        assert [(await ada.complete(10**6))[0] for _ in range(3)] == [400] * 3
        stand_in.status = 200
        assert (await ada.complete(10**6))[0] == 200
        status, _, wait = await ada.complete(3000)
        assert status == 429
        assert 0 < int(wait) <= 30  # not the hours that it would take to make up for a million


@pytest.mark.parametrize(("why", "limits"), [("room_full", Limits(waiting=0)), ("engine_unavailable", Limits())])
async def test_what_the_room_refused_costs_no_tokens(tmp_path: Path, why: str, limits: Limits) -> None:
    async with caller(tmp_path, f"http://127.0.0.1:{free_port()}", limits) as ada:
        for _ in range(2):
            status, answer, _ = await ada.complete(6000)
            assert (status, answer["error"]["type"]) == (503, why)


async def test_paths_that_are_relayed(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    stand_in, url = engine
    paths = [*RELAYED, "/v1/models?a=%2F..&b=/../x"]
    async with caller(tmp_path, url) as ada:
        for path in paths:
            assert (await ada.ask("POST", path, {}))[0] == 200
        assert [(await ada.ask("GET", path, key=""))[0] for path in ("/metrics", "/tokenize")] == [200, 401]
    assert [path.partition("?")[0] for path in stand_in.seen] == [*RELAYED, "/v1/models", "/metrics"]


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/v1/../invocations",
        "/v1/%2e%2e/invocations",
        "/v1/x/../completions",
        "/v1/./completions",
        "/v1//completions",
        "//v1/completions",
        "/v1/completions/",
        "/v1/complet%69ons",
        "/v1/models/../../invocations",
        "/health/../invocations",
        "/tokenize/..%2finvocations",
        "/v1/chat/completions/batch",
        "/inference/v1/abort_requests",
    ],
)
async def test_no_other_path_reaches_the_engine(engine: tuple[StandIn, str], tmp_path: Path, path: str) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url) as ada:
        status, answer, _ = await ada.ask("POST", path, {"max_tokens": 9})
    assert (status, answer["error"]["type"]) == (404, "not_found")
    assert not stand_in.seen


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"max_tokens": Infinity}', 400, "max_tokens must be a whole number"),
        (b'{"max_tokens": 1e999}', 400, "max_tokens must be a whole number"),
        (b'{"max_tokens": NaN}', 400, "max_tokens must be a whole number"),
        (b'{"max_tokens": "2000.0"}', 400, "max_tokens must be a whole number"),  # vLLM reads 2000
        (b'{"max_tokens": 5, "n": 0.5}', 400, "n must be a whole number"),
        (b"[" * 200_000, 400, "nested too deeply"),
        (b" " * ((1 << 20) + 1), 413, "exceeded"),
    ],
)
async def test_what_cannot_be_counted_is_refused(
    engine: tuple[StandIn, str], tmp_path: Path, body: bytes, status: int, says: str
) -> None:
    stand_in, url = engine
    async with caller(tmp_path, url) as ada:
        got, answer, _ = await ada.ask("POST", "/v1/completions", body)
        assert (got, answer["error"]["code"]) == (status, status)
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert says in answer["error"]["message"]
        assert await ada.counted() == [f'room_requests_total{{path="/v1/completions",status="{status}"}} 1.0']
    assert not stand_in.seen


async def test_a_body_that_is_not_what_its_header_says(engine: tuple[StandIn, str], tmp_path: Path) -> None:
    _, url = engine
    async with caller(tmp_path, url) as ada:
        target, headers = str(ada.front.make_url("/v1/completions")), bearer(ada.key) | {"Content-Encoding": "gzip"}
        answer = await asyncio.to_thread(requests.post, target, data=b"not gzip at all", headers=headers, timeout=10)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "The body cannot be read.")


async def hold(turnstile: Turnstile, name: str, entered: list[str], leave: asyncio.Event) -> None:
    async with turnstile.place(name):
        entered.append(name)
        await leave.wait()


async def test_free_places_go_round() -> None:
    turnstile = Turnstile(Limits(places=2, learner_places=4))
    entered: list[str] = []
    leave = asyncio.Event()
    names = ["greedy"] * 6 + ["ada", "grace", "ada"]
    tasks = [asyncio.create_task(hold(turnstile, name, entered, leave)) for name in names]
    await asyncio.sleep(0)
    assert entered == ["greedy", "greedy"]
    leave.set()
    await asyncio.gather(*tasks)
    assert entered[2:5] in (["greedy", "ada", "grace"], ["ada", "grace", "greedy"], ["ada", "greedy", "grace"])
    assert turnstile.running.total() == 0
    assert turnstile.waiting == 0


async def test_too_many_are_refused_and_leavers_free_their_place() -> None:
    turnstile = Turnstile(Limits(places=1, waiting=2, patience=0.2, learner_places=1))
    leave = asyncio.Event()
    first = asyncio.create_task(hold(turnstile, "ada", [], leave))
    await asyncio.sleep(0)
    second = asyncio.create_task(hold(turnstile, "ada", [], leave))
    third = asyncio.create_task(hold(turnstile, "grace", [], leave))
    await asyncio.sleep(0)
    with pytest.raises(Refused) as share:
        await hold(turnstile, "ada", [], leave)
    with pytest.raises(Refused) as full:
        await hold(turnstile, "alan", [], leave)
    assert (share.value.status, full.value.status) == (429, 503)
    second.cancel()
    with pytest.raises(Refused, match=r"within 0\.2 s"):
        await third
    assert turnstile.waiting == 0
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    assert turnstile.running.total() == 0


def test_the_front_needs_the_instructors_key(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="needs a key"):
        find_server("room").argv(Settings(state_dir=tmp_path), tmp_path, {"vllm": {"http": "127.0.0.1:8000"}})


def test_a_key_that_jupyterhub_would_not_take_is_refused_before_anything_starts() -> None:
    with pytest.raises(ServebookError, match="at least 8 characters"):
        instructors_key(load_settings(api_key="sevench"))
    assert instructors_key(load_settings(api_key="eight-ch")) == "eight-ch"
