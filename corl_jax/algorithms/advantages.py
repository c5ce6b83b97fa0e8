"""Advantages: from the rewards of completions to how much better each was than its group.

Axes as in `types.py`: N completions, prompt-major, so that a group is `group_size` neighbouring
rows; F reward functions. Every function is pure and can be called inside jit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

ADVANTAGE_MODES = ("unified_reward", "unified_advantage", "separate")

# Rewards of one group that differ by less than rounding are the same reward: dividing the
# difference by the std would turn rounding into a learning signal.
ROUNDING_UNITS = 4


def combine_rewards(per_function: jax.Array, weights: jax.Array, group_size: int = 1) -> jax.Array:
    """Adds the rewards of several functions, each times its weight.

    `per_function` [F, N], NaN where a function does not apply; `weights` [F]. Returns [N]. A
    function that applies to no row of a group adds nothing there. A row that lacks a reward which
    others of its group have is NaN, and so left out of the group: a sum with a part missing would
    look like a bad completion. NaN too where no function applies.
    Source: TRL's weighted nansum, made fair within a group.
    """
    per_function = jnp.asarray(per_function, jnp.float32)
    applies = ~jnp.isnan(per_function)
    weighted = jnp.where(applies, per_function, 0.0) * jnp.asarray(weights)[:, None]
    grouped = applies.reshape(applies.shape[0], -1, group_size)
    asked = jnp.broadcast_to(grouped.any(axis=-1, keepdims=True), grouped.shape)
    complete = (applies == asked.reshape(applies.shape)).all(axis=0) & applies.any(axis=0)
    return jnp.where(complete, weighted.sum(axis=0), jnp.nan)


def group_advantages(
    rewards: jax.Array, group_size: int, eps: float = 1e-4, scale: bool = True
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """How much better each completion is than its group: (r - mean) / (std + eps).

    `rewards` [N], NaN where not applicable; such a row is left out of the mean and the std of
    its group and gets 0. The std is the unbiased one (ddof 1). Groups with fewer than two
    valid rewards, or with no spread, get exactly 0. `scale=False` leaves the std out.
    Returns the advantages [N] and the metrics of `reward_stats`.
    Raises: ValueError if N is not a multiple of the group size.
    Source: arXiv 2505.17534 eq. 1; DeepSeekMath (arXiv 2402.03300) eq. 4 for the form.
    """
    groups = _as_groups(rewards, group_size)
    valid = ~jnp.isnan(groups)
    count = valid.sum(axis=1, keepdims=True)
    kept = jnp.where(valid, groups, 0.0)
    mean = kept.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(valid, groups - mean, 0.0)
    std = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1))
    informative = (count > 1) & _has_spread(groups, valid)
    std = jnp.where(informative, std, 0.0)
    advantages = jnp.where(informative, centred / (std + eps) if scale else centred, 0.0)
    return advantages.reshape(-1), reward_stats(rewards, group_size)


def reward_stats(rewards: jax.Array, group_size: int) -> dict[str, jax.Array]:
    """Statistics of the compared rewards [N], NaN where a completion has none.

    `reward` and `reward_std` are mean and unbiased std over all valid rewards of the batch, as
    TRL means them; `reward_group_std` is the mean of the groups' std; `frac_reward_zero_std` the
    share of the groups with any valid reward that teach nothing; `not_applicable` the share of
    completions without a reward. A statistic of nothing is NaN: absent, not 0.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    groups = _as_groups(rewards, group_size)
    valid = ~jnp.isnan(groups)
    count = valid.sum(axis=1)
    std = _spread_or_zero(groups, valid)
    batch_std = _spread_or_zero(rewards[None], valid.reshape(1, -1))[0]
    return {
        "reward": jnp.nanmean(rewards),
        "reward_std": jnp.where(valid.any(), batch_std, jnp.nan),
        "reward_group_std": _mean_where(std, count > 1),
        "frac_reward_zero_std": _mean_where((std == 0.0).astype(jnp.float32), count > 0),
        "not_applicable": jnp.isnan(rewards).mean(),
    }


