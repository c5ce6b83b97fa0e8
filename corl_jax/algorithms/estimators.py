"""Advantages of completions with one reward each: every reward against a baseline.

Axes as in `types.py`: N completions, prompt-major, so that a group is `group_size` neighbouring
rows. Every function is pure and can be called inside jit. The module `advantages` adds up several
rewards and tasks before.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Scale = Literal["group", "batch", "none"]
"""The rewards whose standard deviation divides advantages: of the group, of the batch, or none."""

# Rewards of one group that differ by less than rounding are the same reward: dividing the
# difference by the std would turn rounding into a learning signal.
ROUNDING_UNITS = 4


def compute_group_advantages(
    rewards: jax.Array, group_size: int, eps: float = 1e-4, scale: Scale = "group", ddof: int = 1
) -> jax.Array:
    """Computes the advantage of each completion in its group [N]: (r - mean) / (std + eps).

    `rewards` [N] is NaN where no reward applies. Such a row does not enter the mean and the std
    of its group, and its advantage is 0. Groups with fewer than two valid rewards, or whose
    rewards are equal, get exactly 0. The std is that of the group, or with `scale` "batch" that of
    all valid rewards; "none" leaves it out (Dr.GRPO). The sum of squares of n rewards is divided by
    n - ddof.
    Raises: ValueError if N is not a multiple of the group size.
    Source: arXiv 2505.17534 eq. 1; DeepSeekMath (arXiv 2402.03300) eq. 4 for the form; Dr.GRPO
    (arXiv 2503.20783); the std of the batch is an option of TRL (`scale_rewards`) and, with ddof 0,
    `global_std` of Flow-GRPO (arXiv 2505.05470).
    """
    groups = split_into_groups(rewards, group_size)
    valid = ~jnp.isnan(groups)
    count = valid.sum(axis=1, keepdims=True)
    # NaN * 0 is NaN, so the values themselves are replaced before any sum.
    rewards_or_zero = jnp.where(valid, groups, 0.0)
    mean = rewards_or_zero.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(valid, groups - mean, 0.0)
    # ddof 1: torch's std, which the released code uses, is the unbiased one (Q29).
    std = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / jnp.maximum(count - ddof, 1))
    informative = (count > 1) & _has_spread(groups, valid)
    std = jnp.where(informative, std, 0.0)
    if scale == "batch":
        std = _measure_spread(groups.reshape(1, -1), valid.reshape(1, -1), ddof)
    # Eq. 1. The paper has no eps; the released code adds 1e-4.
    advantages = jnp.where(informative, centred if scale == "none" else centred / (std + eps), 0.0)
    return advantages.reshape(-1)


def compute_rloo_advantages(rewards: jax.Array, group_size: int) -> jax.Array:
    """Computes how far each reward is above the mean of the others of its group [N].

    `rewards` [N] is NaN where no reward applies; such a row is left out of the others' means and
    gets 0, as does a row without others. Without NaN this is G / (G - 1) of the centred reward.
    Source: RLOO (arXiv 2402.14740).
    """
    groups = split_into_groups(rewards, group_size)
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
    Source: REINFORCE++ (arXiv 2501.03262).
    """
    # The whole batch is one group.
    return compute_group_advantages(values, len(values), eps, "group" if scale else "none")


def divide_by_spread(advantages: jax.Array, valid: jax.Array, eps: float = 1e-4) -> jax.Array:
    """Computes A / (s + eps) over the batch [N], s^2 = sum(A^2) / (n - 1) over n valid rows.

    For advantages whose mean is 0 (RLOO's), s is their std with ddof 1. No mean is subtracted, so
    an advantage of exactly 0 stays 0.
    Source: option `normalize_advantages` of TRL's RLOO.
    """
    # ReMax's advantages have another mean: subtracting it would move the greedy baseline, and a std
    # around it would be 0 where all are equal.
    squares = jnp.where(valid, advantages, 0.0) ** 2
    return advantages / (jnp.sqrt(squares.sum() / jnp.maximum(valid.sum() - 1, 1)) + eps)


def summarize_rewards(rewards: jax.Array, group_size: int) -> dict[str, jax.Array]:
    """Returns statistics of rewards [N] by metric name; NaN marks a completion without a reward.

    `reward` and `reward_std` are the mean and the unbiased std over all valid rewards, as in TRL.
    `reward_group_std` is the mean of the groups' std. `frac_reward_zero_std` is the share of
    groups with equal rewards, among the groups with any valid reward. `not_applicable` is the
    share of completions without a reward.
    A statistic without values is NaN, not 0.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    groups = split_into_groups(rewards, group_size)
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


def split_into_groups(rewards: jax.Array, group_size: int) -> jax.Array:
    """Returns rewards [N] as float32 [groups, G].

    Raises: ValueError if N is not a multiple of the group size.
    """
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


def _measure_spread(groups: jax.Array, valid: jax.Array, ddof: int = 1) -> jax.Array:
    """Computes the std of each group's valid rewards [groups]; 0 if they are equal."""
    # The std of equal float32 values can be a rounding error, not 0.
    return jnp.where(_has_spread(groups, valid)[:, 0], jnp.nanstd(groups, axis=1, ddof=ddof), 0.0)


def _average_where(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """Computes the mean of the kept values; NaN without any."""
    return jnp.where(chosen, values, 0.0).sum() / chosen.sum()
