"""Compiles schemas, regexes and grammars where they hold up nobody: behind all other work, for a while at most.

vLLM loads this into each of its engines, as a plugin (`vllm.general_plugins` in pyproject.toml).
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from servebook.processes import die_with_parent

if TYPE_CHECKING:
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
    from xgrammar import CompiledGrammar, TokenizerInfo

TITLE = "VLLM::Compiler"
AT_ONCE = 4
"""So many compile at a time; a dear one leaves room for others."""
KEPT = 64
"""So many are remembered, those that are too dear among them. One takes 3 MB where it is large."""
WAITING = 1024
"""Threads for requests that wait for theirs; vLLM's pool has one for two cores."""
COMPILE_SECONDS = 10
"""Of a core, for each; what takes longer is given up."""
WALL_SECONDS = 60
"""Beside a busy engine, seconds of a core take long."""


WALKED = 256
WALK_SECONDS = 2
"""So many tokens that the grammar allows are tried one after the other, within so many seconds of a core. What takes
longer would hold up every step of the engine. Dates, addresses, objects and arithmetic take 0.05 s for so many,
`(.{1,30}[.,]?){1,8}` 8 s for one of them."""


class TooDear(ValueError):
    """A constraint that takes too long to compile, or for each token. vLLM gives up its request, and no other."""


class BrokenOffError(RuntimeError):
    """A compiler was ended from outside: for want of memory, or by the clock beside a busy engine."""


class ProcessCompiler:
    """Has the methods of xgrammar's compiler, and tries each thing in a child process before it compiles it here.

    What `ways/limits.py` lets pass may take for hours: a grammar of 32 rules that lead to each other, a regex of 1,000
    dots. Native code cannot be broken off within a process, but the kernel ends a child that has had its `seconds` of
    a core. There it is also followed for some tokens: an ambiguous one compiles in no time, and then takes seconds in
    each step of the engine. What was too dear once is refused from then on. To compile twice is less than to pass the
    child's result on: 200 properties compile in 0.2 s, and become 99 MB of JSON in 7.3 s and a grammar again in 2.7
    (xgrammar 0.2.8).
    """

    def __init__(self, vocabulary: TokenizerInfo, seconds: float = COMPILE_SECONDS) -> None:
        from vllm.utils.system_utils import set_process_title
        from xgrammar import GrammarCompiler, allocate_token_bitmask

        self.set_title = partial(set_process_title, TITLE.removeprefix("VLLM::"))
        self.vocabulary = vocabulary
        self.compiler = GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
        self.seconds = seconds
        self.mask = allocate_token_bitmask(1, vocabulary.vocab_size)  # here: a child has none of torch's threads
        self.places = threading.BoundedSemaphore(AT_ONCE)
        self.lock = threading.Lock()
        self.begun: dict[str, Future[CompiledGrammar]] = {}
        """By what was asked for; who was asked for last comes last."""

    def __getattr__(self, method: str) -> Any:
        if not method.startswith("compile_"):
            raise AttributeError(method)
        return partial(self._once, method)

    def _once(self, method: str, *args: Any, **options: Any) -> CompiledGrammar:
        """What was compiled earlier, or is by another thread, or now."""
        key = repr((method, args, options))
        with self.lock:
            mine = key not in self.begun
            future = self.begun[key] = Future() if mine else self.begun.pop(key)
            if len(self.begun) > KEPT:
                del self.begun[next(iter(self.begun))]
        if mine:
            try:
                with self.places:
                    future.set_result(self._compile(method, args, options))
            except Exception as error:
                future.set_exception(error)
                if not isinstance(error, TooDear):
                    with self.lock:
                        self.begun.pop(key, None)
        if isinstance(dear := future.exception(), TooDear):
            raise TooDear(*dear.args)  # a new one: raised again and again, one keeps the frames of all who asked
        return future.result()

    def _compile(self, method: str, args: Any, options: Any) -> CompiledGrammar:
        try:
            self._try(method, args, options)
        except BrokenOffError:  # as if it were too dear, vLLM would not say why
            self._try(method, args, options)
        compiled: CompiledGrammar = getattr(self.compiler, method)(*args, **options)
        return compiled

    def _try(self, method: str, args: Any, options: Any) -> None:
        """Return if it can be compiled in time."""
        with self.lock:  # a child begun in between would hold this pipe open
            reading, writing = os.pipe()
            try:
                if not (child := os.fork()):
                    self._be_the_child(writing, method, args, options)
            except OSError:  # there are as many processes as there may be
                os.close(reading)
                raise
            finally:
                os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as pipe:
            wrong = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == -signal.SIGPROF:
            dear = (
                f"{WALK_SECONDS} s of a core for {WALKED} tokens" if wrong else f"{self.seconds} s of a core to compile"
            )
            raise TooDear(f"it takes more than {dear}")
        if status < 0:
            raise BrokenOffError(f"its compiler was ended by {signal.Signals(-status).name}")
        if status:
            raise ValueError(wrong.removeprefix("compiled"))

    def _be_the_child(self, writing: int, method: str, args: Any, options: Any) -> NoReturn:
        status = 1
        try:
            gc.disable()  # what it would free may be CUDA's, which a fork must not touch
            signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
            signal.setitimer(signal.ITIMER_PROF, self.seconds)
            die_with_parent()
            self.set_title()
            with os.fdopen(writing, "w", encoding="utf-8") as pipe:
                try:
                    compiled = getattr(self.compiler, method)(*args, **options)
                    pipe.write("compiled")
                    pipe.flush()
                    signal.setitimer(signal.ITIMER_PROF, WALK_SECONDS)
                    self._walk(compiled)
                    status = 0
                except Exception as error:
                    pipe.write(str(error))
        finally:
            os._exit(status)

    def _walk(self, compiled: CompiledGrammar) -> None:
        """Let tokens follow that are allowed, drawn the same way each time; what must follow is passed over."""
        import numpy as np
        from xgrammar import GrammarMatcher

        matcher, draw = GrammarMatcher(compiled), random.Random(0)
        bits = self.mask.numpy().view("uint8")
        for _ in range(WALKED):
            if matcher.is_terminated():
                return
            try:
                certain: str | bytes = matcher.find_jump_forward_string()
            except UnicodeDecodeError as error:  # it ends within a character
                certain = error.object
            if certain:
                matcher.accept_string(certain)
            matcher.fill_next_token_bitmask(self.mask)
            allowed = np.flatnonzero(np.unpackbits(bits[0], bitorder="little")[: self.vocabulary.vocab_size])
            if not allowed.size or not matcher.accept_token(int(draw.choice(allowed))):
                return


