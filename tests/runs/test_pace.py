"""The time left: steps without those that compile, and the milestones still to come."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.devices.compiling import take_compile_seconds
from corl_jax.runs import pace as pacing
from corl_jax.runs.pace import Pace, Phases, StepClock
from corl_jax.train.loop import train
from corl_jax.train.milestones import Milestone, count_due


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test moves by hand."""
    now = [0.0]
    monkeypatch.setattr(pacing.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def compiled(monkeypatch):
    """Seconds of compilation that a test adds by hand."""
    seconds = [0.0]

    def take():
        taken, seconds[0] = seconds[0], 0.0
        return taken

    monkeypatch.setattr(pacing, "take_compile_seconds", take)
    return seconds


def test_steps_that_compile_do_not_count():
    pace = Pace()
    pace.add_step(300.0)  # the first of a process
    assert pace.seconds_per_step is None and pace.estimate_seconds_left(1, 9) is None
    pace.add_step(90.0, compiling=80.0)  # a new shape
    assert pace.seconds_per_step == 10.0, "better than nothing"
    for seconds in (2.0, 2.0, 50.0, 2.1):  # one was disturbed
        pace.add_step(seconds, compiling=0.01)
    assert pace.seconds_per_step == pytest.approx(2.05)
    assert pace.estimate_seconds_left(10, 110) == pytest.approx(205)


def test_what_comes_between_steps_is_added(clock):
    pace = Pace(lambda step: {"evaluation": 3, "save": 2, "images": 4})
    for seconds in (60.0, 20.0, 22.0):  # the first does more
        with pace.time_milestone("evaluation"):
            clock[0] += seconds
    with pace.time_milestone("save"):
        clock[0] += 5.0
    pace.add_step(100.0)
    pace.add_step(1.0)
    assert pace.estimate_seconds_left(5, 15) == pytest.approx(10 + 3 * 21 + 2 * 5)


def test_the_first_milestone_counts_without_its_compilation(clock, compiled):
    pace = Pace(lambda step: {"evaluation": 2})
    with pace.time_milestone("evaluation"):
        clock[0] += 30.0
        compiled[0] += 26.0
    pace.add_step(9.0)
    pace.add_step(1.0)
    assert pace.estimate_seconds_left(0, 10) == pytest.approx(10 + 2 * 4)


def test_the_line_of_an_evaluation_no_longer_counts_it(clock):
    pace = Pace(lambda step: {"evaluation": count_due(5, step, 10), "save": 1})
    for _ in range(2):
        pace.add_step(1.0)
    for name in ("evaluation", "save"):
        with pace.time_milestone(name):
            clock[0] += 10.0
    assert pace.estimate_seconds_left(5, 10) == pytest.approx(5 + 20 + 10)
    assert pace.estimate_seconds_left(5, 10, after="evaluation") == pytest.approx(5 + 10 + 10)


def test_a_resumed_run_knows_its_evaluations(clock):
    pace = Pace(lambda step: {"evaluation": 3}, {"evaluation": 7.0})
    for _ in range(2):
        pace.add_step(1.0)
    assert pace.estimate_seconds_left(5, 10) == pytest.approx(5 + 21)
    for seconds in (50.0, 8.0):
        with pace.time_milestone("evaluation"):
            clock[0] += seconds
    assert pace.estimate_seconds_left(5, 10) == pytest.approx(5 + 24), "measured here, with these"


@pytest.mark.parametrize("resumed_at", [0, 25])
def test_time_left_is_right_from_the_third_step_on(clock, compiled, resumed_at):
    """A run on a clock of its own: programs compile, and steps scatter by a tenth."""
    total, evaluations, saves, rng = 60, 10, 20, np.random.default_rng(0)

    def count(step):
        return {"evaluation": count_due(evaluations, step, total), "save": count_due(
            saves, step, total)}  # fmt: skip

    pace = Pace(count, {"evaluation": 8.0} if resumed_at else {})
    steps, announced = StepClock(Phases(), pace), {}

    def spend(seconds, compiling=0.0):
        clock[0] += seconds + compiling
        compiled[0] += compiling

    def iterate(run, state, prompts, step):
        # The first step compiles everything, the third one a longer batch.
        spend(3.0 * rng.uniform(0.9, 1.1), {resumed_at: 90.0, resumed_at + 2: 20.0}.get(step, 0.0))
        return state, None

    def add(step, result):
        steps.take()
        announced[step] = clock[0], pace.estimate_seconds_left(step, total)

    def milestone(name, every, seconds, compiling):
        def run(state, step):
            with pace.time_milestone(name):
                spend(seconds, compiling if step in (0, resumed_at + 1) else 0.0)

        return Milestone(name, lambda step: step % every == 0 or step == total, run)

    due = [milestone("evaluation", evaluations, 8.0, 40.0), milestone("save", saves, 1.0, 0.0)]
    if not resumed_at:
        due[0].run(None, 0)
    run = SimpleNamespace(
        iterate=iterate,
        train_loader=SimpleNamespace(iterate=lambda start, stop: [None] * (stop - start)),
    )
    log = SimpleNamespace(begin=steps.restart, add=add, clock=steps)
    train(run, None, range(resumed_at, total), due, log)
    assert announced[resumed_at + 1][1] is None
    for step in range(resumed_at + 3, total):
        at, left = announced[step]
        assert left == pytest.approx(clock[0] - at, rel=0.2), step


def test_a_step_has_its_phases_and_nothing_of_milestones(clock, compiled):
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
