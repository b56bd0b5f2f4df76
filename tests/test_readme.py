"""What README and CONTRIBUTING say is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pictures import shown
from PIL import Image
from survived import BY_HAND, PAGE, in_every_run, load, marked, written
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from servebook.cli import app
from servebook.launch.table import SERVERS
from servebook.settings import RoomSettings, Settings
from servebook.workbook.gate import NOTEBOOKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BOTH = README + (ROOT / "CONTRIBUTING.md").read_text()
FENCED = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
CODE = "\n".join(FENCED.findall(BOTH) + re.findall(r"`([^`\n]+)`", FENCED.sub("", BOTH)))
CHAPTERS = dict(re.findall(r"^\| \[`(\d\d_\w+)`\]\(notebooks/\1\.ipynb\) \|.*\| (\d+) \|$", README, flags=re.MULTILINE))


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_map_has_each_notebook_with_the_minutes_that_it_states(notebook: Path) -> None:
    stated = re.findall(r"(\d+) minutes, of which", notebook.read_text())
    assert stated == [CHAPTERS[notebook.stem]]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", CODE))
    assert named >= {"lab", "test", "check", "lock"}
    assert named <= targets


def test_settings_are_the_settings() -> None:
    named = {name.lower() for name in re.findall(r"SERVEBOOK_([A-Z_]+[A-Z])", BOTH)}
    assert named >= {"model", "engine_url", "api_key", "host", "max_model_len", "engine_args"}
    assert named <= Settings.model_fields.keys() | {f"room_{name}" for name in RoomSettings.model_fields}


def test_servers_are_the_servers() -> None:
    """With the ports that they take where nobody says otherwise."""
    table = README[README.index("| server |") : README.index("A full run of the benchmark")]
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    for spec in (spec for spec in SERVERS.values() if spec.name not in {"front", "hub"}):  # a room's own
        name = spec.name.replace("-", "_")
        ports = ", ".join(f"{kind} {defaults[f'{name}_{kind}_port']}" for kind in spec.ports)
        assert f"| `{spec.name}` | {spec.about} | {ports} |" in table
    assert re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE) == [
        name for name in SERVERS if name not in {"front", "hub"}
    ]


def test_commands_exist() -> None:
    named = set(re.findall(r"\bservebook ([a-z]+)", CODE)) - {"import"}
    assert named >= {"up", "down", "status", "logs", "doctor"}
    for name in named:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name


@pytest.mark.parametrize("line", re.findall(r"\bservebook (bench .*)", "".join(FENCED.findall(BOTH))))
def test_commands_that_measure_have_options_that_there_are(line: str) -> None:
    """And numbers within their bounds: some of them are for a GPU, where nothing is tried before it is needed."""
    name, *words = shlex.split(line, comments=True)
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    command.commands[name].make_context(name, words)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", BOTH):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_another_doors_names_are_those_of_the_rooms_own() -> None:
    """JupyterHub only asks whether a name begins so."""
    (pattern,) = re.findall(r'username_pattern = r"(.*)"', (ROOT / "docs/room.md").read_text())
    (own,) = re.findall(r'^NAME = re.compile\(r"(.*)"\)', (ROOT / "jupyterhub/door.py").read_text(), flags=re.MULTILINE)
    for name in ("ada", "a" * 23, "a" * 24, "ada@uni.example", "ada.lovelace", "Ada", "-ada", ""):
        assert bool(re.match(pattern, name)) == bool(re.fullmatch(own, name)), name


def test_what_a_room_leaves_is_where_its_page_says() -> None:
    """By the names in the programs that write it, and each is among what the commands remove."""
    page = (ROOT / "docs/room.md").read_text()
    part = page[page.index("## After the course") : page.index("## Who talks to whom")]
    table, _, commands = part.partition("```sh")
    code = "".join(path.read_text() for at in ("src", "jupyterhub") for path in (ROOT / at).rglob("*.py"))
    named = set(re.findall(r"`([\w.]+\.(?:sqlite|json|code|key|pem)|cookie_secret)`", table))
    assert len(named) >= 8
    for name in named:
        assert re.search(rf"""["']{re.escape(name)}["']""", code), name
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    (course,) = re.findall(r"rm -rf (submitted .*?) +#", commands)
    kept = {line.strip("/") for line in ignored if line.strip("/") in course.split()}
    assert kept == set(course.split())
    assert kept == set(re.findall(r"`([\w.]+)/?`", table[table.index("| the clone") : table.index("| the machine")]))
    for folder in ("room", "grading", "logs"):
        assert f"servebook/{folder}/`" in table
        assert re.search(rf"^rm -rf .*\b{folder}\b", commands, re.MULTILINE)


def test_the_page_on_security_is_found_where_something_is_opened() -> None:
    (setting,) = re.findall(r"^\| `SERVEBOOK_HOST` .*$", README, re.MULTILINE)
    room = README[README.index("## A room of learners") : README.index("## Servers from the command line")]
    for text in (setting, room):
        assert "](docs/security.md)" in text
    for name in ("room", "instructor"):
        assert "](security.md)" in (ROOT / f"docs/{name}.md").read_text()


def test_whether_the_locks_have_hashes_is_as_the_page_on_security_says() -> None:
    locks = [(ROOT / f"requirements/{name}.txt").read_text() for name in ("cpu", "gpu", "room")]
    assert not any("--hash" in lock for lock in locks)
    assert "no hashes of wheels" in (ROOT / "docs/security.md").read_text()


def test_the_page_on_security_names_tests_that_there_are() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/security.md").read_text()))
    tests = [*(ROOT / "tests").glob("test_*.py"), BY_HAND]
    there = {name for path in tests for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 30
    assert named <= there, named - there


def test_the_table_of_faults_survived_is_that_of_the_tests() -> None:
    """A row for every fault at every server that a test proves; by hand: `make survived` stores what was seen."""
    stored, page = load(), PAGE.read_text()
    by_hand = {row[:4] for row in marked(BY_HAND)}
    assert {row[:4] for row in stored} <= by_hand, "what was seen is of a test that there is"
    assert len(by_hand) > 40
    assert page == written(page, stored), "pytest tests/faults_by_hand.py --store-survived --collect-only writes it"
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    for row in [*in_every_run(), *stored]:
        assert any(
            row.fault in line and re.search(rf"[|,] {row.server}[ ,]", line) and f"`{row.test}`" in line
            for line in lines
        ), row


@pytest.mark.parametrize("file", sorted((ROOT / "docs/images").iterdir()), ids=lambda file: file.stem)
def test_the_pictures_are_small_and_show_what_there_is_now(file: Path) -> None:
    assert f"](docs/images/{file.name})" in README or f"](images/{file.name})" in (ROOT / "docs/room.md").read_text()
    assert file.stat().st_size < 100_000
    with Image.open(file) as picture:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", picture.info["Creation Time"])
        stale = f"it shows what has changed: .venv/bin/python tests/pictures.py {file.stem.removesuffix('_projector')}"
        assert picture.info["Source"] == shown(file.stem), stale


def test_there_are_pictures() -> None:
    assert README.index("docs/images/") < README.index("```console")
