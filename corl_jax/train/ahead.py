"""Compiles the programs of a resumed run's first step while its checkpoint is read.

Reading waits for files, and tracing and compiling for the host. Programs with random completions of
a batch can be known before it is sampled: their shapes are those of the batch's prompts, which
differ between batches. So even with a full cache of compiled programs a step after a resume may
meet shapes that no step had before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from corl_jax.devices.compiling import compile_ahead
from corl_jax.params import merge
from corl_jax.tasks import choose_tasks_of_step
from corl_jax.train.answer_rows import depends_on_lengths
from corl_jax.train.greedy import drop_last_completions
from corl_jax.train.iteration import compare, make_batch, make_update_batch, sample
from corl_jax.train.kl_penalty import measure_penalties
from corl_jax.train.run import Run
from corl_jax.train.step import TrainState
from corl_jax.types import Prompts

CompileStep = Callable[[Run, TrainState, Prompts, int], Iterator[None]]
"""(run, state of shapes, prompts, steps done) -> an iterator that compiles a program each time."""


@contextlib.contextmanager
def compile_meanwhile(
    compile_step: CompileStep | None, run: Run, state: TrainState
) -> Iterator[Callable[[int], None]]:
    """Yields a function that starts to compile the next step's programs, given the steps done.

    `state` are shapes with shardings. The end of the block waits for the programs; after an error
    only for the one that compiles. A failure is printed: the step itself meets it again.
    """
    started: list[Future] = []
    stopped = threading.Event()

    def compile_programs(compile_step: CompileStep, step: int) -> None:
        with jax.set_mesh(run.mesh):  # a thread starts without one
            for _ in compile_step(run, state, run.train_loader.batch(step), step):
                if stopped.is_set():
                    return

    def start(step: int) -> None:
        # Processes may share what they measure of a program, and must compile in the same order.
        if compile_step and not started and step < run.steps and jax.process_count() == 1:
            started.append(pool.submit(compile_programs, compile_step, step))

    with ThreadPoolExecutor(1, "compile") as pool:
        try:
            yield start
        except BaseException:
            stopped.set()
            raise
    for future in started:
        if error := future.exception():
            print(
                f"warning: the next step compiles its programs itself ({type(error).__name__}: "
                f"{error})",
                file=sys.stderr,
            )


def compile_rl_step(run: Run, state: TrainState, prompts: Prompts, step: int) -> Iterator[None]:
    """Compiles the samplers, log-probs and update of `iteration.rl_iteration`, one at a time.

    `state` are shapes. Yields after each sampler, before the update and after it. Samplers give
    zeros in the place of samples, and every reward is 0. Where the lengths of answers decide what
    an update reads, only the samplers are known before.
    """
    params = merge(state.params, run.frozen)
    tasks, rollouts = choose_tasks_of_step(run.tasks, run.alternate_every, step), {}
    for task in tasks:
        rollouts[task] = sample(run, task, params, prompts, True)
        yield
    if depends_on_lengths(run, rollouts):
        return
    greedy = penalties = None
    if run.greedy_samplers is not None:
        rollouts = drop_last_completions(rollouts, run.completions_per_prompt)
        greedy = make_zero_rewards(run, tasks, len(prompts))
    batch = make_batch(stand_in_programs(run, state), state, rollouts)
    yield
    if run.kl_penalty is not None:
        penalties, _ = measure_penalties(batch, run.kl_penalty)
    rewards = make_zero_rewards(run, tasks, len(prompts) * run.group_size)
    advantages, _ = compare(run, rewards, greedy, penalties)
    # Neither is an input of the update.
    state = dataclasses.replace(state, reference=None, average=None)
    update_batch = make_update_batch(run, batch, advantages)
    train_step: Any = run.train_step  # jitted
    train_step.lower(state, run.frozen, update_batch).compile()
    yield


def make_zero_rewards(run: Run, tasks: Sequence[str], rows: int) -> dict[str, Any]:
    """Returns task -> reward -> zeros [rows]."""
    return {
        task: {reward.name: np.zeros(rows, np.float32) for reward in run.rewards[task]}
        for task in tasks
    }


def stand_in_programs(run: Run, state: TrainState) -> Run:
    """Returns a run that compiles the programs before the update in the place of running them."""
    reference = run.reference and Described(run.reference.describe())
    if run.moving is not None:
        reference = Described(state.reference)
    encode = functools.partial(compile_ahead, run.family.encode_images)
    return dataclasses.replace(
        run,
        family=dataclasses.replace(run.family, encode_images=encode),
        reference=reference,
        moving=None,
        logprob_step=functools.partial(compile_ahead, run.logprob_step),
        velocity_step=functools.partial(compile_ahead, run.velocity_step),
    )


@dataclasses.dataclass(frozen=True)
class Described:
    """Shapes in the place of the parameters of a reference."""

    shapes: Any

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context with the shapes."""
        return contextlib.nullcontext(self.shapes)
