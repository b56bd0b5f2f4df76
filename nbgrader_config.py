"""nbgrader on these labs: `nbgrader generate_assignment 01_openai_rest`, `autograde`, `generate_feedback`.

Instructor's guide: docs/instructor.md.
"""

from servebook.lab.preprocessors import STEPS

c = get_config()  # type: ignore[name-defined]  # noqa: F821

c.CourseDirectory.course_id = "servebook"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "labs"
c.GenerateAssignment.preprocessors = STEPS

# Plain TCP would open a student's kernel to every user of this machine.
c.ConnectionFileMixin.transport = "ipc"

# Seconds for one cell. The default of 30 ends a check that waits for a cold engine; a hanging answer costs this
# once, then gets an error, no points, and the next cell runs.
c.Execute.timeout = 150
c.Execute.startup_timeout = 120
