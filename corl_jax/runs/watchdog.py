"""Ends a run that hangs: prints the stacks of all threads and exits with code 1.

A hang is a wait that no exception ends: a collective whose peer is gone, a file system, a reward
that blocks the interpreter. Whoever started the run can start it again, and it resumes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from corl_jax.errors import FAILED_EXIT_CODE

FIRST_FACTOR = 4  # times the limit until the first iteration has ended, because it compiles
BLOCKED_FACTOR = 2  # times the limit until faulthandler's timer ends a blocked interpreter
TICKS = 20  # in a time limit; at least one every LONGEST_TICK_S
LONGEST_TICK_S = 10.0
PRINTING_S = 30  # for printing the stacks, which may hang too


class Watchdog:
    """Ends the process if nothing is reported for `timeout_s` seconds; None switches it off.

    It runs in its own thread while the `with` block lasts.
    """

    # A blocked interpreter keeps the thread from ticking. Then faulthandler's timer, which needs no
    # interpreter, prints the stacks after BLOCKED_FACTOR times the limit, on stderr alone. That
    # timer uses wall-clock time: a process that was suspended for longer may be ended when it
    # continues. Without the timer a process with a blocked interpreter would hang for ever.

    def __init__(self, timeout_s: float | None = None, stacks: Path | None = None):
        """`stacks`: a file for the stacks, in addition to stderr."""
        self._timeout, self._stacks = timeout_s, stacks
        self._beats = 0
        self._compiled = False
        self._pauses = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, *, compiled: bool = False) -> None:
        """Reports progress: the end of a batch, a save or, with `compiled`, an iteration."""
        self._beats += 1
        self._compiled = self._compiled or compiled

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Counts no time in the block, for a wait that ends at an unknown time, as of storage."""
        self._pauses += 1
        try:
            yield
        finally:
            self._beats += 1
            self._pauses -= 1

    def __enter__(self) -> Watchdog:
        if self._timeout is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._timeout is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        assert self._timeout is not None
        tick = min(self._timeout / TICKS, LONGEST_TICK_S)
        silence, seen = 0.0, self._beats
        while not self._ended.wait(tick):
            blocked_s = BLOCKED_FACTOR * self._timeout
            # Started anew at each tick: it fires only if this thread cannot run.
            faulthandler.dump_traceback_later(blocked_s, exit=True, file=_get_stderr())
            # Ticks are counted, not read from a clock: a suspended process has no ticks.
            silence = silence + tick if self._beats == seen and not self._pauses else 0.0
            seen = self._beats
            if silence >= self._timeout * (1 if self._compiled else FIRST_FACTOR):
                self._end_process(silence)

    def _end_process(self, silence: float) -> None:
        # If printing hangs too, for example on a full pipe, the timer ends the process.
        faulthandler.dump_traceback_later(PRINTING_S, exit=True, file=_get_stderr())
        print(
            f"error: no iteration, evaluation batch or save has ended for {silence:.0f} s; raise "
            f"guards.step_timeout_s {self._timeout:g} if the run is only slow. Where each thread "
            f"of process {os.getpid()} waits"
            + (f" (also in {self._stacks}):" if self._stacks else ":"),
            file=_get_stderr(),
            flush=True,
        )
        faulthandler.dump_traceback(file=_get_stderr())
        if self._stacks:
            # The file system may be what hangs or is full; stderr has the stacks already.
            with contextlib.suppress(OSError), self._stacks.open("w") as file:
                faulthandler.dump_traceback(file=file)
        # sys.exit would only end this thread.
        os._exit(FAILED_EXIT_CODE)


def _get_stderr() -> Any:
    # Tests and notebooks replace sys.stderr by an object that faulthandler cannot write to.
    return sys.__stderr__
