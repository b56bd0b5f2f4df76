"""Chapter 10: replicas of vLLM behind vLLM's router; one killed, one drained and added, and the router killed.

Lifetimes are tested with the real router in front of servers that are up at once; what callers see, with real engines.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import requests
from desk import Desk, eventually

from servebook import launch
from servebook.bench.resources import is_engine
from servebook.clients import CLIENTS
from servebook.errors import LaunchError, ServebookError
from servebook.processes import free_port
from servebook.settings import Settings
from servebook.ways.client import Answer
from servebook.ways.metrics import metric
from servebook.ways.scale_out.client import RouterClient
from servebook.workbook.notebook import measure_pace

# Engines start, and one of them in front of 32 callers: minutes where other lanes run beside.
pytestmark = pytest.mark.timeout(900)

REPLICAS = ["vllm-replica-1", "vllm-replica-2"]
PROMPT = "The capital of France is"
CALLERS = 16


def url(entry: dict[str, Any]) -> str:
    return f"http://{entry['endpoints']['http']}"


# --- lifetimes ----------------------------------------------------------------------------------------------------


def client_of(desk: Desk) -> RouterClient:
    router = desk.status("router")
    assert router["state"] == "ready"
    return RouterClient(url(router), router["endpoints"]["metrics"])


def test_up_starts_the_replicas_too_and_down_takes_them_along(desk: Desk) -> None:
    desk.run("up", "router", "--replicas", "2")
    entries = {name: desk.status(name) for name in ["router", *REPLICAS]}
    assert [(entry["state"], entry["owner"]) for entry in entries.values()] == [("ready", "cli")] * 3
    assert client_of(desk).replicas() == {url(entries[name]): True for name in REPLICAS}
    assert desk.run("up", "router").count("attached to") == 3
    ended = desk.run("down", "router").splitlines()
    assert ended == ["router: ended", "vllm-replica-1: ended", "vllm-replica-2: ended"]
    assert desk.family() == []


def test_what_was_killed_comes_back_by_up_and_the_rest_is_kept(desk: Desk) -> None:
    desk.run("up", "router")
    first, second, router = (desk.status(name) for name in [*REPLICAS, "router"])

    os.kill(router["pid"], signal.SIGKILL)
    eventually(lambda: desk.status("router")["state"] == "failed", "the router's end in the status")
    desk.run("up", "router")
    assert [desk.status(name) for name in REPLICAS] == [first, second]

    router = desk.status("router")
    os.kill(first["pid"], signal.SIGKILL)
    eventually(lambda: desk.status(REPLICAS[0])["state"] == "failed", "the replica's end in the status")
    desk.run("up", "router")
    assert (desk.status("router"), desk.status(REPLICAS[1])) == (router, second)
    assert desk.status(REPLICAS[0])["endpoints"] == first["endpoints"], "at the same place, where the router asks"
    eventually(lambda: all(client_of(desk).replicas().values()), "both healthy again")


def test_a_taken_port_is_not_the_routers_end(desk: Desk) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert f"port {port} was taken" in desk.run("up", "router", router_http_port=str(port))
    assert client_of(desk).url != f"http://127.0.0.1:{port}"


def test_another_number_of_replicas_is_not_silently_ignored(desk: Desk) -> None:
    desk.run("up", "router", "--replicas", "1")
    assert "up with other settings" in desk.run("up", "router", "--replicas", "2", expect=1)
    assert desk.status("router")["state"] == "ready"


def test_more_replicas_than_cores(desk: Desk) -> None:
    cores = len(os.sched_getaffinity(0))
    text = desk.run("up", "router", expect=1, device="cpu", replicas=str(cores + 1))
    assert f"{cores + 1} replicas need {cores + 1} cores, one each, and {cores} can be used here" in text
    assert f"--replicas {cores}" in text
    assert desk.family() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["router", "--replicas", "0"], "or equal to 1"),
        (["router", "--replicas", "65"], "or equal to 64"),
        (["vllm", "--replicas", "2"], "--replicas is for `router`"),
    ],
)
def test_replicas_that_make_no_sense(desk: Desk, words: list[str], says: str) -> None:
    assert says in desk.run("up", *words, expect=2)


def test_a_replica_that_cannot_start_takes_the_others_along(desk: Desk) -> None:
    text = desk.run("up", "router", expect=1, engine_args="--die 3")
    assert "vllm-replica-1 ended before it was ready (exit code 3)" in text
    desk.nothing_left()


def test_the_router_is_not_opened_to_the_network(desk: Desk) -> None:
    text = desk.run("up", "router", expect=1, host="0.0.0.0", api_key="anybody could remove a replica")
    assert "router does not check an API key" in text
    assert desk.family() == []


def test_the_router_is_not_installed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servebook.launch.table.find_spec", lambda _: None)
    with pytest.raises(LaunchError, match="make setup"):
        launch.serve("router", settings=settings)


def test_a_router_that_is_not_there_is_said_in_words() -> None:
    client = RouterClient(url := f"http://127.0.0.1:{free_port()}", url)
    for ask in (client.replicas, lambda: client.add("http://127.0.0.1:1"), lambda: client.sent("http://127.0.0.1:1")):
        with pytest.raises(ServebookError, match=r"(no router|no metrics) at http://127\.0\.0\.1.*\n→"):
            ask()


def test_a_router_that_is_slow_is_not_said_to_be_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any, **__: Any) -> None:
        raise requests.ReadTimeout

    monkeypatch.setattr(requests, "request", slow)
    with pytest.raises(ServebookError, match=r"has not answered GET /workers for a minute"):
        RouterClient("http://127.0.0.1:1", "").replicas()


def test_only_a_replica_that_the_router_has_can_be_removed(desk: Desk) -> None:
    """The router says of any name that it has removed it: drain() returned, and requests went on going there."""
    desk.run("up", "router")
    client = client_of(desk)
    leaving, kept = client.replicas()
    for other in (f"{leaving}/", leaving.removeprefix("http://"), leaving.replace("127.0.0.1", "localhost")):
        for leave in (client.remove, client.drain):
            with pytest.raises(ServebookError, match=f"no replica {other}: nothing was removed.\n.*{leaving}, {kept}"):
                leave(other)
    assert list(client.replicas()) == [leaving, kept]
    client.remove(leaving)
    client.remove(leaving)  # as a second drain() does, of one that was still at work
    assert list(client.replicas()) == [kept]
    client.add(leaving)
    assert list(client.replicas()) == [leaving, kept]


def test_each_replica_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 8, 9})
    wanted = settings.model_copy(update={"device": "cpu", "replicas": 2})
    replicas = launch.find_server("router").needs(wanted)
    assert [each.cores for each in replicas.values()] == ["2,3", "5,8,9"]
    assert len({each.port("vllm", "http") for each in replicas.values()}) == 2
    replicas = launch.find_server("router").needs(wanted.model_copy(update={"cores": "9,3"}))
    assert [each.cores for each in replicas.values()] == ["3", "9"]
    with pytest.raises(LaunchError, match="2 replicas need 2 cores, one each, and 1 can be used here"):
        launch.find_server("router").needs(wanted.model_copy(update={"cores": "3"}))


# --- with real engines --------------------------------------------------------------------------------------------


@pytest.fixture
def client(router: launch.Server) -> RouterClient:
    """Both replicas healthy and idle, whatever the test before did."""
    there = launch.serve(router.name)  # a test may have killed it, and another lane taken its ports meanwhile
    client = RouterClient(there.url, there.metrics)
    eventually(lambda: list(client.replicas().values()) == [True, True], "two healthy replicas")
    eventually(lambda: not any(map(running, client.replicas())), "idle replicas")
    return client


def running(replica: str) -> float:
    return metric(replica, "vllm:num_requests_running") + metric(replica, "vllm:num_requests_waiting")


def entry(name: str) -> dict[str, Any]:
    return dict(next(entry for entry in launch.status() if entry["name"] == name))


def complete(router: launch.Server, prompt: str = PROMPT, **params: Any) -> requests.Response:
    body = {"model": router.model, "prompt": prompt, "temperature": 0, "max_tokens": 4} | params
    return requests.post(f"{router.url}/v1/completions", json=body, timeout=300)


def sent_by(client: RouterClient, work: Callable[[], Any]) -> list[int]:
    """How many requests `work` made the router send to each replica."""
    before = [client.sent(replica) for replica in client.replicas()]
    work()
    return [client.sent(replica) - sent for replica, sent in zip(client.replicas(), before, strict=True)]


def test_requests_are_spread(router: launch.Server, client: RouterClient) -> None:
    answers: list[requests.Response] = []
    assert sent_by(client, lambda: answers.extend(complete(router) for _ in range(6))) == [3, 3]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1, "one model, one answer"


async def test_its_clients_are_those_of_a_replica(router: launch.Server, client: RouterClient) -> None:
    greedy = {"temperature": 0, "max_tokens": 4}
    answer = Answer(complete(router).json()["choices"][0]["text"], 4, 5, "length")
    with CLIENTS["router"].client(router) as one:
        assert one.generate(PROMPT, **greedy) == answer
        assert "".join(piece.text for piece in one.stream(PROMPT, **greedy)) == answer.text
    async with CLIENTS["router"].aio_client(router) as aio:
        assert await aio.generate(PROMPT, **greedy) == answer
        assert "".join([piece.text async for piece in aio.stream(PROMPT, **greedy)]) == answer.text


def test_replicas_compute_on_different_cores(settings: Settings, client: RouterClient) -> None:
    if settings.on_gpu:
        pytest.skip("engines on a GPU are bound to no cores")
    cores = [child for name in REPLICAS for child in psutil.Process(entry(name)["pid"]).children() if is_engine(child)]
    one, other = (os.sched_getaffinity(core.pid) for core in cores)
    assert one.isdisjoint(other)


def test_a_stream_passes_as_it_comes(router: launch.Server, client: RouterClient) -> None:
    body = {"model": router.model, "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with requests.post(f"{router.url}/v1/completions", json=body, stream=True, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()  # kept: where the iterator ends, so does the connection
        assert next(lines).startswith(b"data: ")
        eventually(lambda: sum(map(running, client.replicas())) == 1, "the engine writes on")
    eventually(lambda: not any(map(running, client.replicas())), "idle replicas")


def test_a_callers_mistake_is_not_tried_again(router: launch.Server, client: RouterClient) -> None:
    def wrong() -> None:
        assert complete(router, max_tokens=100_000).status_code == 400

    assert sum(sent_by(client, wrong)) == 1


def test_a_drained_replica_gets_nothing_new_and_finishes_what_it_has(
    router: launch.Server, client: RouterClient
) -> None:
    kept, leaving = client.replicas()
    # They are at work still when the replica leaves, on an engine of any speed.
    tokens = measure_pace(lambda n: complete(router, max_tokens=n, ignore_eos=True)).tokens(4, at_least=100)
    eventually(lambda: not any(map(running, client.replicas())), "idle replicas")
    at = client.sent(leaving)
    with ThreadPoolExecutor() as pool:
        long = [pool.submit(complete, router, max_tokens=tokens, ignore_eos=True) for _ in range(4)]
        eventually(lambda: client.sent(leaving) == at + 2, "two long requests at each replica")
        drained = pool.submit(client.drain, leaving, 300)
        try:
            eventually(lambda: list(client.replicas()) == [kept], "one replica less")
            assert not any(each.done() for each in long)
            assert {complete(router).status_code for _ in range(4)} == {200}
            drained.result(timeout=330)
            assert running(leaving) == 0, "the long ones have ended"
            assert [each.result(timeout=60).json()["usage"]["completion_tokens"] for each in long] == [tokens] * 4
            assert client.sent(leaving) == at + 2
        finally:
            client.add(leaving)
    with pytest.raises(ServebookError, match="already exists"):
        client.add(leaving)
    assert sent_by(client, lambda: [complete(router) for _ in range(4)]) == [2, 2]


def end_of_stream(router: launch.Server, tokens: int) -> str:
    """The last line of a long stream, or the name of the error that cut it."""
    body = {"model": router.model, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    try:
        with requests.post(f"{router.url}/v1/completions", json=body, stream=True, timeout=300) as answer:
            *_, last = [line for line in answer.iter_lines() if line]
    except requests.exceptions.ChunkedEncodingError as error:
        return type(error).__name__
    return str(last.decode())


@pytest.mark.survives("one of two engines killed (SIGKILL)", "router", lost="what that engine had begun")
def test_a_replica_killed_under_load_loses_no_request_that_has_not_begun(
    router: launch.Server, client: RouterClient
) -> None:
    """A stream that has begun cannot be taken back: it is not tried again, and does not end as if it were whole."""
    doomed, other = client.replicas()

    def begun() -> list[float]:
        """Counts that stay when an answer has ended: a slow look at them misses nothing."""
        return [metric(replica, "vllm:time_to_first_token_seconds_count") for replica in (doomed, other)]

    # All must be at work still when the replica dies, on an engine of any speed.
    pace = measure_pace(lambda n: complete(router, max_tokens=n, ignore_eos=True))
    tokens = pace.tokens(3, at_least=32)
    victim = entry(REPLICAS[0])["pid"]
    first, second = begun()
    with ThreadPoolExecutor(2 * CALLERS + 2) as pool:
        streams = [pool.submit(end_of_stream, router, pace.tokens(6, at_least=200)) for _ in range(2)]
        eventually(lambda: begun() == [first + 1, second + 1], "one stream at each replica")
        at_doomed = client.sent(doomed)
        early = [pool.submit(complete, router, max_tokens=tokens, ignore_eos=True) for _ in range(CALLERS)]
        eventually(lambda: client.sent(doomed) == at_doomed + CALLERS / 2, "half of the requests at the replica")
        os.kill(victim, signal.SIGKILL)
        late = [pool.submit(complete, router) for _ in range(CALLERS)]
        answers = [each.result(timeout=300) for each in early + late]
        assert sorted(each.result(timeout=300) for each in streams) == ["ChunkedEncodingError", "data: [DONE]"]
    assert [answer.status_code for answer in answers] == [200] * (2 * CALLERS)
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers[:CALLERS]] == [tokens] * CALLERS
    assert metric(router.metrics, "vllm_router_retries_total") >= CALLERS / 2
    eventually(lambda: client.replicas()[doomed] is False, "the router's health check to see it")
    assert [entry(name)["state"] for name in ["router", *REPLICAS]] == ["ready", "failed", "ready"]

    assert launch.serve("router").pid == router.pid
    eventually(lambda: client.replicas()[doomed], "the router to take it back")
    eventually(lambda: min(sent_by(client, lambda: [complete(router) for _ in range(2)])) > 0, "requests at both")


@pytest.mark.survives("the server killed (SIGKILL)", "router", lost="what was under way")
def test_a_killed_router_comes_back_in_front_of_the_same_replicas(router: launch.Server, client: RouterClient) -> None:
    pids = [entry(name)["pid"] for name in REPLICAS]
    os.kill(entry("router")["pid"], signal.SIGKILL)
    eventually(lambda: entry("router")["state"] == "failed", "the router's end in the status")
    with pytest.raises(requests.ConnectionError):
        complete(router)
    back = launch.serve("router")
    assert [entry(name)["pid"] for name in REPLICAS] == pids
    assert {complete(back).status_code for _ in range(4)} == {200}


@pytest.mark.ends("router")
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("client")
def test_notebook(run_notebook: Callable[[str], None]) -> None:
    """It kills the router and a replica and has them started anew by its kernel, with which they end."""
    run_notebook("10_scale_out")
