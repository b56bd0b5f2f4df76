"""What goes between a judge and a learner's session: values in JSON, one message a line, calls in both directions.

A value arrives as itself or not at all: no class of the sender's comes to life at the judge. What a check hands to a
function, such as a client, is made anew in the session from its address; functions and iterators stay where they are
and are called from afar.
"""

from __future__ import annotations

import importlib
import json
import socket
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from servebook.lab.submission import Foreign

LIST_ITERATOR: Any = type(iter([]))


class Broken(Exception):
    """The other end is gone."""


class Failed(Exception):
    """What was asked of the other end raised; `told` is what it says of the error."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__(told.get("text", ""))
        self.told = told


class Wire:
    """One end. `answer` does what the other end asks for; each question has a thread of its own."""

    def __init__(self, connection: socket.socket, answer: Callable[[dict[str, Any]], Any], trusting: bool) -> None:
        self.connection, self.answer, self.trusting = connection, answer, trusting
        self.kept: dict[int, Any] = {}
        self.made: dict[int, Any] = {}
        self.waiting: dict[int, Future[dict[str, Any]]] = {}
        self.numbers = count()
        self.lock = threading.Lock()
        self.threads: set[threading.Thread] = set()
        self.closed = False

    def listen(self) -> None:
        """Take messages until the other end closes, or says what is none."""
        try:
            with self.connection.makefile("rb") as lines:
                for line in lines:
                    self._take(json.loads(line))
        except (OSError, ValueError, TypeError, RecursionError):
            pass  # it closed with a question unread, or what a learner wrote has written to the socket: that is the end
        finally:
            self.closed = True  # before the futures are looked through: who asks from now on looks at it
            for future in list(self.waiting.values()):
                future.set_exception(Broken("the learner's session has ended"))

    def _take(self, message: dict[str, Any]) -> None:
        if "reply" in message:
            if future := self.waiting.pop(message["reply"], None):
                future.set_result(message)
        else:
            thread = threading.Thread(target=self._answer, args=(message,), name="asked", daemon=True)
            self.threads.add(thread)
            thread.start()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Ask the other end, and wait for its reply.

        Raises:
            Failed: it raised.
            Broken: it is gone.
        """
        number = next(self.numbers)
        future: Future[dict[str, Any]] = Future()
        self.waiting[number] = future
        if self.closed:  # and nobody would wake who waits
            raise Broken("the learner's session has ended")
        self._send({"ask": number, **question})
        reply = future.result()
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply

    def _answer(self, message: dict[str, Any]) -> None:
        with suppress(Broken):  # nobody waits for it any more
            try:
                self._send({"reply": message["ask"], **self.answer(message)})
            except Broken:
                raise
            except BaseException as error:  # what JSON cannot say is among them, such as lists nested too deep
                self._send({"reply": message["ask"], "failed": self.describe(error)})
        self.threads.discard(threading.current_thread())

    def describe(self, error: BaseException) -> dict[str, Any]:
        """What the other end is told of an error."""
        return {"kinds": ["builtins.Exception"], "text": str(error)}

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        try:
            with self.lock:
                self.connection.sendall(line)
        except OSError:
            raise Broken("the learner's session has ended") from None

    def use(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what the other end wants of something that is kept here: call it, take its next item, or close it."""
        thing = self.kept[message["of"]]
        if message["use"] == "next":
            for item in thing:
                return {"value": self.encode(item)}
            return {"stop": True}
        if message["use"] == "close":
            thing.close()
            return {}
        kwargs = {name: self.decode(each) for name, each in message["kwargs"].items()}
        return {"value": self.encode(thing(*map(self.decode, message["args"]), **kwargs))}

    def encode(self, value: Any) -> Any:
        """A value in JSON; lists and dicts in a dict that names their kind."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, bytes):
            return {"bytes": b64encode(value).decode()}
        for kind in (list, tuple, set):
            if isinstance(value, kind):
                return {kind.__name__: [self.encode(each) for each in value]}
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(each)] for key, each in value.items()]}
        if isinstance(value, Path):
            return {"path": str(value)}
        if isinstance(value, Message):
            raw = b64encode(value.SerializeToString()).decode()
            return {"message": [type(value).__module__, value.DESCRIPTOR.full_name, raw]}
        if isinstance(value, LIST_ITERATOR):
            return {"items": [self.encode(each) for each in value]}
        if type(value).__name__ == "InferInput":
            return {"tensor": [self.encode(value._get_tensor()), self.encode(value._get_content())]}
        if recipe := recipe_of(value):
            self.kept[id(value)] = value  # its id stays its own
            return {"made": [id(value), *map(self.encode, recipe)]}
        if isinstance(value, Iterator) or callable(value):
            self.kept[id(value)] = value
            return {"iterator" if isinstance(value, Iterator) else "function": id(value)}
        return {"foreign": repr(value)}

    def decode(self, told: Any) -> Any:
        """The value that the other end has sent."""
        if not isinstance(told, dict):
            return told
        ((kind, content),) = told.items()
        if kind in ("list", "tuple", "set"):
            return {"list": list, "tuple": tuple, "set": set}[kind](map(self.decode, content))
        if kind == "dict":
            return {self.decode(key): self.decode(each) for key, each in content}
        if kind == "bytes":
            return b64decode(content)
        if kind == "items":
            return iter([self.decode(each) for each in content])
        if kind == "message":
            return self._message(*content)
        if kind == "tensor":
            importlib.import_module("tritonclient.grpc")
            return tensor_of(*map(self.decode, content))
        if kind == "iterator":
            return FarIterator(self, content)
        if self.trusting and kind == "path":
            return Path(content)
        if self.trusting and kind == "function":
            return self.made.setdefault(content, FarFunction(self, content))
        if self.trusting and kind == "made":
            number, *recipe = content
            if number not in self.made:
                self.made[number] = make(*map(self.decode, recipe))
            return self.made[number]
        return Foreign(str(content))

    def _message(self, module: str, name: str, raw: str) -> Any:
        if self.trusting:
            with suppress(ImportError):  # tritonclient's messages name a module that nobody can import
                importlib.import_module(module)
        found = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))
        return found.FromString(b64decode(raw))


