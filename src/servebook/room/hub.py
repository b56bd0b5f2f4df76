"""Keeps JupyterHub and its proxy: `python -m servebook.room.hub --front http://127.0.0.1:8095 …`.

Both run apart, so that learners' desks outlive a hub that is restarted: the proxy goes on, the desks go on, and the
new hub finds them. A hub or proxy that ends is started again; `jupyterhub/jupyterhub_config.py` says what the hub does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import requests
import typer

from servebook.bearer import bearer
from servebook.checkout import ROOT
from servebook.errors import LaunchError, ServebookError
from servebook.lab.handout.confine import OF_THE_CACHE, hub_cache
from servebook.launch.probes import only_ours
from servebook.numbers import MOST_PORT
from servebook.processes import adopt_orphans, children
from servebook.room.admin import join_code
from servebook.room.desk import make_master
from servebook.room.tls import prepare
from servebook.settings import Settings, in_address, is_loopback, load_settings

log = logging.getLogger("servebook.room")

NOBODY = 65534
SEEN = ("src", "jupyter", "jupyterhub", "protos", "triton", "kubernetes", "shims", "requirements")
"""What a desk sees of the checkout: what its own notebooks show and import. Those here have an instructor's notes."""
ENTER = ROOT / "jupyterhub" / "enter_desk.py"
PROXY = ROOT / "jupyterhub" / "proxy.py"
CONFIG = ROOT / "jupyterhub" / "jupyterhub_config.py"
POLL_SECONDS = 0.2
ROUTES_SECONDS = 30.0
"""How long it is tried to have a new proxy told its routes."""
EARLY_SECONDS = 20.0
"""Whoever ends with an error within this time of its start has a fault that another start would not mend."""
EARLY_ENDS = 3
"""So many in a row in whatever way, by a signal too, are no accident."""


def what_the_config_reads(settings: Settings, front: str, urls: dict[str, str]) -> dict[str, Any]:
    """The room as the hub's configuration gets it: that runs in the hub's environment, where servebook is not."""
    room = settings.room
    if why := why_not_apart(settings):
        log.warning("all desks run as one user: %s", why)
    return {
        "folder": str(settings.state_dir / "room"),
        "python": sys.executable,
        "cache_dir": str(settings.cache_dir),
        "model": settings.model,
        "served_name": settings.served_name,
        "front": front,
        "key": settings.key,
        "open_sign_up": room.open_sign_up,
        "secure": urls["public_url"].startswith("https") or room.url.startswith("https"),
        "seats": room.seats,
        "idle_seconds": room.idle_seconds,
        "limits": limits(settings),
        "apart": None if why else view(settings),
        **urls,
    }


def limits(settings: Settings) -> dict[str, int]:
    """What the processes of a desk may take, as `enter_desk.py` reads it."""
    room = settings.room
    memory = int(room.memory_gib * 2**30)
    return {"memory_bytes": memory, "cpu_seconds": room.cpu_seconds, "processes": room.processes}


def view(settings: Settings) -> dict[str, Any]:
    """What a desk that is kept apart sees of the instructor's files, as `enter_desk.py` reads it.

    Not the solutions, the key in servebook.toml, or git; the environments and the model are read-only. In place of the
    instructor's `labs/`, where they may have been solved, it sees the master's.
    """
    python, master = Path(sys.executable), settings.state_dir / "room" / "master"
    seen = [*(ROOT / name for name in SEEN), python.parents[1], settings.room.env, Path(sys.base_prefix), master]
    seen += of_the_cache(settings)
    shown = {path: path for path in seen} | {ROOT / "labs": master / "labs"}
    return {
        "shown": {str(path): str(source) for path, source in sorted(shown.items()) if source.exists()},
        "covers": [str(path) for path in (ROOT, settings.state_dir, Path.home()) if path.parts[1:]],
        "cache": str(settings.cache_dir),
        "accounts": f"room{hashlib.sha256(str(settings.state_dir).encode()).hexdigest()[:4]}",
    }


def of_the_cache(settings: Settings) -> list[Path]:
    """The folders of the cache that are everybody's; of Hugging Face's home, where it lies there, the models."""
    found = [settings.cache_dir / name for name in OF_THE_CACHE]
    return found + [path for path in [hub_cache()] if settings.cache_dir in path.parents]


def open_cache(settings: Settings) -> None:
    """Let everybody read what desks see of the cache: weights are written for their owner alone."""
    for path in (path for folder in of_the_cache(settings) for path in folder.rglob("*")):
        if stat.S_ISREG(mode := path.lstat().st_mode):  # what a link names lies elsewhere
            path.chmod(mode | 0o444)


