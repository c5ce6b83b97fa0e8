"""The training loop. Every option became a value or a function in `build`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corl_jax.runs.log import StepLog
    from corl_jax.train.milestones import Milestone
    from corl_jax.train.run import Run
    from corl_jax.train.step import TrainState


def train(
    run: Run, state: TrainState, steps: range, milestones: Sequence[Milestone], log: StepLog
) -> TrainState:
    """Runs the iterations `steps`, counted from 0, and after each the milestones that are due."""
    if steps:
        log.begin()
    batches = run.train_loader.iterate(steps.start, steps.stop)
    for step, prompts in zip(steps, batches, strict=True):
        state, iteration = run.iterate(run, state, prompts, step)
        log.add(step + 1, iteration)
        due = [milestone for milestone in milestones if milestone.due(step + 1)]
        for milestone in due:
            milestone.run(state, step + 1)
        if due:
            log.clock.restart()  # the next step's time is without milestones
    return state
