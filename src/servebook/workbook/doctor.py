"""Is this machine ready? Each check takes its facts as arguments; `run` gathers them.

A check returns a `Finding`: `[ OK ]`, `[WARN]` (something will be slower, or is missing for a part) or `[FAIL]`
(a server or the tests cannot work), and what to do about it.
"""

from __future__ import annotations

import html
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from requests.utils import get_netrc_auth

from servebook import launch
from servebook.checkout import ROOT
from servebook.engine import rust_front, start
from servebook.engine.arguments import (
    available_gib,
    cpu_flags,
    cpu_quota,
    gpu_gib,
    needed_gib,
    total_gib,
    weights_gib,
)
from servebook.engine.gpu import GIB, Card, cards
from servebook.engine.model import bundled_path, given_folder, given_model, is_prepared, sufficient_limit
from servebook.environment import (
    GIVEN,
    JUDGE_APART,
    LOOPBACK_NAMES,
    PROXIES,
    module_command,
    short_tmpdir,
    unwelcome,
    writable_homes,
)
from servebook.errors import ServebookError
from servebook.launch.link import OPEN_FILES
from servebook.launch.memory import held_by
from servebook.launch.supervisor import connect
from servebook.processes import KEPT, can_bind
from servebook.settings import (
    BUNDLED_MODEL,
    Settings,
    installed,
    installed_vllm,
    load_settings,
    own_settings,
    variables,
)

Level = Literal["OK", "WARN", "FAIL"]

GLIBC = (2, 35)
"""The oldest that Triton's binaries run on: the tag of nvidia-pytriton's wheel is manylinux_2_35."""
DRIVER = 580
"""The oldest NVIDIA driver for CUDA 13, with which vLLM's wheel is built (CUDA 13.0 release notes)."""
DISK_GIB = 1.0
"""For logs, caches and the prepared model (0.3 GiB)."""
SHM = Path("/dev/shm")
SHM_MIB = 256
"""vLLM and Triton pass data between their processes through /dev/shm; containers often have 64 MiB."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
"""The names that Chromium goes by; `scripts/browser` looks for the same, and for Playwright's own builds."""
VERSION_SECONDS = 10
"""What a browser may take to say its version, which is a moment's work even on a busy machine."""


@dataclass(frozen=True)
class Finding:
    """What one check found: `fact` in a few words, and `remedy`, what to do ("" where there is nothing to do)."""

    level: Level
    name: str
    fact: str
    remedy: str = ""

    def __str__(self) -> str:
        badge = f"[{self.level.center(4)}]"
        return f"{badge} {self.name:<9} {self.fact}" + (f"\n{'':17}→ {self.remedy}" if self.remedy else "")


class Report(list[Finding]):
    """All findings; prints as lines, and as a table in a notebook."""

    @property
    def failed(self) -> bool:
        """Whether anything would keep a server from working."""
        return any(finding.level == "FAIL" for finding in self)

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>[{f.level.center(4).replace(' ', '&nbsp;')}]</code></td>"
            f'<th scope="row" style="text-align:left">{html.escape(f.name)}</th>'
            f'<td style="text-align:left">{html.escape(f.fact)}'
            f"{'<br>→ ' + html.escape(f.remedy) if f.remedy else ''}</td></tr>"
            for f in self
        )
        return f'<table aria-label="Is this machine ready?">{rows}</table>'

    def as_dicts(self) -> list[dict[str, str]]:
        """For `servebook doctor --json`."""
        return [asdict(finding) for finding in self]


def failure(name: str, error: ServebookError) -> Finding:
    """What a command would refuse with this error."""
    return Finding("FAIL", name, str(error).split("\n")[0], error.remedy)


def check_python(running: tuple[int, int]) -> Finding:
    """The lock is made for Python 3.11."""
    if running == (3, 11):
        return Finding("OK", "python", platform.python_version())
    return Finding(
        "FAIL", "python", f"{running[0]}.{running[1]}; the lock is made for 3.11", "Remove .venv and run `make setup`."
    )


