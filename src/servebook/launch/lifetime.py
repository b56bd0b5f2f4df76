"""Start, await, attach to and end servers. Supervisors do the keeping; this is what a notebook calls."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from servebook.errors import LaunchError
from servebook.launch.elsewhere import ask_elsewhere
from servebook.launch.files import TAIL_LINES, Files, tail
from servebook.launch.keep import ABANDONED, keep
from servebook.launch.link import STOP_SECONDS, Link
from servebook.launch.plan import Start, plan
from servebook.launch.supervisor import Description
from servebook.launch.table import ServerSpec, find_server
from servebook.settings import Settings, load_settings, own_settings, url_of

_leases: dict[Files, Link] = {}
"""Leases of this process: they end with it, however it ends."""


def _leave_to_parent() -> None:
    """In a fork: its copies of the leases would keep the servers of a process that has ended."""
    for link in _leases.values():
        link.close()
    _leases.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@dataclass(frozen=True)
class Server:
    """A server that answers.

    `endpoints` maps "http", "grpc" and "metrics", where there are such, to "host:port".
    """

    name: str
    model: str
    endpoints: Mapping[str, str]
    settings: Settings = field(repr=False)
    pid: int | None = None
    log: Path | None = None

    @property
    def http(self) -> str:
        return self.endpoints["http"]

    @property
    def grpc(self) -> str:
        return self.endpoints["grpc"]

    @property
    def metrics(self) -> str:
        return self.endpoints["metrics"]

    @property
    def url(self) -> str:
        """`http://host:port`, or what SERVEBOOK_ENGINE_URL says."""
        return url_of(self.http)

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The end of the server's log."""
        return tail(self.log, lines) if self.log else ""

    def stop(self) -> None:
        """End the server, whoever uses it; an engine elsewhere (SERVEBOOK_ENGINE_URL) is left alone."""
        if self.pid is not None:
            down(self.name, self.settings)


def serve(
    name: str,
    *,
    instance: str | None = None,
    settings: Settings | None = None,
    spec: ServerSpec | None = None,
    **overrides: Any,
) -> Server:
    """Attach to a healthy server or start one, with a progress display; return it when it is ready.

    It lives as long as a process that called `serve` for it, or until `servebook down` if `servebook up`
    started it. `instance` names a second server of the same kind; `overrides` are fields of Settings; `spec`
    starts it in another way than the table of servers says.

    Raises:
        LaunchError: it cannot start; the message holds the cause and the end of its log.
        ModelError: the model is missing, or shorter than `max_model_len`.
    """
    start = Start(spec or find_server(name), _merge(settings, overrides), instance or name, owner="kernel")
    if start.elsewhere:
        model, endpoints = ask_elsewhere(start.settings)
        return Server(name, model, endpoints, start.settings)
    there, leases = keep(plan(start))
    _leases.update(leases)
    return _server(there, start.settings)


def serve_all(names: Iterable[str], start: Callable[[str], Server] = serve) -> dict[str, Server]:
    """Start several servers side by side, each by `start(name)`, and wait for all; each name is a server of its own.

    An interrupt ends those that are not ready so far.

    Raises:
        LaunchError: one of them cannot start; the others stay up for as long as this process.
        ModelError: as `serve`.
    """
    abandoned = Event()

    def one(name: str) -> Server:
        ABANDONED.set(abandoned)
        return start(name)

    starts = ThreadPoolExecutor()
    try:
        begun = {name: starts.submit(one, name) for name in names}
        while wait(begun.values(), timeout=1).not_done:
            pass  # an interrupt in the instant before a wait does not end that wait
    except BaseException:
        abandoned.set()
        raise
    finally:
        starts.shutdown(wait=False, cancel_futures=True)  # one may be at a download, which hears of it late
    return {name: starting.result() for name, starting in begun.items()}


def up(name: str, **overrides: Any) -> Server:
    """Like `serve`, but the server stays when this process ends.

    Raises:
        LaunchError: as `serve`; and for "vllm" where SERVEBOOK_ENGINE_URL says that it runs elsewhere.
    """
    start = Start(find_server(name), load_settings(**overrides), name, owner="cli")
    if start.elsewhere:
        raise LaunchError(
            f"The engine runs elsewhere: SERVEBOOK_ENGINE_URL is {start.settings.engine_url}.",
            "Unset it to run one here.",
        )
    there, leases = keep(plan(start))
    heard = [link.ask("keep") for link in leases.values()]
    for link in leases.values():
        link.close()
    if None in heard:
        raise LaunchError(f"{name} was ready, and has ended.", f"See `servebook logs {name}`.")
    return _server(there, start.settings)


def down(instance: str, settings: Settings | None = None) -> bool:
    """End a server and wait until nothing is left of it; False where there was none.

    Raises:
        LaunchError: it is still there after 40 seconds.
    """
    files = Files((settings or own_settings()).state_dir, instance)
    with suppress(OSError):
        files.record.unlink()
    link = Link.open(files)
    if lease := _leases.pop(files, None):
        lease.close()
    if link is None:
        return False
    deadline = time.monotonic() + STOP_SECONDS
    link.ask("stop")  # which a keeper that does not answer takes all the time for
    if not link.wait_closed(max(0.1, deadline - time.monotonic())):
        raise LaunchError(
            f"{instance} does not end.",
            f"`kill -9 {link.keeper}` ends the process that keeps it, and with that all of it."
            if link.keeper
            else "It is kept in another container: end it in the one where it was started.",
        )
    with suppress(OSError):
        files.record.unlink()  # written meanwhile where the server had just died by itself
    return True


def _merge(settings: Settings | None, overrides: dict[str, Any]) -> Settings:
    if settings is None:
        return load_settings(**overrides)
    return load_settings(**(settings.model_dump(exclude_unset=True) | overrides))


def _server(there: Description, settings: Settings) -> Server:
    return Server(there["name"], there["model"], there["endpoints"], settings, there["pid"], Path(there["log"]))
