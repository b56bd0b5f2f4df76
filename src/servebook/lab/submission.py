"""A learner's work as a check sees it: named things in a notebook, called with a time limit."""

from __future__ import annotations

import asyncio
import builtins
import ctypes
import inspect
import linecache
import re
import sys
import threading
import time
from collections import UserString
from collections.abc import Callable, Collection, ItemsView, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from google.protobuf.message import Message

from servebook.lab.feedback import NotYet, StillOpen, shorten
from servebook.lab.manifest import Exercise
from servebook.launch import Server

IDLE_SECONDS = 4.0
"""How long a learner's code may run while no server works for it; its waits for a busy core do not count."""
LIMIT_SECONDS = 100.0
"""How long one call of it may last at most; a check makes several."""


MOST_BITS = 10_000
"""Of a whole number: far beyond any that is asked for, and Python writes no number of very many digits out."""


Causes = Mapping[Any, str]
"""What an error of a learner's code most likely comes from, by its class or by `(class, pattern)` of its message.

The first that fits counts.
"""
NOBODY_TYPES = "input(): nobody types during a check"
ANYWHERE: Causes = {
    (EOFError, re.escape(NOBODY_TYPES)): "the check calls your function with all that it needs: take its arguments",
    SystemExit: "that ends the whole program and not the function: return, or raise an error for the caller to catch",
}
"""The same for any exercise, where its own causes do not say."""


@contextmanager
def unattended() -> Iterator[None]:
    """Let input() and exit() raise: a check would wait for what nobody sees asked, and a kernel would end."""

    def none(prompt: object = "") -> str:
        raise EOFError(NOBODY_TYPES)

    with ExitStack() as changed:
        changed.enter_context(patch.object(builtins, "input", none))  # a kernel has one of its own there
        if shell := getattr(builtins, "get_ipython", None):  # and what its exit() and quit() call
            changed.enter_context(patch.object(shell(), "ask_exit", sys.exit))
        yield


def words_of(error: object) -> str:
    """What an error says; "" where saying it is one, too, as of a class whose `__str__` returns no text."""
    with suppress(Exception):
        return str(error)
    return ""


class Foreign:
    """Stands for a result of a type that no check asks for; it equals nothing."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def __repr__(self) -> str:
        return self.shown


def plain(value: Any) -> Any:
    """A result by its value: numbers, text, bytes and containers as Python's own, iterators still lazy.

    Whatever else it is becomes Foreign, but for messages and tensors, which some exercises are about.
    """
    if value is None or isinstance(value, bool | Foreign):
        return value
    if hasattr(value, "shape") and hasattr(value, "tolist") and not isinstance(value, type):
        found = value.tolist()  # numpy's and torch's, also of no dimension
        return Foreign(shorten(value)) if type(found) is type(value) else plain(found)
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return Foreign(f"a number of {value.bit_length()} bits")
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    # A dict's values and protobuf's repeated fields among them.
    if isinstance(value, Collection) and not isinstance(value, range | UserString | ItemsView):
        kept = [plain(each) for each in value]
        return tuple(kept) if isinstance(value, tuple) else set(kept) if isinstance(value, Set) else kept
    if isinstance(value, Iterator):
        return Pieces(value)
    if isinstance(value, Message) or type(value).__name__ == "InferInput":
        return value
    return Foreign(shorten(value))


class Pieces(Iterator[Any]):
    """What a learner's generator yields, each piece by its value."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source

    def __next__(self) -> Any:
        return plain(next(self.source))

    def close(self) -> None:
        """End the generator, as a reader does who leaves."""
        if close := getattr(self.source, "close", None):
            close()


class NeedsAwait(Exception):
    """A function that is called as a plain one gave a coroutine or an asynchronous generator."""


class Function:
    """A learner's function, for checks to call; what it returns comes by its value."""

    def __init__(self, found: Callable[..., Any], awaited: bool = False) -> None:
        self.found = found
        self.awaited = awaited

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        async def call() -> Any:
            try:
                return await self.found(*args, **kwargs)
            finally:
                for each in args:
                    if inspect.iscoroutinefunction(getattr(each, "close", None)):
                        await each.close()  # clients belong to the loop that they were used in

        if self.awaited:
            return plain(asyncio.run(call()))
        result = self.found(*args, **kwargs)
        if inspect.iscoroutine(result):
            result.close()  # else Python complains that nobody has awaited it
        if inspect.iscoroutine(result) or inspect.isasyncgen(result):
            raise NeedsAwait(repr(result))
        return plain(result)


class OverTime(Exception):
    """Put into a learner's thread to end it."""