def check_lock(lock: str | None, found: Mapping[str, str]) -> Finding:
    """Every package of the lock is installed in the version that it names."""
    if lock is None:
        return Finding("WARN", "lock", "this is no clone of the repository, so there is no lock to compare with")
    wrong = [f"{name} {found[name] or 'missing'}" for name, wanted in pins(lock) if found[name] != wanted]
    if not wrong:
        return Finding("OK", "lock", f"{len(pins(lock))} packages, as locked")
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return Finding("FAIL", "lock", f"not as locked: {', '.join(wrong[:4])}{more}", "Run `make setup`.")


def pins(lock: str) -> list[tuple[str, str]]:
    """The `name==version` lines of a lock."""
    return re.findall(r"^([\w.-]+)==([^\s;]+)", lock, flags=re.MULTILINE)


def check_glibc(library: tuple[str, str]) -> Finding:
    """Triton's binaries need a glibc of their age or newer."""
    name, number = library
    parts = tuple(int(part) for part in re.findall(r"\d+", number)[:2])
    if name == "glibc" and parts >= GLIBC:
        return Finding("OK", "glibc", number)
    return Finding(
        "FAIL",
        "glibc",
        f"{name or 'another C library'} {number}; Triton's binaries need glibc 2.35",
        "Use Ubuntu 22.04, Debian 12 or newer. All chapters but 03, 06 and 08 work without.",
    )


def check_libpython(library: Path | None) -> Finding:
    """Triton's Python stub is an embedded interpreter: it needs Python as a shared library."""
    if library:
        return Finding("OK", "libpython", library.name)
    return Finding(
        "WARN",
        "libpython",
        "no libpython3.11.so, which Triton needs (chapters 03, 06, 08)",
        "sudo apt-get install libpython3.11, or build Python with --enable-shared.",
    )


def check_cpu(flags: set[str], cores: int, on_gpu: bool, quota: float | None = None) -> Finding:
    """vLLM's CPU build has kernels for AVX2, AVX-512 and AMX."""
    best = next((name for flag, name in _SIMD.items() if flag in flags), None)
    if best is None and not on_gpu:
        return Finding(
            "FAIL", "cpu", "no AVX2, which vLLM's CPU build needs", "Use a processor of 2014 or later, or a GPU."
        )
    if quota is not None and quota < min(cores, 2) and not on_gpu:
        return Finding(
            "WARN",
            "cpu",
            f"{best}, the time of {quota:g} of {cores} cores",
            "Give the container 2 cores (--cpus 2), or the slice (CPUQuota=200%).",
        )
    if cores < 2 and not on_gpu:
        return Finding("WARN", "cpu", f"{best}, one core", "Expect everything to take twice as long as it says.")
    return Finding("OK", "cpu", f"{best or 'no AVX2'}, {cores} cores")


_SIMD = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}


def check_memory(total_gib: float, available_gib: float, needed_gib: float, elsewhere: bool = False) -> Finding:
    """One engine at least must fit, unless that of `vllm` is `elsewhere`."""
    fact = f"{available_gib:.1f} of {total_gib:.1f} GiB available; an engine takes {needed_gib:.1f}"
    if total_gib < needed_gib and elsewhere:
        return Finding("WARN", "memory", fact, "Of the servers those that have no engine of their own can be started.")
    if total_gib < needed_gib:
        return Finding("FAIL", "memory", fact, "Use a larger machine, a smaller model, or SERVEBOOK_ENGINE_URL.")
    if available_gib < needed_gib:
        return Finding(
            "WARN", "memory", fact, "End a server (`servebook status`, `servebook down NAME`) or another program."
        )
    return Finding("OK", "memory", fact)


def check_disk(free: Mapping[str, int]) -> Finding:
    """Room in each folder (bytes)."""
    place, least = min(free.items(), key=lambda item: item[1])
    fact = f"{least / GIB:.1f} GiB free in {place}"
    if least >= DISK_GIB * GIB:
        return Finding("OK", "disk", fact)
    return Finding("FAIL", "disk", fact, f"Free at least {DISK_GIB:.0f} GiB there.")


def check_shm(free: int | None) -> Finding:
    """Shared memory (bytes); None where there is none that this user may use."""
    if free is None:
        return Finding(
            "FAIL",
            "shm",
            f"no {SHM} that this user may write to",
            f"As root: mkdir -p {SHM} && mount -t tmpfs -o mode=1777 tmpfs {SHM}",
        )
    if free >= SHM_MIB * 2**20:
        return Finding("OK", "shm", f"{free / 2**20:.0f} MiB of shared memory")
    return Finding("WARN", "shm", f"{free / 2**20:.0f} MiB of shared memory", "Start the container with --shm-size=1g.")


