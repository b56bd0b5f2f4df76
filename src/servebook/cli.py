"""The command line, `servebook`."""

from __future__ import annotations

import io
import json
import locale
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer
from rich.table import Table

from servebook import launch
from servebook.bench.cli import bench
from servebook.errors import ServebookError
from servebook.lab import cli as lab_cli
from servebook.launch.display import plain_console
from servebook.launch.link import remedy_for
from servebook.processes import end_without_reader
from servebook.room import cli as room_cli
from servebook.settings import installed, installed_vllm, own_settings, unusable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(lab_cli.app, name="labs")
app.command()(lab_cli.release)
app.add_typer(room_cli.app, name="room")
out = plain_console()

NAMES = typer.Argument(metavar="NAME…", help=f"One or more of {', '.join(launch.SERVERS)}.")


def show_version(asked: bool) -> None:
    """Print the workbook's version, and that of the engine, where it was asked for; then end."""
    if asked:
        out.print(f"servebook {installed('servebook')}, vLLM {installed_vllm()}")
        raise typer.Exit


@app.callback()
def servebook(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show the versions of the workbook and of vLLM."
        ),
    ] = False,
) -> None:
    """The LLM serving workbook."""


@app.command()
def doctor(
    quiet: Annotated[bool, typer.Option("--quiet", help="A quick look; print only what is wrong.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check this machine: each line says what is, and what to do about it. Exit code 1 if anything failed."""
    from servebook.workbook import doctor as checks

    report = checks.run(quick=quiet)
    shown = checks.Report(finding for finding in report if finding.level != "OK" or not quiet)
    if as_json:
        print(json.dumps(shown.as_dicts(), indent=2))
    elif shown:
        print(shown)
    if report.failed:
        raise typer.Exit(1)


@app.command()
def up(
    names: Annotated[list[str], NAMES],
    replicas: Annotated[
        int | None, typer.Option(min=1, max=64, help="How many engines stand behind `router`.", show_default="2")
    ] = None,
    fronts: Annotated[
        int | None, typer.Option(min=1, max=64, help="How many processes of `grpc` share an engine.", show_default="1")
    ] = None,
) -> None:
    """Start servers and leave them running; one that is up already is left as it is."""
    if replicas and "router" not in names:
        raise typer.BadParameter("--replicas is for `router`")
    if fronts and "grpc" not in names:
        raise typer.BadParameter("--fronts is for `grpc`")
    for name in names:
        launch.find_server(name)  # a word that is none is found before the first engine is loaded
    for name in names:
        launch.up(name, replicas=replicas, fronts=fronts)


@app.command()
def down(
    names: Annotated[list[str] | None, NAMES] = None,
    everything: Annotated[bool, typer.Option("--all", help="End every server.")] = False,
) -> None:
    """End servers, with every process that belongs to them; `router` takes its replicas along."""
    if not names and not everything:
        raise typer.BadParameter("name a server, or say --all")
    running = [entry["name"] for entry in launch.status() if entry["state"] != "stopped"]
    wanted = list(running if everything else names or [])
    if "router" in wanted:
        wanted += [name for name in running if name.startswith(launch.REPLICA) and name not in wanted]
    for name in set(wanted) - set(running):
        launch.find_server(name)
    with ThreadPoolExecutor() as pool:  # an engine takes seconds to end
        for name, ended in zip(wanted, pool.map(launch.down, wanted), strict=True):
            out.print(f"{name}: {'ended' if ended else 'was not running'}")


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show each server: starting, ready, failed or stopped."""
    entries = launch.status()
    if as_json:
        print(json.dumps(entries, indent=2))
        return
    table = Table("server", "state", "pid", "model", "where", "owner")
    for entry in entries:
        where = "\n".join(f"{kind} {address}" for kind, address in entry["endpoints"].items())
        table.add_row(
            entry["name"], entry["state"], str(entry["pid"] or ""), entry["model"] or "", where, entry["owner"] or ""
        )
    out.print(table)


@app.command()
def logs(
    name: str, lines: Annotated[int, typer.Option("-n", min=1, help="How many lines from the end.")] = 100
) -> None:
    """Print the end of a server's log."""
    files = launch.Files(own_settings().state_dir, name)
    try:
        there = files.log.is_file()
    except OSError as error:
        raise unusable(files.state_dir, error) from None
    if not there:
        launch.find_server(name)
        raise ServebookError(f"{name} has not run yet: there is no log.", f"Start it with `servebook up {name}`.")
    print(files.tail(lines))


@app.command()
def where(chapter: Annotated[str, typer.Argument(metavar="CHAPTER", help="Its number or its stem: 04.")]) -> None:
    """Print every file of a chapter, with a word on each."""
    from servebook.checkout import ROOT
    from servebook.workbook.chapters import files_of, find_chapter, word_on

    found = {str(path.relative_to(ROOT)): word_on(path) for path in files_of(find_chapter(chapter))}
    for path, word in found.items():
        print(f"{path:<{max(map(len, found))}}  {word}".rstrip())


app.command()(bench)


def of_the_machine(error: OSError) -> ServebookError:
    """A disk, file or network that fails a command: which, why, and what to do about it."""
    why = error.strerror or str(error) or type(error).__name__
    return ServebookError(
        f"{error.filename}: {why}." if error.filename else f"{why}.", remedy_for(why) or "See `servebook doctor`."
    )


def main() -> None:
    """Run a command; an expected error is a message and exit code 1, never a traceback."""
    if not sys.flags.utf8_mode and locale.getencoding().lower() != "utf-8":
        # Files are UTF-8 wherever this runs; the terminal is what it is.
        if sys.stdout:  # None where it was closed
            os.environ["PYTHONIOENCODING"] = sys.stdout.encoding
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    warnings.simplefilter("ignore")  # they are for who writes Python, and PYTHONWARNINGS=error makes them fatal
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no ✓ shows a ?
    try:
        run()
    except BrokenPipeError:
        end_without_reader()


def run() -> None:
    """The same, but for a reader of what is printed who has left.

    Raises:
        BrokenPipeError: that one has.
    """
    try:
        app(standalone_mode=True)
    except ServebookError as error:
        print(f"servebook: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"servebook: {of_the_machine(error)}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # of which typer makes an exit code
            raise end.__context__ from None
        if end.code == 130:  # what typer makes of Ctrl-C
            print("servebook: stopped; what had not finished starting was ended", file=sys.stderr)
        print(end="", flush=True)  # not of sys.stdout, which is None where it was closed
        raise