class Submission:
    """What a learner wrote for one exercise."""

    def __init__(self, exercise: Exercise, namespace: Mapping[str, Any]) -> None:
        self.exercise = exercise
        self.namespace = namespace
        self.faults: list[Exception] = []

    def function(self, name: str, awaited: bool = False) -> Callable[..., Any]:
        """The learner's function of that name; a coroutine function is to be `awaited`."""
        found = self.namespace.get(name)
        if not callable(found):
            raise NotYet(
                f"a function named {name}",
                "nothing of that name" if found is None else f"{name} = {found!r}",
                "its cell has not run in this session, or the name was changed",
            )
        if hasattr(found, "awaited"):  # a judge's: it asks the learner's session
            found.awaited = awaited
            return found  # type: ignore[no-any-return]
        return Function(found, awaited)

    def server(self, name: str) -> Server:
        """The server that the notebook's setup cell put into the variable of that name."""
        found = self.namespace.get(name.replace("-", "_"))
        if not isinstance(found, Server):
            raise NotYet(
                f"the running server in the variable {name.replace('-', '_')}",
                found,
                "the setup cell at the top of the notebook has not run in this session",
            )
        return found

    def lent(self, action: Callable[[], None]) -> Callable[[], None]:
        """The check's own `action`, for the learner's code to call: what it raises is raised by `run`, too."""

        def call() -> None:
            try:
                action()
            except Exception as error:
                self.faults.append(error)
                raise

        return call

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        causes: Causes | None = None,
        busy: Callable[[], bool] = lambda: False,
    ) -> Any:
        """`run`, for a call of the learner's function with these arguments.

        It may change lists and dicts: hand in a copy of what the check looks at afterwards.
        """
        return self.run(partial(function, *args), causes, busy)

    def run(
        self,
        action: Callable[[], Any],
        causes: Causes | None = None,
        busy: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Return what `action`, which calls the learner's code, returns.

        It runs in a thread of its own, so that neither a hanging call nor the notebook's event loop is in the way.
        Time that a server takes, while `busy` says so, is not held against the learner.

        Raises:
            StillOpen: it ran into the blank of this exercise.
            NotYet: it raised, or came to nothing; `causes` explains the errors that are to be expected.
            Exception: what the check has `lent` to the code raised, which is not the learner's fault.
        """
        outcome: list[Any] = []
        failure: list[BaseException] = []

        def target() -> None:
            try:
                outcome.append(action())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=target, name=f"lab {self.exercise.id}", daemon=True)
        thread.start()
        started, idle = time.monotonic(), 0.0
        while thread.is_alive() and idle < IDLE_SECONDS and time.monotonic() - started < LIMIT_SECONDS:
            looked, had_waited = time.monotonic(), self.waited(thread)
            thread.join(0.1)
            spent = time.monotonic() - looked - (self.waited(thread) - had_waited)
            # No more than a look should take: this process may have stood still, too. A wait for a core is told when it
            # is over, and what it was charged until then is given back; but no credit for later is in it, for several
            # threads may have waited at once.
            idle = max(0.0, idle + min(spent, 0.3))
            if busy():
                idle = 0.0
        if over_time := thread.is_alive():
            if abort := getattr(self.namespace, "abort", None):
                abort()
            # A loop in Python ends by this; a call that blocks in C lives on until its socket is closed.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(OverTime))
        if self.faults:
            raise self.faults[0]
        if over_time:
            raise NotYet(
                "an end",
                f"none, {time.monotonic() - started:.0f} s after the call",
                (causes or {}).get(TimeoutError, "your code waits for something that never comes, or loops for ever"),
            )
        if failure:
            self.explain(failure[0], causes or {})
        return outcome[0]

    def waited(self, thread: threading.Thread) -> float:
        """Seconds that the learner's code has waited for a core: this thread, or the session that it asks."""
        elsewhere = getattr(self.namespace, "waited", None)
        return waited_for_a_core(thread) + (elsewhere() if elsewhere else 0.0)

    def explain(self, error: BaseException, causes: Causes) -> None:
        """Turn an error of the learner's code into feedback.

        Raises:
            StillOpen: it says that the blank is open.
            NotYet: any other.
        """
        error = ungrouped(error)
        if isinstance(error, NotYet | StillOpen):
            raise error
        if isinstance(error, NotImplementedError) and error.args == (self.exercise.id,):
            raise StillOpen
        if isinstance(error, NeedsAwait):
            raise NotYet("a plain function", str(error), "the check calls it without await: write a plain def")
        known = [*causes.items(), *ANYWHERE.items()]
        cause = next((text for kind, text in known if meant(kind, error)), "your code raised this error")
        raise NotYet(
            "no error",
            f"{type(error).__name__}: {words_of(error)[:300]}{getattr(error, 'place', '') or where(error)}",
            cause,
        ) from error


def meant(kind: Any, error: BaseException) -> bool:
    """Whether an error is what a key of `Causes` stands for."""
    of_class, pattern = kind if isinstance(kind, tuple) else (kind, "")
    return isinstance(error, of_class) and re.search(pattern, words_of(error)) is not None


def waited_for_a_core(thread: threading.Thread) -> float:
    """Seconds in all that a thread of this process was ready to run and had no core, by /proc/…/schedstat."""
    return waited(Path(f"/proc/self/task/{thread.native_id}/schedstat"))


def waited(account: Path) -> float:
    """The same by the kernel's account of a thread."""
    try:
        return int(account.read_text(encoding="utf-8").split()[1]) / 1e9
    except (OSError, IndexError):  # it has ended, or this kernel keeps no such account
        return 0.0


def ungrouped(error: BaseException) -> BaseException:
    """The first error of a group, such as a TaskGroup raises; any other as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def where(error: BaseException) -> str:
    """The line of the learner's cell that an error went through last, "" where it went through none."""
    place = ""
    trace = error.__traceback__
    while trace:
        code = trace.tb_frame.f_code
        if "ipykernel_" in code.co_filename or code.co_filename.startswith("<ipython-input"):
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            place = f"\nin line {trace.tb_lineno} of your cell: {line}"
        trace = trace.tb_next
    return place


CheckFunction = Callable[[Submission], None]
