"""Turns the rewards of completions into advantages: each completion against a baseline.

Axes as in `types.py`: N completions, prompt-major, so that a group is `group_size` neighbouring
rows; F reward functions. Every function is pure and can be called inside jit.

The equations of CoRL (arXiv 2505.17534): eq. 1 in `compute_group_advantages`, eq. 5 in
`unify_rewards`. The functions `compare_...` are those of the rows of `recipes.RECIPES`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

ADVANTAGE_MODES = ("unified_reward", "unified_advantage", "separate")

Scale = Literal["group", "batch", "none"]
"""The rewards whose standard deviation divides advantages: of the group, of the batch, or none."""

# Rewards of one group that differ by less than rounding are the same reward: dividing the
# difference by the std would turn rounding into a learning signal.
ROUNDING_UNITS = 4


def combine_rewards(per_function: jax.Array, weights: jax.Array, group_size: int = 1) -> jax.Array:
    """Adds the rewards of several functions, each times its weight.

    `per_function` [F, N] is NaN where a function does not apply; `weights` [F]. Returns [N].
    A function that applies to no row of a group adds nothing to that group. A row is NaN if no
    function applies to it. It is also NaN if it lacks a reward that other rows of its group have.
    Source: TRL's weighted nansum, made fair within a group.
    """
    per_function = jnp.asarray(per_function, jnp.float32)
    applies = ~jnp.isnan(per_function)
    weighted = jnp.where(applies, per_function, 0.0) * jnp.asarray(weights)[:, None]
    # [F, N] -> [F, groups, G]
    grouped = applies.reshape(applies.shape[0], -1, group_size)
    # One function, G = 2, applies [T, F | F, F] -> expected [T, T | F, F]: row 1 is incomplete.
    # A sum without one part would look like a bad completion, so the row leaves its group.
    expected = jnp.broadcast_to(grouped.any(axis=-1, keepdims=True), grouped.shape)
    complete = (applies == expected.reshape(applies.shape)).all(axis=0) & applies.any(axis=0)
    return jnp.where(complete, weighted.sum(axis=0), jnp.nan)


def compute_group_advantages(
    rewards: jax.Array, group_size: int, eps: float = 1e-4, scale: Scale = "group"
) -> jax.Array:
    """Computes the advantage of each completion in its group [N]: (r - mean) / (std + eps).

    `rewards` [N] is NaN where no reward applies. Such a row does not enter the mean and the std
    of its group, and its advantage is 0. Groups with fewer than two valid rewards, or whose
    rewards are equal, get exactly 0. The std is that of the group, or with `scale` "batch" that of
    all valid rewards; "none" leaves it out (Dr.GRPO).
    Raises: ValueError if N is not a multiple of the group size.
    Source: arXiv 2505.17534 eq. 1; DeepSeekMath (arXiv 2402.03300) eq. 4 for the form; Dr.GRPO
    (arXiv 2503.20783); the std of the batch is an option of TRL (`scale_rewards`).
    """
    groups = _split_into_groups(rewards, group_size)
    valid = ~jnp.isnan(groups)
    count = valid.sum(axis=1, keepdims=True)
    # NaN * 0 is NaN, so the values themselves are replaced before any sum.
    rewards_or_zero = jnp.where(valid, groups, 0.0)
    mean = rewards_or_zero.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(valid, groups - mean, 0.0)
    # ddof 1: torch's std, which the released code uses, is the unbiased one (Q29).
    std = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1))
    informative = (count > 1) & _has_spread(groups, valid)
    std = jnp.where(informative, std, 0.0)
    if scale == "batch":
        std = _measure_spread(rewards[None], ~jnp.isnan(rewards)[None])
    # Eq. 1. The paper has no eps; the released code adds 1e-4.
    advantages = jnp.where(informative, centred if scale == "none" else centred / (std + eps), 0.0)
    return advantages.reshape(-1)


def compute_rloo_advantages(rewards: jax.Array, group_size: int) -> jax.Array:
    """Computes how far each reward is above the mean of the others of its group [N].

    `rewards` [N] is NaN where no reward applies; such a row is left out of the others' means and
    gets 0, as does a row without others. Without NaN this is G / (G - 1) of the centred reward.
    Source: RLOO (arXiv 2402.14740).
    """
    groups = _split_into_groups(rewards, group_size)
    count = (~jnp.isnan(groups)).sum(axis=1, keepdims=True)
    centred = compute_group_advantages(rewards, group_size, scale="none").reshape(groups.shape)
    # r_i - (S - r_i) / (n - 1) = n / (n - 1) (r_i - S / n). The centred form keeps equal rewards at
    # exactly 0.
    return (centred * (count / jnp.maximum(count - 1, 1))).reshape(-1)


def compute_greedy_advantages(rewards: jax.Array, greedy: jax.Array) -> jax.Array:
    """Computes how far each reward [N] is above that of its prompt's greedy completion [B].

    A row gets 0 if either reward is NaN.
    Source: ReMax (arXiv 2310.10505).
    """
    difference = rewards.reshape(len(greedy), -1) - greedy[:, None]
    return jnp.where(jnp.isnan(difference), 0.0, difference).reshape(-1)


def whiten_batch(values: jax.Array, eps: float = 1e-4, scale: bool = True) -> jax.Array:
    """Computes (x - mean) / (std + eps) over the batch [N]; 0 where x is NaN or all are equal.

    The std has ddof 1; `scale` False leaves it out.
    Source: REINFORCE++ (arXiv 2501.03262); GDPO (arXiv 2601.05242) for sums of rewards.
    """
    # The whole batch is one group.
    return compute_group_advantages(values, len(values), eps, "group" if scale else "none")


def summarize_rewards(rewards: jax.Array, group_size: int) -> dict[str, jax.Array]:
    """Returns statistics of rewards [N] by metric name; NaN marks a completion without a reward.

    `reward` and `reward_std` are the mean and the unbiased std over all valid rewards, as in TRL.
    `reward_group_std` is the mean of the groups' std. `frac_reward_zero_std` is the share of
    groups with equal rewards, among the groups with any valid reward. `not_applicable` is the
    share of completions without a reward.
    A statistic without values is NaN, not 0.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    groups = _split_into_groups(rewards, group_size)
    valid = ~jnp.isnan(groups)
    count = valid.sum(axis=1)
    std = _measure_spread(groups, valid)
    # The whole batch is one group of N here, so equal rewards give exactly 0 as well.
    batch_std = _measure_spread(rewards[None], valid.reshape(1, -1))[0]
    return {
        "reward": jnp.nanmean(rewards),
        "reward_std": jnp.where(valid.any(), batch_std, jnp.nan),
        "reward_group_std": _average_where(std, count > 1),
        "frac_reward_zero_std": _average_where((std == 0.0).astype(jnp.float32), count > 0),
        "not_applicable": jnp.isnan(rewards).mean(),
    }


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
    groups = {task: _split_into_groups(values, group_size) for task, values in rewards.items()}
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
    return _compare(
        inputs, options,
        lambda r: compute_group_advantages(r, options.group_size, options.eps, options.scale),
    )  # fmt: skip


