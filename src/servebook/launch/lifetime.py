"""Start, await, attach to, watch and end servers. The supervisor does the keeping; this is its client."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from servebook.engine.arguments import engine_env
from servebook.engine.model import model_path
from servebook.errors import LaunchError
from servebook.launch.memory import memory_for
from servebook.launch.progress import Progress, progress
from servebook.launch.servers import ENGINE_PHASES, SERVERS, ServerSpec, behind, find_server
from servebook.settings import LOOPBACK, Settings, is_loopback, load_settings

SUPERVISOR = Path(__file__).with_name("supervisor.py")
POLL_SECONDS = 0.1
BROKEN_SECONDS = 10.0
"""How long a server that was ready, and is not, may take to come back: longer than a busy one needs to answer."""
SUPERVISOR_SECONDS = 20.0
"""How long a supervisor may take to listen: a few ms, on a machine that is not overloaded."""
STOP_SECONDS = 40.0
"""Longer than a supervisor's grace times together."""
TAIL_LINES = 15
INSTANCE = re.compile(r"\w[\w.-]*")
EX_TEMPFAIL, EX_IOERR = 75, 74


class Link:
    """A connection to one supervisor; while it is open after `attach`, it is a lease on the server."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.settimeout(STOP_SECONDS)

    @classmethod
    def open(cls, settings: Settings, instance: str) -> Link | None:
        """Connect to the supervisor of `instance`; None where there is none."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect("\0" + _address(settings, instance))
        except OSError:
            connection.close()
            return None
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", peer)[1] != os.getuid():  # abstract names have no permissions
            connection.close()
            raise LaunchError(
                f"Another user of this machine holds the name of your {instance}.",
                "Set SERVEBOOK_STATE_DIR to another folder of yours, and tell whoever runs this machine.",
            )
        return cls(connection)

    def ask(self, op: str) -> dict[str, Any] | None:
        """Send one request; None where the supervisor has gone."""
        try:
            self.connection.sendall(json.dumps({"op": op}).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                if not (chunk := self.connection.recv(65536)):
                    return None
                answer += chunk
            return dict(json.loads(answer))
        except (OSError, ValueError):
            return None

    def alive(self) -> bool:
        """Whether the supervisor still holds its end."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return not poll.poll(0)

    def wait_closed(self, seconds: float) -> bool:
        """Wait until the supervisor, and with it everything that it kept, has gone."""
        self.connection.settimeout(seconds)
        with suppress(ConnectionError):
            try:
                while self.connection.recv(65536):
                    pass
            except TimeoutError:
                return False
        return True

    def close(self) -> None:
        self.connection.close()


_leases: dict[str, Link] = {}
"""Leases of this process by supervisor's address: they end with it, however it ends."""


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
        return self.http if "://" in self.http else f"http://{self.http}"

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
    settings = _merge(settings, overrides)
    if name == "vllm" and settings.engine_url and instance is None:
        return _elsewhere(settings)
    server, links = _start(spec or find_server(name), settings, instance or name, owner="kernel")
    _leases.update(links)
    return server


def up(name: str, settings: Settings | None = None, **overrides: Any) -> Server:
    """Like `serve`, but the server stays when this process ends.

    Raises:
        LaunchError: as `serve`; and for "vllm" where SERVEBOOK_ENGINE_URL says that it runs elsewhere.
    """
    settings = _merge(settings, overrides)
    if name == "vllm" and settings.engine_url:
        raise LaunchError(
            f"The engine runs elsewhere: SERVEBOOK_ENGINE_URL is {settings.engine_url}.",
            "Unset it to run one here.",
        )
    server, links = _start(find_server(name), settings, name, owner="cli")
    for link in links.values():
        link.ask("keep")
        link.close()
    return server


def down(instance: str, settings: Settings | None = None) -> bool:
    """End a server and wait until nothing is left of it; False where there was none.

    Raises:
        LaunchError: it is still there after 40 seconds.
    """
    settings = settings or load_settings()
    with suppress(OSError):
        _record_path(settings, instance).unlink()
    link = Link.open(settings, instance)
    if lease := _leases.pop(_address(settings, instance), None):
        lease.close()
    if link is None:
        return False
    link.ask("stop")
    if not link.wait_closed(STOP_SECONDS):
        raise LaunchError(f"{instance} does not end.", f"See `servebook logs {instance}`.")
    return True


def status(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Every known server's state as `servebook status --json` prints it; asked of the servers, not of the disk."""
    settings = settings or load_settings()
    known = {path.stem for path in _servers_dir(settings).glob("*.json")} | _listening(settings)
    return [_status_of(instance, settings) for instance in [*SERVERS, *sorted(known - SERVERS.keys())]]


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file, "" where there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def log_path(instance: str, settings: Settings) -> Path:
    """Where the output of `instance` goes; the run before it is kept beside it as `.log.1`."""
    return settings.state_dir / "logs" / f"{instance}.log"


def _merge(settings: Settings | None, overrides: dict[str, Any]) -> Settings:
    if settings is None:
        return load_settings(**overrides)
    return load_settings(**(settings.model_dump(exclude_unset=True) | overrides))


def _start(spec: ServerSpec, settings: Settings, instance: str, owner: str) -> tuple[Server, dict[str, Link]]:
    """Start or attach to `instance` and what it needs; the links lease them until they are closed."""
    if not INSTANCE.fullmatch(instance):
        raise LaunchError(f"{instance!r} cannot name a server.", "Use letters, digits, '-', '_' and '.'.")
    if not spec.checks_key and not is_loopback(settings.host):
        raise LaunchError(
            f"{spec.name} checks no API key, so it is not opened to {settings.host}.",
            "Unset SERVEBOOK_HOST; to publish it, put a proxy with TLS and keys in front.",
        )
    links: dict[str, Link] = {}
    try:
        at: dict[str, Mapping[str, str]] = {}
        with ExitStack() as starts:
            begun: list[_Begun] = []
            for need, its_settings in spec.needs(settings).items():
                kind = SERVERS.get(need, SERVERS["vllm"])  # a replica is a vllm by another name
                if need == "vllm" and settings.engine_url:
                    at[need] = _elsewhere(settings).endpoints
                elif kind.has_engine:
                    display = starts.enter_context(progress(need))
                    started = sum(not other.attached for other in begun)
                    begun.append(_begin(kind, its_settings, need, owner, {}, display, links, starts, started + 1))
                else:
                    server, its_links = _start(kind, its_settings, need, owner)
                    at[need] = server.endpoints
                    links |= its_links
            for one in begun:
                at[one.info["name"]] = _finish(one).endpoints
        with ExitStack() as starts, progress(instance) as display:
            return _finish(_begin(spec, settings, instance, owner, at, display, links, starts)), links
    except BaseException:
        for link in links.values():
            link.close()
        raise


@dataclass(frozen=True)
class _Begun:
    """A server that is on its way, or was there before (`attached`)."""

    spec: ServerSpec
    settings: Settings
    link: Link
    info: dict[str, Any]
    attached: bool
    display: Progress


def _begin(
    spec: ServerSpec,
    settings: Settings,
    instance: str,
    owner: str,
    needs: dict[str, Mapping[str, str]],
    display: Progress,
    links: dict[str, Link],
    starts: ExitStack,
    engines: int = 1,
) -> _Begun:
    """Take a lease on the server that is there, or on a new one, into `links`; does not wait until it is ready.

    `engines` are those that start together, this one included: memory must be there for all, and what a GPU has is
    held for them until `starts` is closed.
    """
    display.phase("looking for the model")
    model = model_path(settings)
    request = _request(spec, settings, instance, owner, model, needs)
    link, info, attached = _attach(spec, request, settings, model, display, starts, engines)
    links[request["address"]] = link
    if not _serves(info, request):
        raise LaunchError(
            f"{instance} is up with other settings (model {info['model']}).",
            f"End it with `servebook down {instance}`, or ask for the settings that it has.",
        )
    return _Begun(spec, settings, link, info, attached, display)


def _serves(info: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether the server that is there is the one that is asked for.

    One that was opened to the network on purpose also serves those who ask for it on this machine.
    """
    return info["fingerprint"] == request["fingerprint"] and (
        info["host"] == request["host"] or is_loopback(request["host"])
    )


def _finish(begun: _Begun) -> Server:
    """Wait until the server is ready, and say so."""
    info, display = begun.info, begun.display
    _await_ready(begun.spec, info, begun.link, begun.settings, display)
    where = ", ".join(f"{kind} {address}" for kind, address in info["endpoints"].items())
    display.done(f"{'attached to' if begun.attached else 'ready'}: {where} ({display.elapsed}){_moved(info)}")
    return _server(info, begun.settings)


def _attach(
    spec: ServerSpec,
    request: dict[str, Any],
    settings: Settings,
    model: Path,
    display: Progress,
    starts: ExitStack,
    engines: int,
) -> tuple[Link, dict[str, Any], bool]:
    """A lease on the server that is there, or on a new one; its description; whether it was there."""
    while there := Link.open(settings, request["name"]):
        if info := there.ask("attach"):
            return there, info, True
        there.close()  # it was ending, for example because its kernel was restarted: wait until it has
    if spec.has_engine:
        starts.enter_context(memory_for(settings, model, engines, display.phase))
    link = _spawn(request, settings, display)
    if info := link.ask("attach"):
        return link, info, False
    link.close()
    raise _died(request["name"], settings)


def _moved(info: dict[str, Any]) -> str:
    taken = [
        str(preferred)
        for kind, preferred in info["preferred"].items()
        if not info["endpoints"][kind].endswith(f":{preferred}")
    ]
    return f"; port {', '.join(taken)} was taken" if taken else ""


def _server(info: dict[str, Any], settings: Settings) -> Server:
    return Server(
        name=info["name"],
        model=info["model"],
        endpoints=info["endpoints"],
        settings=settings,
        pid=info["pid"],
        log=Path(info["log"]),
    )


def _request(
    spec: ServerSpec,
    settings: Settings,
    instance: str,
    owner: str,
    model: Path,
    needs: dict[str, Mapping[str, str]],
) -> dict[str, Any]:
    env = engine_env(settings)
    if settings.key:
        # In the environment, not in argv: `ps` shows argv to every user of the machine.
        env |= {"VLLM_API_KEY": settings.key, "SERVEBOOK_API_KEY": settings.key}
    # Not where it listens, which `_serves` looks at; and a venv has several names for one Python.
    what = json.dumps([spec.argv(behind(settings), model, needs)[1:], env]).encode()
    hosts = {kind: LOOPBACK if kind in spec.local else settings.host for kind in spec.ports}
    return {
        "name": instance,
        "server": spec.name,
        "address": _address(settings, instance),
        "argv": spec.argv(settings, model, needs),
        "env": env,
        "host": settings.host,
        "hosts": hosts,
        "client_hosts": {kind: {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host) for kind, host in hosts.items()},
        "ports": {kind: settings.port(spec.name, kind) for kind in spec.ports},
        "avoid": [settings.port(other.name, kind) for other in SERVERS.values() for kind in other.ports],
        "model": settings.model_name,
        "owner": owner,
        "fingerprint": hashlib.sha256(what).hexdigest()[:16],
        "log": str(log_path(instance, settings)),
        "record": str(_record_path(settings, instance)),
    }


def _spawn(request: dict[str, Any], settings: Settings, display: Progress) -> Link:
    display.phase("importing")
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (Path(request["log"]).parent, Path(request["record"]).parent):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(settings, error.strerror) from None
    supervisor = subprocess.Popen(
        [sys.executable, "-I", str(SUPERVISOR)], stdin=subprocess.PIPE, start_new_session=True
    )
    assert supervisor.stdin
    with suppress(BrokenPipeError), supervisor.stdin as pipe:
        pipe.write(json.dumps(request).encode())
    deadline = time.monotonic() + SUPERVISOR_SECONDS
    while time.monotonic() < deadline:
        code = supervisor.poll()
        if link := Link.open(settings, request["name"]):
            return link
        if code == EX_IOERR:
            raise _unwritable(settings, "no log can be made there")
        if code not in (None, EX_TEMPFAIL):  # TEMPFAIL: another start was first, and is about to listen
            break
        time.sleep(0.02)
    raise _died(request["name"], settings)


def _unwritable(settings: Settings, why: str | None) -> LaunchError:
    return LaunchError(
        f"The state folder {settings.state_dir} cannot be written: {why}.",
        "Set SERVEBOOK_STATE_DIR to a folder that you can write to.",
    )


def _await_ready(spec: ServerSpec, info: dict[str, Any], link: Link, settings: Settings, display: Progress) -> None:
    deadline = time.monotonic() + (BROKEN_SECONDS if info.get("was_ready") else settings.start_timeout)
    while not spec.ready(info["endpoints"]):
        if not link.alive():
            raise _died(info["name"], settings)
        if time.monotonic() > deadline:
            if info.get("was_ready"):
                raise LaunchError(
                    f"{info['name']} was ready and is not any more. The end of its log:\n{tail(Path(info['log']))}",
                    f"`servebook down {info['name']}`, then start it again.",
                )
            raise LaunchError(
                f"{info['name']} was not ready within {settings.start_timeout:.0f} s. The end of its log:\n"
                f"{tail(Path(info['log']))}",
                "Raise SERVEBOOK_START_TIMEOUT for a large model or a slow disk.",
            )
        display.phase(_phase(Path(info["log"])))
        time.sleep(POLL_SECONDS)
    link.ask("ready")


def _phase(log: Path) -> str:
    try:
        text = log.read_text(errors="replace")
    except OSError:
        text = ""
    return next((phase for phase, words in reversed(ENGINE_PHASES.items()) if words in text), "importing")


def _died(instance: str, settings: Settings) -> LaunchError:
    log = log_path(instance, settings)
    code = _record(settings, instance).get("exit")
    how = "" if code is None else f" (killed by signal {-code})" if code < 0 else f" (exit code {code})"
    hint = "If memory is short, Linux kills the largest process: see `servebook doctor`. " if code == -9 else ""
    return LaunchError(
        f"{instance} ended before it was ready{how}. The end of its log:\n{tail(log)}",
        f"{hint}The whole log: `servebook logs {instance}`.",
    )


def _elsewhere(settings: Settings) -> Server:
    """The vLLM that SERVEBOOK_ENGINE_URL names, asked for its model."""
    import requests

    url = str(settings.engine_url)
    headers = {"Authorization": f"Bearer {settings.key}"} if settings.key else {}
    try:
        answer = requests.get(f"{url}/v1/models", headers=headers, timeout=10)
        answer.raise_for_status()
        model = answer.json()["data"][0]["id"]
    except requests.HTTPError as error:
        refused = error.response.status_code in (401, 403)
        raise LaunchError(
            f"The engine at {url} answers {error.response.status_code} {error.response.reason} to GET /v1/models.",
            "Set SERVEBOOK_API_KEY to a key of that engine."
            if refused
            else "Correct SERVEBOOK_ENGINE_URL: it must be a vLLM.",
        ) from None
    except (requests.RequestException, LookupError, TypeError, ValueError):
        raise LaunchError(
            f"No vLLM answers at SERVEBOOK_ENGINE_URL={url}.",
            "Start it there, correct the URL, or unset it to run an engine here.",
        ) from None
    http = urlsplit(url).netloc if url.startswith("http://") and not urlsplit(url).path else url
    return Server(name="vllm", model=model, endpoints={"http": http}, settings=settings)


def _status_of(instance: str, settings: Settings) -> dict[str, Any]:
    link = Link.open(settings, instance)
    info = link.ask("info") if link else None
    if link:
        link.close()
    record = info or _record(settings, instance)
    if info:
        ready = find_server(info["server"]).ready(info["endpoints"])
        failed = info.get("was_ready") or info.get("seconds", 0) > settings.start_timeout
        state = "ready" if ready else "failed" if failed else "starting"
    else:
        state = "failed" if record else "stopped"
    return {
        "name": instance,
        "state": state,
        "pid": info["pid"] if info else None,
        "model": record.get("model"),
        "endpoints": info["endpoints"] if info else {},
        "owner": record.get("owner"),
        "log": record.get("log"),
    }


def _listening(settings: Settings) -> set[str]:
    """The instances that have a supervisor, whatever became of their records."""
    prefix = "@" + _address(settings, "")
    lines = Path("/proc/net/unix").read_text().splitlines()
    return {line.split()[-1].removeprefix(prefix) for line in lines if prefix in line}


def _servers_dir(settings: Settings) -> Path:
    return settings.state_dir / "servers"


def _record_path(settings: Settings, instance: str) -> Path:
    return _servers_dir(settings) / f"{instance}.json"


def _record(settings: Settings, instance: str) -> dict[str, Any]:
    """What a server left on disk; {} where nothing, or nothing readable, is there."""
    try:
        record = json.loads(_record_path(settings, instance).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _address(settings: Settings, instance: str) -> str:
    """The supervisor's socket name: one per user, state folder and instance."""
    where = hashlib.sha256(str(settings.state_dir.resolve()).encode()).hexdigest()[:12]
    return f"servebook-{os.getuid()}-{where}-{instance}"
