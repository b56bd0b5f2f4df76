"""Checks against servers that compute nothing: what they take for granted of a learner's code, and of an engine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from openai import AsyncOpenAI

from servebook import lab
from servebook.lab.checks import c01_openai_rest, c02_sse_streaming, c06_kserve, c10_scale_out
from servebook.lab.feedback import NotYet
from servebook.lab.manifest import find_exercise
from servebook.lab.submission import Submission
from servebook.launch import Server
from servebook.settings import load_settings
from servebook.ways.metrics import metric

FINISHED = "vllm:request_success_total"
SECONDS_A_TOKEN = 0.0005
PROMPT_TOKENS = 4


class Machine(ThreadingHTTPServer):
    """A replica with that context length or, if it has `workers`, a router that answers for them itself."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, context: int, workers: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.context, self.workers = context, list(workers)
        self.running = self.finished = 0
        self.counting = threading.Lock()
        self.address = f"127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Machine

    def do_GET(self) -> None:
        if self.path == "/metrics":
            states = {"running": self.server.running, "waiting": 0}
            lines = [f"vllm:num_requests_{state} {count}" for state, count in states.items()]
            self.say(200, "\n".join([*lines, f"{FINISHED} {self.server.finished}", ""]))
        elif self.path == "/workers":
            self.say(200, {"workers": [{"url": url, "is_healthy": True} for url in self.server.workers]})
        else:
            self.say(200, {"data": [{"id": "m", "max_model_len": self.server.context}]})

    def do_POST(self) -> None:
        at = urlsplit(self.path)
        if at.path in ("/add_worker", "/remove_worker"):
            (url,) = parse_qs(at.query)["url"]
            (self.server.workers.append if at.path == "/add_worker" else self.server.workers.remove)(url)
            self.say(200, "")
            return
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["max_tokens"] + PROMPT_TOKENS > self.server.context:
            self.say(400, {"error": {"message": "This model's maximum context length is smaller."}})
            return
        with self.server.counting:
            self.server.running += 1
        try:
            self.write(asked)
        finally:
            with self.server.counting:
                self.server.running -= 1
                self.server.finished += 1

    def write(self, asked: dict[str, Any]) -> None:
        if not asked.get("stream"):
            content = f"about {asked['messages'][-1]['content']}" if "messages" in asked else None
            choice = {"index": 0, "text": " a", "message": {"role": "assistant", "content": content}}
            self.say(200, {"choices": [choice | {"finish_reason": "length"}]})
            return
        self.say(200, "", "text/event-stream")
        for number in range(asked["max_tokens"]):
            time.sleep(SECONDS_A_TOKEN)
            self.wfile.write(
                b"data: " + json.dumps({"choices": [{"index": 0, "text": f" {number}"}]}).encode() + b"\n\n"
            )
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, status: int, answer: object, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def up(context: int = 2048, workers: tuple[str, ...] = ()) -> Iterator[str]:
    """A machine's address."""
    with Machine(context, workers) as machine:
        threading.Thread(target=machine.serve_forever, daemon=True).start()
        yield machine.address
        machine.shutdown()


@contextmanager
def router(context: int = 2048) -> Iterator[Server]:
    """A router with two replicas of that context length."""
    with up(context) as one, up(context) as other, up(context, (f"http://{one}", f"http://{other}")) as at:
        yield Server("router", "m", {"http": at, "metrics": at}, load_settings())


def submission(exercise_id: str, **namespace: Any) -> Submission:
    return Submission(find_exercise(exercise_id)[1], namespace)


def test_questions_may_be_taken_off_the_list_one_by_one() -> None:
    async def ask_all(client: AsyncOpenAI, model: str, questions: list[str], max_tokens: int) -> list[Any]:
        async def one(question: str) -> str | None:
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], max_tokens=max_tokens
            )
            return answer.choices[0].message.content

        tasks = []
        while questions:
            tasks.append(asyncio.create_task(one(questions.pop(0))))
        return [await task for task in tasks]

    with up() as at:
        vllm = Server("vllm", "m", {"http": at}, load_settings())
        c01_openai_rest.check_01_5(submission("01.5", ask_all=ask_all, vllm=vllm))


def stream_text(url: str, key: str, model: str, prompt: str, max_tokens: int, most: int = 100) -> Iterator[str]:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    with requests.post(f"{url}/v1/completions", json=body, headers=headers, stream=True, timeout=60) as answer:
        for number, line in enumerate(line for line in answer.iter_lines() if line):
            if line == b"data: [DONE]" or number == most:
                return
            yield json.loads(line[6:])["choices"][0]["text"]


