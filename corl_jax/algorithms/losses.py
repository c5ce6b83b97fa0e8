"""Losses of given completions: log-probs, advantages and masks in, a sum and a count out.

Axes as in `types.py`: N completions, T choices. Every function is pure and can be called inside
jit. Losses and metrics are (sum, count). Both are added over micro-batches and devices and divided
once, which gives exactly the value of the whole batch.

The equations of CoRL (arXiv 2505.17534): eq. 2 in `clipped_policy_loss`, which is eq. 6 when the
advantages are those of the unified reward and `kl_coef` is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SumAndCount = tuple[jax.Array, jax.Array]
Extremes = tuple[dict[str, jax.Array], dict[str, jax.Array]]
"""(largest, smallest) by metric name; none of them is negative."""

# exp() of a larger log-ratio says nothing but "far away", and an infinite ratio times an
# advantage of zero would be NaN; beyond the bound the gradient is zero.
MAX_LOG_RATIO = 20.0

NUM_RATIO_BINS, RATIO_RANGE = 50, (0.5, 1.5)
"""Bins of the histogram of importance ratios; the outer bins also hold what is beyond them."""


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """The arrays of one segment that a loss may read; None where a stage has none."""

    logprobs: jax.Array  # [N, T] float32, of the policy; the gradient flows through them
    mask: jax.Array  # [N, T], True on the choices in the loss
    advantages: jax.Array | None = None  # [N]
    old_logprobs: jax.Array | None = None  # [N, T]; None: the policy itself
    ref_logprobs: jax.Array | None = None  # [N, T]; None: no KL penalty
    entropy: jax.Array | None = None  # [N, T], without gradient


@dataclasses.dataclass(frozen=True)
class LossConstants:
    """The constants of a loss; hashable, because jit takes them as a static argument."""

    kl_coef: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss, and the count that divides its sum."""

    # The count reads masks only, so it is known before any log-prob: the first micro-batch can be
    # scaled by the count of the whole batch.

    compute: Callable[
        [LossInputs, LossConstants], tuple[jax.Array, jax.Array, dict[str, SumAndCount]]
    ]  # -> (sum, count, metrics)
    count: Callable[[Any], jax.Array]  # mask [N, T] -> count
    # -> metrics whose largest and smallest value over rows counts; None: there are none
    extremes: Callable[[LossInputs, LossConstants], Extremes] | None = None


def clipped_policy_loss(
    inputs: LossInputs, constants: LossConstants
) -> tuple[jax.Array, jax.Array, dict[str, SumAndCount]]:
    """Computes GRPO's clipped loss: the mean over rows of the mean over kept tokens.

    l_t = -(min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coef k3_t), with
    rho = exp(logprobs - old_logprobs). Without `old_logprobs` (one update per rollout) rho is 1
    and the gradient is REINFORCE's.
    Returns (sum over rows, number of rows, metrics); sum / number is the loss. A row without a
    kept token adds 0 and is not counted. Metrics are (sum, number of tokens):
    `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean`; `kl` with a
    reference; `entropy` with entropies.

    Raises:
        ValueError: kl_coef is not 0 and there is no reference.

    Source: arXiv 2505.17534 eq. 2, and eq. 6 with the joint advantage; PPO (arXiv 1707.06347)
    eq. 7; metric names of TRL.
    """
    if inputs.ref_logprobs is None and constants.kl_coef != 0:
        raise ValueError(f"kl_coef {constants.kl_coef} needs ref_logprobs, and none were given")
    assert inputs.advantages is not None
    mask = jnp.asarray(inputs.mask, bool)
    # Padding may hold anything, -inf included, and -inf * 0 would be NaN in the gradient.
    logprobs = jnp.where(mask, inputs.logprobs, 0.0)
    advantages = jax.lax.stop_gradient(inputs.advantages)[:, None]
    # rho of eq. 2 and 6. With one update per rollout it is 1 in value but not in gradient.
    ratio = jnp.exp(_compute_log_ratio(logprobs, inputs.old_logprobs, mask))
    low, high = 1.0 - constants.clip_low, 1.0 + constants.clip_high
    # The clip is PPO's. Eq. 2 has none, and the released code never uses its clip range (Q9).
    clipped = jnp.clip(ratio, low, high)
    per_token = -jnp.minimum(ratio * advantages, clipped * advantages)
    metrics = _measure_clipping(ratio, advantages, mask, constants.clip_low, constants.clip_high)
    if inputs.ref_logprobs is not None:  # the KL term of eq. 2, which eq. 6 does not have
        ref_logprobs = jax.lax.stop_gradient(jnp.where(mask, inputs.ref_logprobs, 0.0))
        kl = k3_kl(logprobs, ref_logprobs)
        per_token = per_token + constants.kl_coef * kl
        metrics["kl"] = _sum_over_tokens(kl, mask)
    if inputs.entropy is not None:
        metrics["entropy"] = _sum_over_tokens(inputs.entropy, mask)
    # Every row counts once, whatever its length, as in the released code. A row without tokens
    # (a truncated answer that was masked) would be 0 / 0.
    row_tokens = mask.sum(axis=1)
    per_row = jnp.where(mask, per_token, 0.0).sum(axis=1) / jnp.maximum(row_tokens, 1)
    return per_row.sum(), (row_tokens > 0).sum().astype(jnp.float32), metrics


