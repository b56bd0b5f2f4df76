"""The requests of a measurement: never the same prompt twice, and answers that run to their last token."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from servebook.bench.load import Job

WORDS = (
    *("river", "stone", "market", "window", "garden", "engine", "paper", "silver", "morning", "table", "signal"),
    *("winter", "number", "forest", "story", "bridge", "summer", "light", "music", "letter", "water", "city"),
    *("island", "road", "voice", "glass", "house", "field", "north"),
)

TOKENS_PER_NUMBER = 5
TOKENS_PER_WORD = 3
CHAT_TEMPLATE_TOKENS = 38


def completions(prompt_tokens: int, max_tokens: int, seed: int = 0) -> Iterator[Job]:
    """Endless jobs for text completion, of about `prompt_tokens` tokens with SmolLM2's tokenizer.

    The prompt counts ("417, 419, 421,") and a language model goes on counting: the answer does not end
    early, without asking for `ignore_eos`, which not every path can carry. Each prompt begins differently,
    so that no arm profits from a prefix that another arm has left in the cache.

    Answers have `max_tokens` on average, from half of it to half more: of equal length, callers that began together
    would end together, and each wave of new prompts would hit the engine at once. `seed` draws the prompts only: the
    lengths come in the same order for every arm, so that neighbouring blocks have the same work.
    """
    draw, lengths = random.Random(seed), random.Random(max_tokens)
    length = max(2, prompt_tokens // TOKENS_PER_NUMBER)
    while True:
        start, step = draw.randint(100, 899), draw.choice((1, 2, 5, 10))
        yield Job(", ".join(str(start + step * k) for k in range(length)) + ",", _length(lengths, max_tokens))


def chats(prompt_tokens: int, max_tokens: int, seed: int = 0) -> Iterator[Job]:
    """Endless jobs for chat, of about `prompt_tokens` tokens with the template: each asks for a long story.

    The lengths of the answers vary as in `completions`.
    """
    draw, lengths = random.Random(seed), random.Random(max_tokens)
    count = max(3, (prompt_tokens - CHAT_TEMPLATE_TOKENS) // TOKENS_PER_WORD)
    while True:
        about = ", ".join(f"the {draw.choice(WORDS)}" for _ in range(count))
        yield Job(f"Write a long story about {about}.", _length(lengths, max_tokens))


def _length(draw: random.Random, mean: int) -> int:
    return draw.randint((mean + 1) // 2, mean + mean // 2)


def take(jobs: Iterator[Job], count: int) -> list[Job]:
    """The next `count` jobs."""
    return list(itertools.islice(jobs, count))
