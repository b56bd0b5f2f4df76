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

TOKENS_PER_NUMBER = 6
TOKENS_PER_WORD = 3
TOKENS_PER_MARK = 9
CHAT_TEMPLATE_TOKENS = 30


def seeds() -> Iterator[int]:
    """Endless seeds for the arms of one run, no two alike.

    They begin somewhere else each time: a server that stays up has the prompts of earlier runs in its prefix cache. Six
    digits, each a token, leave a mark short of a block.
    """
    return itertools.count(random.randrange(100_000, 900_000))


def completions(prompt_tokens: int, max_tokens: int, seed: int = 0) -> Iterator[Job]:
    """Endless jobs for text completion, of about `prompt_tokens` tokens with SmolLM2's tokenizer.

    The prompt counts ("1417, 1419, 1421,") and a language model goes on counting: the answer does not end
    early, without asking for `ignore_eos`, which not every path can carry. Each prompt begins with a mark of its
    own, made of `seed` and its number: with seeds from `seeds`, not even the first block of 16 tokens is ever found in
    a prefix cache.

    Answers have `max_tokens` on average, from half of it to half more: of equal length, callers that began together
    would end together, and each wave of new prompts would hit the engine at once. `seed` draws the prompts only: the
    lengths come in the same order for every arm, so that neighbouring blocks have the same work.
    """
    draw, lengths = random.Random(seed), random.Random(max_tokens)
    length = max(2, (prompt_tokens - TOKENS_PER_MARK) // TOKENS_PER_NUMBER)
    for number in itertools.count():
        start, step = draw.randint(1000, 1999), draw.choice((1, 2, 5, 10))
        counted = ", ".join(str(start + step * k) for k in range(length))
        yield Job(f"{seed}-{number}: {counted},", _length(lengths, max_tokens))


def chats(prompt_tokens: int, max_tokens: int, seed: int = 0) -> Iterator[Job]:
    """Endless jobs for chat, of about `prompt_tokens` tokens with the template: each asks for a long story.

    Below 50 they are as short as they get, some 49.

    The lengths of the answers vary as in `completions`.
    """
    draw, lengths = random.Random(seed), random.Random(max_tokens)
    count = max(3, (prompt_tokens - CHAT_TEMPLATE_TOKENS - TOKENS_PER_MARK) // TOKENS_PER_WORD)
    for number in itertools.count():
        about = ", ".join(f"the {draw.choice(WORDS)}" for _ in range(count))
        yield Job(f"{seed}-{number}: write a long story about {about}.", _length(lengths, max_tokens))


def prefix(tokens: int) -> str:
    """The same text each time, of about so many tokens, to put before a prompt: as a long system prompt is."""
    return "".join(f"{word} " for word in itertools.islice(itertools.cycle(WORDS), tokens))


def _length(draw: random.Random, mean: int) -> int:
    return draw.randint((mean + 1) // 2, mean + mean // 2)


def take(jobs: Iterator[Job], count: int) -> list[Job]:
    """The next `count` jobs."""
    return list(itertools.islice(jobs, count))
