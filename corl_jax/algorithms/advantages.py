"""Turns the rewards of several functions and tasks into advantages.

Axes as in `types.py`: N completions, prompt-major, so that a group is `group_size` neighbouring
rows; F reward functions. Every function is pure and can be called inside jit.

The equations of CoRL (arXiv 2505.17534): eq. 5 in `unify_rewards`, eq. 1 in `estimators`, which
compares completions with one reward each. The functions `compare_...` are those of the rows of
`recipes.RECIPES`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.algorithms.estimators import (
    Scale,
    compute_greedy_advantages,
    compute_group_advantages,
    compute_rloo_advantages,
    divide_by_spread,
    split_into_groups,
    summarize_rewards,
    whiten_batch,
)

ADVANTAGE_MODES = ("unified_reward", "unified_advantage", "separate")


def combine_rewards(per_function: jax.Array, weights: jax.Array, group_size: int = 1) -> jax.Array:
    """Adds the rewards of several functions, each times its weight.

    `per_function` [F, N] is NaN where a function does not apply; `weights` [F]. Returns [N].
    A function that applies to no row of a group adds nothing to that group. A row is NaN if no
    function applies to it. It is also NaN if it lacks a reward that other rows of its group have.
    A function of weight 0 is only watched: it counts as one that applies to no row.
    Source: TRL's weighted nansum, made fair within a group.
    """
    per_function = jnp.asarray(per_function, jnp.float32)
    weights = jnp.asarray(weights)[:, None]
    applies = ~jnp.isnan(per_function) & (weights != 0)
    weighted = jnp.where(applies, per_function, 0.0) * weights
    # [F, N] -> [F, groups, G]
    grouped = applies.reshape(applies.shape[0], -1, group_size)
    # One function, G = 2, applies [T, F | F, F] -> expected [T, T | F, F]: row 1 is incomplete.
    # A sum without one part would look like a bad completion, so the row leaves its group.
    expected = jnp.broadcast_to(grouped.any(axis=-1, keepdims=True), grouped.shape)
    complete = (applies == expected.reshape(applies.shape)).all(axis=0) & applies.any(axis=0)
    return jnp.where(complete, weighted.sum(axis=0), jnp.nan)


def normalize_each(
    per_function: jax.Array,
    weights: jax.Array,
    group_size: int,
    eps: float = 1e-4,
    scale: Scale = "group",
) -> jax.Array:
    """Normalises each reward within its groups, then adds the results with weights.

    `per_function` [F, N] is NaN where a function does not apply; `weights` [F]. Returns [N],
    with NaN in the same rows as `combine_rewards`.
    Source: GDPO (arXiv 2601.05242); TRL's `normalize_then_sum`.
    """
    # After this a reward with a large range does not outweigh one with a small range.
    compared = jax.vmap(lambda r: compute_group_advantages(r, group_size, eps, scale))(per_function)
    # An advantage is 0 where a reward does not apply; NaN again, so that the row is left out.
    return combine_rewards(
        jnp.where(jnp.isnan(per_function), jnp.nan, compared), weights, group_size
    )


def compute_joint_advantages(
    rewards: Mapping[str, jax.Array],
    weights: Mapping[str, float],
    mode: str = "unified_reward",
    *,
    group_size: int,
    estimate: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """Returns the advantages [N] of each task, from the rewards [N] of each task.

    Row i of all tasks belongs to completion i of the same prompt. `weights` has the weight of each
    task; in CoRL it is 1 for images and lambda for texts. `estimate` computes the advantages [N] of
    rewards [N]. The modes:
    `unified_reward`: all tasks get the advantage of the weighted sum of rewards (eq. 5).
    `unified_advantage`: all tasks get the weighted sum of the tasks' advantages.
    `separate`: each task gets the advantage of its rewards, without weights.
    A single task has no weight in any mode. See `unify_rewards` for rows without a reward.

    Raises:
        ValueError: the mode is unknown, or there is no task.

    Source: arXiv 2505.17534 eq. 5.
    """
    if mode not in ADVANTAGE_MODES:
        raise ValueError(f"advantage mode {mode!r}: expected one of {', '.join(ADVANTAGE_MODES)}")
    if not rewards:
        raise ValueError("compute_joint_advantages needs the rewards of at least one task")
    if len(rewards) > 1 and mode == "unified_reward":
        # Image i and text i share one advantage, so each task also sees the other's noise (Q28).
        return dict.fromkeys(rewards, estimate(unify_rewards(rewards, weights, group_size)))
    by_task = {task: estimate(values) for task, values in rewards.items()}
    if len(rewards) > 1 and mode == "unified_advantage":
        return dict.fromkeys(rewards, _add_weighted(by_task, weights))
    return by_task


def unify_rewards(
    rewards: Mapping[str, jax.Array], weights: Mapping[str, float], group_size: int
) -> jax.Array:
    """Returns the weighted sum of the tasks' rewards [N]: r_t2i + lambda r_mm2t.

    A task without any valid reward in a group counts as 0 in that group. A row is NaN if its group
    has no reward at all. It is also NaN if it lacks a reward that other rows of its group have.
    Source: arXiv 2505.17534 eq. 5, with lambda = 0.8.
    """
    groups = {task: split_into_groups(values, group_size) for task, values in rewards.items()}
    absent = {task: jnp.isnan(x).all(axis=1, keepdims=True) for task, x in groups.items()}
    # One task, G = 2: [NaN, NaN | 1, NaN] -> [0, 0 | 1, NaN]. The NaN that stays makes the sum NaN:
    # a sum without one part would look like a bad completion.
    present = {task: jnp.where(absent[task], 0.0, x) for task, x in groups.items()}
    total = _add_weighted(present, weights)  # eq. 5
    nothing = functools.reduce(jnp.logical_and, absent.values())
    return jnp.where(nothing, jnp.nan, total).reshape(-1)


def _add_weighted(values: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    # A weight of 1 is no multiplication, so the compiled program is that of a plain sum.
    terms = [x if weights[task] == 1 else weights[task] * x for task, x in values.items()]
    return functools.reduce(jnp.add, terms)


@dataclasses.dataclass(frozen=True)
class AdvantageOptions:
    """Options of the comparisons; hashable, because jit takes them as a static argument."""

    reward_weights: tuple[tuple[str, tuple[float, ...]], ...]  # task -> weight of each reward
    task_weights: tuple[tuple[str, float], ...]  # task -> weight in the joint reward
    mode: str
    group_size: int
    scale: Scale
    eps: float = 1e-4  # added to the standard deviation, as in the released script
    ddof: int = 1  # of the std in `compare_within_groups`; 0 in Flow-GRPO's released code


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardInputs:
    """The rewards that a comparison reads, by task; NaN where a function does not apply."""

    sampled: dict[str, Any]  # [F, N]
    greedy: dict[str, Any] | None = None  # [F, B], of one greedy completion per prompt
    penalties: dict[str, Any] | None = None  # [N], subtracted from the task's total reward


def compare_within_groups(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes GRPO's advantages [N] by task; returns them and statistics by metric name."""
    return compare_rewards(
        inputs, options,
        lambda r: compute_group_advantages(
            r, options.group_size, options.eps, options.scale, options.ddof
        ),
    )  # fmt: skip


