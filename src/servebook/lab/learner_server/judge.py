"""What the checks of learners' own servers share: started, judged over the socket, and heard out when they fail."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servebook.errors import LaunchError
from servebook.lab.feedback import NotYet, StillOpen
from servebook.lab.learner_server.run import OwnServer
from servebook.lab.rest import had_room, key_of
from servebook.lab.submission import Submission
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import events_of
from servebook.launch import Server

LAST_ERROR = re.compile(r"^(\w+(?:\.\w+)*(?:Error|Exception|Interrupt)\b.*)$", re.M)


@contextmanager
def own_server(submission: Submission, file: str, tap: Tap, vllm: Server, timeout: float = 60) -> Iterator[OwnServer]:
    """Run the learner's file, which reaches the engine through `tap`; what goes wrong in it becomes feedback.

    Raises:
        ServebookError: it went wrong because the engine is full, which is not the learner's fault.
        StillOpen: it ran into the blank of this exercise.
        NotYet: there is no such file, it does not start, or the block raised NotYet, which then has the
            server's last error too.
    """
    if not Path(file).is_file():
        raise NotYet(f"the file {file}", "none", "run the cell that writes it (its first line is %%writefile)")
    if blank(submission) in Path(file).read_text():
        raise StillOpen
    server = OwnServer(file, tap.url, key_of(vllm), vllm.model, timeout)
    try:
        with server:
            try:
                yield server
            except NotYet as fault:
                for exchange in tap.exchanges:
                    had_room(exchange)
                if error := last_error(server.said()):
                    raise NotYet(fault.expected, f"{fault.got}\nand in {file}: {error}", fault.cause) from None
                raise
    except LaunchError as error:
        cause = "the file has an error: read the last line"
        raise NotYet(f"{file} that starts", last_error(str(error)) or str(error), cause) from None


class StreamWatch:
    """Holds the engine's streams back to see what a learner's server does with them; `hold` is for a `Tap`.

    The first stream waits at its fourth event until its reader has `first_read` something: it is `early` if that was
    before the end. A stream after `leaving` waits at its tenth event for the server to let go.
    """

    def __init__(self) -> None:
        self.first_read, self.early, self.leaving = threading.Event(), threading.Event(), threading.Event()

    def hold(self, chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        for number, event in enumerate(events_of(chunks)):
            if number == 3 and not self.leaving.is_set() and self.first_read.wait(5):
                self.early.set()
            deadline = time.monotonic() + 5
            while number == 10 and self.leaving.is_set() and not exchange.client_gone() and time.monotonic() < deadline:
                time.sleep(0.02)
            yield event


def blank(submission: Submission) -> str:
    """The line that stands where nothing was written yet."""
    return f'raise NotImplementedError("{submission.exercise.id}")'


def last_error(output: str) -> str:
    """The last line of a server's output that names an error, "" where there is none."""
    found = LAST_ERROR.findall(output)
    return str(found[-1])[:300] if found else ""