def check_ports(holders: Mapping[tuple[str, int], str | None] | None, host: str = "127.0.0.1") -> Finding:
    """`holders` maps (what for, port) to "" where free, "ours", or the name of a stranger; None: not on `host`.

    A port that this user may not have is mapped to None.
    """
    if holders is None:
        return Finding(
            "FAIL",
            "ports",
            f"no server can listen on {host}: it is no address of this machine",
            "Unset SERVEBOOK_HOST, or set it to one of this machine's addresses (`ip address`), or to 0.0.0.0 for all.",
        )
    if barred := [f"{port} ({use})" for (use, port), who in holders.items() if who is None]:
        return Finding(
            "FAIL",
            "ports",
            f"not for this user: {'; '.join(barred)}",
            "Choose ports from 1024 upwards: those below take rights that this user has not.",
        )
    taken = [f"{port} ({use}) by {who}" for (use, port), who in holders.items() if who not in ("", "ours")]
    ours = sum(who == "ours" for who in holders.values())
    if taken:
        return Finding(
            "WARN", "ports", f"taken: {'; '.join(taken)}", "Nothing: the next free port is used, and `up` says so."
        )
    return Finding("OK", "ports", f"{len(holders) - ours} free" + (f", {ours} in use by our servers" if ours else ""))


def check_gpu(card: Card | None, held: str, needed_gib: float, device: str, cpu_build: bool) -> Finding:
    """The card that engines would share, None where no driver answers; `held` says who has what is not free."""
    if not card:
        if device == "gpu":
            return Finding(
                "FAIL",
                "gpu",
                "asked for, and no driver answers",
                "Install NVIDIA's driver, or unset SERVEBOOK_DEVICE; CUDA_VISIBLE_DEVICES may hide the card.",
            )
        return Finding("OK", "gpu", "none; the engine runs on the CPU")
    fact = f"{card.name}, {card.free / GIB:.1f} of {card.total / GIB:.1f} GiB free, driver {card.driver}"
    if device == "cpu":
        return Finding("OK", "gpu", f"{fact}; not used, as SERVEBOOK_DEVICE=cpu says")
    if cpu_build:
        level: Level = "FAIL" if device == "gpu" else "WARN"
        return Finding(level, "gpu", f"{fact}; but this is the CPU environment", "Run `make setup DEVICE=gpu`.")
    if int(card.driver.split(".")[0]) < DRIVER:
        return Finding("FAIL", "gpu", f"{fact}; vLLM's build needs {DRIVER}", "Install a newer driver.")
    fact += f"; an engine takes {needed_gib:.1f}"
    if card.total < needed_gib * GIB:
        return Finding(
            "FAIL",
            "gpu",
            fact,
            "Choose a smaller model or a smaller SERVEBOOK_KV_CACHE_GIB; "
            "or set SERVEBOOK_DEVICE=cpu and run `make setup DEVICE=cpu`.",
        )
    if card.free < needed_gib * GIB:
        remedy = f"End a server (`servebook down NAME`) or another program. {held}".rstrip()
        return Finding("WARN", "gpu", fact, remedy)
    return Finding("OK", "gpu", fact)


def check_compiler(compiler: str | None, header: Path) -> Finding:
    """On a GPU, the `triton` package (not the server) builds its link to CUDA at a first start, against `header`.

    As its source has it (`triton/runtime/build.py`); a machine without either was not tried.
    """
    lacking = [name for name, there in {"C compiler": compiler, header.name: header.is_file()}.items() if not there]
    if not lacking:
        return Finding("OK", "compiler", str(compiler))
    return Finding(
        "WARN",
        "compiler",
        f"no {' and no '.join(lacking)}: an engine on a GPU may not start",
        "sudo apt-get install gcc python3.11-dev, or set CC to a compiler.",
    )


