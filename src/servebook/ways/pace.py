"""How long a stream waits after a message; vLLM merges the tokens that come meanwhile into the next."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """What a front may spend on messages: `per_second` for all streams beyond the `free` ones, whatever is in them.

    A token is never held back for longer than `most_seconds`, the first one not at all.
    """

    per_second: float
    most_seconds: float
    free: int = 0

    def hold_seconds(self, streams: int, sent: int, left: int) -> float:
        """The wait after a message of `sent` tokens: 0 with few streams, longer the more there are.

        Nor does an answer wait that has at most as many tokens `left`: its end should not come later.
        """
        if streams <= self.free or left <= sent:
            return 0.0
        return min((streams - self.free) / self.per_second, self.most_seconds)