def compare_leave_one_out(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes RLOO's advantages [N] by task; `scale` "batch" whitens them over the batch.

    Returns them and statistics by metric name.
    """

    def estimate(rewards: jax.Array) -> jax.Array:
        advantages = compute_rloo_advantages(rewards, options.group_size)
        return _whiten_valid(advantages, rewards, options)

    return _compare(inputs, options, estimate)


def compare_with_batch(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes REINFORCE++'s advantages [N] by task: each reward against the whole batch.

    Returns them and statistics by metric name.
    """
    return _compare(
        inputs, options, lambda r: whiten_batch(r, options.eps, scale=options.scale != "none")
    )


def compare_with_greedy(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes ReMax's advantages [N] by task: each reward less that of the greedy completion.

    `scale` "batch" whitens them over the batch. Returns them and statistics by metric name.

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
        sampled = groups[:, :size].reshape(-1)
        advantages = compute_greedy_advantages(sampled, groups[:, size])
        return _whiten_valid(advantages, sampled, options)

    advantages, _ = _compare(wide, dataclasses.replace(options, group_size=size + 1), estimate)
    return advantages, describe_rewards(total_rewards(inputs, options), options)


def compare_each_reward(
    inputs: RewardInputs, options: AdvantageOptions
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes GDPO's advantages [N] by task: each reward is normalised within its group.

    The weighted sums are then normalised over the batch. Returns them and statistics by metric
    name.
    """
    weights = {task: jnp.asarray(values) for task, values in options.reward_weights}
    normalized = {
        task: normalize_each(values, weights[task], options.group_size, options.eps, options.scale)
        for task, values in inputs.sampled.items()
    }
    # A sum of F normalised rewards grows with F; whitening makes its size independent of F.
    advantages = compute_joint_advantages(
        _subtract_penalties(normalized, inputs.penalties), dict(options.task_weights), options.mode,
        group_size=options.group_size, estimate=lambda r: whiten_batch(r, options.eps),
    )  # fmt: skip
    return advantages, describe_rewards(total_rewards(inputs, options), options)


def _compare(
    inputs: RewardInputs, options: AdvantageOptions, estimate: Callable[[jax.Array], jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    totals = total_rewards(inputs, options)
    advantages = compute_joint_advantages(
        _subtract_penalties(totals, inputs.penalties), dict(options.task_weights), options.mode,
        group_size=options.group_size, estimate=estimate,
    )  # fmt: skip
    return advantages, describe_rewards(totals, options)


def _whiten_valid(
    advantages: jax.Array, rewards: jax.Array, options: AdvantageOptions
) -> jax.Array:
    if options.scale == "none":
        return advantages
    return whiten_batch(jnp.where(jnp.isnan(rewards), jnp.nan, advantages), options.eps)


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


def _split_into_groups(rewards: jax.Array, group_size: int) -> jax.Array:
    rewards = jnp.asarray(rewards, jnp.float32)
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards of shape {rewards.shape}: expected [N], N a multiple of group_size "
            f"{group_size}"
        )
    return rewards.reshape(-1, group_size)


def _has_spread(groups: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns whether the valid rewards of each group differ by more than rounding, [groups, 1]."""
    highest = jnp.where(valid, groups, -jnp.inf).max(axis=1, keepdims=True)
    lowest = jnp.where(valid, groups, jnp.inf).min(axis=1, keepdims=True)
    # Rounding is relative: float32's unit at the largest magnitude of the group.
    size = jnp.where(valid, jnp.abs(groups), 0.0).max(axis=1, keepdims=True)
    return highest - lowest > ROUNDING_UNITS * jnp.finfo(jnp.float32).eps * size


def _measure_spread(groups: jax.Array, valid: jax.Array) -> jax.Array:
    """Computes the unbiased std of each group's valid rewards [groups]; 0 if they are equal."""
    # The std of equal float32 values can be a rounding error, not 0.
    return jnp.where(_has_spread(groups, valid)[:, 0], jnp.nanstd(groups, axis=1, ddof=1), 0.0)


def _average_where(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """Computes the mean of the kept values; NaN without any."""
    return jnp.where(chosen, values, 0.0).sum() / chosen.sum()
