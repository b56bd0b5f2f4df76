"""The Dockerfile's style, and that all who name its images mean the same. They are built on GitHub, not here."""

from __future__ import annotations

import json
import re
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


def test_the_parts_of_the_gpu_job_are_all_tests() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    parts = workflow["jobs"]["gpu"]["strategy"]["matrix"]["part"]
    words = set(re.findall(r"test_\w+", " ".join(parts)))

    def selects(part: str, name: str) -> bool:
        """As `pytest -k` reads it, for the file's name alone."""
        return bool(eval(part, {word: word in name for word in words}))

    for file in (ROOT / "tests").glob("test_*.py"):
        assert sum(selects(part, file.stem) for part in parts) == 1, file.stem
