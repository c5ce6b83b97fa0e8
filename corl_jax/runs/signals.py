"""Stopping on request without losing a step: SIGTERM, SIGINT, or a notice from the scheduler.

While a loop runs the request waits for the end of an iteration; everywhere else, where nothing is
at stake, it ends the process at once. Of several processes one signal is enough: jax passes it
on, and all agree on the iteration after which they save.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from corl_jax.errors import Preempted

INTERRUPTED_TWICE = 128 + signal.SIGINT


class Interruption:
    """Handles the signals of this process for as long as the block lasts."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._waits = False  # for the end of an iteration
        self._several = jax.process_count() > 1
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets no other thread handle signals
        # Of several processes jax.distributed handles SIGTERM and tells the others.
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            # A background job of a shell without job control is not to notice Ctrl-C.
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """A block that asks `reached` after each iteration, and saves before it stops."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; each process has to ask after each step."""
        if not self._several:
            return self.reason is not None
        agreed = multihost_utils.reached_preemption_sync_point(step)
        if agreed:
            self.reason = self.reason or "a signal to one of the processes"
        return agreed

    def leave_if_asked(self, what: str) -> None:
        """Stops here, where all that was done is saved; several processes go on together.

        Raises:
            Preempted
        """
        if self.reason is not None and not self._several:
            raise Preempted(f"stopped by {self.reason} {what}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        again, self.reason = self.reason is not None, name
        if again and number == signal.SIGINT:
            _write(f"{name} again: stopped at once; finished checkpoints are whole\n")
            os._exit(INTERRUPTED_TWICE)
        if self._several:
            if not again:
                os.kill(os.getpid(), signal.SIGTERM)
        elif not self._waits:
            raise Preempted(
                f"stopped by {name}; the same command goes on from the last checkpoint, if there "
                "is one"
            )
        elif again:
            _write(f"{name}: saves already\n")
        else:
            _write(f"{name}: saves after this step and stops; Ctrl-C again stops at once\n")


def _write(text: str) -> None:
    os.write(2, text.encode())  # print may be in the middle of a line of its own
