"""What a client of any way to the engine gives back: `generate(prompt)` an Answer, `stream(prompt)` Pieces."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    `text` may be "" while a character still lacks bytes; `tokens` counts the new ones, and `token_ids` are they, where
    the way carries them. `finish_reason` is None until the last piece.
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
