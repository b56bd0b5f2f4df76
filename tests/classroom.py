"""Learners at the desks of a room's hub, as a browser drives them: the door, the hub's pages, a kernel's channel."""

from __future__ import annotations

import json
import re
import uuid
from contextlib import closing, suppress
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
import requests
from desk import eventually
from requests.adapters import HTTPAdapter
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
        headers = {"Sec-Fetch-Mode": "websocket"}
        return create_connection(url, header=headers, cookie=self.desk.cookies, timeout=SECONDS)

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


def bearer(key: str) -> dict[str, str]:
    """The header that shows this key."""
    return {"Authorization": f"Bearer {key}"}


class Address(HTTPAdapter):
    """Requests that come from this address of the machine."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, source_address=(self.address, 0), **kwargs)


class Door:
    """A browser at the hub's door, as its page's form sends what is typed."""

    def __init__(self, hub: str, address: str = "127.0.0.1") -> None:
        self.hub = hub
        self.browser = requests.Session()
        self.browser.mount("https://", Address(address))

    def sign_in(self, name: str, password: str, code: str = "") -> tuple[int, str]:
        """Status, and what the page says; 302 is the way to the desk."""
        self.browser.get(f"{self.hub}/hub/login", timeout=SECONDS)
        form = {"username": name, "password": password, "code": code, "_xsrf": self.xsrf}
        answer = self.browser.post(f"{self.hub}/hub/login", data=form, allow_redirects=False, timeout=SECONDS)
        said = re.search(r'class="login_error">([^<]*)<', answer.content.decode())
        return answer.status_code, unescape(said[1]) if said else ""

    @property
    def xsrf(self) -> str:
        return next(cookie.value or "" for cookie in self.browser.cookies if cookie.name == "_xsrf")


class LearnersDesk:
    """A learner's own server behind the hub's proxy, by the pages and cookies that a browser has; no token.

    The learner comes in by the door, and signs up there.
    """

    def __init__(self, hub: str, code: str, name: str, password: str) -> None:
        self.hub, self.name = hub, name
        self.url = f"{hub}/user/{name}"
        door = Door(hub)
        assert door.sign_in(name, password, code) == (302, "")
        self.browser = door.browser

    def xsrf(self, path: str) -> str:
        """What a page at this path sends beside its cookies."""
        return str(self.browser.cookies.get("_xsrf", path=path))

    def send(self, method: str, path: str, body: Any = None) -> requests.Response:
        """A page's request for this path of the hub's address."""
        owner = "/hub/" if path.startswith("hub/") else f"/user/{self.name}/"
        headers = {"X-XSRFToken": self.xsrf(owner), "Sec-Fetch-Mode": "same-origin"}
        headers |= {"Content-Type": "application/json"}  # without it a POST might be a form's, of any page
        return self.browser.request(method, f"{self.hub}/{path}", headers=headers, json=body, timeout=SECONDS)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.send(method, f"user/{self.name}/{path}", body)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def hub_ask(self, method: str, path: str) -> requests.Response:
        return self.send(method, f"hub/api/{path}")

    @property
    def cookies(self) -> str:
        """Those for the desk, as a header's value."""
        return str(self.browser.prepare_request(requests.Request("GET", f"{self.url}/")).headers["Cookie"])

    def open(self) -> None:
        """By the hub's page that starts a desk, to JupyterLab."""
        waiting = self.browser.get(f"{self.hub}/hub/spawn/{self.name}", timeout=SECONDS)
        assert f"/hub/spawn-pending/{self.name}" in waiting.url, waiting.text
        progress = f"{self.hub}/hub/api/users/{self.name}/server/progress"
        with self.browser.get(progress, params={"_xsrf": self.xsrf("/hub/")}, stream=True, timeout=SECONDS) as events:
            told = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith(b"data: ")]
        assert told[-1].get("ready"), told
        lab = self.browser.get(f"{self.url}/lab", timeout=SECONDS)
        assert "<title>JupyterLab</title>" in lab.text, lab.text

    def close(self) -> None:
        """End the desk, and wait until the hub says so."""
        assert self.hub_ask("DELETE", f"users/{self.name}/server").status_code in (202, 204)
        eventually(lambda: not self.servers(), f"the end of the desk of {self.name}", SECONDS)

    def servers(self) -> dict[str, Any]:
        """What the hub knows of this learner's server; {} where there is none."""
        return dict(self.hub_ask("GET", f"users/{self.name}").json()["servers"])

    def terminal(self, line: str) -> str:
        """What a new terminal of JupyterLab's shows from its prompt on, when this line is typed there, then `exit`."""
        url = f"{self.url}/terminals/websocket/{self.ask('POST', 'api/terminals')['name']}".replace("http", "ws", 1)
        shown = ""
        with closing(create_connection(url, cookie=self.cookies, timeout=SECONDS)) as channel:
            channel.send(json.dumps(["stdin", f"{line}; exit\r"]))
            while message := channel.recv():
                match json.loads(message):
                    case ["stdout", text]:
                        shown += text
                    case ["disconnect", *_]:
                        break
        return shown

    def notebook(self, path: str) -> Any:
        """A notebook that lies on the desk."""
        return nbformat.from_dict(self.ask("GET", f"api/contents/{path}")["content"])


def answer_of(solutions: Path, lab: str, cell: str) -> str:
    """The solution's code of an exercise."""
    notebook = nbformat.read(solutions / lab / f"{lab}.ipynb", as_version=4)
    return next(str(each.source) for each in notebook.cells if each.id == f"{cell}-answer")


def save(desk: LearnersDesk, path: str, answers: dict[str, str]) -> None:
    """Write these cells, by id, into a notebook on the desk, as JupyterLab saves it."""
    notebook = desk.notebook(path)
    for cell in notebook.cells:
        cell.source = answers.get(cell.id, cell.source)
    desk.ask("PUT", f"api/contents/{path}", {"type": "notebook", "format": "json", "content": notebook})
