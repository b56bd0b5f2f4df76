"""Each check of the doctor in both directions, and the whole on this machine."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nvml import FakeCard, install

from servebook import cli, launch
from servebook.engine.gpu import Card
from servebook.engine.model import bundled_path, model_path
from servebook.errors import LaunchError, ModelError
from servebook.processes import KEPT
from servebook.settings import BUNDLED_MODEL, Settings, load_settings
from servebook.workbook import doctor
from servebook.workbook.doctor import Finding

ROOT = Path(__file__).parents[1]
GIB = 2**30
L4 = Card("GPU-1", "NVIDIA L4", "580.65.06", total=22 * GIB, free=20 * GIB, holders={})
SERVEBOOK = Path(sys.executable).with_name("servebook")


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    return load_settings(state_dir=tmp_path / "state", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("finding", "level", "says"),
    [
        (doctor.check_python((3, 11)), "OK", "3.11"),
        (doctor.check_python((3, 12)), "FAIL", "3.12"),
        (doctor.check_lock("a==1\nb==2.0+cpu  # via a\n", {"a": "1", "b": "2.0+cpu"}), "OK", "2 packages"),
        (doctor.check_lock("a==1\nb==2\n", {"a": "1.5", "b": ""}), "FAIL", "a 1.5, b missing"),
        (doctor.check_lock("a==1\nb==1\nc==1\nd==1\ne==1\nf==1\n", dict.fromkeys("abcdef", "")), "FAIL", "and 2 more"),
        (doctor.check_lock(None, {}), "WARN", "no clone"),
        (doctor.check_glibc(("glibc", "2.36")), "OK", "2.36"),
        (doctor.check_glibc(("glibc", "2.31")), "FAIL", "2.35"),
        (doctor.check_glibc(("", "")), "FAIL", "another C library"),
        (doctor.check_libpython(Path("/usr/lib/libpython3.11.so.1.0")), "OK", "libpython3.11.so.1.0"),
        (doctor.check_libpython(None), "WARN", "libpython3.11"),
        (doctor.check_cpu({"avx2", "avx512f", "amx_tile"}, 8, False), "OK", "AMX, 8 cores"),
        (doctor.check_cpu({"avx2", "avx512f"}, 2, False), "OK", "AVX-512"),
        (doctor.check_cpu({"avx2"}, 2, False), "OK", "AVX2"),
        (doctor.check_cpu({"sse4_2"}, 2, False), "FAIL", "no AVX2"),
        (doctor.check_cpu({"sse4_2"}, 2, True), "OK", "no AVX2"),
        (doctor.check_cpu({"avx2"}, 1, False), "WARN", "one core"),
        (doctor.check_memory(16, 8, 3.3), "OK", "8.0 of 16.0"),
        (doctor.check_memory(16, 2, 3.3), "WARN", "servebook down"),
        (doctor.check_memory(2, 2, 3.3), "FAIL", "SERVEBOOK_ENGINE_URL"),
        (doctor.check_memory(2, 2, 3.3, elsewhere=True), "WARN", "no engine of their own can be started"),
        (doctor.check_disk({"/a": 9 * GIB, "/b": 2 * GIB}), "OK", "2.0 GiB free in /b"),
        (doctor.check_disk({"/a": 9 * GIB, "/b": GIB // 2}), "FAIL", "/b"),
        (doctor.check_shm(GIB), "OK", "1024 MiB"),
        (doctor.check_shm(64 * 2**20), "WARN", "--shm-size"),
        (doctor.check_shm(None), "FAIL", "no /dev/shm"),
        (doctor.check_ports({("vllm http", 8000): "", ("grpc grpc", 50051): "ours"}), "OK", "1 free, 1 in use by our"),
        (doctor.check_ports({("vllm http", 8000): "nginx, pid 7"}), "WARN", "8000 (vllm http) by nginx, pid 7"),
        (doctor.check_ports({("vllm http", 80): None, ("grpc grpc", 50051): ""}), "FAIL", "not for this user: 80"),
        (doctor.check_ports(None, "192.0.2.1"), "FAIL", "no address of this machine"),
        (doctor.check_gpu(None, "", 2.8, "auto", True), "OK", "none"),
        (doctor.check_gpu(None, "", 2.8, "gpu", False), "FAIL", "no driver answers"),
        (doctor.check_gpu(L4, "", 2.8, "auto", False), "OK", "NVIDIA L4, 20.0 of 22.0 GiB free"),
        (doctor.check_gpu(replace(L4, driver="550.54.15"), "", 2.8, "auto", False), "FAIL", "580"),
        (doctor.check_gpu(L4, "", 2.8, "auto", True), "WARN", "make setup DEVICE=gpu"),
        (doctor.check_gpu(L4, "", 2.8, "gpu", True), "FAIL", "make setup DEVICE=gpu"),
        (doctor.check_gpu(L4, "", 2.8, "cpu", True), "OK", "not used, as SERVEBOOK_DEVICE=cpu says"),
        (doctor.check_gpu(L4, "Held by: game (pid 7) 2.0 GiB.", 20.5, "auto", False), "WARN", "game (pid 7) 2.0 GiB"),
        (doctor.check_gpu(L4, "", 30.0, "auto", False), "FAIL", "smaller model"),
        (doctor.check_gpu(L4, "", 30.0, "auto", False), "FAIL", "run `make setup DEVICE=cpu`"),
        (doctor.check_compiler("/usr/bin/gcc", Path(__file__)), "OK", "/usr/bin/gcc"),
        (doctor.check_compiler(None, Path(__file__)), "WARN", "no C compiler: an engine"),
        (doctor.check_compiler("/usr/bin/gcc", Path("/none/Python.h")), "WARN", "no Python.h: an engine"),
        (doctor.check_compiler(None, Path("/none/Python.h")), "WARN", "no C compiler and no Python.h"),
        (doctor.check_engine_url(None, None), "OK", "this machine"),
        (doctor.check_engine_url("http://gpu-box:8000", None), "OK", "http://gpu-box:8000"),
        (doctor.check_engine_url("http://x", LaunchError("No vLLM answers.", "Start it.")), "FAIL", "No vLLM answers."),
        (doctor.check_servers([{"name": "vllm", "state": "ready"}], {}), "OK", "vllm ready"),
        (doctor.check_servers([{"name": "vllm", "state": "stopped"}], {}), "OK", "none running"),
        (doctor.check_servers([{"name": "vllm", "state": "failed"}], {}), "WARN", "servebook logs vllm"),
        (doctor.check_servers([], {17: "VLLM::EngineCore"}), "FAIL", "kill 17"),
        (doctor.check_environment({"PATH": "/bin", "SERVEBOOK_MODEL": "x"}), "OK", "nothing unknown"),
        (doctor.check_environment({"SERVEBOOK_SCRIPTED_RATE": "60"}), "OK", "nothing unknown"),
        (doctor.check_environment({"SERVEBOOK_MODLE": "x"}), "WARN", "SERVEBOOK_MODLE"),
        *(
            (doctor.check_environment({name: "http://p:3128"}), "WARN", f"{name} set without an exception")
            for name in ("http_proxy", "HTTPS_PROXY", "all_proxy", "GRPC_PROXY")
        ),
        (doctor.check_environment({"HTTP_PROXY": "http://p", "no_proxy": "a.example, 127.0.0.1"}), "OK", ""),
        (doctor.check_environment({"http_proxy": "http://p", "no_proxy": "*"}), "OK", ""),
        (doctor.check_environment({"http_proxy": "http://p", "NO_PROXY": "127.0.0.1"}), "WARN", "small letters"),
        (doctor.check_environment({"VLLM_API_KEY": "x", "VLLM_PORT": "tcp://a:80"}), "WARN", "VLLM_PORT is kept from"),
        (doctor.check_environment({"VLLM_PORT": "5000"}), "OK", ""),
        (doctor.check_environment({"HF_HOME": "/dev/null/hf"}), "WARN", "HF_HOME cannot be written to"),
        (doctor.check_environment({"TMPDIR": "/" + 90 * "x"}), "WARN", "too long for sockets"),
        (doctor.check_cpu({"avx2"}, 2, False, quota=0.5), "WARN", "the time of 0.5 of 2 cores"),
        (doctor.check_cpu({"avx2"}, 2, False, quota=2), "OK", "2 cores"),
        (doctor.check_netrc(False), "OK", "no password"),
        (doctor.check_netrc(True), "WARN", "in a key's place"),
        (doctor.check_files(1024), "OK", "1024"),
        (doctor.check_files(64), "FAIL", "ulimit -n"),
        (doctor.check_place(Path("/home/ada/servebook/.venv"), [Path("/tmp")]), "OK", "names"),
        (doctor.check_place(Path("/home/a:b/.venv"), []), "WARN", "colon"),
        (doctor.check_place(Path("/home/ada/.venv"), [Path("/home/josé-서울")]), "WARN", "ASCII"),
        (doctor.check_rust_front(Path("/cache/vllm-rs")), "OK", "/cache/vllm-rs"),
        (doctor.check_rust_front(None), "WARN", "-m servebook.engine.rust_front"),
        (doctor.check_browser("/usr/bin/chromium"), "OK", "/usr/bin/chromium"),
        (doctor.check_browser(None), "WARN", "scripts/browser"),
    ],
)
def test_check(finding: Finding, level: str, says: str) -> None:
    assert finding.level == level
    assert says in str(finding)
    assert bool(finding.remedy) or level == "OK" or finding.name == "lock"


@pytest.mark.parametrize(
    "finding",
    [doctor.check_glibc(("glibc", "2.31")), doctor.check_libpython(None), doctor.check_place(Path("/é"), [])],
    ids=lambda finding: finding.name,
)
def test_the_chapters_that_need_triton_are_named(finding: Finding) -> None:
    notebooks = {path.stem[:2]: path.read_text() for path in (ROOT / "notebooks").glob("*.ipynb")}
    starts = {number for number, text in notebooks.items() if 'serve(\\"triton\\"' in text}
    assert starts == {"03", "06"}
    assert set(re.findall(r"\b\d\d\b", str(finding).replace("22.04", ""))) >= starts | {"08"}  # which measures it


def test_folders(tmp_path: Path) -> None:
    assert doctor.check_folder("SERVEBOOK_STATE_DIR", tmp_path / "new").level == "OK"
    finding = doctor.check_folder("SERVEBOOK_CACHE_DIR", Path("/dev/null/cache"))
    assert (finding.level, finding.name) == ("FAIL", "cache")
    assert "Set SERVEBOOK_CACHE_DIR" in finding.remedy


def test_model(here: Settings, tmp_path: Path) -> None:
    assert doctor.check_model(load_settings(), quick=False).level == "OK"
    assert doctor.check_model(load_settings(), quick=True).level == "OK"
    missing = doctor.check_model(here, quick=True)
    assert (missing.level, "not prepared yet" in missing.fact) == ("WARN", True)
    folder = bundled_path(here)
    folder.mkdir(parents=True)
    (folder / "SHA256SUMS.json").write_text('{"config.json": "0"}')
    (folder / "config.json").write_text("{}")
    for quick in (True, False):
        assert doctor.check_model(here, quick).level == "FAIL"

    own = tmp_path / "own"
    own.mkdir()
    assert "no readable config.json" in doctor.check_model(load_settings(model=str(own)), quick=True).fact
    for content, says in (("[]", "no readable config.json"), ("{}", "describes no language model")):
        (own / "config.json").write_text(content)
        failed = [each for each in doctor.run(load_settings(model=str(own)), quick=True) if each.level == "FAIL"]
        assert [each.name for each in failed] == ["model"]
        assert says in failed[0].fact
    (own / "config.json").write_text('{"max_position_embeddings": 4096, "model_type": "llama"}')
    assert "up to 4096 tokens" in doctor.check_model(load_settings(model=str(own)), quick=True).fact
    assert "from the hub" in doctor.check_model(load_settings(model="Qwen/Qwen3-0.6B"), quick=True).fact


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model": "/no/such"}, "There is no model folder '/no/such'."),
        ({"model": "~nosuchuser/x"}, "There is no model folder '~nosuchuser/x'."),
        ({"max_model_len": 100_000}, "SERVEBOOK_MAX_MODEL_LEN is 100000, and this model ends at 8192 tokens."),
    ],
)
def test_a_model_that_no_engine_would_start_with(overrides: dict[str, object], says: str) -> None:
    settings = load_settings(**overrides)
    finding = doctor.check_model(settings, quick=True)
    assert (finding.level, finding.fact) == ("FAIL", says)
    with pytest.raises(ModelError, match=re.escape(f"{says}\n→ {finding.remedy}")):
        model_path(settings)


def test_a_strangers_port_is_named(here: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        settings = load_settings(**here.model_dump() | {"vllm_http_port": port})
        entry = {"endpoints": {"http": f"127.0.0.1:{port}"}}
        holders = [doctor._port_holders(settings, entries) or {} for entries in ([], [entry])]
        assert f"pid {os.getpid()}" in str(holders[0]["vllm http", port])
        assert holders[1]["vllm http", port] == "ours"
    assert (doctor._port_holders(settings, []) or {})["vllm http", port] == ""


def test_a_port_that_is_not_for_this_user_is_not_called_taken(here: Settings, low_ports_barred: None) -> None:
    settings = load_settings(**here.model_dump() | {"vllm_http_port": 80})
    assert (doctor._port_holders(settings, []) or {})["vllm http", 80] is None


@pytest.fixture
def orphan(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """By a mark that only this test knows: the doctors of tests beside it would find it too, and say so."""
    mark = f"{KEPT}_OF_A_TEST"
    monkeypatch.setattr(doctor, "KEPT", mark)
    with subprocess.Popen(["sleep", "600"], env=os.environ | {mark: "/nonexistent/no-such.sock"}) as process:
        yield process
        process.send_signal(signal.SIGKILL)


def test_an_orphan_is_found(orphan: subprocess.Popen[bytes]) -> None:
    assert doctor._orphans()[orphan.pid] == "sleep 600"


def test_report_renders_for_people_programs_and_notebooks() -> None:
    report = doctor.Report([Finding("OK", "python", "3.11.2"), Finding("FAIL", "disk", "0.1 GiB <free>", "Free some.")])
    assert report.failed
    assert str(report).splitlines() == [
        "[ OK ] python    3.11.2",
        "[FAIL] disk      0.1 GiB <free>",
        "                 → Free some.",
    ]
    assert "&lt;free&gt;" in report._repr_html_()
    assert report.as_dicts()[1] == {"level": "FAIL", "name": "disk", "fact": "0.1 GiB <free>", "remedy": "Free some."}


def command(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SERVEBOOK, "doctor", *words], env=os.environ | env, capture_output=True, text=True, timeout=60
    )


def test_this_machine_is_ready() -> None:
    done = command()
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line[7:16].strip() for line in done.stdout.splitlines() if line.startswith("[")}
    assert names >= {"python", "lock", "cpu", "memory", "disk", "ports", "gpu", "model", "servers", "browser"}


def test_quiet_prints_only_what_is_wrong() -> None:
    done = command("--quiet")
    assert done.returncode == 0
    assert "[ OK ]" not in done.stdout
    assert "browser" not in done.stdout


def test_a_failure_gives_exit_code_1() -> None:
    done = command("--json", SERVEBOOK_STATE_DIR="/dev/null/state")
    assert done.returncode == 1, done.stderr
    failed = [finding for finding in json.loads(done.stdout) if finding["level"] == "FAIL"]
    assert [finding["name"] for finding in failed] == ["state"]


def test_a_host_that_is_not_this_machine() -> None:
    done = command("--quiet", "--json", SERVEBOOK_HOST="192.0.2.1", SERVEBOOK_API_KEY="of-this-test")
    assert done.returncode == 1, done.stderr
    (ports,) = [finding for finding in json.loads(done.stdout) if finding["level"] == "FAIL"]
    assert "no server can listen on 192.0.2.1" in ports["fact"]
    assert "SERVEBOOK_HOST" in ports["remedy"]


def test_a_machine_without_shared_memory_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHM", Path("/there/is/none"))
    assert "shm" in {finding.name for finding in doctor.run(quick=True) if finding.level == "FAIL"}


def test_a_host_without_a_key_is_one_finding_of_many() -> None:
    done = command("--json", SERVEBOOK_HOST="0.0.0.0", SERVEBOOK_API_KEY="")
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)
    (failed,) = [finding for finding in findings if finding["level"] == "FAIL"]
    assert failed["name"] == "settings"
    assert "host 0.0.0.0 opens the servers to the network without a key" in failed["fact"]
    assert {"python", "model", "browser"} <= {finding["name"] for finding in findings}


OUT_OF_SIGHT = f"/tmp/{'x' * 300}/state"
"""Nobody can look there, for another reason than that it is another user's: these tests may be root's."""


def test_folders_that_this_user_may_not_look_into_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_orphans", dict)
    settings = load_settings(state_dir=OUT_OF_SIGHT, cache_dir=OUT_OF_SIGHT)
    folders = {name: f"{OUT_OF_SIGHT} cannot be written: File name too long" for name in ("state", "cache")}
    for model, more in ((OUT_OF_SIGHT, {"model": f"There is no model folder {OUT_OF_SIGHT!r}."}), (BUNDLED_MODEL, {})):
        each = settings.model_copy(update={"model": model})
        failed = {finding.name: finding.fact for finding in doctor.run(each, quick=True) if finding.level == "FAIL"}
        assert failed == folders | more


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_compiler_is_looked_for_on_a_gpu_alone(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCard(22, 20))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    report = doctor.run(load_settings(device=device), quick=True)
    found = [finding.level for finding in report if finding.name == "compiler"]
    assert found == ([] if device == "cpu" else ["WARN"])
    (tmp_path / "gcc").touch(0o755)
    assert doctor._compiler() == str(tmp_path / "gcc")


@pytest.mark.parametrize("words", ["status", "down vllm", "down --all", "logs vllm"])
def test_a_state_folder_that_this_user_may_not_look_into_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    monkeypatch.setenv("SERVEBOOK_STATE_DIR", OUT_OF_SIGHT)
    assert ended(monkeypatch, capsys, *words.split()).startswith(f"servebook: The state folder {OUT_OF_SIGHT} cannot")


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that ends with exit code 1."""
    monkeypatch.setattr(sys, "argv", ["servebook", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.\n→ Free some disk space"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/srv/state"),
            "/srv/state: Permission denied.\n→ Let this user write there",
        ),
        (OSError("of some library"), "of some library.\n→ See `servebook doctor`."),
    ],
)
def test_what_the_machine_refuses_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, says: str
) -> None:
    def refused() -> None:
        raise error

    monkeypatch.setattr(launch, "status", refused)
    assert ended(monkeypatch, capsys, "status").startswith(f"servebook: {says}")


def test_settings_that_do_not_fit_are_a_message() -> None:
    done = command(SERVEBOOK_MAX_MODEL_LEN="many")
    assert done.returncode == 1
    assert "SERVEBOOK_MAX_MODEL_LEN" in done.stderr
    assert "Traceback" not in done.stderr
