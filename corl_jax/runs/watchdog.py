"""Ends a run that hangs, and says where: stacks of all threads, then exit code 1.

A hang is a wait that no exception ends: a collective whose peer is gone, a file system, a reward
that holds the interpreter. Whoever started the run then starts it again, and it resumes.
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

FIRST_FACTOR = 4  # until the first iteration has ended: it waits for the compiler
HELD_FACTOR = 2
TICKS = 20  # in a time limit, but one at least every LONGEST_TICK_S
LONGEST_TICK_S = 10.0
LAST_WORDS_S = 30  # for printing the stacks, which may itself hang


class Watchdog:
    """Watches from a thread of its own while the `with` block lasts; None never barks.

    Time is counted in ticks of that thread, so that a process that was stopped for a while and
    continued has not hung. Where the interpreter itself is held, so that the thread cannot tick,
    faulthandler's own timer prints the stacks, on stderr alone, after HELD_FACTOR times the limit.
    That timer goes by the clock: who was stopped for longer than it may be taken for held when
    continued, and ended. Without it a held interpreter would never end.
    """

    def __init__(self, timeout_s: float | None = None, stacks: Path | None = None):
        """`stacks`: a file for the stacks, beside stderr."""
        self._timeout, self._stacks = timeout_s, stacks
        self._beats = 0
        self._compiled = False
        self._pauses = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, *, compiled: bool = False) -> None:
        """Something ended: an evaluation's batch, a save or, `compiled`, an iteration."""
        self._beats += 1
        self._compiled = self._compiled or compiled

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For a wait that has an end but no measure, as of storage: no time counts in the block."""
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
        idle, seen = 0.0, self._beats
        while not self._ended.wait(tick):
            held = HELD_FACTOR * self._timeout
            faulthandler.dump_traceback_later(held, exit=True, file=_stderr())
            idle = idle + tick if self._beats == seen and not self._pauses else 0.0
            seen = self._beats
            if idle >= self._timeout * (1 if self._compiled else FIRST_FACTOR):
                self._bark(idle)

    def _bark(self, idle: float) -> None:
        faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True, file=_stderr())
        print(
            f"error: no iteration, evaluation batch or save has ended for {idle:.0f} s; raise "
            f"guards.step_timeout_s {self._timeout:g} if the run is only slow. Where each thread "
            f"of process {os.getpid()} waits"
            + (f" (also in {self._stacks}):" if self._stacks else ":"),
            file=_stderr(),
            flush=True,
        )
        faulthandler.dump_traceback(file=_stderr())
        if self._stacks:
            # The file system may be what hangs or is full; stderr has the stacks already.
            with contextlib.suppress(OSError), self._stacks.open("w") as file:
                faulthandler.dump_traceback(file=file)
        os._exit(FAILED_EXIT_CODE)


def _stderr() -> Any:
    """The real one, whatever takes its place for others."""
    return sys.__stderr__
