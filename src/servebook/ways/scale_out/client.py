"""Asks vLLM's router for its replicas, and changes them while it serves."""

from __future__ import annotations

import time

import requests

from servebook.bearer import bearer
from servebook.errors import ServebookError
from servebook.ways.metrics import metric, page_text, samples

SETTLE_SECONDS = 2.0
"""A request that the router has just sent is on its way, then waits for a step of the engine; only then it is counted.

Kubernetes' preStop hooks sleep for the same reason.
"""


class RouterClient:
    """The management side of vLLM's router at `url`; `metrics` is the address of its Prometheus page.

    A replica is known by its URL, such as `http://127.0.0.1:8092`. None of these calls needs a key: whoever
    reaches the router can change its replicas. Each raises a ServebookError where there is no router, or it refuses.
    """

    def __init__(self, url: str, metrics: str) -> None:
        self.url = url
        self.metrics = metrics
        self._removed: set[str] = set()  # `drain` may be called again for one that was still at work

    def replicas(self) -> dict[str, bool]:
        """Each replica's URL, and whether the router's health check finds it healthy."""
        workers = self._ask("GET", "/workers").json()["workers"]
        return {worker["url"]: worker["is_healthy"] for worker in sorted(workers, key=lambda each: str(each["url"]))}

    def sent(self, replica: str) -> int:
        """How many requests the router has sent to `replica`, retries included; 0 where it knows of none.

        Raises:
            ServebookError: its page cannot be read.
        """
        return int(sum(samples(page_text(self.metrics), "vllm_router_processed_requests_total", worker=replica)))

    def add(self, replica: str) -> None:
        """Send requests to `replica` too, from now on.

        Raises:
            ServebookError: it is there already.
        """
        self._ask("POST", "/add_worker", url=replica)
        self._removed.discard(replica)

    def remove(self, replica: str) -> None:
        """Send no further request to `replica`; those that it has go on.

        Raises:
            ServebookError: it has none of this name, which it takes to the letter.
        """
        # The router itself says of any name that it has removed it.
        if replica not in (known := self.replicas()) and replica not in self._removed:
            raise ServebookError(
                f"The router has no replica {replica}: nothing was removed.",
                f"Name it as replicas() does: {', '.join(known) or 'there is none'}.",
            )
        self._ask("POST", "/remove_worker", url=replica)
        self._removed.add(replica)

    def drain(self, replica: str, seconds: float = 60) -> None:
        """Remove `replica`, and wait until it has finished what it has.

        Raises:
            ServebookError: it is still at work after `seconds`.
        """
        self.remove(replica)
        time.sleep(SETTLE_SECONDS)
        deadline = time.monotonic() + seconds
        while any(metric(replica, f"vllm:num_requests_{state}") for state in ("running", "waiting")):
            if time.monotonic() > deadline:
                raise ServebookError(f"{replica} is still at work after {seconds:.0f} s.", "Wait longer, or end it.")
            time.sleep(0.1)

    def _ask(self, method: str, path: str, **query: str) -> requests.Response:
        # add_worker waits until the replica is healthy, for up to ten minutes; nobody should wait that long.
        try:
            answer = requests.request(method, self.url + path, params=query, auth=bearer(None), timeout=60)
        except requests.Timeout:
            raise ServebookError(
                f"The router has not answered {method} {path} for a minute.",
                "Is the replica healthy? `servebook logs router` says more.",
            ) from None
        except requests.RequestException as error:
            raise ServebookError(
                f"There is no router at {self.url} ({type(error).__name__}).", "Start it: `servebook up router`."
            ) from None
        if not answer.ok:
            raise ServebookError(
                f"The router answers {answer.status_code} to {method} {path}: {answer.text}",
                "Its log says more: `servebook logs router`.",
            )
        return answer
