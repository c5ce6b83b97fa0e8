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


class Pace:
    """Collects seconds of steps and milestones; steps that compile are left out.

    A process compiles in its first step, and in each later one that meets a new shape. The first
    milestone of each name compiles too, so it counts only until the second.
    """

    def __init__(self, count_milestones: Callable[[int], Mapping[str, int]] = lambda step: {}):
        """`count_milestones`: returns how many of each name are due from a step on, included."""
        self._count_milestones = count_milestones
        self._first = True
        self._steps: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._milestones: dict[str, list[float]] = {}

    def add_step(self, seconds: float | None, compiling: float = 0.0) -> None:
        """Adds the time of a step without milestones; `seconds` is None if it is not known.

        `compiling`: how many of the seconds were spent on compilation.
        """
        if seconds is not None and not self._first and compiling < COMPILING * seconds:
            self._steps.append(seconds)
        self._first = False

    @contextlib.contextmanager
    def time_milestone(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to the milestones of this name."""
        start = time.perf_counter()
        yield
        self._milestones.setdefault(name, []).append(time.perf_counter() - start)

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the last steps; None as long as all have compiled."""
        return statistics.median(self._steps) if self._steps else None

    def estimate_seconds_left(self, step: int, total: int) -> float | None:
        """Estimates the seconds from the end of `step` to the end of step `total`.

        Returns None before the time of a step is known. Milestones that have not happened yet,
        and the export, are not counted.
        """
        if self.seconds_per_step is None:
            return None
        return self.seconds_per_step * max(total - step, 0) + sum(
            # Without the first one, which compiles, as soon as there is another.
            count * statistics.fmean(seconds[1:] or seconds)
            for name, count in self._count_milestones(step).items()
            if (seconds := self._milestones.get(name))
        )


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

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
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
        self._began = now
        return seconds
