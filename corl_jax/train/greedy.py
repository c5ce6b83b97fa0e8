"""Separates the greedy completion of each prompt from the sampled ones of its group.

A sampler with `greedy_last` returns groups of G + 1 completions, of which the last is greedy.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from corl_jax.devices.mesh import constrain
from corl_jax.train.drawn import Drawn, Scored
from corl_jax.types import Rollout

Rewards = dict[str, dict[str, np.ndarray]]
"""Task -> reward -> values."""


def separate_greedy(drawn: Drawn, group_size: int) -> tuple[Drawn, Rewards]:
    """Returns the sampled completions, and the rewards [B] of the greedy ones.

    `group_size` is that of `drawn`: G + 1.
    """
    rollouts = drop_last_completions(drawn.rollouts, group_size)
    scored, greedy = {}, {}
    for task, part in drawn.scored.items():
        scored[task], greedy[task] = _split_scored(part, group_size)
    return dataclasses.replace(drawn, rollouts=rollouts, scored=scored), greedy


def _split_scored(scored: Scored, group_size: int) -> tuple[Scored, dict[str, np.ndarray]]:
    rows, _ = split_last(np.arange(len(scored.samples)), group_size)
    pairs = {name: split_last(values, group_size) for name, values in scored.rewards.items()}
    sampled = {name: values for name, (values, _) in pairs.items()}
    samples = scored.samples.take(rows)
    return dataclasses.replace(scored, samples=samples, rewards=sampled), {
        name: values for name, (_, values) in pairs.items()
    }


@functools.partial(jax.jit, static_argnames="group_size")
def drop_last_completions(rollouts: dict[str, Rollout], group_size: int) -> dict[str, Rollout]:
    """Returns rollouts without the last of the `group_size` completions of each prompt."""

    def drop(x: jax.Array) -> jax.Array:
        # Groups of 3: [a0, a1, a*, b0, b1, b*] -> [a0, a1, b0, b1]. Groups stay on their devices.
        sampled = x.reshape(-1, group_size, *x.shape[1:])[:, :-1].reshape(-1, *x.shape[1:])
        return constrain(sampled, "batch", *[None] * (x.ndim - 1))

    return {
        task: Rollout(rollout.prompts, jax.tree.map(drop, rollout.segments))
        for task, rollout in rollouts.items()
    }


def split_last(values: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits values [B * group_size] into those of sampled completions, and the last ones [B]."""
    groups = values.reshape(-1, group_size)
    return groups[:, :-1].ravel(), groups[:, -1]