def normalize_each(
    per_function: jax.Array,
    weights: jax.Array,
    group_size: int,
    eps: float = 1e-4,
    scale: bool = True,
) -> jax.Array:
    """The weighted sum of rewards that were each compared within their groups first.

    `per_function` [F, N], NaN where a function does not apply, `weights` [F]; returns [N]. Each
    reward becomes its `group_advantages`, so that none drowns the others by its scale. NaN rows
    are those of `combine_rewards`.
    Source: GDPO (arXiv 2601.05242); TRL's `normalize_then_sum`.
    """
    compared = jax.vmap(lambda r: group_advantages(r, group_size, eps, scale)[0])(per_function)
    return combine_rewards(
        jnp.where(jnp.isnan(per_function), jnp.nan, compared), weights, group_size
    )


def normalize_batch(totals: jax.Array, eps: float = 1e-4) -> jax.Array:
    """(x - mean) / (std + eps) over the whole batch [N]; 0 where x is NaN or nothing varies.

    Keeps the size of advantages independent of the number of rewards.
    Source: GDPO (arXiv 2601.05242).
    """
    return group_advantages(totals, totals.shape[0], eps)[0]


def joint_advantages(
    rewards: Mapping[str, jax.Array],
    weights: Mapping[str, float],
    mode: str = "unified_reward",
    *,
    group_size: int,
    eps: float = 1e-4,
    scale: bool = True,
    compared: bool = False,
) -> dict[str, jax.Array]:
    """Returns the advantages [N] of each task, from the rewards [N] of each task.

    Row i of all rewards belongs to the i-th completion of the same prompt. `weights` has the
    weight of each task; for CoRL 1 for images and lambda for texts.
    `unified_reward`: one advantage of the weighted sum of rewards, for all tasks (eq. 5).
    `unified_advantage`: the weighted sum of the tasks' advantages, for all tasks.
    `separate`: each task its own, without weights. A single task stands alone, unweighted.
    A group in which one task has no valid reward is judged by the others; otherwise a row that
    lacks a reward is left out of a unified reward. `compared` says that the rewards come from
    `normalize_each`: totals are then normalised over the batch instead of within groups.

    Raises:
        ValueError: the mode is unknown, or there is no task.

    Source: arXiv 2505.17534 eq. 5.
    """
    if mode not in ADVANTAGE_MODES:
        raise ValueError(f"advantage mode {mode!r}: expected one of {', '.join(ADVANTAGE_MODES)}")
    if not rewards:
        raise ValueError("joint_advantages needs the rewards of at least one task")

    def advantages(values: jax.Array) -> jax.Array:
        if compared:
            return normalize_batch(values, eps)
        return group_advantages(values, group_size, eps, scale)[0]

    if len(rewards) > 1 and mode == "unified_reward":
        return dict.fromkeys(rewards, advantages(unified_reward(rewards, weights, group_size)))
    own = {task: advantages(values) for task, values in rewards.items()}
    if len(rewards) > 1 and mode == "unified_advantage":
        return dict.fromkeys(rewards, _weighted_sum(own, weights))
    return own


def unified_reward(
    rewards: Mapping[str, jax.Array], weights: Mapping[str, float], group_size: int
) -> jax.Array:
    """Returns the weighted sum of the tasks' rewards [N]: r_t2i + lambda r_mm2t.

    A task without any valid reward in a group counts as 0 there. A row that lacks a reward which
    its neighbours have is NaN: a sum with a part missing would look like a bad completion. NaN
    too where a group has no reward at all.
    Source: arXiv 2505.17534 eq. 5.
    """
    groups = {task: _as_groups(values, group_size) for task, values in rewards.items()}
    absent = {task: jnp.isnan(x).all(axis=1, keepdims=True) for task, x in groups.items()}
    present = {task: jnp.where(absent[task], 0.0, x) for task, x in groups.items()}
    total = _weighted_sum(present, weights)
    nothing = functools.reduce(jnp.logical_and, absent.values())
    return jnp.where(nothing, jnp.nan, total).reshape(-1)


