"""When tokens wait for each other, and for how long."""

from __future__ import annotations

import pytest

from servebook.ways.pace import Pace

PACE = Pace(per_second=1000, most_seconds=0.02, free=8)


@pytest.mark.parametrize(("streams", "seconds"), [(1, 0), (8, 0), (9, 0.001), (18, 0.01), (28, 0.02), (500, 0.02)])
def test_a_stream_waits_the_longer_the_more_there_are_and_never_beyond_the_bound(streams: int, seconds: float) -> None:
    assert PACE.hold_seconds(streams, sent=1, left=100) == seconds


@pytest.mark.parametrize(("left", "seconds"), [(5, 0.01), (4, 0.01), (3, 0), (0, 0)])
def test_the_end_of_an_answer_is_not_held_back(left: int, seconds: float) -> None:
    assert PACE.hold_seconds(18, sent=3, left=left) == seconds
