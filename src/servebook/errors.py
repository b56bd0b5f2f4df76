"""Errors that a reader meets: one line of what went wrong, one line of what to do."""


class ServebookError(Exception):
    """An error with a remedy.

    Attributes:
        remedy: what the reader can do about it, as an imperative sentence.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}\n→ {remedy}" if remedy else problem)
        self.remedy = remedy

    def _render_traceback_(self) -> list[str]:
        """Show only the message in a notebook: IPython calls this hook instead of printing the stack."""
        return [f"{type(self).__name__}: {self}"]


class ModelError(ServebookError):
    """The model cannot be found, prepared or used."""


class LaunchError(ServebookError):
    """A server cannot be started, reached or ended."""
