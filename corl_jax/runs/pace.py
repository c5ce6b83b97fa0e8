"""Measures steps and milestones, and estimates how long a run still takes."""

from __future__ import annotations

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

from corl_jax.devices.compiling import take_compile_seconds

WINDOW = 50  # logged steps; prompts and answers may get longer in the course of a run
COMPILING = 0.1  # fraction of a step's time; a step that compiles for longer is not typical
STEP_SECONDS, COMPILE_SECONDS = "step_time", "phase/compile_seconds"
"""Metrics of `StepClock`."""
EVALUATION = "evaluation"
"""Name of the milestone whose end the log shows."""


class Pace:
    """Collects the seconds of steps and milestones, without those of compilation.

    A process compiles in its first step, and in each later one that meets a new shape. Such steps
    count only as long as there are no others. The first milestone of each name does other things
    only once, too, so it counts only until the second.
    """

    def __init__(
        self,
        count_milestones: Callable[[int], Mapping[str, int]] = lambda step: {},
        earlier: Mapping[str, float] | None = None,
    ):
        """`count_milestones`: returns how many of each name are due from a step on, included.

        `earlier`: name of a milestone -> its seconds in an earlier process of the run.
        """
        self._count_milestones = count_milestones
        self._first = True
        self._steps: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._compiled_steps: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._milestones: dict[str, list[float]] = {}
        self._earlier = dict(earlier or {})

    def add_step(self, seconds: float, compiling: float = 0.0) -> None:
        """Adds the time of a step without milestones.

        `compiling`: how many of the seconds were spent on compilation.
        """
        first, self._first = self._first, False
        if compiling < COMPILING * seconds and not first:
            self._steps.append(seconds)
        elif not first:
            self._compiled_steps.append(max(seconds - compiling, 0.0))

    @contextlib.contextmanager
    def time_milestone(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to the milestones of this name."""
        take_compile_seconds()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start - take_compile_seconds()
        self._milestones.setdefault(name, []).append(max(seconds, 0.0))

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the last steps; None after the first one."""
        steps = self._steps or self._compiled_steps
        return statistics.median(steps) if steps else None

    def estimate_seconds_left(self, step: int, total: int, *, after: str = "") -> float | None:
        """Estimates the seconds from the end of `step` to the end of step `total`.

        `after`: the milestone of `step` that has ended too. Returns None before the time of a step
        is known. Milestones whose time is not known yet, and the export, are not counted.
        """
        if self.seconds_per_step is None:
            return None
        due = dict(self._count_milestones(step))
        if after in due:
            due[after] = self._count_milestones(step + 1)[after]
        milestones = sum(count * self._estimate_milestone(name) for name, count in due.items())
        return self.seconds_per_step * max(total - step, 0) + milestones

    def _estimate_milestone(self, name: str) -> float:
        """Returns the mean seconds of a milestone; 0 if none is known."""
        seconds = self._milestones.get(name, [])
        if len(seconds) < 2 and name in self._earlier:
            return self._earlier[name]
        return statistics.fmean(seconds[1:] or seconds or [0.0])


class Phases:
    """Adds up seconds by phase: `with phases("rollout"): ...`.

    Times are of the host. A block that ends before the device has finished counts too little.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def take(self) -> dict[str, float]:
        """Returns `phase/NAME_seconds` since the last call."""
        seconds, self._seconds = self._seconds, {}
        return {f"phase/{name}_seconds": spent for name, spent in seconds.items()}


class StepClock:
    """Measures each step: its seconds, those of its phases, and those of compilation."""

    def __init__(self, phases: Phases, pace: Pace | None = None) -> None:
        """`pace` is told of each step."""
        self._phases = phases
        self._pace = pace or Pace()
        self.restart()

    def restart(self) -> None:
        """Begins the next step now: the time and compilation since the last one are dropped."""
        self._began = time.perf_counter()
        take_compile_seconds()

    def take(self) -> dict[str, float]:
        """Returns the seconds since the last call or restart, by metric, and begins a step."""
        now = time.perf_counter()
        seconds = self._phases.take()
        seconds[STEP_SECONDS] = now - self._began
        seconds[COMPILE_SECONDS] = take_compile_seconds()
        self._pace.add_step(seconds[STEP_SECONDS], seconds[COMPILE_SECONDS])
        self._began = now
        return seconds