class FarFunction:
    """A function at the other end."""

    def __init__(self, wire: Wire, number: int) -> None:
        self.wire, self.number = wire, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reply = self.wire.ask(
            use="call",
            of=self.number,
            args=list(map(self.wire.encode, args)),
            kwargs={name: self.wire.encode(each) for name, each in kwargs.items()},
        )
        return self.wire.decode(reply["value"])


class FarIterator(Iterator[Any]):
    """An iterator at the other end; each item is asked for when it is wanted."""

    def __init__(self, wire: Wire, number: int) -> None:
        self.wire, self.number = wire, number

    def __next__(self) -> Any:
        reply = self.wire.ask(use="next", of=self.number)
        if "stop" in reply:
            raise StopIteration
        return self.wire.decode(reply["value"])

    def close(self) -> None:
        """End the generator at the other end."""
        self.wire.ask(use="close", of=self.number)


def target_of(channel: Any) -> str:
    """The address that a gRPC channel leads to."""
    return str(channel._channel.target().decode())


def recipe_of(value: Any) -> tuple[str, Any] | None:
    """How a client is made anew: a word for `make`, and what that needs. None where it is no client."""
    name, module = type(value).__name__, type(value).__module__
    if module.startswith("openai") and name in ("OpenAI", "AsyncOpenAI"):
        return name, {
            "base_url": str(value.base_url),
            "api_key": value.api_key,
            "max_retries": value.max_retries,
            **({"timeout": float(value.timeout)} if isinstance(value.timeout, int | float) else {}),
        }
    if name == "InferenceServerClient":
        return name, target_of(value._channel)
    if name == "Channel" and module == "grpc._channel":
        return name, target_of(value)
    if name.endswith("Stub"):
        return "Stub", [module, name, target_of(next(iter(vars(value).values())))]
    if name == "Tokenizer":
        return name, value.to_str()
    return None


def make(what: str, needs: Any) -> Any:
    """The client that such a recipe describes."""
    if what in ("OpenAI", "AsyncOpenAI"):
        return getattr(importlib.import_module("openai"), what)(**needs)
    if what == "InferenceServerClient":
        return importlib.import_module("tritonclient.grpc").InferenceServerClient(needs)
    if what == "Tokenizer":
        return importlib.import_module("tokenizers").Tokenizer.from_str(needs)
    channel = importlib.import_module("grpc").insecure_channel
    if what == "Channel":
        return channel(needs)
    module, name, address = needs
    return getattr(importlib.import_module(module), name)(channel(address))


def tensor_of(description: Any, content: bytes | None) -> Any:
    """tritonclient's input of that description."""
    tensor = importlib.import_module("tritonclient.grpc").InferInput(
        description.name, list(description.shape), description.datatype
    )
    tensor._input.CopyFrom(description)
    tensor._raw_content = content
    return tensor
