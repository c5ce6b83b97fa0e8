"""Stops on SIGTERM, SIGINT or a notice of the scheduler without losing a step.

In the training loop the process stops after the iteration that runs. Everywhere else nothing can
be lost, so it stops at once. A signal to one of several processes is enough: jax passes it on,
and all agree on the iteration after which they save.
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
    """Handles the signals of this process while the `with` block lasts.

    `ends_process`: a second SIGINT ends the process at once. Otherwise it raises KeyboardInterrupt,
    for a process that has other work than this run.
    """

    def __init__(self, *, ends_process: bool = True) -> None:
        self.reason: str | None = None
        self._ends_process = ends_process
        self._is_deferred = False  # to the end of an iteration
        self._several = jax.process_count() > 1
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows only the main thread to handle signals
        # With several processes SIGTERM is left to jax.distributed.
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            # A shell without job control makes its background jobs ignore Ctrl-C.
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
    def deferred(self) -> Iterator[None]:
        """Defers signals in the block, which calls `is_reached` after each iteration and saves."""
        # Only inside of the loop an iteration would be lost; elsewhere the process stops at once.
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def is_reached(self, step: int) -> bool:
        """Returns whether to save and stop after `step`. Each process must ask after each step."""
        if not self._several:
            return self.reason is not None
        # All processes must agree on the step, or some would wait in its collectives for ever.
        agreed = multihost_utils.reached_preemption_sync_point(step)
        if agreed:
            self.reason = self.reason or "a signal to one of the processes"
        return agreed

    def stop_if_asked(self, what: str) -> None:
        """Stops a single process after a signal; call it where all work is saved.

        Raises:
            Preempted: a signal has come.
        """
        # Several processes continue: they must do the same, and only `is_reached` makes them agree.
        if self.reason is not None and not self._several:
            raise Preempted(f"stopped by {self.reason} {what}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        again, self.reason = self.reason is not None, name
        if again and number == signal.SIGINT and not self._ends_process:
            raise KeyboardInterrupt
        if again and number == signal.SIGINT:
            _write(f"{name} again: stopped at once; finished checkpoints are whole\n")
            # Not sys.exit, which would wait for threads and for a save.
            os._exit(INTERRUPTED_TWICE)
        if self._several:
            if not again:
                # jax.distributed handles SIGTERM and tells the other processes.
                os.kill(os.getpid(), signal.SIGTERM)
        elif not self._is_deferred:
            raise Preempted(
                f"stopped by {name}; the same command continues from the last checkpoint, if "
                "there is one"
            )
        elif again:
            _write(f"{name}: saves already\n")
        else:
            _write(f"{name}: saves after this step and stops; Ctrl-C again stops at once\n")


def _write(text: str) -> None:
    os.write(2, text.encode())  # a signal may interrupt `print` in the middle of a line
