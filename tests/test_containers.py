"""The Dockerfile's style, and that all who name its images mean the same. They are built on GitHub, not here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from servebook.workbook.doctor import pins

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DESK = (ROOT / "kubernetes/jupyterhub/Dockerfile").read_text()
LOCK = dict(pins((ROOT / "requirements/cpu.txt").read_text()))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
IMAGES = {f"servebook:{VERSION}", f"servebook:{VERSION}-gpu", f"vllm-router:{LOCK['vllm-router']}"}
DESKS = f"servebook-desk:{VERSION}"


def hadolint(text: str) -> str:
    command = [str(Path(sys.executable).with_name("hadolint")), "--no-color", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60).stdout


def test_the_dockerfiles_are_clean() -> None:
    assert hadolint(DOCKERFILE) == ""
    assert hadolint(DESK) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("WORKDIR /servebook", "WORKDIR servebook", "DL3000"),
        ('CMD ["make", "lab"]', "CMD make lab", "DL3025"),
        ("python:3.11-slim", "python", "DL3006"),
        ("RUN UV_NO_CACHE=1 make setup", "RUNN make setup", "missing whitespace"),
    ],
)
def test_the_linter_finds_mistakes(right: str, wrong: str, rule: str) -> None:
    assert right in DOCKERFILE
    assert rule in hadolint(DOCKERFILE.replace(right, wrong))


def built(text: str) -> dict[str, str]:
    """The images that a text builds, with their options."""
    return dict(re.findall(r"docker build -t (\S+) ?(.*) \.$", text, flags=re.MULTILINE))


def test_comment_and_workflow_build_the_same_images() -> None:
    workflow = built((ROOT / ".github/workflows/test.yml").read_text())
    assert workflow == built(DOCKERFILE) | built(DESK)
    assert workflow.keys() == IMAGES | {DESKS}
    assert re.findall(r"^FROM (\S+)$", DESK, flags=re.MULTILINE) == [f"servebook:{VERSION}"]


def test_kubernetes_names_these_images() -> None:
    texts = [path.read_text() for path in (ROOT / "kubernetes").rglob("*.yaml")]
    named = set(re.findall(r"^ *(?:- )?image: (\S+)$", "\n".join(texts), flags=re.MULTILINE))
    assert named == IMAGES


def test_targets_exist_and_the_last_is_the_workbook() -> None:
    stages = re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    assert stages == ["router", "base", "servebook"]
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert container["build"]["target"] in stages
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert container["postCreateCommand"] == "make setup"


GITIGNORE = (ROOT / ".gitignore").read_text()


COPIED_FIRST = re.findall(
    r"^COPY --chown=1000 (.+) (\S+)$", DOCKERFILE.partition("RUN UV_NO_CACHE=1 make setup")[0], flags=re.MULTILINE
)
"""What an image has when `make setup` runs: sources and where they go."""


def copied_first(to: Path) -> Path:
    for sources, target in COPIED_FIRST:
        for source in (path for name in sources.split() for path in ROOT.glob(name.rstrip("/"))):
            place = to / target
            if source.is_dir():
                shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
    (to / "README.md").touch()
    return to


SET_UP = """
import servebook.engine.prepare, servebook.engine.rust_front, servebook.engine.wheel
from hatchling.build import build_editable
build_editable("wheel")
print(servebook.__file__)
"""


def test_setup_finds_what_it_reads_in_what_is_copied_before_it_and_an_edit_elsewhere_costs_no_layer(
    tmp_path: Path,
) -> None:
    there = copied_first(tmp_path / "servebook")
    assert {path.name for path in there.iterdir()} == {
        *("Makefile", "README.md", "pyproject.toml", "requirements", "scripts", "shims", "src")
    }
    assert [path.name for path in (there / "src/servebook").iterdir() if path.is_dir()] == ["engine"]
    setup = (ROOT / "scripts/setup").read_text()
    assert set(re.findall(r" -m (servebook[\w.]+)", setup)) == {
        "servebook.engine.prepare",
        "servebook.engine.rust_front",
    }
    ran = subprocess.run(
        [sys.executable, "-P", "-c", SET_UP],
        cwd=there,
        env=os.environ | {"PYTHONPATH": str(there / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).is_relative_to(there)


def test_an_environment_out_of_the_builds_cache_is_not_made_anew(tmp_path: Path) -> None:
    """The locks that come with the last `COPY` may be younger than it."""
    there = copied_first(tmp_path / "servebook")
    ready = there / ".venv" / ".servebook-cpu"
    (there / ".venv/bin").mkdir(parents=True)
    (there / ".venv/bin/python").symlink_to(sys.executable)
    ready.touch()
    os.utime(ready, (0, 0))
    left = DOCKERFILE.partition("\nCOPY --chown=1000 . .\n")[2]
    (touch,) = re.findall(r"^RUN .*&& (make .*)$", left, flags=re.MULTILINE)
    for command, said in ((touch.split(), "touch"), (["make", "setup"], "Nothing to be done")):
        env = {"PATH": os.environ["PATH"], "DEVICE": "cpu"}
        done = subprocess.run(command, cwd=there, env=env, capture_output=True, text=True, timeout=60)
        assert said in done.stdout, done.stdout + done.stderr


def test_the_images_python_is_not_where_kserve_lays_an_empty_volume() -> None:
    """Its `kserve-config-llm-template` has one at /home."""
    (place,) = re.findall(r"^ENV .*\bUV_PYTHON_INSTALL_DIR=(\S+)", DOCKERFILE, flags=re.MULTILINE)
    (workdir,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert Path(place).parent == Path(workdir), "not below /home, and the user may write there"
    assert DOCKERFILE.index("UV_PYTHON_INSTALL_DIR") < DOCKERFILE.index("make setup\n")


def test_a_container_keeps_what_a_learner_writes() -> None:
    run, again = re.findall(r"^#   docker (run|start) (.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert (run[0], again[0]) == ("run", "start")
    assert "--rm" not in run[1].split()
    (name,) = re.findall(r"--name (\S+)", run[1])
    assert f"-ai {name} " in again[1]


def test_what_runs_there_is_not_root() -> None:
    """For each image: the last `USER` before its end is the number that Kubernetes' `runAsNonRoot` can check."""
    for stage in DOCKERFILE.split("\nFROM ")[1:3]:
        assert re.findall(r"^USER (\S+)$", stage, flags=re.MULTILINE) == ["1000"]


