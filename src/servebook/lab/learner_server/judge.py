"""What the checks of learners' own servers share: started, judged over the socket, and heard out when they fail."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servebook.errors import LaunchError
from servebook.lab.feedback import NotYet, StillOpen
from servebook.lab.learner_server.run import OwnServer
from servebook.lab.rest import had_room, key_of
from servebook.lab.submission import Submission
from servebook.lab.taps.http import Exchange, Tap
from servebook.lab.taps.sse import content_of, events_of
from servebook.launch import Server
from servebook.processes import wait_until

LAST_ERROR = re.compile(r"^(\w+(?:\.\w+)*(?:Error|Exception|Interrupt)\b.*)$", re.M)
NEVER_AWAITED = re.compile(r"coroutine '(?:\w+\.)*(\w+)' was never awaited")
LOOP_RUNS = re.compile(r"cannot be called from a running event loop|event loop is already running")
MESSAGE = re.compile(r"^\s*message\b", re.M)
GATHERED = "everything is gathered before it goes out: send inside the loop over the engine's stream"
USED_UP = "the first call closed or used up what the next one needs: end the engine's stream, keep the client open"


@contextmanager
def own_server(submission: Submission, file: str, tap: Tap, vllm: Server, timeout: float = 60) -> Iterator[OwnServer]:
    """Run the learner's file, which reaches the engine through `tap`; what goes wrong in it becomes feedback.

    Raises:
        ServebookError: it went wrong because the engine is full or gone, which is not the learner's fault.
        StillOpen: it ran into the blank of this exercise.
        NotYet: there is no such file, it does not start, or the block raised NotYet, which then has the
            server's last error too.
    """
    answer = written(submission, file)
    server = OwnServer(answer, tap.url, key_of(vllm), vllm.model, timeout)
    try:
        with server:
            try:
                yield server
            except NotYet as fault:
                for exchange in tap.exchanges:
                    had_room(exchange)
                output = server.last_words()
                cause = fault.cause
                if LOOP_RUNS.search(output):  # it leaves a coroutine without await, too
                    cause = "a handler is on an event loop already, which can run no other: await the call in it"
                elif forgotten := NEVER_AWAITED.search(output):
                    cause = f"{forgotten[1]}() was called without await: it returns a coroutine, and does nothing yet"
                error = last_error(output)
                raise NotYet(
                    fault.expected, f"{fault.got}\nand in {file}: {error}" if error else fault.got, cause
                ) from None
    except LaunchError as error:
        cause = "the file has an error: read the last line"
        if "waits" in str(error):
            cause = "importing the file never ends: it must only define app or Servicer, the check runs it"
        raise NotYet(f"{file} that starts", last_error(str(error)) or str(error), cause) from None


def written(submission: Submission, file: str) -> Path:
    """The file that an answer cell writes.

    Raises:
        NotYet: there is none, or it is no UTF-8.
        StillOpen: it has the blank.
    """
    path = Path(file)
    if not path.is_file():
        raise NotYet(f"the file {file}", "none", "run the cell that writes it (its first line is %%writefile)")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        cause = "another program has saved it so: run the cell that writes it once more"
        raise NotYet(f"{file} in UTF-8", str(error), cause) from None
    # In a .proto the blank is a comment, and may stay above the messages that were written; in Python it is code, and
    # may stay as a comment.
    blank = rf'^[^#\n]*raise NotImplementedError\("{re.escape(submission.exercise.id)}"\)'
    done = path.suffix == ".proto" and MESSAGE.search(text)
    if re.search(blank, text, re.M) and not done:
        raise StillOpen
    return path


class StreamWatch:
    """Holds the engine's streams back to see what a learner's server does with them; `hold` is for a `Tap`.

    The first stream waits at its fourth text until its reader has `first_read` something: it is `early` if that was
    before the end; it then waits for `go_on`, which is set unless a check clears it to do something meanwhile. A stream
    after `leaving` waits at its tenth text for the server to let go. Where so many do not come, as a busy engine merges
    tokens, a stream waits at its end.
    """

    def __init__(self) -> None:
        self.first_read, self.early, self.leaving = threading.Event(), threading.Event(), threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def hold(self, chunks: Iterator[bytes], exchange: Exchange) -> Iterator[bytes]:
        left = self.leaving.is_set()
        first = not left and not self.early.is_set()
        number, held = 0, False
        for event in events_of(chunks):
            if not held and (number == (10 if left else 3) or b"[DONE]" in event):
                held = True
                if left:
                    wait_until(exchange.client_gone, 10)
                elif first and wait_until(self.first_read.is_set, 10):
                    self.early.set()
                    self.go_on.wait(20)
            number += bool(content_of(event))
            yield event


def last_error(output: str) -> str:
    """The last line of a server's output that names an error, "" where there is none."""
    found = LAST_ERROR.findall(output)
    return str(found[-1])[:300] if found else ""
