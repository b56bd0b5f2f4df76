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
    at most `learner_places` are in the engine, and as many more wait; a request takes a place for each of its answers.
    Tokens are counted as asked for (`max_tokens`) at first, what is not asked for as the most that it can be: what an
    answer comes to is known only when it is too late to refuse it. What was not used is given back at its end.
    """

    places: int = 64
    waiting: int = 128
    patience: float = 20.0
    learner_places: int = 16
    learner_requests_per_minute: int = 120
    learner_tokens_per_minute: int = 6000

    @property
    def answers(self) -> int:
        """The most that one request may ask for; with more than there are places it would wait before all others."""
        return min(self.places, self.learner_places)


class Refused(Exception):
    """A request that is not served.

    `param` is the field that is at fault; `retry_after` is in whole seconds, None where trying again does not help.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, *, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after


class Bucket:
    """Lets `per_minute` units a minute through, and as many at once after a quiet minute."""

    def __init__(self, per_minute: int) -> None:
        self.capacity = per_minute
        self.level = float(per_minute)
        self.at = time.monotonic()

    def take(self, amount: int) -> int:
        """Take `amount` and return 0; or take nothing, and return the seconds until there will be enough.

        More than the bucket holds can be taken when it is full: one big request is not refused for ever, and what
        comes after it waits until all of it is made up for.
        """
        self._fill()
        if self.level < (needed := min(amount, self.capacity)):
            return math.ceil((needed - self.level) * 60 / self.capacity)
        self.level -= amount
        return 0

    def used(self) -> float:
        """Which part of a minute's share is taken now: 0 to 1, and more after something that was bigger."""
        self._fill()
        return 1 - self.level / self.capacity

    def _fill(self) -> None:
        now = time.monotonic()
        self.level = min(self.capacity, self.level + (now - self.at) * self.capacity / 60)
        self.at = now

    def give_back(self, amount: int) -> None:
        """Undo a `take`, as far as it came to nothing."""
        self.level = min(self.capacity, self.level + amount)


class Turnstile:
    """Admits requests to `limits.places` places; what falls free goes to the learner whose turn it is."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running: Counter[str] = Counter()
        """Places taken, by learner."""
        self.queues: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}
        """Who waits for how many, by learner; the learner whose turn is next comes first."""

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues.values()))

    @asynccontextmanager
    async def place(self, learner: str, places: int = 1) -> AsyncIterator[None]:
        """Hold so many places in the engine, `limits.answers` at most.

        Raises:
            Refused: 429, this learner has too many under way; 503, the room has, or no place fell free in time.
        """
        await self._enter(learner, places)
        try:
            yield
        finally:
            self.running[learner] -= places
            self._admit()

    async def _enter(self, learner: str, places: int) -> None:
        limits = self.limits
        mine = sum(wanted for wanted, _ in self.queues.get(learner, ()))
        if mine + places > limits.learner_places:
            raise Refused(
                429,
                "too_many_requests",
                f"{self.running[learner]} of your answers are under way and {mine} wait: that is your share. "
                "Wait for some of them to end.",
                retry_after=2,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queues.setdefault(learner, deque()).append((places, turn))
        self._admit()
        if not turn.done() and self.waiting > limits.waiting:
            self._leave(learner, (places, turn))
            raise Refused(
                503,
                "room_full",
                f"The room's engine is full: {self.waiting} requests wait. Try again in a moment.",
                retry_after=5,
            )
        try:
            async with asyncio.timeout(limits.patience):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # admitted in the very moment of leaving
                self.running[learner] -= places
            else:
                self._leave(learner, (places, turn))
            self._admit()
            if isinstance(error, TimeoutError):
                raise Refused(
                    503, "room_full", f"No place in the engine fell free within {limits.patience:g} s.", retry_after=5
                ) from None
            raise

    def _leave(self, learner: str, waiter: tuple[int, asyncio.Future[None]]) -> None:
        if waiter in (queue := self.queues.get(learner, deque())):
            queue.remove(waiter)
            if not queue:
                del self.queues[learner]

    def _admit(self) -> None:
        """Give the free places away, one request of each learner in turn; who needs many is not passed by."""
        limits = self.limits
        while True:
            allowed = (
                name for name, queue in self.queues.items() if self.running[name] + queue[0][0] <= limits.learner_places
            )
            if (learner := next(allowed, None)) is None:
                return
            queue = self.queues[learner]
            places, turn = queue[0]
            if self.running.total() + places > limits.places:
                return
            del self.queues[learner]
            queue.popleft()
            if queue:
                self.queues[learner] = queue  # behind all others
            if not turn.done():  # one that was cancelled a moment ago is about to leave
                self.running[learner] += places
                turn.set_result(None)
