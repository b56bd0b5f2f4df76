"""The floor under the number of tests, in a folder with two of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("floor", "words", "code"),
    [
        (3, [], 1),
        (2, [], 0),
        (3, ["-k", "first"], 0),
        (3, ["-m", "not engine"], 0),
        (3, ["test_two.py"], 0),
        (3, ["--collect-only"], 0),
    ],
)
def test_a_whole_run_with_too_few_tests_fails(tmp_path: Path, floor: int, words: list[str], code: int) -> None:
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
    assert done.returncode == code, done.stdout + done.stderr
    assert ("FAILED: 2 tests passed, and in a whole run at least 3 must" in done.stdout) == bool(code)


def test_this_run_has_the_floor(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.has_plugin("floor")


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
    assert re.search(r"[34]  test_one.py\n", table)
    assert "test_two.py" not in table
    started = re.search(r"started: \d+ engines, (\d+) kernels", table)
    assert started
    assert int(started[1]) >= 1


def test_two_lanes_are_all_tests(tmp_path: Path) -> None:
    """And each has a floor of its own."""
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = .\nmarkers =\n  engine:\n  browser:\n")
    (tmp_path / "conftest.py").write_text('import floor\nfloor.FLOOR = {"engines": 2, "rest": 2}\n')
    (tmp_path / "test_three.py").write_text(
        "import pytest\n\n\n@pytest.mark.engine\ndef test_a():\n    pass\n\n\ndef test_b():\n    pass\n\n\n"
        "@pytest.mark.browser\ndef test_c():\n    pass\n"
    )
    said = {}
    for lane, code in (("engines", 0), ("rest", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-p", "floor", "-p", "lanes", "--lane", lane],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        said[lane] = re.findall(r"::(test_\w) PASSED", done.stdout)
    assert said == {"engines": ["test_a", "test_c"], "rest": ["test_b"]}
