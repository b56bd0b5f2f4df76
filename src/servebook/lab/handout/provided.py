"""What a submission is given to run with: an environment without secrets, a home, and the servers that are up.

Its kernel and its judge each have a state folder of their own, with links to the sockets of the servers that are up: so
they attach to those, and write nothing into the state folder that whoever serves or grades trusts. They can end one.
"""

from __future__ import annotations

import os
from contextlib import chdir
from fnmatch import fnmatch
from pathlib import Path

from servebook import launch
from servebook.lab.handout import confine
from servebook.lab.manifest import Lab
from servebook.launch.files import Files
from servebook.launch.link import Link
from servebook.launch.table import REPLICA, SERVERS
from servebook.settings import FILE_NAME, LOOPBACK, Settings, load_settings

PASSED = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHON*", "VIRTUAL_ENV", "CONDA_PREFIX", "USER", "LOGNAME"),
    *("LANG", "LANGUAGE", "LC_*", "TZ", "TERM", "COLUMNS", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("OMP_*", "KMP_*", "MKL_*", "CUDA_*", "NVIDIA_*", "VLLM_CPU_*", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "JUPYTER_PREFER_ENV_PATH", "NBGRADER_EXECUTION"),
)
"""The variables that a submission has from who grades. No others: they may be tokens, keys, a proxy's password."""
KEPT_BACK = {"api_key", "room", "cache_dir", "state_dir", "host"}
"""Settings that are no submission's business, or for which it has its own."""


def settings_as_variables(settings: Settings) -> dict[str, str]:
    """The settings that somebody made, as an environment that says the same: no `servebook.toml` is needed then."""
    made = settings.model_dump(mode="json", exclude_unset=True, exclude=KEPT_BACK)
    return {f"SERVEBOOK_{name.upper()}": str(value) for name, value in made.items() if value is not None}


def environment(scratch: Path) -> dict[str, str]:
    """The whole environment of a submission: with a home and a state folder of its own in `scratch`, and no secret.

    It has a key only for an engine elsewhere, and only the one that the environment names for that: a learner's desk
    has the same. A key in `servebook.toml` is the instructor's own.
    """
    settings, home = load_settings(), scratch / "home"
    folders = {"HOME": "", "IPYTHONDIR": ".ipython", "JUPYTER_CONFIG_DIR": ".jupyter", "JUPYTER_DATA_DIR": ".data"}
    folders |= {"XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config", "XDG_DATA_HOME": ".data", "HF_HOME": ".hf"}
    key = os.environ.get("SERVEBOOK_API_KEY") if settings.engine_url else None
    return {
        **{name: value for name, value in os.environ.items() if any(fnmatch(name, each) for each in PASSED)},
        **settings_as_variables(settings),
        **({"SERVEBOOK_API_KEY": key} if key else {}),
        **{name: str(home / folder) for name, folder in folders.items()},
        "TMPDIR": str(scratch),
        "HF_HUB_CACHE": str(confine.hub_cache()),
        "SERVEBOOK_CACHE_DIR": str(settings.cache_dir),
        "SERVEBOOK_HOST": LOOPBACK,
        "SERVEBOOK_STATE_DIR": str(scratch / "state"),
        "VLLM_CACHE_ROOT": str(home / "vllm"),
    }


def judges_state(scratch: Path) -> Path:
    """The judge's state folder: beside `scratch`, where the submission cannot replace what the judge attaches to."""
    return scratch.parent / "judge"


def start_servers(lab: Lab) -> None:
    """Start those that a lab needs and that are not up: the submission before may have ended one.

    Raises:
        LaunchError: one does not start.
    """
    with chdir(load_settings().state_dir):  # a servebook.toml in the course may hold the key
        for name in lab.servers:
            launch.serve(name)


def make_folders(scratch: Path) -> None:
    """Make home and state folders, and end the search for `servebook.toml`: no folder further up is looked into.

    The judge looks for a server that is not up where the submission may start it. Not so in a room, where all that a
    lab needs are up before (`start_servers`): else one submission could end a server, and the next one answer for it.
    """
    settings, own, judges = load_settings(), scratch / "state", judges_state(scratch)
    started_before = confine.FROM in os.environ
    (scratch.parent / FILE_NAME).touch()
    (scratch / "home").mkdir()
    for folder in (own, judges):
        for name in ("logs", "servers"):
            (folder / name).mkdir(parents=True, mode=0o700)
    for name in [*SERVERS, *(f"{REPLICA}{number + 1}" for number in range(settings.replicas))]:
        there, here = Files(settings.state_dir, name), Files(own, name)
        link = Link.open(there)
        if link:
            link.close()
            here.socket.symlink_to(there.socket)
        Files(judges, name).socket.symlink_to((there if link or started_before else here).socket)
