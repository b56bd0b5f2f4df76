"""What the programs of the workbook get from the environment, and what they do not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from servebook.engine.arguments import cpu_quota
from servebook.environment import child_environment, reach_loopback_directly, writable_homes

ASK = """
import sys
from servebook.launch.probes import http_ok
import grpc, servebook
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(1))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
for host in sys.argv[1:]:
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        grpc.channel_ready_future(channel).result(5)
    print("reached", host)
"""


@pytest.mark.parametrize("variables", [("http_proxy",), ("https_proxy", "HTTPS_PROXY"), ("grpc_proxy",)])
@pytest.mark.parametrize("exception", ["NO_PROXY", "no_proxy", "no_grpc_proxy", ""])
def test_no_client_of_ours_asks_a_proxy_for_this_machine(variables: tuple[str, ...], exception: str) -> None:
    """gRPC reads small letters only: an exception in capitals, or for another host, had sent it to the proxy."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        env = os.environ | dict.fromkeys(variables, address) | ({exception: "intranet.example"} if exception else {})
        ask = [sys.executable, "-c", ASK, "127.0.0.1", "localhost"]
        done = subprocess.run(ask, env=env, capture_output=True, text=True)
        assert done.stdout == "reached 127.0.0.1\nreached localhost\n", done.stderr
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_exceptions_that_are_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://p:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.example,127.0.0.1")
    reach_loopback_directly()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intranet.example,127.0.0.1,localhost,::1"
    assert "no_grpc_proxy" not in os.environ
    monkeypatch.setenv("no_proxy", "*")
    reach_loopback_directly()
    assert os.environ["no_proxy"] == "*"


def test_without_a_proxy_nothing_is_set() -> None:
    code = "import os; given = dict(os.environ); import servebook; print(given == dict(os.environ))"
    names = {"http_proxy", "https_proxy", "all_proxy", "grpc_proxy"}
    env = {name: value for name, value in os.environ.items() if name.lower() not in names}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("VLLM_PORT", "tcp://10.0.0.1:8000", False),
        ("VLLM_PORT", "5000", True),
        ("VLLM_API_KEY", "left-in-the-shell", False),
        ("PYTHONWARNINGS", "error", False),
        ("PYTHONIOENCODING", "ascii", False),
        ("PYTHONPATH", "/somewhere", True),
        ("VLLM_LOGGING_LEVEL", "DEBUG", True),
    ],
)
def test_what_a_child_gets(name: str, value: str, kept: bool) -> None:
    env = child_environment({name: value})
    assert (env.get(name) == value) is kept
    assert env["PYTHONSAFEPATH"] == env["PYTHONUTF8"] == "1"


@pytest.mark.parametrize(("folder", "used"), [("/" + 48 * "x", "/tmp"), ("/" + 47 * "x", "/" + 47 * "x")])
def test_a_folder_for_temporary_files_that_is_too_long_for_sockets(folder: str, used: str) -> None:
    assert child_environment({"TMPDIR": folder})["TMPDIR"] == used
    if used == "/tmp":
        assert child_environment({"TMP": folder})["TMPDIR"] == used, "Python looks there, too"


def test_folders_that_libraries_cannot_write_to(tmp_path: Path) -> None:
    given = {"HF_HOME": "/dev/null/hf", "XDG_CACHE_HOME": str(tmp_path / "new"), "XDG_CONFIG_HOME": "/proc/1/x/y"}
    assert writable_homes(tmp_path, given).keys() >= {"HF_HOME"}
    assert "XDG_CACHE_HOME" not in writable_homes(tmp_path, given)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_processor(files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == cores


TESTS = Path(__file__).parent


def test_the_settings_of_the_person_at_work_do_not_reach_the_tests(tmp_path: Path) -> None:
    """But for what the machine needs; nor do that person's options for pytest reach what tests start."""
    own = {"SERVEBOOK_API_KEY": "of-the-reader", "servebook_model": "a/b", "PYTEST_ADDOPTS": "--co"}
    kept = {"SERVEBOOK_STATE_DIR": str(tmp_path), "SERVEBOOK_KV_CACHE_GIB": "0.5"}
    ask = (
        "import conftest, os; print([name for name in os.environ if name.upper()[:10] in ('SERVEBOOK_', 'PYTEST_ADD')])"
    )
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])} | own | kept
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True)
    assert done.stdout == f"{list(kept)}\n", done.stderr


def test_a_settings_file_ends_a_run_by_name(tmp_path: Path) -> None:
    (file := tmp_path / "servebook.toml").write_text('model = "a/b"\n')
    run = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(TESTS / "test_floor.py")]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert f"{file} changes what is tested: move it away." in done.stderr
