"""Group-relative advantages, KL and the clipped policy loss: arrays in, arrays out.

Axes as in `types.py`: N completions, prompt-major, so that a group is `group_size` neighbouring
rows; T tokens. Every function is pure and can be called inside jit. Losses and metrics are
returned as (sum, denominator), so that adding both over micro-batches or devices and dividing
once gives exactly the value of the whole batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

SumAndDenominator = tuple[jax.Array, jax.Array]

ADVANTAGE_MODES = ("unified_reward", "unified_advantage", "separate")

# exp() of a larger log-ratio says nothing but "far away", and an infinite ratio times an
# advantage of zero would be NaN; beyond the bound the gradient is zero.
MAX_LOG_RATIO = 20.0

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
    Source: docs/explained/method.md; DeepSeekMath (arXiv 2402.03300) eq. 4 for the form.
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
    t2i_reward: jax.Array | None,
    mm2t_reward: jax.Array | None,
    mode: str = "unified_reward",
    *,
    group_size: int,
    mm2t_weight: float = 0.8,
    eps: float = 1e-4,
    scale: bool = True,
    compared: bool = False,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The advantages of the image and the text completions, from the rewards of both tasks.

    Row i of both rewards belongs to the i-th pair (image, text) of the same prompt.
    `unified_reward`: one advantage of r = r_t2i + w r_mm2t, for both. `unified_advantage`:
    A = A_t2i + w A_mm2t, for both. `separate`: each task its own, the weight unused.
    A task that is None is absent: the other stands alone, unweighted, and the absent task's
    advantage is None. A group in which one task has no valid reward is judged by the other
    task; otherwise a row that lacks either reward is left out of a unified reward.
    `compared` says that the rewards come from `normalize_each`: totals are then normalised over
    the batch instead of within groups.
    Raises: ValueError if the mode is unknown or both tasks are absent.
    Source: docs/explained/method.md; arXiv 2505.17534 eq. 5.
    """
    if mode not in ADVANTAGE_MODES:
        raise ValueError(f"advantage mode {mode!r}: expected one of {', '.join(ADVANTAGE_MODES)}")

    def advantages(rewards: jax.Array) -> jax.Array:
        if compared:
            return normalize_batch(rewards, eps)
        return group_advantages(rewards, group_size, eps, scale)[0]

    if t2i_reward is None:
        if mm2t_reward is None:
            raise ValueError("joint_advantages needs the rewards of at least one task")
        return None, advantages(mm2t_reward)
    if mm2t_reward is None:
        return advantages(t2i_reward), None
    if mode == "unified_reward":
        shared = advantages(unified_reward(t2i_reward, mm2t_reward, mm2t_weight, group_size))
        return shared, shared
    a_t2i, a_mm2t = advantages(t2i_reward), advantages(mm2t_reward)
    if mode == "unified_advantage":
        shared = a_t2i + mm2t_weight * a_mm2t
        return shared, shared
    return a_t2i, a_mm2t


def unified_reward(
    t2i_reward: jax.Array, mm2t_reward: jax.Array, mm2t_weight: float, group_size: int
) -> jax.Array:
    """r_t2i + w r_mm2t [N], where a task without any valid reward in a group counts as 0.

    A row that lacks a reward which its neighbours have is NaN: a sum with a part missing
    would look like a bad completion. NaN too where a group has no reward at all.
    """
    t2i, mm2t = _as_groups(t2i_reward, group_size), _as_groups(mm2t_reward, group_size)
    t2i_absent = jnp.isnan(t2i).all(axis=1, keepdims=True)
    mm2t_absent = jnp.isnan(mm2t).all(axis=1, keepdims=True)
    total = jnp.where(t2i_absent, 0.0, t2i) + mm2t_weight * jnp.where(mm2t_absent, 0.0, mm2t)
    return jnp.where(t2i_absent & mm2t_absent, jnp.nan, total).reshape(-1)


