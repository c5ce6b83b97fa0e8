"""How long a run still takes, from what its steps and its evaluations, pictures and saves took."""

from __future__ import annotations

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

WINDOW = 50  # logs of steps; prompts and answers may get longer in the course of a run
COMPILING = 0.1  # share of a step's time from which on it counts as one that compiles


class Pace:
    """Seconds of a process's steps and milestones, without those of steps that compile.

    That is the first step of a process, and each later one that meets a new shape. Of each kind
    of milestone the first compiles too, and counts only until the second.
    """

    def __init__(self) -> None:
        self.count_milestones: Callable[[int], Mapping[str, int]] = lambda step: {}
        """How many milestones of each kind come from a step on, its own included."""
        self._first = True
        self._steps: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._milestones: dict[str, list[float]] = {}

    def add_step(self, seconds: float | None, compiling: float = 0.0) -> None:
        """Notes a step of the training, milestones not included; None if it was not measured.

        `compiling`: how many of the seconds were spent on that.
        """
        if seconds is not None and not self._first and compiling < COMPILING * seconds:
            self._steps.append(seconds)
        self._first = False

    @contextlib.contextmanager
    def milestone(self, kind: str) -> Iterator[None]:
        """Notes the seconds of the block as those of a milestone of this kind."""
        start = time.perf_counter()
        yield
        self._milestones.setdefault(kind, []).append(time.perf_counter() - start)

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the last steps; None as long as all have compiled."""
        return statistics.median(self._steps) if self._steps else None

    def seconds_left(self, step: int, total: int) -> float | None:
        """From the end of `step` to that of the last; None if the steps' time is not known.

        A kind of milestone that has not happened yet counts nothing, nor does the export.
        """
        if self.seconds_per_step is None:
            return None
        return self.seconds_per_step * max(total - step, 0) + sum(
            count * statistics.fmean(seconds[1:] or seconds)
            for kind, count in self.count_milestones(step).items()
            if (seconds := self._milestones.get(kind))
        )
