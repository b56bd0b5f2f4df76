"""vLLM's Rust front end: one file of the wheel `vllm`, of the very version that is installed here.

On a GPU that wheel is installed. vLLM's CPU build has no such file: it is taken out of the same wheel, by HTTP ranges
(22 of 327 MB), once per user: `python -m servebook.rust_front`, and at the first use.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from zipfile import BadZipFile, ZipFile

import requests
from filelock import FileLock
from remotezip import RangeNotSupported, RemoteZip, RemoteZipError

from servebook.errors import LaunchError, ServebookError
from servebook.settings import Settings, installed_vllm, load_settings

NAME = "vllm-rs"
MEMBER = f"vllm/{NAME}"
CHUNK = 2**20
TIMEOUT = 60.0
ELSEWHERE = (
    "Check the network and pip's settings. Or run `python -m servebook.rust_front FOLDER` on a machine that has both, "
    "bring the folder here, and set SERVEBOOK_VLLM_RS_FILE to the file in it."
)

Say = Callable[[str], None]
"""Told what is going on now, in a few words."""


def rust_front(settings: Settings, say: Say) -> Path:
    """The program, checked; fetched where it is neither installed nor there from an earlier time.

    Raises:
        LaunchError: it cannot be had, it is of another version than the engine, or it was altered.
    """
    if file := settings.vllm_rs_file or _installed():
        return _of_this_version(file)
    file = cached(settings)
    if not is_intact(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file.parent}.lock"):
                if not is_intact(file):
                    fetch(file.parent, say)
        except OSError as error:
            raise LaunchError(
                f"vLLM's Rust front end cannot be written to {file.parent}: {error.strerror or error}.",
                "Free some disk space, or set SERVEBOOK_CACHE_DIR to a folder that you can write to.",
            ) from None
    return _of_this_version(file)


def available(settings: Settings) -> Path | None:
    """The program where it is there without a network, unchecked but for the hash of a fetched one."""
    file = settings.vllm_rs_file or _installed() or cached(settings)
    return file if file.is_file() and (file != cached(settings) or is_intact(file)) else None


def cached(settings: Settings) -> Path:
    """Where the fetched program is, or will be."""
    return settings.cache_dir / NAME / engine_version() / NAME


def engine_version() -> str:
    """vLLM's version without the build, such as "0.32.0"."""
    return installed_vllm().partition("+")[0]


def is_intact(file: Path) -> bool:
    """Whether `file` has the hash that its wheel recorded for it."""
    try:
        with file.open("rb") as content:
            return _record_hash(content) == file.with_name("RECORD").read_text().strip()
    except OSError:
        return False


def fetch(folder: Path, say: Say) -> Path:
    """Take the program out of the wheel of this version into `folder`, with the hash that the wheel records for it.

    Raises:
        LaunchError: no such wheel at the index, no network, or what came is not what the wheel records.
        OSError: `folder` cannot be written.
    """
    say("looking for the wheel of vLLM's Rust front end")
    url, digest = _wheel(engine_version())
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
            draft = Path(scratch) / NAME
            with _open(url, digest, draft.with_name("wheel"), say) as wheel:
                record = wheel.read(f"vllm-{engine_version()}.dist-info/RECORD").decode().splitlines()
                recorded = next(row[1] for row in csv.reader(record) if row[0] == MEMBER)
                with wheel.open(MEMBER) as source, draft.open("wb") as target:
                    _copy(source, target, wheel.getinfo(MEMBER).file_size, say)
            with draft.open("rb") as content:
                if _record_hash(content) != recorded:
                    raise LaunchError(f"What came as {MEMBER} is not what its wheel records.", "Try again.")
            draft.chmod(0o755)
            (folder / "RECORD").write_text(f"{recorded}\n")
            draft.replace(folder / NAME)
    except (requests.RequestException, RemoteZipError) as error:
        why = type(error.__context__ or error).__name__  # not its words: they hold the address
        raise LaunchError(f"The wheel {_shown(url)} cannot be read ({why}).", ELSEWHERE) from None
    except (BadZipFile, KeyError, StopIteration):
        raise LaunchError(f"The wheel {_shown(url)} holds no {MEMBER}.", ELSEWHERE) from None
    return folder / NAME


