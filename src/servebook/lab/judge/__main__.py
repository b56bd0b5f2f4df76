"""A judge: `python -P -m servebook.lab.judge`. One question a line in, one verdict out, both in JSON.

A question names the exercise, the folder of the submission, and the socket to listen on for the learner's session; a
second line says that the session is done, whether it has come or not.
"""

from __future__ import annotations

import builtins
import json
import os
import queue
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import grpc
import requests
from tritonclient.utils import InferenceServerException

from servebook.errors import LaunchError
from servebook.lab.checking import evaluate
from servebook.lab.feedback import Result
from servebook.lab.handout.landlock import confine_as_told
from servebook.lab.judge.process import LISTENING
from servebook.lab.judge.wire import Failed, FarFunction, Wire
from servebook.lab.manifest import find_exercise
from servebook.lab.submission import NeedsAwait, waited
from servebook.launch import SERVERS, Files, serve
from servebook.launch.link import Link
from servebook.processes import peer
from servebook.settings import load_settings

KNOWN = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (
        *(each for each in vars(builtins).values() if isinstance(each, type) and issubclass(each, BaseException)),
        json.JSONDecodeError,
        queue.Empty,
        requests.RequestException,
        requests.HTTPError,
        requests.ConnectionError,
        requests.Timeout,
        grpc.RpcError,
        InferenceServerException,
        NeedsAwait,
    )
    if not issubclass(kind, BaseExceptionGroup)  # which cannot be made without what it groups
}
"""The errors that checks tell apart; any other comes as the nearest of these that it is a kind of."""


class Judge(Wire):
    """Asks a learner's session."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, self.use, trusting=False)
        self.pid = peer(connection)[0]
        self.raised: dict[int, BaseException] = {}

    def describe(self, error: BaseException) -> dict[str, Any]:
        """Only its number: it is the check's own, and comes back to it."""
        self.raised[id(error)] = error
        return {"kinds": ["builtins.Exception"], "text": "", "mine": id(error)}

    def ask(self, **question: Any) -> dict[str, Any]:
        """As Wire does; an error of the learner's is raised as the check knows it."""
        try:
            return super().ask(**question)
        except Failed as failure:
            raise self.raised.get(failure.told.get("mine", 0)) or error_of(failure.told) from None


def error_of(told: dict[str, Any]) -> BaseException:
    """The error that a session tells of, as one of a known kind."""
    kinds = [str(kind) for kind in told["kinds"]]
    base = next((KNOWN[kind] for kind in kinds if kind in KNOWN), Exception)

    def says(name: str) -> Callable[[Any], Any]:
        code = getattr(grpc.StatusCode, str(told.get(name)), None)
        return lambda self: code if name == "code" else told.get(name)

    attributes: dict[str, Any] = {name: says(name) for name in ("status", "message", "code", "details") if name in told}
    attributes |= {"__init__": lambda self: None, "__str__": lambda self: str(told["text"]), "place": told["where"]}
    error: BaseException = base.__new__(type(kinds[0].rsplit(".", 1)[-1], (base,), attributes))
    error.args = tuple(told["args"])
    return error


class NamedFunction(FarFunction):
    """A function of the learner's, by its name."""

    awaited = False

    def __init__(self, wire: Wire, name: str) -> None:
        super().__init__(wire, 0)
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reply = self.wire.ask(
            call=self.name,
            args=[self.wire.encode(each) for each in args],
            kwargs={name: self.wire.encode(each) for name, each in kwargs.items()},
            awaited=self.awaited,
        )
        for given, after in zip(args, reply["args"], strict=True):
            if isinstance(given, list) and after is not None:
                given[:] = self.wire.decode(after)
        return self.wire.decode(reply["value"])


class Names(Mapping[str, Any]):
    """The names in a learner's session; the servers are found by the judge itself, with the settings of `home`."""

    def __init__(self, judge: Judge, home: Path = Path()) -> None:
        self.judge, self.home = judge, home
        self.waits: dict[str, float] = {}
        self.waits_before = 0.0

    def __getitem__(self, name: str) -> Any:
        if (server := name.replace("_", "-")) in SERVERS:
            with chdir(self.home):  # a learner's servebook.toml in the submission's folder names no servers
                require_there(server)
                return serve(server)
        reply = self.judge.ask(look=name)
        return NamedFunction(self.judge, name) if reply["callable"] else self.judge.decode(reply["value"])

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def waited(self) -> float:
        """Seconds in all that the session's threads, ended ones too, were ready to run and had no core."""
        for account in Path(f"/proc/{self.judge.pid}/task").glob("*/schedstat"):
            now, last = waited(account), self.waits.get(account.parent.name, 0.0)
            if now < last:  # it has just ended, or is another one by the same number
                self.waits_before += last
            self.waits[account.parent.name] = now
        return self.waits_before + sum(self.waits.values())

    def abort(self) -> None:
        """End what runs in the session."""
        threading.Thread(target=lambda: self.judge.ask(abort=True), daemon=True).start()


def require_there(name: str) -> None:
    """Raise LaunchError where a server that this judge was given a link to is gone: it starts none in its place."""
    settings = load_settings()
    socket = Files(settings.state_dir, name).socket
    if (name == "vllm" and settings.engine_url) or not socket.is_symlink():
        return
    if link := Link.open(Files(settings.state_dir, name)):
        link.close()
        return
    raise LaunchError(
        f"The server {name} is gone: it has ended, or the submission has ended it.",
        f"Start it with `servebook up {name}` (`servebook room collect --grade` does so itself), and grade this again.",
    )


def verdict(exercise_id: str, path: str, out: TextIO, home: Path) -> Result:
    """Listen for the session, and judge; `home` is for `Names`."""
    _, exercise = find_exercise(exercise_id)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        print(LISTENING, end="", file=out, flush=True)
        come, _, _ = select.select([listener, sys.stdin], [], [])
        if listener not in come:
            return Result(exercise, "wrong", "a session that answers", "none", "the kernel does not answer the judge")
        connection, _ = listener.accept()
    with connection:
        judge = Judge(connection)
        threading.Thread(target=judge.listen, daemon=True).start()
        try:
            return evaluate(exercise_id, Names(judge, home))
        finally:
            connection.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Judge until the input ends."""
    confine_as_told()
    out, home = os.fdopen(os.dup(1), "w"), Path.cwd()
    os.dup2(2, 1)  # what a check prints is no verdict
    for line in iter(sys.stdin.readline, ""):
        question = json.loads(line)
        os.chdir(question["folder"])
        result = verdict(question["exercise"], question["socket"], out, home)
        told = {name: value for name, value in asdict(result).items() if name != "exercise"}
        print(json.dumps(told), file=out, flush=True)
        sys.stdin.readline()  # the session is done


if __name__ == "__main__":
    main()
