"""Becomes the process of a learner's desk: `python -I enter_desk.py WHERE COMMAND…`, WHERE being JSON.

Always: the limits on each of its processes. With `uid` (the room runs as root): as that user for good, in a mount
namespace in which the instructor's checkout, home and state are not to be found. What a desk needs of them is mounted
where it was, read-only; /tmp and /dev/shm are its own, and of bounded size.
"""

import ctypes
import json
import os
import resource
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_NO_NEW_PRIVS = 38

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: Path, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [os.fsencode(source), os.fsencode(target), kind and kind.encode(), flags, options and options.encode()]
    checked(libc.mount(*words), f"mount on {target}")


def hidden_by(path: Path) -> Path | None:
    """The outermost folder above `path` that only its owner may pass."""
    return next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001), None)


def separate(where: dict) -> None:
    """Leave the machine's view of its files: `covers` are hidden, `cache` is empty.

    Each path in `shown` is there nonetheless; what it names is what stands there now, mostly the same.
    """
    home, cache = Path(where["home"]), Path(where["cache"])
    shown = {Path(path): Path(source) for path, source in where["shown"].items()} | {home: home}
    hidden = {hidden_by(path) for path in shown} - {None}
    checked(libc.unshare(CLONE_NEWNS), "a mount namespace")
    mount("none", Path("/"), None, MS_REC | MS_PRIVATE)
    # Before they are covered.
    opened = {path: (os.open(source, os.O_PATH), source.is_dir()) for path, source in shown.items()}
    size = f"size={where['memory_bytes'] // 4}"  # there are three: what lies in them is memory of the machine
    covered: list[Path] = []
    for cover in sorted({Path("/tmp"), Path("/dev/shm"), cache, *map(Path, where["covers"]), *hidden}):
        if not any(cover.is_relative_to(other) for other in covered):
            free = cover in (Path("/tmp"), Path("/dev/shm"))
            mount("none", cover, "tmpfs", MS_NOSUID | MS_NODEV, f"{size},mode={'1777' if free else '755'}")
            covered.append(cover)
    cache.mkdir(parents=True, exist_ok=True)
    os.chown(cache, where["uid"], where["gid"])
    for path, (source, folder) in sorted(opened.items()):
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        elif not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        mount(f"/proc/self/fd/{source}", path, None, MS_BIND)
        read_only = 0 if path == home else MS_RDONLY
        mount("none", path, None, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV | read_only)
        os.close(source)


def main() -> None:
    where, command = json.loads(sys.argv[1]), sys.argv[2:]
    os.nice(10)  # after the engine in line for the cores
    Path("/proc/self/oom_score_adj").write_text("1000")  # and before it, where the machine's memory is short
    if "uid" in where:
        separate(where)
        os.setgroups([])
        os.setgid(where["gid"])
        os.setuid(where["uid"])
        checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
        # By user: as the instructor's own user it would count what belongs to others.
        resource.setrlimit(resource.RLIMIT_NPROC, (where["processes"], where["processes"]))
    # Each process of a learner, kernels included, gets a MemoryError or is ended; nobody else notices.
    resource.setrlimit(resource.RLIMIT_DATA, (where["memory_bytes"], where["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (where["cpu_seconds"], where["cpu_seconds"] + 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(where["home"])
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
