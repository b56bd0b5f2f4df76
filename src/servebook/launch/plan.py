"""What is to be started, before anything is: each server with its settings, in the order of who needs whom."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from servebook.engine.arguments import engine_env
from servebook.environment import child_environment, writable_homes
from servebook.errors import LaunchError
from servebook.launch.files import Files
from servebook.launch.supervisor import Order, Owner
from servebook.launch.table import SERVERS, Endpoints, ServerSpec, behind, kind_of
from servebook.processes import can_bind
from servebook.settings import LOOPBACK, Settings, in_address, is_loopback

ANY = {"0.0.0.0": LOOPBACK, "::": "::1"}
"""Where a client on this machine reaches a server that listens on all its addresses."""


@dataclass(frozen=True)
class Start:
    """One server as it is asked for: what it is, with which settings, under which name, and for whom."""

    spec: ServerSpec
    settings: Settings
    instance: str
    owner: Owner

    def __post_init__(self) -> None:
        Files(self.settings.state_dir, self.instance)  # refuses a name that could lead elsewhere

    @property
    def files(self) -> Files:
        return Files(self.settings.state_dir, self.instance)

    @property
    def elsewhere(self) -> bool:
        """Whether it is the engine that SERVEBOOK_ENGINE_URL names, which nobody starts."""
        return self.instance == "vllm" and bool(self.settings.engine_url)

    def order(self, model: Path, needs: dict[str, Endpoints], remote_model: str = "") -> Order:
        """What a supervisor is told, once it is known where the model lies and where the servers that it needs are.

        `remote_model` is the name of the model of an engine elsewhere.
        """
        spec, settings = self.spec, self.settings
        env = engine_env(settings)
        if settings.key:
            # In the environment, not in argv: `ps` shows argv to every user of the machine.
            env |= {"VLLM_API_KEY": settings.key, "SERVEBOOK_API_KEY": settings.key}
        # Not where it listens, which a lease looks at; and a venv has several names for one Python.
        what = json.dumps([spec.argv(behind(settings), model, needs)[1:], env])
        hosts = {kind: LOOPBACK if kind in spec.local else settings.host for kind in spec.ports}
        return {
            "name": self.instance,
            "server": spec.name,
            "argv": spec.argv(settings, model, needs),
            "env": child_environment() | env | writable_homes(settings.cache_dir),
            "host": settings.host,
            "hosts": hosts,
            "client_hosts": {kind: in_address(ANY.get(at, at)) for kind, at in hosts.items()},
            "ports": {kind: settings.port(spec.name, kind) for kind in spec.ports},
            "avoid": [settings.port(other.name, kind) for other in SERVERS.values() for kind in other.ports],
            "model": remote_model or settings.model_name,
            "owner": self.owner,
            "fingerprint": hashlib.sha256(what.encode()).hexdigest()[:16],
            "state_dir": str(settings.state_dir),
        }


def plan(start: Start) -> list[list[Start]]:
    """The servers that `start` needs, and at last itself: those of one list may start at once.

    Raises:
        LaunchError: one of them may not be started so; the message says what to change.
    """
    if not start.spec.checks_key and not is_loopback(start.settings.host):
        raise LaunchError(
            f"{start.spec.name} does not check an API key on every port, so it is not opened to {start.settings.host}.",
            "Unset SERVEBOOK_HOST; to publish it, put a proxy with TLS and keys in front.",
        )
    if start.elsewhere:
        return [[start]]
    cores = os.sched_getaffinity(0)  # of who starts it: a library may bind a process to fewer later
    if lacking := [core for core in start.settings.cores.split(",") if core and int(core) not in cores]:
        raise LaunchError(
            f"SERVEBOOK_CORES: no core {' and no core '.join(lacking)} can be used here, only {sorted(cores)}.",
            "Choose of those, or unset it.",
        )
    for kind in start.spec.ports:
        try:
            can_bind(LOOPBACK, port := start.settings.port(start.spec.name, kind))
        except PermissionError as error:
            raise LaunchError(
                f"{start.instance} cannot listen on port {port} ({kind}): {error.strerror}.",
                "Choose a port from 1024 upwards: those below take rights that this user has not.",
            ) from None
    before = [
        plan(Start(kind_of(instance), settings, instance, start.owner))
        for instance, settings in start.spec.needs(start.settings).items()
    ]
    return [*(list(chain(*wave)) for wave in zip_longest(*before, fillvalue=())), [start]]
