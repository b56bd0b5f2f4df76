"""Grading what was handed in: every lab by nbgrader, feedback back to the desks, a table of grades."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

from servebook import launch
from servebook.checkout import ROOT
from servebook.errors import LaunchError, ServebookError
from servebook.lab.handout import confine, provided
from servebook.lab.manifest import Lab, load_labs
from servebook.room.collect import deliver
from servebook.settings import FILE_NAME, LOOPBACK, Settings

FEEDBACK = "feedback"
"""The folder for it, of the course and at a desk."""
GRADES = "grades.csv"


def grade(course: Path, settings: Settings, desks: Path) -> Iterator[str]:
    """Grade every lab in `course/submitted`; yield what came of it, in lines to print.

    Learners' code runs here, so this process and all that it starts give up the instructor's key, and have servers of
    their own in a state folder of their own, each lab's while it is graded. What has not changed is not graded again.
    """
    place = settings.state_dir / "grading"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    (place / FILE_NAME).touch()  # servers started there find no other, which may hold the key
    os.environ.pop("SERVEBOOK_API_KEY", None)
    own = settings.model_copy(update={"engine_url": None})  # another's engine may ask for the key
    os.environ.pop("SERVEBOOK_ENGINE_URL", None)
    os.environ |= provided.settings_as_variables(own) | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # nbgrader's helpers
        "SERVEBOOK_STATE_DIR": str(place),
        "SERVEBOOK_HOST": LOOPBACK,
        "JUPYTER_CONFIG_PATH": str(ROOT),  # for a course elsewhere
        "JUPYTER_PREFER_ENV_PATH": "1",
        confine.FROM: str(settings.state_dir),
    }
    log = place / "nbgrader.log"
    log.write_text("")
    handed_in = [lab for lab in load_labs() if any((course / "submitted").glob(f"*/{lab.stem}"))]
    graded = [lab for lab in handed_in if anything_new(course, lab)]
    for lab in handed_in:
        if lab not in graded:
            yield f"{lab.stem}: nothing new"
            yield from give_back(course, lab, desks)
    for lab, following in zip(graded, [*graded, None][1:], strict=True):
        try:
            provided.start_servers(lab)
            yield grade_lab(course, lab, log)
            yield from give_back(course, lab, desks)
        except LaunchError as error:
            yield f"{lab.stem}: not graded. {error}"
        finally:
            for name in set(lab.servers) - set(following.servers if following else ()):
                launch.down(name)
    enroll(course, desks)
    if not nbgrader(course, log, "export", "--to", GRADES):
        raise ServebookError(f"The grades could not be written to {course / GRADES}.", f"{log} says why.")
    yield f"grades in {course / GRADES}; what nbgrader said in {log}"


def anything_new(course: Path, lab: Lab) -> bool:
    """Whether a hand-in of this lab has not been graded as it is now, by its time, or has no feedback."""

    def time(folder: str, learner: str) -> str | None:
        path = course / folder / learner / lab.stem / "timestamp.txt"
        return path.read_text() if path.is_file() else None

    return any(
        not all((course / step / learner / lab.stem).is_dir() for step in ("autograded", FEEDBACK))
        or time("submitted", learner) != time("autograded", learner)
        for learner in (path.parent.name for path in (course / "submitted").glob(f"*/{lab.stem}"))
    )


def enroll(course: Path, desks: Path) -> None:
    """Enter everybody who has a desk, so that the grades have a line too for who handed in nothing."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course}/gradebook.db", "servebook") as gradebook:
        for desk in sorted(path for path in desks.glob("*") if path.is_dir() and not path.is_symlink()):
            gradebook.update_or_create_student(desk.name)


def grade_lab(course: Path, lab: Lab, log: Path) -> str:
    """Grade one lab of all who have handed it in, and write the feedback; say how many there are."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course}/gradebook.db", "servebook") as gradebook:
        known = {assignment.name for assignment in gradebook.assignments}
    if lab.stem not in known:
        with tempfile.TemporaryDirectory() as scratch:  # it is the entry in the gradebook that is wanted
            folders = {"source": ROOT / "solutions", "release": scratch}
            options = (f"--CourseDirectory.{name}_directory={folder}" for name, folder in folders.items())
            nbgrader(course, log, "generate_assignment", lab.stem, *options)
    nbgrader(course, log, "autograde", lab.stem)
    nbgrader(course, log, "generate_feedback", lab.stem)
    handed_in, graded = (
        {path.parent.name for path in (course / step).glob(f"*/{lab.stem}")} for step in ("submitted", "autograded")
    )
    said = f"{lab.stem}: {len(graded)} graded"
    if left := sorted(handed_in - graded):
        said += f", {len(left)} not, and tried again at the next collection ({', '.join(left)}): {GRADES} says why"
    return said


def give_back(course: Path, lab: Lab, desks: Path) -> Iterator[str]:
    """Put the feedback on a lab on the desks; yield where that could not be."""
    for page in sorted((course / FEEDBACK).glob(f"*/{lab.stem}/{lab.stem}.html")):
        learner = page.parts[-3]
        try:
            deliver(desks / learner, FEEDBACK, page.name, page.read_bytes())
        except OSError as error:
            yield f"  {learner} has no feedback: {error.strerror}"


def nbgrader(course: Path, log: Path, *words: str) -> bool:
    """Run a command of nbgrader's, whose words go to `log`; whether it did all of it.

    Of a lab, what could not be graded shows in what it left.
    In a process of its own, as at a prompt, but forked: nbgrader takes seconds to import, and is imported only once.
    """
    from nbgrader.apps import NbGraderApp

    from servebook.lab.handout import autograde, blanks, remarks  # noqa: F401 (which nbgrader_config.py imports)

    def run() -> None:
        os.chdir(course)
        with log.open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        NbGraderApp.launch_instance(list(words))

    process = get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode == 0
