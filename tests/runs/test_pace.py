"""The time left: steps without those that compile, and the milestones still to come."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from corl_jax.devices.compiling import take_compile_seconds
from corl_jax.runs import pace as pacing
from corl_jax.runs.pace import Pace, Phases, StepClock
from corl_jax.train.milestones import count_due


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test moves by hand."""
    now = [0.0]
    monkeypatch.setattr(pacing.time, "perf_counter", lambda: now[0])
    return now


def test_steps_that_compile_do_not_count():
    pace = Pace()
    pace.add_step(300.0)  # the first of a process
    assert pace.seconds_per_step is None and pace.estimate_seconds_left(1, 9) is None
    pace.add_step(90.0, compiling=80.0)  # a new shape
    assert pace.seconds_per_step is None
    for seconds in (2.0, 2.0, 50.0, 2.1):  # one was disturbed
        pace.add_step(seconds, compiling=0.01)
    assert pace.seconds_per_step == pytest.approx(2.05)
    assert pace.estimate_seconds_left(10, 110) == pytest.approx(205)


def test_what_comes_between_steps_is_added(clock):
    pace = Pace(lambda step: {"evaluation": 3, "save": 2, "images": 4})
    for seconds in (60.0, 20.0, 22.0):  # the first compiles
        with pace.time_milestone("evaluation"):
            clock[0] += seconds
    with pace.time_milestone("save"):
        clock[0] += 5.0
    pace.add_step(100.0)
    pace.add_step(1.0)
    assert pace.estimate_seconds_left(5, 15) == pytest.approx(10 + 3 * 21 + 2 * 5)


def test_a_step_has_its_phases_and_nothing_of_milestones(clock, monkeypatch):
    compiled = [0.0]

    def take_compile_seconds():
        seconds, compiled[0] = compiled[0], 0.0
        return seconds

    monkeypatch.setattr(pacing, "take_compile_seconds", take_compile_seconds)
    phases = Phases()
    steps = StepClock(phases)
    with phases("rollout"):
        clock[0] += 2.0
    clock[0] += 1.0
    compiled[0] = 0.5
    names = ("phase/rollout_seconds", "step_time", "phase/compile_seconds")
    assert steps.take() == dict(zip(names, (2.0, 3.0, 0.5), strict=True))
    clock[0] += 4.0  # what comes between steps is of the next one
    assert steps.take() == {"step_time": 4.0, "phase/compile_seconds": 0.0}
    clock[0] += 60.0
    compiled[0] = 9.0
    steps.restart()
    clock[0] += 1.0
    assert steps.take() == {"step_time": 1.0, "phase/compile_seconds": 0.0}


@pytest.mark.parametrize(
    ("every", "first", "last", "count"),
    [(0, 1, 9, 1), (3, 1, 9, 3), (3, 3, 9, 3), (3, 4, 9, 2), (4, 1, 9, 3), (100, 1, 9, 1)],
)
def test_milestones_to_come_by_hand(every, first, last, count):
    """Multiples of `every`, and the last step once."""
    assert count_due(every, first, last) == count
    due = [s for s in range(first, last + 1) if (every and s % every == 0) or s == last]
    assert len(due) == count


def test_compilation_is_measured():
    function, x = jax.jit(lambda x: x * 3 + 1), jnp.ones(7)
    take_compile_seconds()
    function(x)
    assert take_compile_seconds() > 0
    function(x)
    assert take_compile_seconds() == 0
