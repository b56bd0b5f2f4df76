"""Recording proxies: they relay between a learner's code and a real server, and note what passes."""

import time
from collections.abc import Callable


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether `holds` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True
