"""Ask the overlay `cpu-kind` on a cluster: `python3 tests/check_cluster.py`, with kubectl's context set.

Eight answers are streamed through the gateway, and while they run every replica is told to go: all must come whole.
No package is needed. `tests/test_kubernetes.py` holds the manifests to each other; this is what only a cluster shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from threading import Event

KUBECTL = ["kubectl", "--namespace", "servebook"]
URL = "http://127.0.0.1:18080"
KEY = "a-key-for-kind-only"
SLEEP_SECONDS = 10
"""What a replica sleeps before it gets SIGTERM: some answers have to last longer, or nothing was drained."""


def request(path: str, body: dict[str, object], key: str = KEY) -> urllib.request.Request:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return urllib.request.Request(URL + path, json.dumps(body).encode(), headers)


def stream(number: int, begun: Event) -> tuple[float, str]:
    """When the answer ended, and its last event but `[DONE]`.

    Raises:
        ValueError: it was broken off.
    """
    body = {"message": f"Tell me a very long story about {number} ships and their captains.", "max_tokens": 400}
    events = []
    with urllib.request.urlopen(request("/chat/stream", body), timeout=300) as lines:
        for line in lines:
            if line.startswith(b"data: "):
                events.append(line.decode().removeprefix("data: ").strip())
                begun.set()
    if events[-1] != "[DONE]":
        raise ValueError(f"broken off after {len(events)} events: {events[-1]}")
    return time.monotonic(), events[-2]


def main() -> None:
    forward = subprocess.Popen([*KUBECTL, "port-forward", "service/gateway", "18080:80"], stdout=subprocess.PIPE)
    try:
        assert forward.stdout
        forward.stdout.readline()  # "Forwarding from …": it listens
        try:
            urllib.request.urlopen(request("/chat", {"message": "Hello"}, key="another key"), timeout=60)
            sys.exit("A wrong key was taken.")
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
        begun = [Event() for _ in range(8)]
        with ThreadPoolExecutor(len(begun)) as pool:
            answers = [pool.submit(stream, number, event) for number, event in enumerate(begun, 2)]
            for event in begun:
                assert event.wait(120), "an answer did not begin"
            subprocess.run([*KUBECTL, "delete", "pod", "--selector=app=vllm", "--wait=false"], check=True)
            told = time.monotonic()
            ends = [answer.result() for answer in answers]
        lasted = sorted(end - told for end, _ in ends)
        print(f"{len(ends)} answers came whole, the last {lasted[-1]:.0f} s after the replicas were told to go")
        assert all(json.loads(last)["finish_reason"] in ("stop", "length") for _, last in ends), ends
        assert lasted[-1] > SLEEP_SECONDS, "all were done before SIGTERM came: nothing was drained"
    finally:
        forward.terminate()
        forward.wait()


if __name__ == "__main__":
    main()
