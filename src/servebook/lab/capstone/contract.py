"""What every service keeps to, whatever it is made of: its folder, its environment, its limits."""

from __future__ import annotations

import shlex
import shutil
import tomllib
from pathlib import Path

from servebook.errors import ServebookError

ID = "14"
"""`check("14")`, as `check("04.2")` for an exercise."""
FOLDER = Path("capstone")
"""Where a learner's service lies: beside the notebook."""
START_FILE = "service.toml"

PROMPT_CHARACTERS = 1000
MAX_TOKENS = 256
CAPACITY = 32
"""Callers at work at once; whoever comes beyond is refused."""
GONE_SECONDS = 2.0
"""How soon a caller hears that the engine is gone. The judge waits six times as long: its machine may be busy."""
END_SECONDS = 10.0
"""How long a service may take to end after SIGTERM, once what was under way is answered."""

REQUESTS, TOKENS = "service_requests_total", "service_generated_tokens_total"
"""The counters on /metrics: answers of POST /generate by `status`, and tokens written."""


def begin(folder: Path = FOLDER) -> list[str]:
    """Put a beginning into `folder`, unless there is a service already; return the names of its files."""
    if not (folder / START_FILE).exists():
        shutil.copytree(Path(__file__).parent / "starter", folder, dirs_exist_ok=True)
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def command_of(folder: Path) -> list[str]:
    """The words of the command that starts the service in `folder`.

    Raises:
        ServebookError: service.toml is not there, or has no such line, or one that names nothing.
    """
    path = folder / START_FILE
    try:
        words = shlex.split(tomllib.loads(path.read_text(encoding="utf-8"))["command"])
        if not words or "\0" in "".join(words):
            raise ValueError("nothing that can be started")
        return words
    except FileNotFoundError:
        raise ServebookError(
            f"There is no {path} here.", "Run this in the folder that has it; chapter 14, section 2, makes one."
        ) from None
    except (tomllib.TOMLDecodeError, KeyError, ValueError, AttributeError, OSError):
        raise ServebookError(
            f'{path} has no command that can be read: command = "python service.py"', "Write it so."
        ) from None
