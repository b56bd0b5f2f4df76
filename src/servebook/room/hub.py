"""Keeps JupyterHub and its proxy: `python -m servebook.room.hub --front http://127.0.0.1:8095 …`.

Both run apart, so that learners' desks outlive a hub that is restarted: the proxy goes on, the desks go on, and the
new hub finds them. A hub or proxy that ends is started again; `jupyterhub/jupyterhub_config.py` says what the hub does.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import requests
import typer

from servebook.checkout import ROOT
from servebook.errors import ServebookError
from servebook.launch.processes import adopt_orphans, children
from servebook.room.admin import join_code
from servebook.room.desk import make_master
from servebook.settings import Settings, load_settings

log = logging.getLogger("servebook.room")

PROXY = ROOT / "jupyterhub" / "proxy.py"
PROXY_SECONDS = 600
"""How long an answer may take: a page waits for its desk to open, 20 s would be too short for a full room."""
CONFIG = ROOT / "jupyterhub" / "jupyterhub_config.py"
POLL_SECONDS = 0.2
ROUTES_SECONDS = 30.0
"""How long a new proxy is waited for."""
EARLY_SECONDS = 20.0
"""Whoever ends within this time of its start has a fault that another start would not mend."""


def what_the_config_reads(settings: Settings, front: str, urls: dict[str, str]) -> dict[str, Any]:
    """The room as the hub's configuration gets it: that runs in the hub's environment, where servebook is not."""
    return {
        "folder": str(settings.state_dir / "room"),
        "python": sys.executable,
        "cache_dir": str(settings.cache_dir),
        "model": settings.model,
        "served_name": settings.served_name,
        "front": front,
        "key": settings.key,
        "open_sign_up": settings.room_open_sign_up,
        "seats": settings.room_seats,
        "memory_gib": settings.room_memory_gib,
        "cpu_seconds": settings.room_cpu_seconds,
        "idle_seconds": settings.room_idle_seconds,
        **urls,
    }


def find_hub(settings: Settings) -> Path:
    """The programs of the room's environment.

    Raises:
        ServebookError: it has not been made, or this is not the instructor's repository.
    """
    programs = settings.room_env / "bin"
    if not (programs / "jupyterhub").is_file():
        raise ServebookError(f"There is no JupyterHub in {settings.room_env}.", "Run `make room`, which installs it.")
    if not CONFIG.is_file():
        raise ServebookError(f"There is no {CONFIG}.", "Run this in the instructor's repository.")
    return programs


def keep(commands: dict[str, list[str]], env: dict[str, str], restarted: Callable[[str], None]) -> None:
    """Run the commands until a signal comes; start again what ends by itself, and say so by `restarted(name)`.

    Raises:
        ServebookError: one ended right after its start.
    """
    # A hub that dies leaves its desks to us. It finds them again by their process ids, so one that has ended must go.
    adopt_orphans()
    running: dict[str, subprocess.Popen[bytes]] = {}
    started: dict[str, float] = {}
    try:
        while True:
            for name, command in commands.items():
                child = running.get(name)
                if child and child.poll() is None:
                    continue
                if child:
                    log.warning("%s ended with code %d", name, child.returncode)
                    if child.returncode > 0 and time.monotonic() - started[name] < EARLY_SECONDS:  # not by a signal
                        raise ServebookError(f"{name} ends as soon as it starts.", "Its words above say why.")
                running[name] = subprocess.Popen(command, env=env)
                started[name] = time.monotonic()
                log.info("%s is process %d", name, running[name].pid)
                if child:
                    restarted(name)
            reap(children() - {child.pid for child in running.values()})
            time.sleep(POLL_SECONDS)
    finally:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()


def reap(orphans: set[int]) -> None:
    """Forget those of these processes that have ended."""
    for pid in orphans:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def renew_routes(name: str, routes_url: str, hub_url: str, key: str) -> None:
    """A proxy that starts anew knows no desk: have the hub tell it, which by itself it does every five minutes."""
    if name != "proxy":
        return
    headers = {"Authorization": f"token {key}"}
    deadline = time.monotonic() + ROUTES_SECONDS
    while time.monotonic() < deadline:
        with suppress(requests.RequestException):
            requests.get(routes_url, timeout=1)  # whatever it answers, it is up
            if requests.post(f"{hub_url}/hub/api/proxy", headers=headers, timeout=5).ok:
                return
        time.sleep(POLL_SECONDS / 4)
    log.warning("the hub did not tell the new proxy its routes within %g s", ROUTES_SECONDS)


def main(
    front: Annotated[str, typer.Option(help="The root URL of the room's front.")],
    http_port: Annotated[int, typer.Option(help="Where learners come in: the proxy.")],
    routes_port: Annotated[int, typer.Option(help="Where the hub tells the proxy its routes.")],
    api_port: Annotated[int, typer.Option(help="The hub itself; desks and proxy ask it.")],
    host: str = "127.0.0.1",
) -> None:
    """Serve until a signal comes; SERVEBOOK_API_KEY is the instructor's key, for the hub's API too."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = load_settings(host=host)
    programs = find_hub(settings)
    folder = settings.state_dir / "room"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    make_master(folder / "master")
    join_code(settings)
    urls = {
        "public_url": f"http://{host}:{http_port}",
        "routes_url": f"http://127.0.0.1:{routes_port}",
        "hub_url": f"http://127.0.0.1:{api_port}",
    }
    env = os.environ | {
        "CONFIGPROXY_AUTH_TOKEN": secrets.token_hex(32),
        "SERVEBOOK_ROOM": json.dumps(what_the_config_reads(settings, front, urls)),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    proxy = [
        *(str(programs / "python"), str(PROXY), "--ip", host, "--port", str(http_port)),
        *("--proxy-timeout", str(1000 * PROXY_SECONDS)),
        *("--api-ip", "127.0.0.1", "--api-port", str(routes_port), "--log-level", "WARNING"),
        *("--default-target", urls["hub_url"], "--error-target", f"{urls['hub_url']}/hub/error"),
    ]
    commands = {"proxy": proxy, "hub": [str(programs / "jupyterhub"), "--config", str(CONFIG)]}
    keep(commands, env, lambda name: renew_routes(name, urls["routes_url"], urls["hub_url"], settings.key or ""))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ServebookError as error:
        sys.exit(f"servebook: {error}")
