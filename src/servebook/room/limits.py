"""How much of the engine each learner gets. What is too much is refused at once or after a short wait, never hung."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """A room's limits; those of a learner begin with `learner_`.

    `places` requests are in the engine at a time, `waiting` more wait for up to `patience` seconds. Of one learner
    at most `learner_places` are in the engine, and as many more wait. Tokens are counted as asked for (`max_tokens`),
    as OpenAI counts them too: what an answer comes to is known only when it is too late to refuse it.
    """

    places: int = 64
    waiting: int = 128
    patience: float = 20.0
    learner_places: int = 16
    learner_requests_per_minute: int = 120
    learner_tokens_per_minute: int = 6000


class Refused(Exception):
    """A request that is not served.

    `retry_after` is in whole seconds, None where trying again does not help.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after


class Bucket:
    """Lets `per_minute` units a minute through, and as many at once after a quiet minute."""

    def __init__(self, per_minute: int) -> None:
        self.capacity = per_minute
        self.level = float(per_minute)
        self.at = time.monotonic()

    def take(self, amount: int) -> int:
        """Take `amount` and return 0; or take nothing, and return the seconds until there will be enough.

        More than the bucket holds counts as all that it holds: one big request is not refused for ever, and what
        comes after it waits for a minute at most.
        """
        amount = min(amount, self.capacity)
        now = time.monotonic()
        self.level = min(self.capacity, self.level + (now - self.at) * self.capacity / 60)
        self.at = now
        if self.level < amount:
            return math.ceil((amount - self.level) * 60 / self.capacity)
        self.level -= amount
        return 0

    def give_back(self, amount: int) -> None:
        """Undo a `take` of `amount` that came to nothing."""
        self.level = min(self.capacity, self.level + min(amount, self.capacity))


class Turnstile:
    """Admits `limits.places` requests at a time; a place that falls free goes to the learner whose turn it is."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running: Counter[str] = Counter()
        self.queues: dict[str, deque[asyncio.Future[None]]] = {}
        """Who waits, by learner; the learner whose turn is next comes first."""

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues.values()))

    @asynccontextmanager
    async def place(self, learner: str) -> AsyncIterator[None]:
        """Hold a place in the engine.

        Raises:
            Refused: 429, this learner has too many under way; 503, the room has, or no place fell free in time.
        """
        await self._enter(learner)
        try:
            yield
        finally:
            self.running[learner] -= 1
            self._admit()

    async def _enter(self, learner: str) -> None:
        limits = self.limits
        mine = self.queues.get(learner, ())
        if len(mine) >= limits.learner_places:
            raise Refused(
                429,
                "too_many_requests",
                f"{self.running[learner]} of your requests are under way and {len(mine)} wait: that is your share. "
                "Wait for some of them to end.",
                retry_after=2,
            )
        if self.waiting >= limits.waiting:
            raise Refused(
                503, "room_full", f"The room's engine is full: {self.waiting} requests wait. Try again in a moment.", 5
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queues.setdefault(learner, deque()).append(turn)
        self._admit()
        try:
            async with asyncio.timeout(limits.patience):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # admitted in the very moment of leaving
                self.running[learner] -= 1
                self._admit()
            else:
                self._leave(learner, turn)
            if isinstance(error, TimeoutError):
                raise Refused(
                    503, "room_full", f"No place in the engine fell free within {limits.patience:g} s.", 5
                ) from None
            raise

    def _leave(self, learner: str, turn: asyncio.Future[None]) -> None:
        queue = self.queues[learner]
        queue.remove(turn)
        if not queue:
            del self.queues[learner]

    def _admit(self) -> None:
        """Give the free places away, one to each learner in turn."""
        while self.running.total() < self.limits.places:
            allowed = (name for name in self.queues if self.running[name] < self.limits.learner_places)
            if (learner := next(allowed, None)) is None:
                return
            queue = self.queues.pop(learner)
            queue.popleft().set_result(None)
            if queue:
                self.queues[learner] = queue  # behind all others
            self.running[learner] += 1
