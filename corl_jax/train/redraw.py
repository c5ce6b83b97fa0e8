"""Replaces groups whose rewards are all equal by groups of other prompts (dynamic sampling).

Such a group has no advantage and teaches nothing. A further batch of prompts is drawn, and each of
these groups is replaced by the new one in its place, if that has different rewards. The number of
batches is bounded. Source: DAPO (arXiv 2503.14476).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms.advantages import (
    AdvantageOptions,
    RewardInputs,
    compute_group_advantages,
    join_rewards,
    total_rewards,
)
from corl_jax.devices.batches import all_gather_array, take_own_rows
from corl_jax.devices.mesh import constrain
from corl_jax.train.drawn import Drawn, Scored, place_rewards
from corl_jax.train.run import Run, put_batch
from corl_jax.types import EncodedPrompts, Prompts, Rollout

FIRST_POSITION = 1 << 31
"""The first position in the data order of redrawn prompts, which no batch of a step reaches.

Positions are seeds of samples, which have 32 bits.
"""
SUMMED = ("seconds", "failed")
"""Costs of a reward that add up over the batches of a step."""


def choose_redrawn_batch(batch_size: int, redraws: int, step: int, attempt: int) -> int:
    """Returns the number of the batch of the data order that an attempt of a step draws."""
    # A function of step and attempt alone: a resumed run draws the same prompts.
    return FIRST_POSITION // batch_size + step * redraws + attempt


def replace_flat_groups(
    run: Run, drawn: Drawn, draw: Callable[[Prompts], Drawn], step: int
) -> tuple[Drawn, dict[str, Any]]:
    """Returns the completions with as few groups of equal rewards as `run.redraws` batches allow.

    Returns them and statistics by metric name. All processes draw equally many batches.
    """
    flat, batches, replaced = find_flat_groups(run, drawn), 0, 0
    while flat.any() and batches < run.redraws:
        number = choose_redrawn_batch(run.train_loader.batch_size, run.redraws, step, batches)
        other = draw(run.train_loader.batch(number))
        is_replaced = flat & ~find_flat_groups(run, other)
        drawn = replace_groups(run, drawn, other, is_replaced)
        flat, batches, replaced = flat & ~is_replaced, batches + 1, replaced + is_replaced.sum()
    return drawn, {
        "redraw/batches": float(batches),
        "redraw/replaced": float(replaced),
        "redraw/zero_spread_left": float(flat.mean()),
    }


def find_flat_groups(run: Run, drawn: Drawn) -> np.ndarray:
    """Returns whether each group of all processes has no advantage [B] bool, on the host."""
    rewards = place_rewards(run, {task: part.rewards for task, part in drawn.scored.items()})
    assert run.advantage_options is not None
    # With a greedy completion its group has one member more.
    options = dataclasses.replace(run.advantage_options, group_size=run.completions_per_prompt)
    return all_gather_array(_find_flat(rewards, options=options))


@functools.partial(jax.jit, static_argnames="options")
def _find_flat(rewards: dict[str, jax.Array], *, options: AdvantageOptions) -> jax.Array:
    totals = total_rewards(RewardInputs(rewards), options)
    # With a joint reward it alone matters; otherwise each task has advantages of its own.
    compared = [*totals.values()]
    if options.mode == "unified_reward":
        compared = [join_rewards(totals, options)]

    def is_flat(rewards: jax.Array) -> jax.Array:
        centred = compute_group_advantages(rewards, options.group_size, scale="none")
        return (centred.reshape(-1, options.group_size) == 0).all(axis=1)

    return functools.reduce(jnp.logical_and, map(is_flat, compared))


def replace_groups(run: Run, drawn: Drawn, other: Drawn, is_replaced: np.ndarray) -> Drawn:
    """Returns `drawn` with the groups of `other` where `is_replaced` [B] of all processes says."""
    own_groups = take_own_rows(run.mesh, is_replaced)
    rollouts = {
        task: replace_rollout(rollout, other.rollouts[task], put_batch(run, own_groups))
        for task, rollout in drawn.rollouts.items()
    }
    rows = np.repeat(own_groups, run.completions_per_prompt)
    scored = {
        task: replace_scored(part, other.scored[task], rows) for task, part in drawn.scored.items()
    }
    return Drawn(rollouts, scored, drawn.tokens.add(other.tokens))


@jax.jit
def replace_rollout(old: Rollout, new: Rollout, is_replaced: jax.Array) -> Rollout:
    """Returns a rollout with the prompts of another one, and their completions, where [B] says."""
    prompts = pad_alike(old.prompts, new.prompts)
    old, new = (dataclasses.replace(x, prompts=p) for x, p in zip((old, new), prompts, strict=True))

    def choose(before: jax.Array, after: jax.Array) -> jax.Array:
        # Row by row, so no row leaves its device. B = 2, N = 4: [T, F] -> [T, T, F, F].
        rows = jnp.repeat(is_replaced, len(before) // len(is_replaced))
        chosen = jnp.where(rows.reshape(-1, *[1] * (before.ndim - 1)), after, before)
        return constrain(chosen, "batch", *[None] * (before.ndim - 1))

    return jax.tree.map(choose, old, new)


def pad_alike(
    first: EncodedPrompts, second: EncodedPrompts
) -> tuple[EncodedPrompts, EncodedPrompts]:
    """Pads the prompts of each turn to the longer of both lengths."""
    length = max(x.input_ids.shape[1] for x in (first, second))
    padded = pad_prompts(first, length), pad_prompts(second, length)
    if first.next is None or second.next is None:
        return padded
    next_first, next_second = pad_alike(first.next, second.next)
    return (
        dataclasses.replace(padded[0], next=next_first),
        dataclasses.replace(padded[1], next=next_second),
    )


def pad_prompts(prompts: EncodedPrompts, length: int) -> EncodedPrompts:
    """Pads prompts [B, P] on the left to a length."""
    more = ((0, 0), (length - prompts.input_ids.shape[1], 0))
    return dataclasses.replace(
        prompts,
        # The mask leaves these ids out; the first one of the row is one that a prompt may have.
        input_ids=jnp.pad(prompts.input_ids, more, mode="edge"),
        attention_mask=jnp.pad(prompts.attention_mask, more),
    )


def replace_scored(old: Scored, new: Scored, is_replaced: np.ndarray) -> Scored:
    """Returns scored completions with those of `new` where `is_replaced` [N]; costs are of both."""
    costs = {
        # `failures` is a count since the start of the process.
        name: {**new.costs[name], **{k: cost[k] + new.costs[name][k] for k in SUMMED if k in cost}}
        for name, cost in old.costs.items()
    }
    rewards = {
        name: np.where(is_replaced, new.rewards[name], values)
        for name, values in old.rewards.items()
    }
    samples = old.samples.replace(new.samples, is_replaced)
    return Scored(samples, rewards, costs, old.num_scored + new.num_scored)