def k3_kl(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """The estimate exp(d) - d - 1 of KL(policy || reference), d = ref - policy, per token.

    Unbiased in value under samples of the policy, never negative, 0 where both agree.
    Source: docs/explained/method.md; Schulman, "Approximating KL divergence" (estimator k3).
    """
    delta = jnp.clip(ref_logprobs - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(delta) - delta


def mask_truncated(mask: jax.Array, ended: jax.Array) -> jax.Array:
    """Drops every token of the answers that never reached EOS.

    `mask` [N, T] bool, `ended` [N] bool (True: the answer closed with EOS). For text only:
    never apply it to image tokens, which always fill their grid and are never truncated.
    """
    return jnp.asarray(mask, bool) & jnp.asarray(ended, bool)[:, None]


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    ref_logprobs: jax.Array | None = None,
    kl_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    entropy: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, SumAndDenominator]]:
    """The clipped GRPO loss of one task: the mean over rows of the mean over kept tokens.

    l_t = -(min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coef k3_t), with
    rho = exp(logprobs - old_logprobs). `logprobs`, `old_logprobs`, `ref_logprobs`, `entropy`
    [N, T] float32; `advantages` [N]; `mask` [N, T], True on kept tokens. `old_logprobs` None
    means the policy itself (one update per rollout): rho is 1 and the gradient is REINFORCE's.
    Returns (sum over rows, number of rows, metrics); sum / number is the loss. A row without a
    kept token (a truncated answer that was masked) adds 0 and is not counted. Metrics are
    token means as (sum, number of tokens): `clip_ratio/low_mean`, `clip_ratio/high_mean`,
    `clip_ratio/region_mean`; `kl` given a reference; `entropy` given one.
    Raises: ValueError if kl_coef is not 0 and there is no reference.
    Source: docs/explained/method.md; PPO (arXiv 1707.06347) eq. 7; metric names of TRL.
    """
    if ref_logprobs is None and kl_coef != 0:
        raise ValueError(f"kl_coef {kl_coef} needs ref_logprobs, and none were given")
    mask = jnp.asarray(mask, bool)
    logprobs = jnp.where(mask, logprobs, 0.0)  # padding may hold anything, -inf included
    advantages = jax.lax.stop_gradient(advantages)[:, None]
    ratio = jnp.exp(_log_ratio(logprobs, old_logprobs, mask))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    per_token = -jnp.minimum(ratio * advantages, clipped * advantages)
    metrics = _clip_metrics(ratio, advantages, mask, clip_low, clip_high)
    if ref_logprobs is not None:
        ref_logprobs = jax.lax.stop_gradient(jnp.where(mask, ref_logprobs, 0.0))
        kl = k3_kl(logprobs, ref_logprobs)
        per_token = per_token + kl_coef * kl
        metrics["kl"] = _token_sum(kl, mask)
    if entropy is not None:
        metrics["entropy"] = _token_sum(entropy, mask)
    row_tokens = mask.sum(axis=1)
    per_row = jnp.where(mask, per_token, 0.0).sum(axis=1) / jnp.maximum(row_tokens, 1)
    return per_row.sum(), (row_tokens > 0).sum().astype(jnp.float32), metrics


def logprob_difference(
    sampler_logprobs: jax.Array, trainer_logprobs: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How far the sampler's log-probs are from the trainer's: |difference| over kept tokens.

    All [N, T]. Returns (sum, number of tokens, maximum); the first two are added over
    micro-batches, of the third one takes the maximum. Away from 0, the rollouts come from
    another policy than the one that is trained.
    """
    mask = jnp.asarray(mask, bool)
    difference = jnp.where(mask, sampler_logprobs, 0.0) - jnp.where(mask, trainer_logprobs, 0.0)
    difference = jax.lax.stop_gradient(jnp.abs(difference))
    return *_token_sum(difference, mask), difference.max(initial=0.0)


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


def _log_ratio(logprobs: jax.Array, old_logprobs: jax.Array | None, mask: jax.Array) -> jax.Array:
    old = logprobs if old_logprobs is None else jnp.where(mask, old_logprobs, 0.0)
    return jnp.clip(logprobs - jax.lax.stop_gradient(old), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clip_metrics(
    ratio: jax.Array, advantages: jax.Array, mask: jax.Array, clip_low: float, clip_high: float
) -> dict[str, SumAndDenominator]:
    """Shares of tokens whose gradient the clip removed; `region` is either side."""
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    sides = {"low": low, "high": high, "region": low | high}
    return {f"clip_ratio/{side}_mean": _token_sum(hit, mask) for side, hit in sides.items()}


def _token_sum(values: jax.Array, mask: jax.Array) -> SumAndDenominator:
    total = jnp.where(mask, jax.lax.stop_gradient(values), 0.0).sum()
    return total.astype(jnp.float32), mask.sum().astype(jnp.float32)
