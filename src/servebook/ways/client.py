"""What a client of any way to the engine does: `generate(prompt)` gives an Answer, `stream(prompt)` Pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self


@dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    `text` may be "" while a character still lacks bytes; `tokens` counts the new ones (all of them in the last piece,
    where a way tells no earlier), and `token_ids` are they, where the way carries them. `finish_reason` is None until
    the last piece.
    """

    text: str
    tokens: int = 0
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A whole answer: its text, its length and its prompt's in tokens, and why it ended."""

    text: str
    tokens: int
    prompt_tokens: int
    finish_reason: str
    token_ids: tuple[int, ...] = ()


def one_answer(sampling: Mapping[str, Any]) -> None:
    """Refuse `n` > 1, where the server would take it: an Answer has room for one, and pieces of two would mingle.

    Raises:
        TypeError: it asks for several.
    """
    if sampling.get("n") not in (None, 1):
        raise TypeError("n must be 1: this client reads one answer; ask for more with a call each")


class Client(Protocol):
    """A client of one server; every way has one. Use it in a `with` block.

    `timeout` is in seconds: gRPC's deadline for the whole call, over HTTP the longest wait for bytes. Of the names
    in `sampling`, every way knows `max_tokens` and `temperature`; which others, each says. `n`, several answers to one
    prompt, is none of them. Errors are those of the library that the client is made with.
    """

    def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:
        """The whole answer."""

    def stream(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Generator[Piece]:
        """What is new, as it comes; leaving the loop, or closing the generator, ends the request."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class AioClient(Protocol):
    """The same for asyncio: many calls at once on one event loop. Use it in an `async with` block."""

    async def generate(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> Answer:  # noqa: ASYNC109
        """The whole answer; cancelling the task ends the request."""

    def stream(self, prompt: str, *, timeout: float = 60, **sampling: Any) -> AsyncGenerator[Piece]:
        """What is new, as it comes; to leave early, use `contextlib.aclosing`, which ends the request."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...