def find_clip_extremes(inputs: LossInputs, constants: LossConstants) -> Extremes:
    """Returns the largest and the smallest share of clipped tokens in one completion.

    The smallest is infinite if no row has a token.
    """
    assert inputs.advantages is not None
    mask = jnp.asarray(inputs.mask, bool)
    logprobs = jnp.where(mask, inputs.logprobs, 0.0)
    ratio = jnp.exp(_compute_log_ratio(logprobs, inputs.old_logprobs, mask))
    hits = _find_clipped(ratio, inputs.advantages[:, None], constants.clip_low, constants.clip_high)
    tokens = mask.sum(axis=1)
    low, high = [
        (hits[side] & mask).sum(axis=1) / jnp.maximum(tokens, 1) for side in ("low", "high")
    ]
    smallest = jnp.where(tokens > 0, low, jnp.inf).min()
    return {"clip_ratio/high_max": high.max()}, {"clip_ratio/low_min": smallest}


def negative_log_likelihood(
    inputs: LossInputs, constants: LossConstants
) -> tuple[jax.Array, jax.Array, dict[str, SumAndCount]]:
    """Computes the next-token loss of given completions: the mean over kept tokens."""
    tokens = count_tokens(inputs.mask)
    total = -jnp.where(inputs.mask, inputs.logprobs, 0.0).sum()
    metrics = {"nll": (total, tokens)}
    if inputs.entropy is not None:
        metrics["entropy"] = jnp.where(inputs.mask, inputs.entropy, 0.0).sum(), tokens
    return total, tokens, metrics


def count_rows(mask: jax.Array) -> jax.Array:
    """Returns the number of rows of a mask [N, T] with a kept token."""
    # float32 like the sums, so that both are added over micro-batches in one tree.
    return mask.any(axis=-1).sum().astype(jnp.float32)


def count_tokens(mask: jax.Array) -> jax.Array:
    """Returns the number of kept tokens of a mask [N, T]."""
    return mask.sum().astype(jnp.float32)


CLIPPED_POLICY_LOSS = Loss(clipped_policy_loss, count_rows, find_clip_extremes)
NEGATIVE_LOG_LIKELIHOOD = Loss(negative_log_likelihood, count_tokens)


