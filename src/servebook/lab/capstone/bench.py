"""A service under judgement: its process, its way to the engine, and what callers see of it."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import requests

from servebook.bearer import bearer
from servebook.lab.capstone.contract import CAPACITY, command_of
from servebook.lab.feedback import NotYet
from servebook.lab.rest import key_of
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import events_of, text_of
from servebook.launch import Server
from servebook.launch.child import Child, run_child
from servebook.launch.probes import listens
from servebook.processes import free_port

PATIENCE_SECONDS = 60.0
"""How long a caller waits for the beginning of an answer: a slow engine on a busy machine takes long over a crowd."""
STREAM_SECONDS = 120.0
"""How long a whole stream may take: one that is kept open by pings would else never end."""
LISTEN_SECONDS = 60.0

Gate = Callable[[Exchange, int], None]


@dataclass
class Answer:
    """What a caller got."""

    status: int
    headers: requests.structures.CaseInsensitiveDict[str]
    body: bytes

    def json(self) -> Any:
        """The body's JSON, None where it has none."""
        with suppress(ValueError):
            return json.loads(self.body)
        return None

    def __repr__(self) -> str:
        return f"{self.status} {self.body.decode(errors='replace')[:200]}"


class Stream:
    """A streamed answer that is being read."""

    def __init__(self, response: requests.Response) -> None:
        self.response = response
        self.status, self.headers = response.status_code, response.headers
        self.kind = response.headers.get("Content-Type", "")
        self.lines = self._lines(time.monotonic() + STREAM_SECONDS)
        self.text, self.done, self.ended = "", False, False

    def __repr__(self) -> str:
        return f"{self.status}, and a stream"

    def _lines(self, deadline: float) -> Iterator[bytes]:
        rest = b""
        for data in self.response.iter_content(1):  # no more at once: it would wait for that
            if time.monotonic() > deadline:
                raise NotYet(
                    "a stream that ends",
                    f"none, {STREAM_SECONDS:.0f} s after it began",
                    "who keeps it open, by comments (`: ping`) perhaps, keeps its caller waiting: end it after [DONE]",
                )
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
        yield rest

    def piece(self) -> str | None:
        """The text of the next event; an error has none, nor has the end, after which the stream has `ended`.

        Raises:
            NotYet: it is none that the brief knows, or comes after the last one; or the stream does not end.
        """
        try:
            for line in self.lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.done = True
                    continue
                if self.done:
                    raise NotYet(
                        "data: [DONE] as the last event",
                        f"{line.decode(errors='replace')[:200]} after it",
                        "callers read no further than [DONE]: send it when all the text is out",
                    )
                event = json.loads(data)
                if isinstance(event, dict) and isinstance(event.get("text"), str):
                    self.text += event["text"]
                    return str(event["text"])
                if isinstance(event, dict) and "error" in event:
                    return None
                raise ValueError
        except ValueError:
            raise NotYet(
                'events like data: {"text": " sea"}',
                line.decode(errors="replace")[:200],
                "each event is one line: data:, a JSON object with a text, and an empty line after it",
            ) from None
        except requests.RequestException:
            pass  # broken off
        self.ended = True
        return None

    def rest(self) -> None:
        """Read it to its end."""
        while not self.ended:
            self.piece()

    def leave(self) -> None:
        """Hang up."""
        self.response.close()