def check_model(settings: Settings, quick: bool) -> Finding:
    """The model is there; the bundled one unaltered (by hash, or only by size of its files where `quick`)."""
    bundled = bundled_path(settings) if settings.model == BUNDLED_MODEL else None
    if bundled and not is_prepared(bundled, quick=quick):
        there = os.access(bundled, os.F_OK)  # False where this user may not look
        level: Level = "FAIL" if there else "WARN"
        state = "altered or incomplete" if there else "not prepared yet"
        return Finding(
            level, "model", f"{state}: {bundled}", f"Run `{module_command('servebook.engine.prepare')}` (20 s)."
        )
    try:
        folder = bundled or given_model(settings)
        if not folder:
            return Finding("OK", "model", f"{settings.model}, fetched from the hub when an engine starts")
        limit = sufficient_limit(settings, folder)
        weights_gib(folder)
    except ServebookError as error:
        return failure("model", error)
    if bundled:
        return Finding("OK", "model", f"SmolLM2-135M-Instruct in {folder}")
    return Finding("OK", "model", f"{folder}, up to {limit or 'an unknown number of'} tokens")


def check_rust_front(file: Path | None) -> Finding:
    """vLLM's Rust front end is there: installed on a GPU, else fetched."""
    if file:
        return Finding("OK", "vllm-rs", str(file))
    return Finding(
        "WARN",
        "vllm-rs",
        "vLLM's Rust front end is not there (chapters 07, 08)",
        f"Run `{module_command('servebook.engine.rust_front')}` (22 MB), or set SERVEBOOK_VLLM_RS_FILE.",
    )


def check_engine_url(url: str | None, problem: ServebookError | None) -> Finding:
    """The engine elsewhere, where there is to be one, answers."""
    if problem:
        return failure("engine", problem)
    return Finding("OK", "engine", f"vLLM at {url}" if url else "runs on this machine")


def check_servers(entries: Iterable[Mapping[str, Any]], orphans: Mapping[int, str]) -> Finding:
    """`entries` as `servebook status` has them; `orphans` maps pids of processes without supervisor to commands."""
    if orphans:
        what = "; ".join(f"{pid} ({command})" for pid, command in orphans.items())
        return Finding("FAIL", "servers", f"left without a supervisor: {what}", f"kill {' '.join(map(str, orphans))}")
    states = {str(entry["name"]): entry["state"] for entry in entries}
    if failed := [name for name, state in states.items() if state == "failed"]:
        names = " ".join(failed)
        return Finding(
            "WARN", "servers", f"failed: {names}", f"`servebook logs {failed[0]}` says why; `up` or `down` clears it."
        )
    running = [f"{name} {state}" for name, state in states.items() if state != "stopped"]
    return Finding("OK", "servers", ", ".join(running) or "none running")


def check_folder(variable: str, folder: Path) -> Finding:
    """Whether a file can be made in `folder`."""
    name = variable.removeprefix("SERVEBOOK_").removesuffix("_DIR").lower()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(
            "FAIL", name, f"{folder} cannot be written: {error.strerror}", f"Set {variable} to a folder of yours."
        )
    return Finding("OK", name, str(folder))


def check_environment(environment: Mapping[str, str], cache_dir: Path = Path("/tmp")) -> Finding:
    """Misspelt settings, what servers do not get or get otherwise, and a proxy before this very machine."""
    known = variables() | {KEPT, JUDGE_APART, "SERVEBOOK_SCRIPTED_RATE"}
    unknown = sorted(name for name in environment if name.startswith("SERVEBOOK_") and name not in known)
    found = [
        (f"unknown, so without effect: {', '.join(unknown)}" if unknown else "", "Correct the name."),
        (
            "; ".join(f"{name} is kept from servers: {why}" for name, why in unwelcome(environment).items()),
            f"unset {' '.join(unwelcome(environment))}",
        ),
        (
            "; ".join(f"{name} cannot be written to" for name in writable_homes(cache_dir, environment)),
            "Servers use folders below SERVEBOOK_CACHE_DIR in their place; set these to folders of yours.",
        ),
        (
            "the folder for temporary files is too long for sockets, so servers use /tmp"
            if short_tmpdir(environment)
            else "",
            "export TMPDIR=/tmp before JupyterLab starts: kernels have sockets too.",
        ),
        (
            proxied(environment),
            f"export no_proxy={','.join(LOOPBACK_NAMES)} NO_PROXY={','.join(LOOPBACK_NAMES)}",
        ),
    ]
    if wrong := [(fact, remedy) for fact, remedy in found if fact]:
        return Finding("WARN", "variables", *("; ".join(parts) for parts in zip(*wrong, strict=True)))
    return Finding("OK", "variables", "nothing unknown, no proxy in the way")


