"""Learners at the desks of a room's hub, as a browser drives them: the hub's API, a kernel's channel."""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import requests
from desk import eventually
from websocket import WebSocket, WebSocketTimeoutException, create_connection

SECONDS = 120.0
"""How long anything may take; the machine has two cores."""


class Kernel:
    """One kernel of a learner's."""

    def __init__(self, desk: LearnersDesk) -> None:
        self.desk = desk
        self.id = desk.ask("POST", "api/kernels", {"name": "python3"})["id"]
        self.channel = self.connect()

    def connect(self) -> WebSocket:
        url = f"{self.desk.url}/api/kernels/{self.id}/channels".replace("http", "ws", 1)
        return create_connection(url, header=self.desk.headers, timeout=SECONDS)

    def reconnect(self) -> None:
        """Open the channel anew, and ask until the kernel is heard on it: a cell that is sent before may get lost."""
        self.channel.close()
        self.channel = self.connect()
        self.channel.settimeout(1)
        eventually(self.is_heard, "the kernel's answer", SECONDS)
        self.channel.settimeout(SECONDS)

    def is_heard(self) -> bool:
        """Whether the kernel's status comes over the channel, in a second."""
        asked = self.send("kernel_info_request", {})
        with suppress(WebSocketTimeoutException):
            while message := json.loads(self.channel.recv()):
                if message["msg_type"] == "status" and message["parent_header"].get("msg_id") == asked:
                    return True
        return False

    def start(self, code: str) -> str:
        """Send a cell; return its message id."""
        content = {"code": code, "silent": False, "store_history": True, "stop_on_error": True, "allow_stdin": False}
        return self.send("execute_request", content)

    def send(self, kind: str, content: dict[str, Any]) -> str:
        """Send a message on the shell channel; return its id."""
        header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "username": "", "session": "test"}
        message = {"header": header | {"version": "5.3", "date": ""}, "parent_header": {}, "metadata": {}}
        self.channel.send(json.dumps(message | {"content": content, "channel": "shell"}))
        return header["msg_id"]

    def run(self, code: str) -> str:
        """Run a cell to its end; return what it printed, and assert that it raised nothing."""
        asked, printed, replied, idle = self.start(code), "", False, False
        while not (replied and idle):
            message = json.loads(self.channel.recv())
            if message.get("parent_header", {}).get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                printed += content["text"]
            assert kind != "error", "\n".join(content["traceback"])
            idle = idle or (kind == "status" and content["execution_state"] == "idle")
            replied = replied or kind == "execute_reply"
        return printed

    def alive(self) -> bool:
        return any(kernel["id"] == self.id for kernel in self.desk.ask("GET", "api/kernels"))


class LearnersDesk:
    """A learner's own server behind the hub's proxy; `token` is the instructor's, who may sit down at any desk."""

    def __init__(self, hub: str, token: str, name: str) -> None:
        self.hub, self.name = hub, name
        self.url = f"{hub}/user/{name}"
        self.headers = {"Authorization": f"token {token}"}

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = requests.request(method, f"{self.url}/{path}", headers=self.headers, json=body, timeout=SECONDS)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def hub_ask(self, method: str, path: str) -> requests.Response:
        return requests.request(method, f"{self.hub}/hub/api/{path}", headers=self.headers, timeout=SECONDS)

    def spawn(self) -> None:
        """Sign the learner up and ask for the desk; it may be open only later."""
        made = self.hub_ask("POST", f"users/{self.name}")
        assert made.status_code in (201, 409), made.text
        asked = self.hub_ask("POST", f"users/{self.name}/server")
        assert asked.status_code in (201, 202), asked.text

    def open(self) -> None:
        self.spawn()
        progress = f"{self.hub}/hub/api/users/{self.name}/server/progress"
        with requests.get(progress, headers=self.headers, stream=True, timeout=SECONDS) as events:
            told = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith(b"data: ")]
        assert told[-1].get("ready"), told

    def close(self) -> None:
        """End the desk, and wait until the hub says so."""
        assert self.hub_ask("DELETE", f"users/{self.name}/server").status_code in (202, 204)
        eventually(lambda: not self.servers(), f"the end of the desk of {self.name}", SECONDS)

    def servers(self) -> dict[str, Any]:
        """What the hub knows of this learner's server; {} where there is none."""
        return dict(self.hub_ask("GET", f"users/{self.name}").json()["servers"])

    def notebook(self, path: str) -> Any:
        """A notebook that lies on the desk."""
        return nbformat.from_dict(self.ask("GET", f"api/contents/{path}")["content"])


def answer_of(solutions: Path, lab: str, cell: str) -> str:
    """The solution's code of an exercise."""
    notebook = nbformat.read(solutions / lab / f"{lab}.ipynb", as_version=4)
    return next(str(each.source) for each in notebook.cells if each.id == f"{cell}-answer")