@pytest.mark.parametrize("most", [1, 5, 100])
def test_a_stream_that_is_left_before_its_end_is_no_whole_text(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had come by then would pass for all of it."""
    monkeypatch.setattr(sys.modules[__name__], "SECONDS_A_TOKEN", 0.3)  # so that the leaving is noticed
    with up() as at:
        vllm = Server("vllm", "m", {"http": at}, load_settings())
        answer = submission("02.2", stream_text=partial(stream_text, most=most), vllm=vllm)
        if most == 100:
            c02_sse_streaming.check_02_2(answer)
            return
        with pytest.raises(NotYet, match="read on until"):
            c02_sse_streaming.check_02_2(answer)


@pytest.mark.parametrize(("stream", "cause"), [("true", "not a truth value"), (None, "only when the request's JSON")])
def test_who_asks_for_a_stream_in_other_words_is_told_why(stream: object, cause: str) -> None:
    """A server takes the text "true" for true, so it is no matter of not having asked."""

    def stream_text(url: str, key: str, model: str, prompt: str, max_tokens: int) -> Iterator[str]:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": stream}
        requests.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        yield "a text"

    with up() as at:
        vllm = Server("vllm", "m", {"http": at}, load_settings())
        with pytest.raises(NotYet, match=cause):
            c02_sse_streaming.check_02_2(submission("02.2", stream_text=stream_text, vllm=vllm))


def test_outputs_may_be_taken_off_an_answer_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_: str, choices: int, asked_for: tuple[str, ...]) -> Any:
        counts = [{"name": "num_output_tokens", "data": [5, 7][:choices]}] * ("return_num_output_tokens" in asked_for)
        return {"outputs": [{"name": "text_output", "data": ["a", "b"][:choices]}, *counts]}

    def read_answer(answer: dict[str, Any]) -> tuple[list[str], int | None]:
        found = {}
        while answer["outputs"]:
            output = answer["outputs"].pop()
            found[output["name"]] = output["data"]
        counts = found.get("num_output_tokens")
        return found["text_output"], sum(counts) if counts else None

    monkeypatch.setattr(c06_kserve, "_answer", answer)
    kserve = Server("kserve", "m", {"http": "127.0.0.1:1"}, load_settings())
    c06_kserve.check_06_3(submission("06.3", read_answer=read_answer, kserve=kserve))


def test_replicas_may_be_taken_off_the_list_one_by_one() -> None:
    def spread(replicas: list[str], work: Callable[[], None]) -> dict[str, int]:
        before = {replica: metric(replica, FINISHED) for replica in replicas}
        work()
        found = {}
        while replicas:
            replica = replicas.pop()
            found[replica] = int(metric(replica, FINISHED) - before[replica])
        return found

    with router() as at:
        c10_scale_out.check_10_1(submission("10.1", spread=spread, router=at))


def whole_text(url: str, body: dict[str, Any], tries: int) -> str:
    for _ in range(tries):
        text = ""
        try:
            with requests.post(
                f"{url}/v1/completions", json=body | {"stream": True}, stream=True, timeout=60
            ) as answer:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    if line == b"data: [DONE]":
                        return text
                    if line:
                        text += json.loads(line[6:])["choices"][0]["text"]
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            continue
    raise ConnectionError("all were cut")


def drain(router: str, replica: str) -> None:
    requests.post(f"{router}/remove_worker", params={"url": replica}, timeout=60).raise_for_status()
    time.sleep(1)
    while metric(replica, "vllm:num_requests_running"):
        time.sleep(0.05)


@pytest.mark.parametrize("context", [1024, 131_072])
def test_lab_10_is_passed_whatever_the_context_length(context: int) -> None:
    """A refusal is had by one token too many, and a long request is one that there is room for."""
    with router(context) as at:
        c10_scale_out.check_10_2(submission("10.2", whole_text=whole_text, router=at))
        c10_scale_out.check_10_3(submission("10.3", drain=drain, router=at))


def test_a_learners_server_loads_no_check(tmp_path: Path) -> None:
    """What checks need would be imported before each learner's server, and take half a second of every check."""
    (tmp_path / "answer.py").write_text("import sys\nsys.exit(str('servebook.lab.checking' in sys.modules))\n")
    command = [sys.executable, "-P", "-m", "servebook.lab.learner_server", str(tmp_path / "answer.py"), "0"]
    assert subprocess.run(command, capture_output=True, text=True).stderr.strip() == "False"


def test_the_labs_package_gives_what_notebooks_import_from_it() -> None:
    assert [getattr(lab, name).__name__ for name in lab.__all__] == lab.__all__
    assert not hasattr(lab, "chek")