def _wheel(version: str) -> tuple[str, str]:
    """The address and the SHA-256 of vLLM's wheel, from the index that uv and pip are set to."""
    from uv import find_uv_bin

    command = [
        *(find_uv_bin(), "pip", "compile", "-", "--no-deps", "--no-header", "--only-binary", "vllm"),
        *("--format", "pylock.toml", "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_35"),
    ]
    done = subprocess.run(
        command, input=f"vllm=={version}", env=_index_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise LaunchError(f"The index offers no wheel of vllm {version} for this machine: {lines[-1]}.", ELSEWHERE)
    wheel = tomllib.loads(done.stdout)["packages"][0]["wheels"][0]
    return wheel["url"], wheel["hashes"]["sha256"]


def _index_environment() -> dict[str, str]:
    """The environment for uv, which does not read pip's settings: pip's index and certificates are handed on."""
    env = dict(os.environ)
    if "UV_DEFAULT_INDEX" not in env:
        pip = [sys.executable, "-m", "pip", "config", "list"]
        settings = subprocess.run(pip, capture_output=True, text=True, check=False).stdout
        for line in settings.splitlines():
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
    if certificates := os.environ.get("PIP_CERT"):
        session.verify = certificates
    try:
        return RemoteZip(url, session=session, timeout=TIMEOUT)
    except RangeNotSupported:
        with session.get(url, stream=True, timeout=TIMEOUT) as answer, whole.open("wb") as target:
            answer.raise_for_status()
            _copy(answer.raw, target, int(answer.headers.get("Content-Length", 0)), say)
        with whole.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                raise LaunchError(f"What came as {_shown(url)} is not what its index promises.", "Try again.") from None
        return ZipFile(whole)


def _copy(source: IO[bytes], target: IO[bytes], size: int, say: Say) -> None:
    done = 0
    while chunk := source.read(CHUNK):
        target.write(chunk)
        done += len(chunk)
        say(f"fetching vLLM's Rust front end, {done / 1e6:.0f} of {size / 1e6:.0f} MB")


def _record_hash(content: IO[bytes]) -> str:
    """The hash as a wheel's RECORD writes it (PEP 376 and 427)."""
    digest = hashlib.file_digest(content, "sha256").digest()  # type: ignore[arg-type]
    return f"sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def _shown(url: str) -> str:
    """The file's name alone: an address may hold a password."""
    return urlsplit(url).path.rsplit("/", 1)[-1]


def _installed() -> Path | None:
    """The program beside the package vllm, where the wheel brought it."""
    spec = find_spec("vllm")
    places = spec.submodule_search_locations if spec else None
    file = Path(places[0]) / NAME if places else None
    return file if file and file.is_file() else None


def _of_this_version(file: Path) -> Path:
    """`file`, asked for its version.

    Raises:
        LaunchError: it does not run, or it is not the engine's version: the two speak a protocol of that version.
    """
    try:
        done = subprocess.run([file, "--version"], capture_output=True, text=True, timeout=30, check=True)
        name, _, version = done.stdout.strip().partition(" ")
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"{file} does not run: {getattr(error, 'strerror', error) or error}.", ELSEWHERE) from None
    if (name, version) != (NAME, engine_version()):
        raise LaunchError(
            f"{file} is {done.stdout.strip() or 'no vllm-rs'}, and the engine is vLLM {engine_version()}.",
            "Use the vllm-rs of the wheel of that version; without SERVEBOOK_VLLM_RS_FILE it is fetched by itself.",
        )
    return file


def main() -> int:
    """Fetch the program, into the folder given or where servers look for it, and say where it is."""
    settings = load_settings()

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    try:
        if len(sys.argv) > 1:
            folder = Path(sys.argv[1])
            folder.mkdir(parents=True, exist_ok=True)
            print(Path(shutil.copy2(rust_front(settings, say), folder)).resolve())
        else:
            print(rust_front(settings, say))
    except (ServebookError, OSError) as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
