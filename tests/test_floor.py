"""The floor under the number of tests, in a folder with two of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import floor
import pytest


@pytest.mark.parametrize(
    ("floor", "words", "said"),
    [
        (3, [], "FAILED: 2 tests passed, and in a whole run at least 3 must"),
        (2, [], ""),
        (1, [], "ERROR: raise in tests/floor.py: FLOOR[None], 1, for 2 tests"),
        (3, ["-k", "first"], ""),
        (1, ["-k", "test"], ""),
        (3, ["-m", "not engine"], ""),
        (3, ["test_two.py"], ""),
        (3, ["--collect-only"], ""),
    ],
)
def test_a_whole_run_with_too_few_tests_or_too_low_a_floor_fails(
    tmp_path: Path, floor: int, words: list[str], said: str
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = .\n")
    (tmp_path / "conftest.py").write_text(f"import floor\nfloor.FLOOR = {{None: {floor}}}\n")
    (tmp_path / "test_two.py").write_text("def test_first():\n    pass\n\n\ndef test_second():\n    pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "floor", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    codes = {"FAILED": pytest.ExitCode.TESTS_FAILED, "ERROR": pytest.ExitCode.USAGE_ERROR, "": pytest.ExitCode.OK}
    assert done.returncode == codes[said.partition(":")[0]], done.stdout + done.stderr
    assert re.findall("^(?:FAILED|ERROR): .*", done.stdout + done.stderr, re.MULTILINE) == ([said] if said else [])


def test_no_floor_has_aged(pytestconfig: pytest.Config) -> None:
    """In `make check`, too, which collects all tests and runs those without servers."""
    assert pytestconfig.stash[floor.AGED] == ""


def test_a_run_says_where_its_seconds_went(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import subprocess, sys\n\n\ndef test_slow():\n"
        "    subprocess.run([sys.executable, '-c', 'import time; time.sleep(3)', 'ipykernel_launcher'])\n"
    )
    (tmp_path / "test_two.py").write_text("def test_quick():\n    pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "seconds"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    table = done.stdout.partition("seconds by file")[2]
    assert re.search(r" ([3-9]|\d\d+)  test_one.py\n", table)
    assert "test_two.py" not in table
    started = re.search(r"started: \d+ engines, (\d+) kernels", table)
    assert started
    assert int(started[1]) >= 1


def test_the_lanes_are_all_tests(tmp_path: Path) -> None:
    """Each has a floor of its own, and what needs servers comes first; where a part is asked for, one may be empty."""
    marks = "".join(f"  {name}:\n" for name in ("engine", "browser", "lane"))
    (tmp_path / "pytest.ini").write_text(f"[pytest]\ntestpaths = .\nmarkers =\n{marks}")
    (tmp_path / "conftest.py").write_text('import floor\nfloor.FLOOR = {"several": 3, "one": 3}\n')
    (tmp_path / "test_five.py").write_text(
        """
import pytest
mark = pytest.mark

@mark.engine
def test_a(): pass

def test_b(): pass

@mark.browser
def test_c(): pass

@mark.engine
@mark.lane("one")
def test_d(): pass

@mark.lane("several")
def test_e(): pass
"""
    )
    said = {}
    for lane, code, *words in (("several", 0), ("own", 5), ("own", 0, "-k", "test_a"), ("one", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-p", "floor", "-p", "lanes", "--lane", str(lane), *words],
            cwd=tmp_path,
            env=os.environ
            | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
            | {"SERVEBOOK_STATE_DIR": str(tmp_path / "state")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        said[lane] = re.findall(r"::(test_\w) PASSED", done.stdout)
    assert said == {"several": ["test_a", "test_c", "test_e"], "own": [], "one": ["test_d", "test_b"]}
