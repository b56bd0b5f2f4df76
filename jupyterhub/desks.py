"""A learner's desk: a folder, a key of the room's front, and a JupyterLab as a local process of its own user."""

import asyncio
import json
import os
import pwd
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

from door import is_account
from jupyterhub.spawner import LocalProcessSpawner
from tornado.httpclient import AsyncHTTPClient, HTTPClientError
from tornado.web import HTTPError
from traitlets import Dict

here = Path(__file__).parent
END_ALL = "import os, signal, sys; os.setuid(int(sys.argv[1])); os.kill(-1, signal.SIGKILL)"
"""Ends all processes of a user, but for itself: in one step, so that none of them forks its way out."""
TRIES = 5
TRY_SECONDS = 5


class DeskSpawner(LocalProcessSpawner):
    """JupyterHub's spawner of local processes, with the room's limits; `room` is what `servebook.room.hub` says.

    Where the room keeps desks apart, each is a Unix user of its own, `roomNNNN-NAME`, which stays with its files; the
    number is the room's, so that two on a machine do not share users.
    """

    room = Dict(config=True)

    @property
    def home(self) -> Path:
        return Path(self.room["folder"]) / "desks" / self.user.name

    @property
    def account(self) -> str:
        return f"{self.room['apart']['accounts']}-{self.user.name}"

    def where(self) -> dict:
        """What `enter_desk.py` reads."""
        where = self.room["limits"] | {"home": str(self.home)}
        if not self.room["apart"]:
            return where
        user = pwd.getpwnam(self.account)
        return where | self.room["apart"] | {"uid": user.pw_uid, "gid": user.pw_gid}

    def entering(self, command: list[str]) -> list[str]:
        """The command, at this desk."""
        return [sys.executable, "-I", str(here / "enter_desk.py"), json.dumps(self.where()), *command]

    def make_preexec_fn(self, name):
        """Nothing: `enter_desk.py` does it, in a process of its own."""
        return lambda: None

    def user_env(self, env):
        account = self.account if self.room["apart"] else pwd.getpwuid(os.getuid()).pw_name
        env |= {"USER": account, "LOGNAME": account, "HOME": str(self.home), "SHELL": "/bin/bash"}
        return env

    def make_home(self) -> None:
        """The folder, and the user whose it is."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.room["apart"]:
            return
        if not is_account(self.account):
            words = ["--no-create-home", "--home-dir", str(self.home), "--shell", "/bin/bash", "--user-group"]
            subprocess.run(["useradd", *words, self.account], check=True, capture_output=True, text=True)
        user = pwd.getpwnam(self.account)
        if self.home.stat().st_uid != user.pw_uid:
            subprocess.run(["chown", "-R", "-h", f"{user.pw_uid}:{user.pw_gid}", str(self.home)], check=True)

    async def key(self) -> str:
        """A new key from the room's front; a learner whose key was revoked gets no desk either.

        The front is sent the instructor's key: nothing is said to anybody else who listens in its place.
        """
        at = urlsplit(self.room["front"])
        found = await asyncio.get_running_loop().getaddrinfo(at.hostname, at.port, type=socket.SOCK_STREAM)
        if set().union(*(listeners(each[4][0], at.port) for each in found)) != {os.getuid()}:
            self.log.error("No desk for %s: no front of this user's is at %s", self.user.name, self.room["front"])
            raise refusal(503, "The room's front is away, and is being started again. Open your desk in a minute.")
        try:
            answer = await AsyncHTTPClient().fetch(
                f"{self.room['front']}/room/learners/{quote(self.user.name)}",
                method="PUT",
                body="",
                headers={"Authorization": f"Bearer {self.room['key']}"},
            )
        except HTTPClientError as error:
            if error.code == 403:
                raise refusal(403, f"The instructor has revoked the key of {self.user.name}.") from None
            raise
        return json.loads(answer.body)["key"]

    async def lay_out(self) -> None:
        """Put notebooks and labs on the desk, as its user; what is there already stays."""
        master = str(Path(self.room["folder"]) / "master")
        command = self.entering([self.room["python"], "-P", "-m", "servebook.room.desk", master, str(self.home)])
        child = await asyncio.create_subprocess_exec(*command, env=self.get_env())
        if await child.wait():
            raise refusal(500, "Your desk could not be laid out; the hub's log says why.")

    async def start(self):
        self.environment = self.environment | {"SERVEBOOK_API_KEY": await self.key()}
        try:
            await asyncio.to_thread(self.make_home)
        except (OSError, subprocess.CalledProcessError) as error:
            self.log.error("No desk for %s: %s %s", self.user.name, error, getattr(error, "stderr", ""))
            raise refusal(500, "Your desk could not be made; the hub's log says why.") from None
        await self.lay_out()
        single_user = [str(here / "singleuser.py"), sysconfig.get_path("purelib")]
        self.cmd = self.entering([self.room["python"], "-P", *single_user])
        return await super().start()

    async def run_post_stop_hook(self):
        """End what is left of the desk; where JupyterLab has ended by itself, the hub does not call `stop`."""
        if not self.room["apart"] or not is_account(self.account):
            return
        if not await asyncio.to_thread(end_all, pwd.getpwnam(self.account).pw_uid):
            self.log.error("Processes of %s do not end: `ps -fu %s` shows them.", self.user.name, self.account)


def refusal(code: int, words: str) -> HTTPError:
    """An error whose words the learner reads: without this attribute the hub's pages have words of their own."""
    error = HTTPError(code, words)
    error.jupyterhub_message = words
    return error


def listeners(host: str, port: int) -> set[int]:
    """The users whose programs listen at `host`:`port`, or there at any address: more than get its connections.

    `servebook.processes.listeners`, which this environment has not, tells them apart.
    """
    six = ":" in host
    places = set()
    for at in (host, "::" if six else "0.0.0.0"):
        packed = socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, at)
        words = (int.from_bytes(packed[i : i + 4], sys.byteorder) for i in range(0, len(packed), 4))
        places.add(f"{''.join(f'{word:08X}' for word in words)}:{port:04X}")
    lines = Path("/proc/net/tcp6" if six else "/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return {int(row[7]) for row in map(str.split, lines) if row[1] in places and row[3] == "0A"}


def end_all(uid: int) -> bool:
    """End every process of this user, those that left their session included; whether that was all of them.

    They may stop or kill the one that is to end them, in the moment in which it is theirs: it is tried again.
    """
    if uid == 0:
        raise ValueError("root's processes are the machine's")
    for _ in range(TRIES):
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-I", "-c", END_ALL, str(uid)], timeout=TRY_SECONDS, check=False)
        for _ in range(20):  # the kernel takes a moment
            if not any(owned(path, uid) for path in Path("/proc").glob("[0-9]*")):
                return True
            time.sleep(0.05)
    return False


def owned(path: Path, uid: int) -> bool:
    """Whether this is a live process of that user."""
    try:
        return path.stat().st_uid == uid and ") Z " not in (path / "stat").read_text()
    except OSError:
        return False