def _weighted_sum(values: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    # A weight of 1 is left out, not multiplied by.
    terms = [x if weights[task] == 1 else weights[task] * x for task, x in values.items()]
    return functools.reduce(jnp.add, terms)


@dataclasses.dataclass(frozen=True)
class AdvantageOptions:
    """How rewards become advantages; hashable, so that the comparison is compiled for it."""

    reward_weights: tuple[tuple[str, tuple[float, ...]], ...]  # task -> weight of each reward
    task_weights: tuple[tuple[str, float], ...]  # task -> weight in the joint reward
    mode: str
    group_size: int
    scale: bool
    normalize_each: bool  # each reward on its own within its group (GDPO)
    eps: float = 1e-4  # added to the standard deviation, as in the released script


def group_relative(
    rewards: Mapping[str, jax.Array], options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns (advantages [N] by task, statistics by metric name) of GRPO.

    `rewards` has [F, N] for each task, NaN where a function does not apply.
    """
    group_size = options.group_size
    totals = total_rewards(rewards, options)
    judged = totals
    if options.normalize_each:
        weights = {task: jnp.asarray(values) for task, values in options.reward_weights}
        judged = {
            task: normalize_each(values, weights[task], group_size, options.eps, options.scale)
            for task, values in rewards.items()
        }
    advantages = joint_advantages(
        judged, dict(options.task_weights), options.mode, group_size=group_size,
        eps=options.eps, scale=options.scale, compared=options.normalize_each,
    )  # fmt: skip
    return advantages, describe_rewards(totals, options)


def total_rewards(
    rewards: Mapping[str, jax.Array], options: AdvantageOptions
) -> dict[str, jax.Array]:
    """Returns the weighted sum [N] of each task's rewards [F, N]; see `combine_rewards`."""
    weights = {task: jnp.asarray(values) for task, values in options.reward_weights}
    return {
        task: combine_rewards(values, weights[task], options.group_size)
        for task, values in rewards.items()
    }


def join_rewards(totals: Mapping[str, jax.Array], options: AdvantageOptions) -> jax.Array:
    """Returns the reward [N] of each sample number over all tasks; see `unified_reward`."""
    if len(totals) == 1:
        (joint,) = totals.values()
        return joint
    return unified_reward(totals, dict(options.task_weights), options.group_size)


def describe_rewards(
    totals: Mapping[str, jax.Array], options: AdvantageOptions
) -> dict[str, jax.Array]:
    """Returns `reward_stats` of each task, as `TASK/NAME`, and those of the joint reward."""
    stats = {
        f"{task}/{name}": value
        for task, total in totals.items()
        for name, value in reward_stats(total, options.group_size).items()
    }
    return stats | reward_stats(join_rewards(totals, options), options.group_size)


def _as_groups(rewards: jax.Array, group_size: int) -> jax.Array:
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards of shape {rewards.shape}: expected [N], N a multiple of group_size "
            f"{group_size}"
        )
    return rewards.reshape(-1, group_size)


def _has_spread(groups: jax.Array, valid: jax.Array) -> jax.Array:
    """[groups, 1]: whether the valid rewards differ by more than rounding."""
    highest = jnp.where(valid, groups, -jnp.inf).max(axis=1, keepdims=True)
    lowest = jnp.where(valid, groups, jnp.inf).min(axis=1, keepdims=True)
    size = jnp.where(valid, jnp.abs(groups), 0.0).max(axis=1, keepdims=True)
    return highest - lowest > ROUNDING_UNITS * jnp.finfo(jnp.float32).eps * size


def _spread_or_zero(groups: jax.Array, valid: jax.Array) -> jax.Array:
    """The unbiased std of each group's valid rewards [groups]; exactly 0 if they are equal."""
    return jnp.where(_has_spread(groups, valid)[:, 0], jnp.nanstd(groups, axis=1, ddof=1), 0.0)


def _mean_where(values: jax.Array, kept: jax.Array) -> jax.Array:
    """The mean of the kept values, NaN of none."""
    return jnp.where(kept, values, 0.0).sum() / kept.sum()
