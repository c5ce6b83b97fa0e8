"""The training loop. Verbs only: every option became a value in `build`."""

from __future__ import annotations

import time
from typing import Any

from corl_jax.devices.compiling import take_compile_seconds
from corl_jax.train.milestones import Recorder
from corl_jax.train.run import Run
from corl_jax.train.step import TrainState


def train(run: Run, state: TrainState, recorder: Recorder, start: int, stop: int) -> TrainState:
    """Iterations `start` to `stop` - 1; metrics of one are read after the next is dispatched.

    Those of the first are read at once: whoever started the run waits to see that it goes.
    """
    pending: tuple[int, Any, dict[str, float]] | None = None
    began = time.perf_counter()
    if start < stop:
        recorder.metrics.announce_compilation("step")
    for step, prompts in zip(
        range(start, stop), run.train_loader.iterate(start, stop), strict=True
    ):
        state, iteration = run.iterate(run, state, prompts, step)
        if pending is not None:
            recorder.iteration(*pending, run)
        now = time.perf_counter()
        seconds = run.phases.take() | {
            "step_time": now - began,
            "phase/compile_seconds": take_compile_seconds(),
        }
        pending, began = (step, iteration, seconds), now
        due = recorder.due(step + 1, run)
        if due or step == start:
            recorder.iteration(*pending, run)
            pending = None
        if step == start:
            recorder.prepare_saves()
        if due:
            recorder.milestone(run, state, step + 1)
        if due or step == start:
            began = time.perf_counter()
            take_compile_seconds()  # of the above, not of the next step
    if pending is not None:
        recorder.iteration(*pending, run)
    return state