def why_not_apart(settings: Settings) -> str:
    """Why desks cannot be users of their own here, "" where they can: tried, as a user who owns nothing."""
    if os.getuid() != 0:
        return "the room does not run as root"
    if not shutil.which("useradd"):
        return "there is no useradd"
    for folder in (settings.cache_dir, settings.state_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    open_cache(settings)
    where = limits(settings) | view(settings) | {"home": str(ROOT / "labs"), "uid": NOBODY, "gid": NOBODY}
    python = [sys.executable, "-P", "-c", "import servebook.lab.checking"]
    command = [sys.executable, "-I", str(ENTER), json.dumps(where), *python]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return tried.stderr.strip().rpartition("\n")[2] if tried.returncode else ""


def require_safe(settings: Settings) -> None:
    """Refuse to open a room beyond this machine in which every learner is the instructor's user.

    Raises:
        LaunchError: and why desks are not kept apart.
    """
    opened = not is_loopback(settings.host) or settings.room.url  # by itself, or by a web server before it
    if settings.room.trusted or not opened:
        return
    if why := why_not_apart(settings):
        raise LaunchError(
            f"Desks cannot be kept apart here ({why}), so whoever has the join code could read your files and keys.",
            "Run the room as root of a machine or container made for it; or, if you trust everybody in the room, "
            "`servebook room start --trusted`.",
        )


def find_hub(settings: Settings) -> Path:
    """The programs of the room's environment.

    Raises:
        ServebookError: it has not been made, or this is not the instructor's repository.
    """
    programs = settings.room.env / "bin"
    if not (programs / "jupyterhub").is_file():
        raise ServebookError(f"There is no JupyterHub in {settings.room.env}.", "Run `make room`, which installs it.")
    if not CONFIG.is_file():
        raise ServebookError(f"There is no {CONFIG}.", "Run this in the instructor's repository.")
    return programs


def keep(commands: dict[str, list[str]], env: dict[str, str], restarted: Callable[[str], bool]) -> None:
    """Run the commands until a signal comes; start again what ends by itself, then say so by `restarted(name)`.

    Where `restarted` returns False it is called again later; commands that end meanwhile are started too.

    Raises:
        ServebookError: one ended right after its start with an error, or again and again in whatever way.
    """
    # A hub that dies leaves its desks to us. It finds them again by their process ids, so one that has ended must go.
    adopt_orphans()
    running: dict[str, subprocess.Popen[bytes]] = {}
    started: dict[str, float] = {}
    early = dict.fromkeys(commands, 0)
    unsaid: dict[str, float] = {}
    try:
        while True:
            for name, command in commands.items():
                child = running.get(name)
                if child and child.poll() is None:
                    continue
                if child:
                    log.warning("%s ended with code %d", name, child.returncode)
                    early[name] = early[name] + 1 if time.monotonic() - started[name] < EARLY_SECONDS else 0
                    # A signal once may be somebody's; each time it is for a cause, such as memory that is short.
                    if early[name] and (child.returncode > 0 or early[name] == EARLY_ENDS):
                        raise ServebookError(f"{name} ends as soon as it starts.", "Its words above say why.")
                    unsaid[name] = time.monotonic() + ROUTES_SECONDS
                running[name] = subprocess.Popen(command, env=env)
                started[name] = time.monotonic()
                log.info("%s is process %d", name, running[name].pid)
            for name, deadline in list(unsaid.items()):  # when all are there: the proxy's routes come from the hub
                if restarted(name):
                    del unsaid[name]
                elif time.monotonic() > deadline:
                    log.warning("%s is back, and was not told its routes within %g s", name, ROUTES_SECONDS)
                    del unsaid[name]
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


def renew_routes(name: str, routes_url: str, hub_url: str, key: str) -> bool:
    """A proxy that starts anew knows no desk: have the hub tell it, which by itself it does every five minutes.

    False where one of the two is not there yet.
    """
    if name != "proxy":
        return True
    with suppress(requests.RequestException):
        requests.get(routes_url, timeout=1)  # whatever it answers, it is up
        if only_ours(hub_url):  # else another user listens there, or nobody
            return requests.post(f"{hub_url}/hub/api/proxy", auth=bearer(key, "token"), timeout=5).ok
    return False


def main(
    front: Annotated[str, typer.Option(help="The root URL of the room's front.")],
    http_port: Annotated[int, typer.Option(min=1, max=MOST_PORT, help="Where learners come in: the proxy.")],
    routes_port: Annotated[int, typer.Option(min=1, max=MOST_PORT, help="Where the hub tells the proxy its routes.")],
    api_port: Annotated[int, typer.Option(min=1, max=MOST_PORT, help="The hub itself; desks and proxy ask it.")],
    host: str = "127.0.0.1",
) -> None:
    """Serve until a signal comes; SERVEBOOK_API_KEY is the instructor's key, for the hub's API too."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = load_settings(host=host)
    programs = find_hub(settings)
    folder = settings.state_folder("room")
    require_safe(settings)
    make_master(folder / "master")
    join_code(settings)
    tls = prepare(settings)
    urls = {
        "public_url": f"{'https' if tls else 'http'}://{in_address(host)}:{http_port}",
        "routes_url": f"http://127.0.0.1:{routes_port}",
        "hub_url": f"http://127.0.0.1:{api_port}",
    }
    env = os.environ | {
        "CONFIGPROXY_AUTH_TOKEN": secrets.token_hex(32),
        "SERVEBOOK_PROXY_SECRET": secrets.token_hex(32),  # by which the hub knows its proxy
        "SERVEBOOK_HUB_CONFIG": json.dumps(what_the_config_reads(settings, front, urls)),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    options = {
        "host": host,
        "port": http_port,
        "routes_port": routes_port,
        "hub_url": urls["hub_url"],
        "cert": str(tls[0]) if tls else "",
        "cert_key": str(tls[1]) if tls else "",
        "behind": bool(settings.room.url),
    }
    proxy = [str(programs / "python"), str(PROXY), json.dumps(options)]
    commands = {"proxy": proxy, "hub": [str(programs / "jupyterhub"), "--config", str(CONFIG)]}
    keep(commands, env, lambda name: renew_routes(name, urls["routes_url"], urls["hub_url"], settings.key or ""))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ServebookError as error:
        sys.exit(f"servebook: {error}")
