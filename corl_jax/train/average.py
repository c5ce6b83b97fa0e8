"""The mean of the policy's weights over steps: evaluations measure it, and the export writes it.

The mean is a part of `TrainState`, so that checkpoints have it. No step reads it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from corl_jax.config.schema import Config
from corl_jax.train.step import TrainState
from corl_jax.types import Params

if TYPE_CHECKING:
    from corl_jax.train.run import Iteration, Run
    from corl_jax.types import Prompts

Iterate = Callable[["Run", TrainState, "Prompts", int], tuple[TrainState, "Iteration"]]
"""(run, state, prompts, step) -> (next state, results for the log)."""


def has_average(config: Config) -> bool:
    """Returns whether a run keeps the mean of its weights."""
    return config.train.ema_decay > 0


def start_average(config: Config, trained: Params) -> Params | None:
    """Returns the mean of a fresh start, a float32 copy of the parameters; None without one."""
    if not has_average(config):
        return None
    # float32, because a step changes the mean by little. A copy, because the buffers of the
    # parameters are donated to the next step.
    return jax.tree.map(lambda x: jnp.copy(x.astype(jnp.float32)), trained)


def keep_average(iterate: Iterate, decay: float, shardings: Any) -> Iterate:
    """Returns an iteration that also moves the mean: decay x mean + (1 - decay) x weights.

    `shardings` are those of the parameters. Without a decay it is the iteration itself.
    """
    if not decay:
        return iterate

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def move(average: Params, trained: Params) -> Params:
        # This form leaves weights that do not move as they are, to the bit.
        return jax.tree.map(
            lambda old, new: old + (1 - decay) * (new.astype(jnp.float32) - old), average, trained
        )

    def iterate_and_average(run: Run, state: TrainState, prompts: Prompts, step: int):
        average = state.average
        state, iteration = iterate(run, dataclasses.replace(state, average=None), prompts, step)
        return dataclasses.replace(state, average=move(average, state.params)), iteration

    return iterate_and_average


def choose_evaluated(state: TrainState) -> Params:
    """Returns the trained parameters that are evaluated and exported: the mean, if there is one."""
    return state.params if state.average is None else state.average
