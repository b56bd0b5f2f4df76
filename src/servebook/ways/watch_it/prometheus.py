"""Runs a real Prometheus, where there is one, on the chapter's own files, and asks it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml

from servebook.launch.child import run_child
from servebook.launch.probes import http_ok
from servebook.processes import free_port
from servebook.ways.watch_it.alarm import FOLDER, RULES, Rule

CONFIG = FOLDER / "prometheus.yaml"
"""What comes with the chapter: which servers are read, how often."""


def find() -> str | None:
    """The program, where it is installed (Debian and Ubuntu: `apt install prometheus`)."""
    return shutil.which("prometheus")


def write_files(folder: Path, addresses: Mapping[str, str], rule: Rule, key: str | None = None) -> Path:
    """Put the chapter's two files into `folder`, for servers at these `addresses`, once a second, with this `rule`.

    `addresses` are "host:port" by the names of their jobs; jobs without one are left out. Returns the configuration.
    """
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    jobs = [job for job in config["scrape_configs"] if job["job_name"] in addresses]
    for job in jobs:
        job["static_configs"] = [{"targets": [addresses[job["job_name"]]]}]
        if key:
            job["authorization"] = {"credentials": key}
    config["scrape_configs"] = jobs
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    for each in (each for group in rules["groups"] for each in group["rules"]):
        if each["alert"] == rule.alert:
            each |= {"expr": rule.expression, "for": f"{rule.hold}s"}
    (folder / RULES.name).write_text(yaml.safe_dump(rules), encoding="utf-8")
    path = folder / CONFIG.name
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@contextmanager
def run(addresses: Mapping[str, str], rule: Rule, key: str | None = None) -> Iterator[str]:
    """Run it for the length of the block, on a free port of this machine only; gives its URL.

    Raises:
        LaunchError: it does not start.
    """
    program = find()
    assert program, "ask find() first"
    with tempfile.TemporaryDirectory() as name:
        address = f"127.0.0.1:{free_port()}"
        words = [
            *(program, "--config.file", str(write_files(Path(name), addresses, rule, key))),
            *("--storage.tsdb.path", f"{name}/data", "--web.listen-address", address, "--log.level", "warn"),
        ]
        with run_child(words, lambda _: http_ok(address, "/-/ready"), name="prometheus"):
            yield f"http://{address}"


def ask(url: str, query: str, start: float, end: float, step: float = 1) -> list[dict[str, Any]]:
    """Its answer to a PromQL `query` from `start` to `end`, in seconds since 1970, every `step` seconds.

    A list of series; each has its labels (`metric`) and its `values`, pairs of time and number.
    """
    wanted = {"query": query, "start": start, "end": end, "step": step}
    answer = requests.get(f"{url}/api/v1/query_range", params={k: str(v) for k, v in wanted.items()}, timeout=30)
    answer.raise_for_status()
    result: list[dict[str, Any]] = answer.json()["data"]["result"]
    return result