def k3_kl(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Computes the estimate exp(d) - d - 1 of KL(policy || reference) per token, d = ref - policy.

    It is unbiased in value under samples of the policy, never negative, and 0 where both agree.
    Source: Schulman, "Approximating KL divergence" (estimator k3).
    """
    delta = jnp.clip(ref_logprobs - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1: exp(d) - 1 loses all digits of a small d in float32.
    return jnp.expm1(delta) - delta


def mask_truncated(mask: jax.Array, ended: jax.Array) -> jax.Array:
    """Returns the mask without the tokens of answers that never reached EOS.

    `mask` [N, T] bool; `ended` [N] bool is True for an answer that closed with EOS.
    """
    # For texts only. Image codes always fill their grid and have no EOS: all would be dropped.
    return jnp.asarray(mask, bool) & jnp.asarray(ended, bool)[:, None]


def logprob_difference(
    sampler_logprobs: jax.Array, trainer_logprobs: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Measures |sampler - trainer| of the log-probs of kept tokens. All arrays are [N, T].

    Returns (sum, number of tokens, maximum). Over micro-batches the first two are added, and the
    third one is reduced by the maximum. A large value means that the rollouts come from another
    policy than the trained one.
    """
    mask = jnp.asarray(mask, bool)
    difference = jnp.where(mask, sampler_logprobs, 0.0) - jnp.where(mask, trainer_logprobs, 0.0)
    difference = jax.lax.stop_gradient(jnp.abs(difference))
    return *_sum_over_tokens(difference, mask), difference.max(initial=0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImportanceRatio:
    """Statistics of exp(trainer - sampler) over kept tokens. `mean` and `shares` add up."""

    mean: SumAndCount
    shares: SumAndCount  # tokens of each bin [NUM_RATIO_BINS], and of all bins
    smallest: jax.Array  # infinite without tokens
    largest: jax.Array  # 0 without tokens


def measure_importance_ratio(
    sampler_logprobs: jax.Array, trainer_logprobs: jax.Array, mask: jax.Array
) -> ImportanceRatio:
    """Measures the probability of each kept token under the trainer over that under the sampler.

    All arrays are [N, T]. The ratio is 1 where both agree. Source: metric names of TRL.
    """
    mask = jnp.asarray(mask, bool)
    log_ratio = jnp.where(mask, trainer_logprobs, 0.0) - jnp.where(mask, sampler_logprobs, 0.0)
    log_ratio = jax.lax.stop_gradient(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    ratio = jnp.exp(log_ratio)
    # Comparisons with the inner edges, because a scatter-add into bins is slow on accelerators.
    # Edges 1, 2 and ratios 0.5, 1.5, 1.7: below [1, 3], and with 0 and all [0, 1, 3, 3], whose
    # differences are the bins [1, 2, 0].
    inner_edges = jnp.linspace(*RATIO_RANGE, NUM_RATIO_BINS + 1)[1:-1]
    is_below = mask[..., None] & (ratio[..., None] < inner_edges)
    below = is_below.sum(axis=(0, 1)).astype(jnp.float32)
    total, tokens = _sum_over_tokens(ratio, mask)
    bins = jnp.diff(below, prepend=0.0, append=tokens)
    return ImportanceRatio(
        mean=(total, tokens), shares=(bins, tokens),
        smallest=jnp.where(mask, ratio, jnp.inf).min(initial=jnp.inf),
        largest=jnp.where(mask, ratio, 0.0).max(initial=0.0),
    )  # fmt: skip


def _compute_log_ratio(
    logprobs: jax.Array, old_logprobs: jax.Array | None, mask: jax.Array
) -> jax.Array:
    # logprobs - stop_gradient(logprobs) is 0 with the gradient of logprobs: exp() of it is 1, and
    # its gradient is REINFORCE's.
    old = logprobs if old_logprobs is None else jnp.where(mask, old_logprobs, 0.0)
    return jnp.clip(logprobs - jax.lax.stop_gradient(old), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _measure_clipping(
    ratio: jax.Array, advantages: jax.Array, mask: jax.Array, clip_low: float, clip_high: float
) -> dict[str, SumAndCount]:
    """Returns the shares of tokens whose gradient the clip removed; `region` is either side."""
    sides = _find_clipped(ratio, advantages, clip_low, clip_high)
    sides["region"] = sides["low"] | sides["high"]
    return {f"clip_ratio/{side}_mean": _sum_over_tokens(hit, mask) for side, hit in sides.items()}


def _find_clipped(
    ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> dict[str, jax.Array]:
    """Returns whether the clip removed the gradient of each token [N, T], by side."""
    # min() takes the clipped term only if the step would go further away from the old policy.
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return {"low": low, "high": high}


def _sum_over_tokens(values: jax.Array, mask: jax.Array) -> SumAndCount:
    # Metrics must not add to the gradient of the loss that they are returned with.
    total = jnp.where(mask, jax.lax.stop_gradient(values), 0.0).sum()
    return total.astype(jnp.float32), mask.sum().astype(jnp.float32)
