"""The room's door: learners sign up with the room's join code, a name and a password of their own, then sign in.

On JupyterHub's own base class and its own page, which gets one more field. Passwords are kept as scrypt digests.
"""

import asyncio
import hashlib
import hmac
import pwd
import re
import secrets
import shutil
import sqlite3
import time
from pathlib import Path

from jupyterhub.auth import Authenticator
from jupyterhub.log import log_request as log_as_the_hub
from tornado.web import HTTPError
from traitlets import Bool, Unicode

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,22}")  # behind `roomNNNN-` it is a Unix user's
NAME_RULE = "A name has 1 to 23 letters a to z, digits, _ and -, and begins with a letter or digit."
PASSWORD_CHARS = range(8, 129)
SCRYPT = {"n": 2**14, "r": 8, "p": 5, "maxmem": 2**26}
"""OWASP's Password Storage Cheat Sheet: 16 MiB and a tenth of a second of a core for each try."""
TRIES_PER_MINUTE = 10
"""Wrong passwords for a name, and wrong codes, from one address."""
TRIES_FOR_A_NAME = 100
"""At once, from all addresses. No more a minute than from one, which alone so locks nobody out."""
SIGN = "X-Servebook-Proxy"
"""As in proxy.py, which is not to load JupyterHub."""
COOKIE = "servebook-door"
"""What a browser that has signed in shows: its tries are counted apart from those of strangers."""
REMEMBERED = 4096
NEEDED_BYTES = 2**24
"""Some desks. On a disk without a byte the hub has whoever has signed in sign in again, and again."""


class Tries:
    """Wrong tries, each kind by who made it: so many at once, and one more every six seconds."""

    def __init__(self, at_once: int = TRIES_PER_MINUTE) -> None:
        self.at_once = at_once
        self.left: dict[tuple[str, ...], tuple[float, float]] = {}
        """How many were left, and when."""

    def take(self, who: tuple[str, ...]) -> None:
        """Count a try as wrong, before anything is compared; refuse who has none left."""
        now = time.monotonic()
        left, at = self.left.get(who, (self.at_once, now))
        left = min(self.at_once, left + (now - at) * TRIES_PER_MINUTE / 60)
        if left < 1:
            seconds = 1 + int((1 - left) * 60 / TRIES_PER_MINUTE)
            where = "from here" if who[0] != "name" else f"for {who[1]}"
            raise HTTPError(429, f"Too many wrong tries {where}. Wait {seconds} s.")
        self.left.pop(who, None)
        self.left[who] = (left - 1, now)
        if len(self.left) > REMEMBERED:  # nobody fills the memory: who tried longest ago is forgotten
            del self.left[next(iter(self.left))]

    def forgive(self, who: tuple[str, ...]) -> None:
        """It was right."""
        self.left.pop(who, None)


class Door(Authenticator):
    """Who comes in. `folder` is the room's, only its owner reads it; `join.code` in there is read at each sign-up."""

    folder = Unicode(config=True)
    open_sign_up = Bool(config=True)
    secure = Bool(config=True)
    proxys_sign = Unicode(config=True)

    def __init__(self, **traits: object) -> None:
        super().__init__(**traits)
        self.tries = Tries()
        self.tries_for_names = Tries(TRIES_FOR_A_NAME)  # apart: made-up addresses would have them forgotten
        self.passwords = sqlite3.connect(Path(self.folder) / "passwords.sqlite", isolation_level=None)
        self.passwords.execute("create table if not exists password (name text primary key, salt blob, digest blob)")

    def validate_username(self, username):
        """Whether it can name a learner; the hub's API asks this too."""
        return NAME.fullmatch(username) is not None and username != "root"

    async def authenticate(self, handler, data):
        """The learner's name, None for a wrong password.

        Raises:
            HTTPError: 403 for what cannot be, in words; 429 for who tries too often; 507 where the disk is full.
        """
        if shutil.disk_usage(self.folder).free < NEEDED_BYTES:
            self.log.error("Nobody comes in: the disk of %s is full", self.folder)
            raise HTTPError(507, "The disk of the room's machine is full: nobody can come in. Tell the instructor.")
        raw = handler.request.body_arguments.get("username", [b""])[-1].decode(errors="replace").strip(" ")
        name = self.normalize_username(raw)
        if not self.validate_username(name):
            raise HTTPError(403, NAME_RULE)
        password, code = data.get("password", ""), data.get("code", "").strip()
        kept = self.passwords.execute("select salt, digest from password where name = ?", [name]).fetchone()
        if kept:
            await self.sign_in(handler, name, password, *kept)
        else:
            await self.sign_up(handler, name, password, code)
        handler.set_secure_cookie(COOKIE, name, httponly=True, samesite="Lax", secure=self.secure)
        return name

    async def sign_in(self, handler, name: str, password: str, salt: bytes, kept: bytes) -> None:
        known = (handler.get_secure_cookie(COOKIE) or b"").decode() == name
        who = ("known", name) if known else ("password", self.caller(handler), name)
        self.tries.take(who)
        if not known:
            self.tries_for_names.take(("name", name))
        if not hmac.compare_digest(await digest(password, salt), kept):
            raise HTTPError(
                403,
                f"Wrong password for {name}. Forgotten? The instructor can reset it. "
                "If you are new here, this name is taken: choose another.",
            )
        self.tries.forgive(who)

    def caller(self, handler) -> str:
        """Whose tries these are: the address that our proxy names. Of whoever comes past it, where it comes from."""
        sign = handler.request.headers.get(SIGN, "")
        if hmac.compare_digest(sign.encode(errors="replace"), self.proxys_sign.encode()):
            return handler.request.remote_ip
        return handler.request.connection.context.address[0]

    async def sign_up(self, handler, name: str, password: str, code: str) -> None:
        who = ("code", self.caller(handler))
        if not self.open_sign_up:
            if not code:
                raise HTTPError(403, f"There is no {name} here yet. The first time, the join code is needed too.")
            self.tries.take(who)
            if not hmac.compare_digest(bare(code), bare((Path(self.folder) / "join.code").read_text())):
                raise HTTPError(403, "That is not the join code of this room.")
            self.tries.forgive(who)
        if is_account(name):
            raise HTTPError(403, f"{name} is an account of this machine. Choose another name.")
        if len(password) not in PASSWORD_CHARS:
            raise HTTPError(
                403, f"A password has {PASSWORD_CHARS[0]} to {PASSWORD_CHARS[-1]} characters. Choose one of your own."
            )
        salt = secrets.token_bytes(16)
        row = [name, salt, await digest(password, salt)]
        try:
            self.passwords.execute("insert into password values (?, ?, ?)", row)
        except sqlite3.IntegrityError:  # somebody took the name in this very moment
            raise HTTPError(403, f"The name {name} is taken. Choose another.") from None
        self.log.info("%s signed up", name)


def log_request(handler) -> None:
    """As the hub logs a request, whose headers it shows after an error of its own: without the proxy's sign."""
    handler.request.headers.pop(SIGN, None)
    log_as_the_hub(handler)


async def digest(password: str, salt: bytes) -> bytes:
    """Not on the hub's loop: it serves everybody else meanwhile."""
    return await asyncio.to_thread(hashlib.scrypt, password.encode(errors="replace"), salt=salt, **SCRYPT)


def bare(code: str) -> bytes:
    """A join code as it counts: people type small letters, blanks and no dash."""
    return re.sub(r"[\s-]", "", code).upper().encode()


def is_account(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
