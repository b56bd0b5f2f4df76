"""Where settings come from, and what is refused."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from typer.testing import CliRunner

from servebook import settings as module
from servebook.cli import app
from servebook.engine import prepare, rust_front
from servebook.errors import ServebookError
from servebook.settings import Settings, is_loopback, load_settings, settings_file
from servebook.trust import not_only_mine, others_may_read


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No variables of the person who runs the tests, and a folder without `servebook.toml`."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SERVEBOOK_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.model, settings.model_name) == ("bundled", "smollm2")
    assert settings.host == "127.0.0.1"
    assert settings.key is None
    assert settings.port("vllm", "http") == 8000
    assert settings.port("vllm-grpc", "grpc") == 50052


def test_the_documented_default_ports() -> None:
    ports = {name: load_settings().model_dump()[name] for name in Settings.model_fields if name.endswith("_port")}
    assert ports == {
        "vllm_http_port": 8000,
        "triton_grpc_port": 8001,
        "triton_metrics_port": 8002,
        "triton_http_port": 8003,
        "grpc_grpc_port": 50051,
        "grpc_metrics_port": 9051,
        "gateway_http_port": 8080,
        "kserve_grpc_port": 8085,
        "kserve_http_port": 8086,
        "vllm_grpc_grpc_port": 50052,
        "vllm_rs_http_port": 8010,
        "vllm_rs_grpc_port": 50053,
        "router_http_port": 8090,
        "router_metrics_port": 8091,
        "front_http_port": 8095,
        "hub_http_port": 8100,
        "hub_routes_port": 8101,
        "hub_api_port": 8102,
    }


def test_order_parameters_environment_file_default(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "servebook.toml").write_text('max_model_len = 100\nmodel = "a/b"\nkv_cache_gib = 0.5\n')
    monkeypatch.setenv("SERVEBOOK_MAX_MODEL_LEN", "200")
    monkeypatch.setenv("SERVEBOOK_KV_CACHE_GIB", "")  # empty is as if not set
    settings = load_settings(model="", engine_url=None)
    assert (settings.max_model_len, settings.model, settings.kv_cache_gib) == (200, "a/b", 0.5)
    assert load_settings(max_model_len=300).max_model_len == 300


def test_the_file_is_found_from_a_notebooks_folder(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "servebook.toml").write_text(
        'max_model_len = 100\nstate_dir = "state"\nmodel = "models/x"\ncache_dir = "~/cache"\n[room]\nenv = "room"\n'
    )
    (bare / "models/x").mkdir(parents=True)
    inner = bare / "labs/01_openai_rest"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert settings_file() == bare / "servebook.toml"
    settings = load_settings()
    assert settings.max_model_len == 100
    assert (settings.state_dir, settings.room.env, settings.model) == (
        bare / "state",
        bare / "room",
        f"{bare}/models/x",
    )
    assert settings.cache_dir == Path("~/cache").expanduser()
    (bare / "servebook.toml").write_text('model = "Qwen/Qwen3-0.6B"\n')
    assert load_settings().model == "Qwen/Qwen3-0.6B", "no such folder: of the hub"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"max_model_len": "many"}, "SERVEBOOK_MAX_MODEL_LEN"),
        ({"max_model_len": 1}, "SERVEBOOK_MAX_MODEL_LEN"),
        ({"kv_cache_gib": 0}, "SERVEBOOK_KV_CACHE_GIB"),
        ({"kv_cache_gib": "inf"}, "SERVEBOOK_KV_CACHE_GIB"),
        ({"room": {"memory_gib": "nan"}}, "SERVEBOOK_ROOM_MEMORY_GIB"),
        ({"device": "tpu"}, "SERVEBOOK_DEVICE"),
        ({"engine_url": "gpu-box:8000"}, "http://"),
        ({"engine_url": "http://ada:secret@gpu-box:8000"}, "must hold no password"),
        ({"engine_url": "http://gpu-box:8000/?key=secret"}, "must end before [?]"),
        ({"engine_url": "http://gpu-box:8000#secret"}, "must end before [?]"),
        ({"room": {"url": "room.example.org"}}, "SERVEBOOK_ROOM_URL: must be what learners type"),
        ({"room": {"url": "https://room.example.org?code=a"}}, "SERVEBOOK_ROOM_URL"),
        ({"room": {"url": "https://example.org/room"}}, "and no path"),
        ({"engine_args": "--a 'b"}, "SERVEBOOK_ENGINE_ARGS"),
        ({"engine_args": "--host 0.0.0.0"}, "SERVEBOOK_ENGINE_ARGS: --host is not .*: set SERVEBOOK_HOST"),
        ({"engine_args": "--seed 7 --hos=0.0.0.0"}, "--hos is not .*: set SERVEBOOK_HOST"),
        ({"engine_args": "--uds /tmp/socket"}, "set SERVEBOOK_HOST"),
        ({"engine_args": "--port=9000"}, "set SERVEBOOK_VLLM_HTTP_PORT"),
        ({"engine_args": "--metrics_port 9000"}, "set SERVEBOOK_VLLM_HTTP_PORT, or that of the server meant"),
        ({"engine_args": "--grpc-port 9000"}, "_PORT"),
        ({"engine_args": "--api_key=sk-of-this-test"}, "--api-key is not for the engine to say: set SERVEBOOK_API_KEY"),
        ({"engine_args": "--ssl_keyfile x.pem"}, "set SERVEBOOK_TLS_CERT"),
        ({"engine_args": "--tls-key x.pem"}, "set SERVEBOOK_TLS_CERT"),
        ({"engine_args": "--model=/other"}, "set SERVEBOOK_MODEL"),
        ({"engine_args": "--served_model_name x"}, "set SERVEBOOK_SERVED_NAME"),
        ({"engine_args": "--grpc"}, "`servebook up vllm-grpc` is that server"),
        ({"engine_args": "--config my.yaml"}, "write out here what the file says"),
        ({"vllm_http_port": 70000}, "SERVEBOOK_VLLM_HTTP_PORT"),
        ({"cores": "0-1"}, "SERVEBOOK_CORES"),
        ({"host": "0.0.0.0"}, "SERVEBOOK_API_KEY"),
        ({"host": "::"}, "SERVEBOOK_API_KEY"),
        ({"host": "gpu-box"}, "SERVEBOOK_API_KEY"),
        ({"host": "[::]"}, "host :: opens the servers to the network"),
        ({"host": "0"}, "host 0.0.0.0 opens the servers to the network"),
        ({"host": "::ffff:10.0.0.1"}, "host 10.0.0.1 opens the servers to the network"),
        ({"modle": "x"}, "SERVEBOOK_MODLE"),
        ({"cache_dir": "~nosuchuser/x"}, "SERVEBOOK_CACHE_DIR: there is no home folder for ~nosuchuser"),
        ({"room": {"tls_cert": "x.pem"}}, "SERVEBOOK_ROOM: .*_CERT and SERVEBOOK_ROOM_TLS_KEY go together"),
        ({"room": {"tls_key": "x.pem"}}, "go together"),
    ],
)
def test_what_does_not_fit_is_named(overrides: dict[str, object], says: str) -> None:
    with pytest.raises(ServebookError, match=says):
        load_settings(**overrides)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"model = \n", r"servebook\.toml cannot be read"),
        (b"modle = 'x'\n", "SERVEBOOK_MODLE"),
        (b"\xef\xbb\xbfmodel = 'x'\n", "begins with a byte order mark"),
        (b"max_model_len = " + b"9" * 5000, r"servebook\.toml cannot be read: Exceeds the limit"),
        (b"model = " + b"[" * 3000 + b"]" * 3000, r"servebook\.toml cannot be read: maximum recursion"),
        (b"[" + b".".join([b"a"] * 3000) + b"]", r"servebook\.toml cannot be read: maximum recursion"),
        ("model = 'é'\n".encode("latin-1"), r"servebook\.toml cannot be read: 'utf-8' codec"),
    ],
)
def test_a_bad_file(bare: Path, content: bytes, says: str) -> None:
    (bare / "servebook.toml").write_bytes(content)
    with pytest.raises(ServebookError, match=says):
        load_settings()


@pytest.mark.parametrize("value", ["foo", "{", "5", "[" * 100_000], ids=["a word", "half", "a number", "brackets"])
def test_a_variable_that_stands_for_a_whole_table(bare: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    (bare / "servebook.toml").write_text("max_model_len = 1024\n")  # which is none of its faults
    monkeypatch.setenv("SERVEBOOK_ROOM", value)
    with pytest.raises(ServebookError, match="SERVEBOOK_ROOM"):
        load_settings()


def test_the_state_folder_and_those_in_it_are_this_users_alone(bare: Path) -> None:
    before = os.umask(0o002)
    try:
        inner = load_settings(state_dir=bare / "of" / "mine").state_folder("room", "tls")
    finally:
        os.umask(before)
    assert inner == bare / "of" / "mine" / "room" / "tls"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (inner, *inner.parents[:3])] == [0o700] * 3 + [0o775]
    with pytest.raises(ServebookError, match=r"/dev/null/state cannot be used: Not a directory.*\n.*STATE_DIR"):
        load_settings(state_dir="/dev/null/state").state_folder("room")


def test_a_key_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(api_key="sk-secret", host="0.0.0.0")
    assert settings.key == "sk-secret"
    assert "sk-secret" not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    with pytest.raises(ServebookError) as caught:
        load_settings(api_key="sk-secret", max_model_len="many")
    assert "sk-secret" not in str(caught.value)


def test_a_rooms_url_is_taken_as_people_write_it() -> None:
    assert load_settings(room={"url": "HTTPS://room.example.org/"}).room.url == "https://room.example.org"


def test_engine_url_is_taken_as_people_write_it() -> None:
    assert load_settings(engine_url="http://gpu-box:8000/v1/").engine_url == "http://gpu-box:8000"


def test_files_and_folders_are_absolute(bare: Path) -> None:
    tls = {"tls_cert": "~/server.pem", "tls_key": "~/server.key"}
    room = {"env": "~/room", **tls}
    settings = load_settings(
        cache_dir="~/cache", state_dir="state", vllm_rs_file="./vllm-rs", tls_client_ca="ca.pem", room=room, **tls
    )
    assert settings.room.env == Path.home() / "room"
    for place in (settings, settings.room):
        assert (place.tls_cert, place.tls_key) == (Path.home() / "server.pem", Path.home() / "server.key")
    assert settings.tls_client_ca == bare / "ca.pem"
    assert settings.cache_dir == Path.home() / "cache"
    assert settings.state_dir == bare / "state"
    assert settings.vllm_rs_file == bare / "vllm-rs", "a word without a folder is looked for along PATH"
    assert load_settings().vllm_rs_file is None


@pytest.mark.parametrize(
    "words", ["--dtype float16", "--model-impl auto --data-parallel-rpc-port 9", "--chat-template=--host", "-- - ''"]
)
def test_what_is_the_engines_reaches_it(words: str) -> None:
    assert load_settings(engine_args=words).engine_args == words


@pytest.mark.parametrize(
    ("model", "name"), [("Qwen/Qwen3-0.6B", "qwen3-0.6b"), ("/models/Mine", "mine"), ("bundled", "smollm2")]
)
def test_model_name(model: str, name: str) -> None:
    assert load_settings(model=model).model_name == name
    assert load_settings(model=model, served_name="other").model_name == "other"


def test_a_model_in_the_working_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Mine").mkdir()
    monkeypatch.chdir(tmp_path / "Mine")
    for model in (".", "..", "../.."):
        assert load_settings(model=model).model_name == Path(model).resolve().name.lower()


@pytest.mark.parametrize(
    ("device", "driver", "vllm", "on_gpu"),
    [
        ("auto", True, "0.32.0", True),
        ("auto", True, "0.32.0+cpu", False),
        ("auto", False, "0.32.0", False),
        ("gpu", False, "0.32.0", True),
        ("cpu", True, "0.32.0", False),
    ],
)
def test_on_gpu(monkeypatch: pytest.MonkeyPatch, device: str, driver: bool, vllm: str, on_gpu: bool) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(module, "installed_vllm", lambda: vllm)
    assert load_settings(device=device).on_gpu is on_gpu


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


NAMELESS = """
import pwd