class Bench:
    """One service in `folder`, started; the engine `vllm` is behind a relay that can be cut, mended and held.

    Attributes:
        gate: called before each piece of an answer of the engine goes on to the service, with its number.
    """

    def __init__(self, folder: Path, vllm: Server) -> None:
        self.folder, self.vllm = folder.resolve(), vllm
        self.key = secrets.token_urlsafe(16)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.gate: Gate = lambda exchange, number: None
        self.exchanges: list[Exchange] = []
        self.tap = self._relay(0)
        self.engine_port = int(self.tap.url.rsplit(":", 1)[1])
        self.tap.__enter__()

    def _relay(self, port: int) -> Tap:
        tap = Tap(self.vllm.url, self._hold, {"ignore_eos": True}, port)  # so that all get as many tokens as they want
        tap.exchanges = self.exchanges
        return tap

    def _hold(self, chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        streamed = isinstance(exchange.body, dict) and exchange.body.get("stream")
        for number, chunk in enumerate(events_of(chunks) if streamed else chunks):
            if exchange.method == "POST":
                self.gate(exchange, number)
            yield chunk

    def cut(self) -> None:
        """The engine is gone: who connects is refused."""
        self.tap.close()

    def mend(self) -> None:
        """It is back."""
        self.tap = self._relay(self.engine_port)
        self.tap.__enter__()

    @contextmanager
    def without_engine(self) -> Iterator[None]:
        """It is gone for the length of the block."""
        self.cut()
        try:
            yield
        finally:
            self.mend()

    @contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Hold the engine's answers back by `gate` for the length of the block."""
        self.gate = gate
        try:
            yield
        finally:
            self.gate = lambda exchange, number: None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start the service; end it and all that it has started with the block."""
        env = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONSAFEPATH": "",  # a service may be more than one file
            "PYTHONUNBUFFERED": "1",  # what it logs is seen at once
            "PORT": str(self.port),
            "ENGINE_URL": f"http://127.0.0.1:{self.engine_port}",
            "ENGINE_KEY": key_of(self.vllm),
            "ENGINE_MODEL": self.vllm.model,
            "SERVICE_KEY": self.key,
            "CAPACITY": str(CAPACITY),
        }
        with ExitStack() as stack:
            stack.callback(self.cut)
            try:
                child = run_child(command_of(self.folder), env=env, cwd=self.folder, grace=0)
                self.child: Child = stack.enter_context(child)
            except OSError as error:
                raise NotYet(
                    "a command that starts", str(error), "service.toml names no program that is here"
                ) from None
            yield

    def alive(self) -> bool:
        """Whether the process is still there."""
        return self.child.process.poll() is None

    def listens(self) -> bool:
        """Whether the service takes connections."""
        return listens(f"127.0.0.1:{self.port}")

    def asked(self) -> list[Exchange]:
        """What the service has asked the engine to write so far."""
        return [each for each in self.exchanges if each.method == "POST"]

    @staticmethod
    def most_at_once(made: list[Exchange]) -> int:
        """How many of these were under way together at most."""
        ends = [(each.started, 1) for each in made] + [(each.ended or each.left or math.inf, -1) for each in made]
        return max(accumulate(step for _, step in sorted(ends)), default=0)

    def call(self, method: str, path: str, seconds: float = PATIENCE_SECONDS, **how: Any) -> requests.Response:
        """One request.

        Raises:
            NotYet: no answer begins within `seconds`.
        """
        try:
            return requests.request(method, self.url + path, auth=bearer(None), timeout=seconds, **how)
        except requests.Timeout:
            cause = "the service waits for something that does not come, or a call that blocks keeps it from answering"
            raise NotYet(f"an answer to {method} {path}", f"none within {seconds:.0f} s", cause) from None
        except requests.RequestException:
            cause = "the service has ended" if not self.alive() else "it hung up without an answer"
            raise NotYet(f"an answer to {method} {path}", "the connection failed", cause) from None

    def get(self, path: str, seconds: float = PATIENCE_SECONDS) -> Answer:
        """GET of a page that needs no key."""
        response = self.call("GET", path, seconds)
        return Answer(response.status_code, response.headers, response.content)

    def post(
        self, prompt: Any, max_tokens: Any, key: str | None = None, seconds: float = PATIENCE_SECONDS, **more: Any
    ) -> Answer:
        """POST /generate; `key` is the whole header Authorization in place of the right one, "" for none."""
        return self.send({"prompt": prompt, "max_tokens": max_tokens} | more, key, seconds)

    def send(
        self,
        body: dict[str, Any] | bytes,
        key: str | None = None,
        seconds: float = PATIENCE_SECONDS,
        path: str = "/generate",
    ) -> Answer:
        """The same with any body, JSON or bytes as they are, and to any path."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | self.headers(key)
        response = self.call("POST", path, seconds, data=data, headers=headers)
        return Answer(response.status_code, response.headers, response.content)

    def stream(self, prompt: str, max_tokens: int, seconds: float = PATIENCE_SECONDS) -> Stream:
        """The same as a stream, which begins within `seconds`."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
        return Stream(self.call("POST", "/generate", seconds, json=body, headers=self.headers(), stream=True))

    def headers(self, key: str | None = None) -> dict[str, str]:
        """What a caller sends."""
        shown = f"Bearer {self.key}" if key is None else key
        return {"Authorization": shown} if shown else {}


def at_once(number: int, action: Callable[[int], Any]) -> list[Any]:
    """What `action(0)`, `action(1)`, … return or, where they raise NotYet, that; all begun at one moment."""
    start = threading.Barrier(number)

    def one(each: int) -> Any:
        start.wait()
        try:
            return action(each)
        except NotYet as fault:
            return fault

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


def written(exchange: Exchange) -> dict[str, str]:
    """What the engine wrote in one exchange, by prompt."""
    body = exchange.body if isinstance(exchange.body, dict) else {}
    prompts = body.get("prompt")
    answers = exchange.events() if body.get("stream") else [exchange.json() or {}]
    texts: dict[str, str] = {}
    for choice in (choice for answer in answers for choice in answer.get("choices", [])):
        prompt = prompts[choice["index"]] if isinstance(prompts, list) else prompts
        texts[str(prompt)] = texts.get(str(prompt), "") + text_of(choice)
    return texts