def compare_leave_one_out(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes RLOO's advantages [N] by task; `scale` "batch" divides by their std in the batch.

    Returns them and statistics by metric name.
    """

    def estimate(rewards: jax.Array) -> jax.Array:
        advantages = compute_rloo_advantages(rewards, options.group_size)
        if options.scale == "none":
            return advantages
        valid = ~jnp.isnan(rewards.reshape(-1, options.group_size))
        compared = valid & (valid.sum(axis=1, keepdims=True) > 1)
        return divide_by_spread(advantages, compared.reshape(-1), options.eps)

    return compare_rewards(inputs, options, estimate)


def compare_with_batch(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes REINFORCE++'s advantages [N] by task: each reward against the whole batch.

    The rewards are compared between prompts, so they should apply to every row. Returns the
    advantages and statistics by metric name.
    """
    return compare_rewards(
        inputs, options, lambda r: whiten_batch(r, options.eps, scale=options.scale != "none")
    )


def compare_with_greedy(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes ReMax's advantages [N] by task: each reward less that of the greedy completion.

    `scale` "batch" divides them by their size in the batch. A difference of 0 stays 0. Returns
    them and statistics by metric name.

    Raises:
        ValueError: there are no greedy rewards.
    """
    if inputs.greedy is None:
        raise ValueError("ReMax needs the rewards of greedy completions, and none were given")
    # The greedy completion is member G of its group until the rewards of functions and tasks are
    # added, so that a row that lacks one of the other's rewards is left out as in any group.
    size = options.group_size
    wide = RewardInputs(
        {task: _append_member(x, inputs.greedy[task], size) for task, x in inputs.sampled.items()},
        penalties=inputs.penalties and {
            task: _append_member(x[None], jnp.zeros((1, len(x) // size)), size)[0]
            for task, x in inputs.penalties.items()
        },
    )  # fmt: skip

    def estimate(rewards: jax.Array) -> jax.Array:
        groups = rewards.reshape(-1, size + 1)
        advantages = compute_greedy_advantages(groups[:, :size].reshape(-1), groups[:, size])
        if options.scale == "none":
            return advantages
        valid = ~jnp.isnan(groups[:, :size] - groups[:, size:])
        return divide_by_spread(advantages, valid.reshape(-1), options.eps)

    advantages, _ = compare_rewards(
        wide, dataclasses.replace(options, group_size=size + 1), estimate
    )
    return advantages, describe_rewards(total_rewards(inputs, options), options)


def compare_each_reward(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes GDPO's advantages [N] by task: each reward is normalised within its group.

    The weighted sums, less penalties, are centred in their group and divided by the std of the
    batch, whatever the `scale` of the single rewards. Returns the advantages and statistics by
    metric name.
    """
    weights = {task: jnp.asarray(values) for task, values in options.reward_weights}
    normalized = {
        task: normalize_each(values, weights[task], options.group_size, options.eps, options.scale)
        for task, values in inputs.sampled.items()
    }

    def estimate(sums: jax.Array) -> jax.Array:
        # Sums of normalised rewards are centred already, but for penalties and rows left out. To
        # subtract the mean of the batch instead would move groups with equal rewards away from 0.
        centred = compute_group_advantages(sums, options.group_size, scale="none")
        # A sum of F normalised rewards grows with F; the std of the batch takes that out.
        return divide_by_spread(centred, ~jnp.isnan(sums), options.eps)

    advantages = compute_joint_advantages(
        _subtract_penalties(normalized, inputs.penalties), dict(options.task_weights), options.mode,
        group_size=options.group_size, estimate=estimate,
    )  # fmt: skip
    return advantages, describe_rewards(total_rewards(inputs, options), options)


def compare_rewards(
    inputs: RewardInputs, options: AdvantageOptions, estimate: Callable[[jax.Array], jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes advantages [N] by task: adds the rewards, subtracts penalties, joins the tasks.

    `estimate` turns the rewards [N] of one task, or of both together, into advantages [N]. Returns
    the advantages and statistics of the rewards by metric name.
    """
    totals = total_rewards(inputs, options)
    advantages = compute_joint_advantages(
        _subtract_penalties(totals, inputs.penalties), dict(options.task_weights), options.mode,
        group_size=options.group_size, estimate=estimate,
    )  # fmt: skip
    return advantages, describe_rewards(totals, options)


def _append_member(rewards: jax.Array, member: jax.Array, group_size: int) -> jax.Array:
    """Appends one reward [F, B] to each group of [F, N]; returns [F, B * (G + 1)]."""
    # F = 1, G = 2: [[a, b, c, d]] and [[x, y]] -> [[a, b, x, c, d, y]]
    groups = rewards.reshape(len(rewards), -1, group_size)
    return jnp.concatenate([groups, member[..., None]], axis=-1).reshape(len(rewards), -1)


def _subtract_penalties(
    totals: Mapping[str, jax.Array], penalties: Mapping[str, jax.Array] | None
) -> dict[str, jax.Array]:
    return {task: total - penalties[task] if penalties else total for task, total in totals.items()}


def total_rewards(inputs: RewardInputs, options: AdvantageOptions) -> dict[str, jax.Array]:
    """Returns the weighted sum [N] of each task's rewards [F, N]; see `combine_rewards`.

    Penalties are not subtracted.
    """
    weights = {task: jnp.asarray(values) for task, values in options.reward_weights}
    return {
        task: combine_rewards(values, weights[task], options.group_size)
        for task, values in inputs.sampled.items()
    }


def join_rewards(totals: Mapping[str, jax.Array], options: AdvantageOptions) -> jax.Array:
    """Returns the reward [N] of each sample number over all tasks; see `unify_rewards`."""
    if len(totals) == 1:
        (joint,) = totals.values()
        return joint
    return unify_rewards(totals, dict(options.task_weights), options.group_size)


def describe_rewards(
    totals: Mapping[str, jax.Array], options: AdvantageOptions
) -> dict[str, jax.Array]:
    """Returns `summarize_rewards` of each task, as `TASK/NAME`, and those of the joint reward."""
    # Statistics are of the rewards as the functions gave them, not of normalised ones.
    stats = {
        f"{task}/{name}": value
        for task, total in totals.items()
        for name, value in summarize_rewards(total, options.group_size).items()
    }
    return stats | summarize_rewards(join_rewards(totals, options), options.group_size)
