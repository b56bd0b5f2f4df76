"""Confines what a submission runs to the files that a student has: neither solutions, nor others' work, nor grades.

Reading is allowed everywhere but in the instructor's folders and where a system has secrets, writing in the
submission's own; `landlock` does it.
"""

from __future__ import annotations

import os
import pwd
import ssl
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from jupyter_core.paths import jupyter_runtime_dir

from servebook.checkout import ROOT
from servebook.engine.model import given_folder
from servebook.environment import SOCKET_FOLDER_CHARACTERS
from servebook.settings import FILE_NAME, load_settings

TMP, DEVICES, CONFIGURATION = Path("/tmp"), Path("/dev"), Path("/etc")
OF_SERVICES = (Path("/run"), Path("/var"))
"""What services keep there may be root's alone, such as the tokens and secrets that a container is given."""
EVERYBODYS = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "nvidia*", "dxg")
"""The devices that a program may need. Root's include disks."""
NAMED = "folders.json"
"""The file that names the folders, beside the one for temporary files."""
FROM = "SERVEBOOK_CONFINED_FROM"
"""In the environment of who grades: one more folder that no submission reads, the state folder with a room's keys."""
OF_THE_CACHE = ("models", "adapters", "vllm-rs")
"""What a learner sees of the cache. An engine writes there too, and a hub's home, with its token, may lie there."""


def folders(course: Path, scratch: Path) -> dict[str, list[str]]:
    """Where a submission may read, write and make folders; `scratch` is its own, and goes with it.

    It writes nothing that anybody else runs or reads: no home folder, whose configuration is code to Jupyter and
    IPython, no cache, no state folder, out of which servers are started, no folder of the course, into which nbgrader
    writes; and of the devices those that every program may have.
    """
    from servebook.lab.handout.bundle import BUNDLE

    course, scratch = course.resolve(), scratch.resolve()
    settings = load_settings()
    prefix, state = Path(sys.prefix).resolve(), settings.state_dir.resolve()
    secret = [course, state, Path(os.environ.get(FROM, state)).resolve(), *hub_tokens()]
    hidden = [*secret, ROOT.resolve(), prefix, DEVICES, settings.cache_dir.resolve(), hub_home().resolve()]
    hidden += [each for each in homes() if each.parts[1:]]  # "/" in some containers
    hidden += [*OF_SERVICES, *not_for_everybody(CONFIGURATION)]  # root without its powers is still their owner
    given = [*(ROOT / name for name in (*BUNDLE, ".venv")), prefix, Path(sys.base_prefix).resolve()]
    given += [*(settings.cache_dir / name for name in OF_THE_CACHE), hub_cache(), given_folder(settings)]
    given += [scratch.parent / name for name in (NAMED, FILE_NAME)]
    given += [(CONFIGURATION / "resolv.conf").resolve()]  # for names of machines; often a link into /run
    given += certificates()
    read = [*around(Path("/"), hidden)]
    read += [part for each in given for part in around(each.resolve(), secret)]  # what is secret may lie in it, too
    own = [scratch, sockets_folder()]
    own += [path for name in EVERYBODYS for path in DEVICES.glob(name)]
    return {
        "read": [*map(str, read)],
        "list": [str(DEVICES)],
        "write": [*map(str, own)],
        # Triton's stub makes itself a folder there, whatever TMPDIR says.
        "make folders": [str(TMP)],
    }


def homes() -> set[Path]:
    """This user's home folder, and what HOME calls so: another one where root's environment was kept."""
    with suppress(KeyError):  # a container's user without a name
        return {Path.home().resolve(), Path(pwd.getpwuid(os.getuid()).pw_dir).resolve()}
    return {Path.home().resolve()}


def certificates() -> set[Path]:
    """Those of the authorities, by which a client knows a server: links may lead to them, into /var for example."""
    paths = ssl.get_default_verify_paths()
    files = [paths.cafile, paths.capath, os.environ.get("REQUESTS_CA_BUNDLE")]
    return {Path(each).resolve() for each in files if each}


def not_for_everybody(folder: Path) -> Iterator[Path]:
    """What in `folder`, at any depth, only its owner or a group may read, such as /etc/shadow."""
    for path in folder.rglob("*"):
        with suppress(OSError):  # it has just gone
            if not path.lstat().st_mode & stat.S_IROTH:
                yield path


def hub_home() -> Path:
    """Where Hugging Face's libraries keep what is theirs."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(cache, "huggingface")).expanduser()


def hub_tokens() -> Iterator[Path]:
    """Where they keep tokens, as `huggingface_hub.constants` has it."""
    for token in (hub_home() / "token", Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()):
        yield from (token.resolve(), token.resolve().with_name("stored_tokens"))


def hub_cache() -> Path:
    """Where models from the hub lie: beside the tokens, unless somebody has set another place."""
    return Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser()


def sockets_folder() -> Path:
    """For the sockets of submissions' kernels, and nothing else: beside it lie the keys to the instructor's own."""
    return Path(jupyter_runtime_dir(), "nbgrader")


def around(folder: Path, hidden: Iterable[Path]) -> Iterator[Path]:
    """What lies in `folder` but for what is hidden, in as few paths as can be; a link could lead to what is hidden."""
    inside = [each for each in hidden if each.is_relative_to(folder)]
    if not inside:
        yield folder
    elif folder not in inside and folder.is_dir():
        with suppress(PermissionError):  # /home on a machine of many users, each of whom sees his own folder alone
            for each in sorted(path for path in folder.iterdir() if not path.is_symlink()):
                yield from around(each, inside)


def scratch_folder() -> Path:
    """A new folder for a submission's temporary files, in one that only this user may enter; sockets fit into it."""
    longest = SOCKET_FOLDER_CHARACTERS - len("/submission-12345678/tmp12345678")
    outer = str(TMP) if len(os.fsencode(tempfile.gettempdir())) > longest else None
    return Path(tempfile.mkdtemp(dir=tempfile.mkdtemp(prefix="submission-", dir=outer)))