def check_netrc(passwords: bool) -> Finding:
    """Whether `requests` would send a password of ~/.netrc to servers of this machine, in the place of a key."""
    if not passwords:
        return Finding("OK", "netrc", "no password for this machine")
    what = "~/.netrc has a password for this machine, perhaps as `default`: `requests` sends it in a key's place"
    return Finding("WARN", "netrc", what, "Name there the machine that it is for: labs with keys fail otherwise.")


def proxied(environment: Mapping[str, str]) -> str:
    """Which proxy would get requests to this very machine, and from whom; "" where none would.

    Servers and clients of the workbook go past it by themselves; curl and other programs do as they are told.
    """
    names = [each for name in PROXIES for each in (name, name.upper()) if environment.get(each)]
    if not names:
        return ""

    def excepts(variable: str) -> bool:
        return bool({"127.0.0.1", "*"} & {word.strip() for word in environment.get(variable, "").split(",")})

    if not excepts("no_proxy") and not excepts("NO_PROXY"):
        return f"{', '.join(names)} set without an exception for this machine"
    if not excepts("no_proxy"):
        return f"{', '.join(names)} set, and the exception for this machine in NO_PROXY only: gRPC reads small letters"
    return ""


def check_files(most: int) -> Finding:
    """How many files a process may open; a server is given as many as the hard limit allows."""
    if most >= OPEN_FILES:
        return Finding("OK", "files", f"a process may open {most}")
    return Finding(
        "FAIL", "files", f"a process may open {most}, a server needs {OPEN_FILES}", f"ulimit -n {OPEN_FILES}"
    )


def check_place(environment: Path, folders: Iterable[Path]) -> Finding:
    """Letters that some part of the workbook cannot have in a path."""
    if ":" in str(environment):
        return Finding(
            "WARN",
            "place",
            f"the loader cannot be told of {environment}, which has a colon: engines run at half the speed",
            "Move the clone.",
        )
    if other := [str(folder) for folder in (environment, *folders) if not str(folder).isascii()]:
        return Finding(
            "WARN",
            "place",
            f"Triton takes no other letters than ASCII's: {', '.join(other)} (chapters 03, 06, 08)",
            "Move the clone, or set SERVEBOOK_STATE_DIR and SERVEBOOK_CACHE_DIR.",
        )
    return Finding("OK", "place", "its folders have names that every part takes")


def check_browser(path: str | None) -> Finding:
    """Chromium is needed by the browser tests only."""
    if path:
        return Finding("OK", "browser", path)
    return Finding("WARN", "browser", "no Chromium, which the browser tests need", "scripts/browser brings one.")


def run(settings: Settings | None = None, quick: bool = False) -> Report:
    """Every check on this machine; `quick` (under a second) leaves out the model's hash and the browser."""
    refused = []
    try:
        settings = settings or load_settings()
    except ServebookError as error:
        settings = own_settings()  # all but a host that asks for a key is refused here, too
        refused = [failure("settings", error)]
    entries = []
    with suppress(ServebookError):  # the state folder cannot be looked into: `check_folder` says so
        entries = launch.status(settings)
    weights = bundled_path(settings) if settings.model == BUNDLED_MODEL else given_folder(settings)
    try:
        weights_gib(weights)
    except ServebookError:  # `check_model` says so; memory is reckoned without them
        weights = Path(os.devnull)
    lock_file = ROOT / "requirements" / f"{'gpu' if settings.on_gpu else 'cpu'}.txt"
    lock = lock_file.read_text() if lock_file.is_file() else None
    card = next(iter(cards()), None)
    folders = [
        check_folder("SERVEBOOK_CACHE_DIR", settings.cache_dir),
        check_folder("SERVEBOOK_STATE_DIR", settings.state_dir),
    ]
    report = Report(
        [
            *refused,
            check_python(sys.version_info[:2]),
            check_lock(lock, {name: installed(name) for name, _ in pins(lock or "")}),
            check_glibc(platform.libc_ver()),
            check_libpython(_libpython()),
            check_cpu(cpu_flags(), len(os.sched_getaffinity(0)), settings.on_gpu, cpu_quota()),
            check_memory(
                total_gib(),
                available_gib(),
                needed_gib(settings, weights),
                elsewhere=bool(settings.engine_url),
            ),
            *folders,
            check_disk(_free(settings.cache_dir, settings.state_dir, Path(sys.prefix))),
            check_shm(shutil.disk_usage(SHM).free if os.access(SHM, os.W_OK | os.X_OK) else None),
            check_ports(_port_holders(settings, entries), settings.host),
            check_gpu(
                card,
                held_by(card) if card else "",
                gpu_gib(settings, weights),
                settings.device,
                installed_vllm().endswith("+cpu"),
            ),
            *([check_compiler(_compiler(), _python_h())] if settings.on_gpu else []),
            check_model(settings, quick),
            check_rust_front(rust_front.available(settings, quick)),
            check_engine_url(settings.engine_url, _engine_problem(settings)),
            check_servers(entries, _orphans()),
            check_environment(GIVEN, settings.cache_dir),
            check_netrc(bool(get_netrc_auth("http://127.0.0.1"))),
            check_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
            check_place(Path(sys.prefix), [settings.state_dir, settings.cache_dir]),
        ]
    )
    if not quick:
        report.append(check_browser(find_browser()))
    return report


