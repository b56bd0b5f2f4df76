"""vLLM's Rust front end: one file of the wheel `vllm`, of the very version that is installed here.

On a GPU that wheel is installed. vLLM's CPU build has no such file: it is taken out of the same wheel (22 of 327 MB),
once per user: `python -m servebook.engine.rust_front`, and at the first use.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock

from servebook.errors import LaunchError, ServebookError
from servebook.settings import Settings, installed_vllm, own_settings

if TYPE_CHECKING:
    from servebook.engine.wheel import Say

NAME = "vllm-rs"
ELSEWHERE = (
    "Check the network and pip's settings, or bring the file from a machine that has it: there run "
    "`.venv/bin/python -m servebook.engine.rust_front FOLDER`, here the same with --from FOLDER (or set "
    "SERVEBOOK_VLLM_RS_FILE)."
)


def rust_front(settings: Settings, say: Say) -> Path:
    """The program, checked; fetched where it is neither installed nor there from an earlier time.

    Raises:
        LaunchError: it cannot be had, it is of another version than the engine, or it does not run.
    """
    file = settings.vllm_rs_file or _installed()
    if not file:
        file = cached(settings)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file.parent}.lock"):
                if not is_intact(file):
                    from servebook.engine.wheel import take  # a slow import, needed once per user

                    take("vllm", engine_version(), f"vllm/{NAME}", file.parent, say)
        except OSError as error:
            raise LaunchError(
                f"vLLM's Rust front end cannot be written to {file.parent}: {error.strerror or error}.",
                "Free some disk space, or set SERVEBOOK_CACHE_DIR to a folder that you can write to.",
            ) from None
        except ServebookError as error:
            raise LaunchError(f"vLLM's Rust front end cannot be fetched. {error}", ELSEWHERE) from None
    return _of_this_version(file)


def available(settings: Settings, quick: bool = False) -> Path | None:
    """The program where it is there without a network; a fetched one unaltered by its hash, unless `quick`."""
    file = settings.vllm_rs_file or _installed()
    if not file:
        file = cached(settings)
        if not quick and not is_intact(file):
            return None
    with suppress(OSError):  # in a folder that this user may not see
        return file if file.is_file() else None
    return None


def cached(settings: Settings) -> Path:
    """Where the fetched program is, or will be."""
    return settings.cache_dir / NAME / engine_version() / NAME


def engine_version() -> str:
    """vLLM's version without the build, such as "0.32.0"."""
    return installed_vllm().partition("+")[0]


def is_intact(file: Path) -> bool:
    """Whether `file` has the hash that its wheel recorded for it."""
    try:
        with file.open("rb") as content:
            return _hash(content) == file.with_name("RECORD").read_text().strip()
    except (OSError, ValueError):  # also where the record is no text
        return False


def _hash(content: IO[bytes]) -> str:
    from servebook.engine.wheel import record_hash  # a slow import

    return record_hash(content)


def _installed() -> Path | None:
    """The program beside the package vllm, where the wheel brought it."""
    spec = find_spec("vllm")
    places = spec.submodule_search_locations if spec else None
    file = Path(places[0]) / NAME if places else None
    return file if file and file.is_file() else None


def _of_this_version(file: Path) -> Path:
    """`file`, once it has told its version: front and engine speak a protocol that each version may change."""
    try:
        done = subprocess.run([file, "--version"], capture_output=True, text=True, errors="replace", timeout=30)
        # What it lacks, such as a newer glibc, is in its last words.
        words = [*filter(None, done.stderr.splitlines())] or [f"it ended with {done.returncode}"]
        why = words[-1] if done.returncode else ""
    except OSError as error:
        why = str(error.strerror)
    except subprocess.TimeoutExpired:
        why = "it has not told its version within 30 s"
    if why:
        raise LaunchError(f"vLLM's Rust front end {file} does not run: {why}.", ELSEWHERE)
    said = done.stdout.strip()
    if said != f"{NAME} {engine_version()}":
        first, _, _ = said.partition("\n")
        raise LaunchError(
            f"{file} is {first or 'no vllm-rs'}, and the engine is vLLM {engine_version()}.",
            "Use the vllm-rs of that version's wheel; where SERVEBOOK_VLLM_RS_FILE is unset it is fetched.",
        )
    return file


def bring(folder: Path, settings: Settings) -> None:
    """Take the program and its hash from `folder`, which another machine filled, to where a fetched one lies.

    Raises:
        OSError: they are not in there, or the cache cannot be written.
    """
    target = cached(settings).parent
    target.mkdir(parents=True, exist_ok=True)
    for name in ("RECORD", NAME):
        draft = Path(shutil.copy2(folder / name, target / f".{name}"))
        draft.chmod(0o755 if name == NAME else 0o644)  # some media keep no modes
        draft.replace(target / name)


def main() -> int:
    """`[--from FOLDER] [FOLDER]`: make sure of the program, put a copy into a folder, and say where it is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--from", type=Path, dest="source", help="take it from this folder, without a network")
    parser.add_argument("folder", type=Path, nargs="?", help="put a copy of it, and its hash, there")
    words = parser.parse_args()

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    try:
        settings = own_settings()
        if words.source and not _installed():
            bring(words.source, settings)
        file = rust_front(settings, say)
        if words.folder:
            words.folder.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as content:
                (words.folder / "RECORD").write_text(f"{_hash(content)}\n")
            file = Path(shutil.copy2(file, words.folder / NAME))
    except (ServebookError, OSError) as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # what it was at is nothing for who has stopped the set-up
        return 130
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