def test_an_image_gets_no_secret_and_no_environment_of_this_machine() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".venv", ".git", "**/servebook.toml", "scratch"} <= set(ignored)
    assert {"solutions", "tests"} <= set(ignored), "a learner's desk is made from it"
    by_nbgrader = set(
        re.findall(r"^/(gradebook.db|\w+ed|feedback|grades.csv|remarks.json)/?$", GITIGNORE, re.MULTILINE)
    )
    assert len(by_nbgrader) == 6
    assert by_nbgrader <= set(ignored)


def test_an_image_gets_nothing_that_the_instructors_work_leaves_in_the_clone() -> None:
    """Answers, slides with notes: what git ignores in the root or below one of its folders, for it alone is copied."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    left = [line.strip("/") for line in GITIGNORE.splitlines() if line.startswith("/")]
    assert {"notebooks/capstone", "labs/*/*.p*", "deck"} <= set(left)
    assert [path for path in left if not {path, path.partition("/")[0]} & set(ignored)] == []
    assert {"**/servebook.toml", "**/.ipynb_checkpoints", "**/__pycache__"} <= set(ignored), "at any depth"


def test_a_devcontainers_user_has_a_name() -> None:
    """The devcontainer's CLI gives the user the uid of who has the clone, but for a number, as the image has it."""
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert f"useradd --uid 1000 --no-create-home {container['remoteUser']};" in DOCKERFILE


def test_the_workflow_is_yaml_with_the_jobs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert workflow["jobs"].keys() == {"cpu", "images", "gpu", "gpu-image"}
    assert workflow["permissions"] == {"contents": "read"}


def test_a_push_ends_no_run_that_somebody_started_by_hand() -> None:
    concurrency = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["concurrency"]
    assert "${{ github.event_name }}" in concurrency["group"]
    assert concurrency["cancel-in-progress"] == "${{ github.event_name == 'pull_request' }}"


def test_the_parts_of_the_gpu_job_are_all_tests() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    parts = workflow["jobs"]["gpu"]["strategy"]["matrix"]["part"]
    words = set(re.findall(r"test_\w+", " ".join(parts)))

    def selects(part: str, name: str) -> bool:
        """As `pytest -k` reads it, for the file's name alone."""
        return bool(eval(part, {word: word in name for word in words}))

    for file in (ROOT / "tests").glob("test_*.py"):
        assert sum(selects(part, file.stem) for part in parts) == 1, file.stem