def unknown(_):
    raise KeyError

pwd.getpwuid = unknown
from servebook.environment import writable_homes
from servebook.settings import load_settings

settings = load_settings()
writable_homes(settings.cache_dir)
print(settings.cache_dir, settings.state_dir)
"""


def test_a_user_without_a_name_or_a_home_has_the_shells() -> None:
    """As a container's `--user 12345`; what cannot be written there is told with the variable to set."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HOME", "XDG_", "SERVEBOOK_"))}
    done = subprocess.run([sys.executable, "-c", NAMELESS], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "/.cache/servebook /.local/state/servebook\n", done.stderr


@pytest.mark.parametrize(
    ("host", "plain"),
    [
        *(("[::1]", "::1"), ("0:0:0:0:0:0:0:1", "::1"), ("::ffff:127.0.0.1", "127.0.0.1")),
        *(("127.1", "127.0.0.1"), ("0x7f000001", "127.0.0.1"), (" 127.0.0.2 ", "127.0.0.2")),
        *(("LOCALHOST", "localhost"), ("localhost.", "localhost")),
    ],
)
def test_this_machine_by_any_of_its_spellings_is_not_open(host: str, plain: str) -> None:
    assert load_settings(host=host).host == plain


@pytest.mark.parametrize("words", ["labs list", "labs hint 01.1", "prepare", "rust_front"])
def test_what_opens_nothing_asks_for_no_key(bare: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """As in a second terminal beside `SERVEBOOK_HOST=0.0.0.0 make room`, which makes its own key, and in its set-up."""
    monkeypatch.setenv("SERVEBOOK_HOST", "0.0.0.0")
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", str(bare / "state"))
    monkeypatch.setattr(prepare, "prepare_bundled", lambda _: bare)
    monkeypatch.setattr(rust_front, "rust_front", lambda *_: bare)
    monkeypatch.setattr("sys.argv", [words])
    if script := {"prepare": prepare, "rust_front": rust_front}.get(words):
        assert script.main() == 0
    else:
        done = CliRunner().invoke(app, words.split())
        assert (done.exit_code, done.exception) == (0, None)


# --- whom settings are taken from ---------------------------------------------------------------------------------


def planted(folder: Path) -> Path:
    file = folder / "servebook.toml"
    file.write_text('engine_url = "http://attacker.example"\nengine_args = "--trust-remote-code"\n')
    return file


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to act as another user")
@pytest.mark.parametrize("above", [0, 1, 3])
def test_a_settings_file_of_another_user_is_refused_by_name(
    above: int, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = bare / "shared" / "a" / "b" / "c"
    work.mkdir(parents=True)
    file = planted([work, *work.parents][above])
    os.chown(file, 65534, 65534)
    monkeypatch.chdir(work)
    with pytest.raises(ServebookError, match=f"{re.escape(str(file))} is not read.*belongs to"):
        load_settings()


@pytest.mark.parametrize(("place", "mode"), [("file", 0o666), ("file", 0o622), ("folder", 0o777), ("folder", 0o757)])
def test_a_settings_file_that_others_may_write_is_refused_by_name(place: str, mode: int, bare: Path) -> None:
    file = planted(bare)
    (file if place == "file" else bare).chmod(mode)
    with pytest.raises(ServebookError, match=f"{re.escape(str(file))} is not read.*may write to it"):
        load_settings()
    bare.chmod(0o1777)  # as /tmp: nobody can put another in its place
    file.chmod(0o644)
    assert load_settings().engine_url == "http://attacker.example"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to act as another user")
def test_a_link_to_another_users_file_is_refused_too(bare: Path) -> None:
    theirs = planted(bare)
    theirs = theirs.rename(bare / "theirs")
    os.chown(theirs, 65534, 65534)
    (bare / "servebook.toml").symlink_to(theirs)
    with pytest.raises(ServebookError, match="is not read"):
        load_settings()


@pytest.mark.parametrize(
    ("group", "members", "others"),
    [("ann", [], False), ("ann", ["ann"], False), ("ann", ["ann", "bob"], True), ("users", [], True)],
)
def test_a_group_is_nobody_elses_where_it_is_this_users_own_and_has_no_other_member(
    group: str, members: list[str], others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o660)
    me = SimpleNamespace(pw_name="ann", pw_gid=file.stat().st_gid)
    monkeypatch.setattr("pwd.getpwuid", lambda _: me)
    monkeypatch.setattr("grp.getgrgid", lambda _: SimpleNamespace(gr_name=group, gr_mem=members))
    assert others_may_read(file) == others
    assert not_only_mine(file) == (f"group {group} may write to it" if others else "")


def test_a_key_that_others_may_read_is_refused(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bare / "servebook.toml"
    file.write_text('api_key = "of-this-test"\n')
    file.chmod(0o644)
    with pytest.raises(ServebookError, match="others may read it"):
        load_settings()
    file.chmod(0o600)
    assert load_settings().key == "of-this-test"
    (bare / "server.key").write_text("")
    (bare / "server.key").chmod(0o604)
    monkeypatch.setenv("HOME", str(bare))
    for written in (bare / "server.key", "server.key", "~/server.key"):
        with pytest.raises(ServebookError, match="SERVEBOOK_TLS_KEY: others may read"):
            load_settings(tls_key=written)
    room = {"tls_cert": bare / "server.pem", "tls_key": bare / "server.key"}
    with pytest.raises(ServebookError, match="SERVEBOOK_ROOM_TLS_KEY: others may read"):
        load_settings(room=room)
    (bare / "server.key").chmod(0o600)
    assert load_settings(room=room).room.tls_key == bare / "server.key"


def test_a_key_in_a_folder_that_one_may_not_enter_is_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is told to remove it."""

    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("servebook.settings.others_may_read", refuse)
    (bare / "server.key").write_text("")
    with pytest.raises(ServebookError, match=r"SERVEBOOK_TLS_KEY: .*server\.key cannot be looked at"):
        load_settings(tls_key=bare / "server.key")


@pytest.mark.parametrize(
    "key", ["pä-key-of-mine", "~", "sevench", "with\nnewline", "with\ttab-in-it", " in-spaces ", "😀" * 8]
)
def test_keys_that_nobody_could_use_or_anybody_guess(key: str) -> None:
    with pytest.raises(ServebookError, match="at least 8 characters, all of them printable ASCII") as refusal:
        load_settings(api_key=key)
    assert key not in str(refusal.value)


@pytest.mark.parametrize("key", ["eight-ch", "sk-" + 60 * "x", "with a space", "!\"#$%&'()"])
def test_keys_that_do(key: str) -> None:
    assert load_settings(api_key=key).key == key


@given(st.text(min_size=1) | st.text(st.characters(max_codepoint=255), min_size=8))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_key_is_refused_or_travels_in_a_header_as_it_is(key: str) -> None:
    try:
        there = Settings(api_key=SecretStr(key)).key
    except ValidationError:
        return
    headers = httpx.Request("GET", "http://127.0.0.1", headers={"Authorization": f"Bearer {there}"}).headers
    assert there == key
    assert dict(headers.raw)[b"Authorization"] == f"Bearer {key}".encode("ascii")


def test_a_working_folder_that_was_removed(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = bare / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert load_settings().model == "bundled"


@given(st.text().map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary())
@hypothesis_settings(max_examples=50, deadline=None)
def test_a_settings_file_of_any_content_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("servebook.toml").write_bytes(content)
        with contextlib.suppress(ServebookError):
            load_settings()


@pytest.mark.parametrize(
    "program",
    [
        "servebook.ways.fastapi_gateway.server --upstream http://127.0.0.1:1",
        "servebook.ways.custom_grpc.server",
        "servebook.ways.triton_grpc.backend",
        "servebook.room --upstream http://127.0.0.1:1 --roll keys.json",
    ],
)
def test_a_key_that_nobody_can_send_is_told_in_words_by_what_a_pod_starts(program: str, tmp_path: Path) -> None:
    env = os.environ | {"SERVEBOOK_API_KEY": "a-key-from-a-file\n"}
    words = [sys.executable, "-P", "-m", *program.split()]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "SERVEBOOK_API_KEY: a key has at least 8 characters" in done.stderr
    assert "Traceback" not in done.stderr
