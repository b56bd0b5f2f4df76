"""nbgrader on these labs: `nbgrader generate_assignment 01_openai_rest --force`, `autograde`, `generate_feedback`.

Instructor's guide: docs/instructor.md.
"""

import os

from servebook.lab.handout import autograde, blanks, confine, remarks

c = get_config()  # type: ignore[name-defined]  # noqa: F821

c.CourseDirectory.course_id = "servebook"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "labs"
c.CourseDirectory.ignore = [".ipynb_checkpoints", "__pycache__", "*.py", "*.proto"]  # files that solutions write
c.GenerateAssignment.preprocessors = blanks.STEPS
c.Autograde.autograde_preprocessors = autograde.STEPS
c.Autograde.sanitize_preprocessors = autograde.SANITIZE_STEPS
c.ExportApp.plugin_class = remarks.GradesWithRemarks

# Plain TCP would open a student's kernel to every user of this machine. The sockets' place has to be absolute:
# the kernel works in the folder of the submission, its manager in this one.
sockets = confine.sockets_folder()
sockets.mkdir(parents=True, exist_ok=True, mode=0o700)
c.KernelManager.transport = "ipc"
c.KernelManager.ip = str(sockets / str(os.getpid()))

# Seconds for one cell of the student's own. One that hangs costs this once, then it has an error, and the next cell
# runs. A check has more (`CHECK_SECONDS` in servebook.lab.handout.autograde).
c.Execute.timeout = 150
c.Execute.startup_timeout = 120