def find_browser() -> str | None:
    """The Chromium for the browser tests: the first that runs, installed or Playwright's own build, or None."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    builds = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or cache / "ms-playwright")
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    with suppress(OSError):  # a home folder that is another's
        found += map(str, builds.glob("chromium-*/chrome-linux*/chrome"))
    return next(filter(_runs, found), None)


def _runs(program: str) -> bool:
    """Not so where `chromium-browser` of Ubuntu's apt only says that one is to install a snap."""
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([program, "--version"], capture_output=True, timeout=VERSION_SECONDS).returncode == 0
    return False


def _libpython() -> Path | None:
    lib, arch = (Path(sysconfig.get_config_var("LIBDIR")), sysconfig.get_config_var("MULTIARCH") or "")
    found = (file for folder in (lib, lib / arch) for file in folder.glob("libpython3.11.so*"))
    return next(found, None)


def _compiler() -> str | None:
    """The one that `triton` would take."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _python_h() -> Path:
    return Path(sysconfig.get_paths()["include"]) / "Python.h"


def _free(*folders: Path) -> dict[str, int]:
    """Free bytes for each folder that is there, as far as this user may see."""
    return {str(folder): shutil.disk_usage(folder).free for folder in folders if os.access(folder, os.F_OK)}


def _port_holders(settings: Settings, entries: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], str | None] | None:
    """As `check_ports` wants it."""
    ours = {int(where.rpartition(":")[2]) for entry in entries for where in entry["endpoints"].values()}
    uses = [(spec.name, kind) for spec in launch.SERVERS.values() for kind in spec.ports]
    wanted = {(f"{name} {kind}", settings.port(name, kind)) for name, kind in uses}
    taken, barred = set(), set()
    try:
        for _, port in wanted:
            try:
                if not can_bind(settings.host, port):
                    taken.add(port)
            except PermissionError:
                barred.add(port)
    except OSError:
        return None
    names = _listeners() if taken - ours else {}

    def holder(port: int) -> str | None:
        if port in taken:
            return "ours" if port in ours else names.get(port, "another user's program")
        return None if port in barred else ""

    return {(use, port): holder(port) for use, port in sorted(wanted, key=lambda item: item[1])}


def _listeners() -> dict[int, str]:
    """Which program listens on which port, as far as this user may know."""
    found = {}
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid and connection.laddr:
            try:
                found[connection.laddr.port] = f"{psutil.Process(connection.pid).name()}, pid {connection.pid}"
            except psutil.Error:
                continue
    return found


def _engine_problem(settings: Settings) -> ServebookError | None:
    if settings.engine_url:
        try:
            launch.serve("vllm", settings=settings)
        except ServebookError as error:
            return error
    return None


def _orphans() -> dict[int, str]:
    """Servers of this user, by any state folder, whose supervisor is gone."""
    found = {}
    for process in psutil.process_iter():
        try:
            socket = process.environ().get(KEPT)
            if socket and process.uids().real == os.getuid():
                if there := connect(Path(socket)):
                    there.close()
                else:
                    words = [word for word in process.cmdline() if word != start.__name__]
                    found[process.pid] = " ".join(words)[:60]
        except psutil.Error:
            continue
    return found
