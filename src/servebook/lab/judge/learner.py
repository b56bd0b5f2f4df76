"""The end in a learner's session: calls what the learner wrote, as the judge asks, and says what came of it."""

from __future__ import annotations

import ctypes
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from servebook.lab.judge.wire import Failed, Wire
from servebook.lab.submission import Function, OverTime, plain, unattended, ungrouped, where, words_of


class Session(Wire):
    """Answers a judge with the names in `namespace`."""

    def __init__(self, connection: socket.socket, namespace: Mapping[str, Any]) -> None:
        super().__init__(connection, self.serve, trusting=True)
        self.namespace = namespace

    def serve(self, question: dict[str, Any]) -> dict[str, Any]:
        """Do one thing that the judge asks for."""
        if "look" in question:
            found = self.namespace.get(question["look"])
            return {"callable": callable(found), "value": self.encode(None if callable(found) else plain(found))}
        if "call" in question:
            args = [self.decode(each) for each in question["args"]]
            kwargs = {name: self.decode(each) for name, each in question["kwargs"].items()}
            function = Function(self.namespace[question["call"]], question["awaited"])
            value = self.encode(function(*args, **kwargs))
            # The judge wants to see what became of its lists.
            return {"value": value, "args": [self.encode(each) if isinstance(each, list) else None for each in args]}
        if "abort" in question:
            self.abort()
            return {}
        return self.use(question)

    def abort(self) -> None:
        """End what runs for the judge."""
        for thread in list(self.threads):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(OverTime))

    def describe(self, error: BaseException) -> dict[str, Any]:
        """What kinds of error it is, its words, and where in the learner's cell it was raised."""
        error = ungrouped(error)
        if isinstance(error, Failed):  # something of the judge's raised, when called from here
            return error.told
        told: dict[str, Any] = {
            "kinds": [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__],
            "text": words_of(error)[:2000],
            "args": [words_of(each) for each in error.args[:2]],
            "where": where(error),
        }
        for name in ("status", "message", "code", "details"):
            with suppress(Exception):
                said = getattr(error, name)()
                told[name] = None if said is None else getattr(said, "name", str(said))
        return told


def serve(path: str) -> None:
    """Answer the judge that listens on the socket at `path`, until it has judged."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        session = Session(connection, sys._getframe(1).f_globals)
        with unattended():
            session.listen()
        for client in session.made.values():
            with suppress(Exception):
                client.stop_stream(cancel_requests=True)
            with suppress(Exception):
                client.close()
