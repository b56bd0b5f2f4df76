"""vLLM's Rust front end is taken out of a wheel and checked; where it cannot be had, the message names the way out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

from servebook.engine.rust_front import available, bring, cached, engine_version, is_intact, rust_front
from servebook.engine.wheel import record_hash
from servebook.errors import LaunchError
from servebook.settings import Settings, load_settings

PADDING = os.urandom(2_000_000)
"""What the wheel holds besides, and nobody asks for."""


def program(version: str) -> bytes:
    """A program that tells this version, as the real one does."""
    return f'#!/bin/sh\necho "vllm-rs {version}"\n'.encode()


def wheel_of(member: bytes, recorded: bytes | None = None, name: str = "vllm/vllm-rs") -> bytes:
    """A wheel `vllm` of the engine's version whose RECORD has the hash of `recorded`."""
    info = f"vllm-{engine_version()}.dist-info"
    file = BytesIO()
    with ZipFile(file, "w", ZIP_DEFLATED) as wheel:
        wheel.writestr("vllm/rest.bin", PADDING)
        wheel.writestr(name, member)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {engine_version()}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        digest = record_hash(BytesIO(member if recorded is None else recorded))
        wheel.writestr(f"{info}/RECORD", f"{name},{digest},{len(member)}\n")
    return file.getvalue()


class Index(BaseHTTPRequestHandler):
    """A package index with this one wheel; it may know no ranges, or send something else to all but uv."""

    def __init__(self, *words: object, wheel: bytes, ranges: bool, sent: list[int], altered: bool = False) -> None:
        self.wheel, self.ranges, self.sent, self.altered = wheel, ranges, sent, altered
        super().__init__(*words)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = f"vllm-{engine_version()}-py3-none-any.whl"
        if self.path == "/simple/vllm/":
            page = f'<a href="/files/{name}#sha256={sha256(self.wheel).hexdigest()}">{name}</a>'.encode()
            return self.answer(HTTPStatus.OK, page, {"Content-Type": "text/html"})
        if self.path != f"/files/{name}":
            return self.answer(HTTPStatus.NOT_FOUND, b"", {})
        wheel = bytes(len(self.wheel)) if self.altered and "requests" in self.headers["User-Agent"] else self.wheel
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if not (self.ranges and asked):
            return self.answer(HTTPStatus.OK, wheel, {})
        first, _, last = asked.partition("-")
        begin, end = (int(first), int(last) + 1) if first else (len(wheel) - int(last), len(wheel))
        span = {"Content-Range": f"bytes {begin}-{end - 1}/{len(wheel)}"}
        return self.answer(HTTPStatus.PARTIAL_CONTENT, wheel[begin:end], span)

    do_HEAD = do_GET

    def answer(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Accept-Ranges": "bytes"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.sent.append(len(body))
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Indexes:
    """Makes indexes, and points uv at the last one made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.servers: list[ThreadingHTTPServer] = []

    def serve(self, wheel: bytes, ranges: bool = True, altered: bool = False) -> list[int]:
        """Offer `wheel`; the list has the length of each answer."""
        sent: list[int] = []
        handler = partial(Index, wheel=wheel, ranges=ranges, sent=sent, altered=altered)
        self.servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=self.servers[-1].serve_forever, daemon=True).start()
        self.monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{self.servers[-1].server_port}/simple")
        return sent


@pytest.fixture
def indexes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Indexes]:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    made = Indexes(monkeypatch)
    yield made
    for server in made.servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A person with an empty cache, and a vLLM that brings no Rust front end."""
    monkeypatch.setattr("servebook.engine.rust_front._installed", lambda: None)
    return load_settings(cache_dir=tmp_path / "cache")


def silent(_: str) -> None:
    pass


def refused(settings: Settings) -> str:
    """The words with which it is refused."""
    with pytest.raises(LaunchError) as caught:
        rust_front(settings, silent)
    return str(caught.value)


def test_only_the_file_is_fetched_and_only_once(here: Settings, indexes: Indexes) -> None:
    sent, said = indexes.serve(wheel_of(program(engine_version()))), list[str]()
    assert available(here) is None
    file = rust_front(here, said.append)
    assert file == cached(here) == available(here)
    assert is_intact(file)
    assert os.access(file, os.X_OK)
    assert sum(sent) < len(PADDING) / 2
    assert said[-1].startswith("fetching vllm-rs")
    sent.clear()
    assert rust_front(here, silent) == file
    assert not sent


def test_an_index_without_ranges_gives_the_whole_wheel(here: Settings, indexes: Indexes) -> None:
    sent = indexes.serve(wheel_of(program(engine_version())), ranges=False)
    assert is_intact(rust_front(here, silent))
    assert max(sent) > len(PADDING)
    assert sorted(file.name for file in cached(here).parent.iterdir()) == ["RECORD", "vllm-rs"]


def test_an_altered_copy_is_fetched_anew(here: Settings, indexes: Indexes) -> None:
    indexes.serve(wheel_of(program(engine_version())))
    file = rust_front(here, silent)
    file.write_bytes(program("6.6.6"))
    assert available(here) is None
    assert available(here, quick=True) == file
    assert rust_front(here, silent).read_bytes() == program(engine_version())


@pytest.mark.parametrize(
    ("wheel", "ranges", "altered", "says"),
    [
        (wheel_of(program("1"), recorded=program("2")), True, False, "not what its wheel records"),
        (wheel_of(program("1"), name="vllm/other"), True, False, "holds no vllm/vllm-rs"),
        (wheel_of(program("1")), False, True, "not what its index promises"),
    ],
)
def test_what_is_not_the_file_is_refused(
    here: Settings, indexes: Indexes, wheel: bytes, ranges: bool, altered: bool, says: str
) -> None:
    indexes.serve(wheel, ranges, altered)
    words = refused(here)
    assert says in words
    assert "SERVEBOOK_VLLM_RS_FILE" in words
    assert not cached(here).exists()


def test_no_index_is_refused_with_the_way_out(
    here: Settings, indexes: Indexes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    assert "SERVEBOOK_VLLM_RS_FILE" in refused(here)


def test_a_file_of_ones_own(here: Settings, tmp_path: Path) -> None:
    own = tmp_path / "vllm-rs"
    mine = here.model_copy(update={"vllm_rs_file": own})
    assert f"{own} does not run: No such file" in refused(mine)
    assert available(mine) is None
    own.write_bytes(program("0.31.0"))
    own.chmod(0o755)
    assert refused(mine).startswith(f"{own} is vllm-rs 0.31.0, and the engine is vLLM {engine_version()}.")
    own.write_bytes(program(engine_version()))
    assert rust_front(mine, silent) == own == available(mine)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "echo; echo 'libc.so.6: version GLIBC_2.38 not found' >&2; exit 1",
            "does not run: libc.so.6: version GLIBC_2",
        ),
        ("exit 3", "does not run: it ended with 3."),
        ("kill -9 $$", "does not run: it ended with -9."),
        (r"printf '\377'", "is \ufffd, and the engine is vLLM"),
        ("echo one; echo two", "is one, and the engine is vLLM"),
    ],
)
def test_why_a_file_of_ones_own_does_not_do_is_in_its_words(
    here: Settings, tmp_path: Path, script: str, says: str
) -> None:
    """On a system that is too old it was Python's words about a command; not UTF-8, and it was a traceback."""
    own = tmp_path / "vllm-rs"
    own.write_text(f"#!/bin/sh\n{script}\n")
    own.chmod(0o755)
    assert says in refused(here.model_copy(update={"vllm_rs_file": own}))