def use_what_is_left() -> None:
    """Let this thread, and the children that it begins, have a core only while nobody else of this session wants it.

    A low priority is not enough: a thread of the engine that wakes for its next layer waits until the compiler's time
    slice is over. Measured on 2 cores (Intel Xeon) beside one large schema after the other, the p50 between a stream's
    tokens: 31 ms alone, 68 beside compilers at nice 10, 43 beside these; and the p99 48, 205 and 146.
    """
    with suppress(OSError):  # a sandbox may not allow it; a pool whose threads cannot begin would serve nobody
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def register() -> None:
    """Put such a compiler in the place of vLLM's, and let each request wait for its own."""
    from vllm.v1.structured_output import StructuredOutputManager, backend_xgrammar

    begin_manager, begin_backend = StructuredOutputManager.__init__, backend_xgrammar.XgrammarBackend.__post_init__

    def with_places(manager: StructuredOutputManager, *args: Any, **options: Any) -> None:
        begin_manager(manager, *args, **options)
        manager.executor = ThreadPoolExecutor(WAITING, initializer=use_what_is_left)

    def with_processes(backend: XgrammarBackend) -> None:
        begin_backend(backend)
        vocabulary = backend.compiler.compile_grammar('root ::= "x"').tokenizer_info  # it has no other word for it
        backend.compiler = ProcessCompiler(vocabulary)
        # vLLM gives up a regex after 5 s by the clock, however busy the machine is.
        backend_xgrammar.compile_regex_with_timeout = lambda compile_it, pattern: compile_it(pattern)

    StructuredOutputManager.__init__ = with_places
    backend_xgrammar.XgrammarBackend.__post_init__ = with_processes