def test_no_room_in_the_cache(here: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = refused(here.model_copy(update={"cache_dir": tmp_path / "file"}))
    assert "cannot be written" in words
    assert "SERVEBOOK_CACHE_DIR" in words


def test_the_command_brings_it_into_a_folder(tmp_path: Path) -> None:
    """What the set-up calls, and a machine with a network for one without."""
    own = tmp_path / "own"
    own.write_bytes(program(engine_version()))
    own.chmod(0o755)
    command = [sys.executable, "-P", "-m", "servebook.engine.rust_front"]
    env = os.environ | {"SERVEBOOK_VLLM_RS_FILE": str(own)}
    done = subprocess.run([*command, str(tmp_path / "bag")], env=env, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).read_bytes() == own.read_bytes()
    assert is_intact(tmp_path / "bag/vllm-rs")
    own.write_bytes(program("0.31.0"))
    for more, says in (({}, "is vllm-rs 0.31.0"), ({"SERVEBOOK_REPLICAS": "0"}, "SERVEBOOK_REPLICAS")):
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_a_machine_without_a_network_takes_it_from_that_folder(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_OFFLINE", "1")
    (tmp_path / "vllm-rs").write_bytes(program(engine_version()))
    (tmp_path / "vllm-rs").chmod(0o644)  # as from a stick that keeps no modes
    with pytest.raises(FileNotFoundError):
        bring(tmp_path, here)
    (tmp_path / "RECORD").write_text(record_hash(BytesIO(program(engine_version()))))
    bring(tmp_path, here)
    assert rust_front(here, silent) == cached(here)


@pytest.mark.parametrize("record", [b"\xff", b"sha256=another", None])
def test_a_hash_that_is_damaged_or_missing_is_not_the_files(tmp_path: Path, record: bytes | None) -> None:
    (tmp_path / "vllm-rs").touch()
    if record:
        (tmp_path / "RECORD").write_bytes(record)
    assert not is_intact(tmp_path / "vllm-rs")
