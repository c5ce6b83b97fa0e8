"""Losses of given completions: log-probs, advantages and masks in, a sum and a count out.

Axes as in `types.py`: N completions, T choices. Every function is pure and can be called inside
jit. Losses and metrics are (sum, count), so that adding both over micro-batches or devices and
dividing once gives exactly the value of the whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SumAndCount = tuple[jax.Array, jax.Array]

# exp() of a larger log-ratio says nothing but "far away", and an infinite ratio times an
# advantage of zero would be NaN; beyond the bound the gradient is zero.
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What a loss may read of one segment; None where a stage has none."""

    logprobs: jax.Array  # [N, T] float32, of the policy; the gradient flows through them
    mask: jax.Array  # [N, T], True on the choices in the loss
    advantages: jax.Array | None = None  # [N]
    old_logprobs: jax.Array | None = None  # [N, T]; None: the policy itself
    ref_logprobs: jax.Array | None = None  # [N, T]; None: no KL penalty
    entropy: jax.Array | None = None  # [N, T], without gradient


@dataclasses.dataclass(frozen=True)
class LossConstants:
    """The numbers of a loss; hashable."""

    kl_coef: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and what its sum is divided by, which masks alone decide."""

    compute: Callable[
        [LossInputs, LossConstants], tuple[jax.Array, jax.Array, dict[str, SumAndCount]]
    ]  # -> (sum, count, metrics)
    count: Callable[[Any], jax.Array]  # mask [N, T] -> count


def clipped_policy_loss(
    inputs: LossInputs, constants: LossConstants
) -> tuple[jax.Array, jax.Array, dict[str, SumAndCount]]:
    """Returns GRPO's clipped loss: the mean over rows of the mean over kept tokens.

    l_t = -(min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coef k3_t), with
    rho = exp(logprobs - old_logprobs). Without `old_logprobs` (one update per rollout) rho is 1
    and the gradient is REINFORCE's.
    Returns (sum over rows, number of rows, metrics); sum / number is the loss. A row without a
    kept token (a truncated answer that was masked) adds 0 and is not counted. Metrics are
    token means as (sum, number of tokens): `clip_ratio/low_mean`, `clip_ratio/high_mean`,
    `clip_ratio/region_mean`; `kl` given a reference; `entropy` given one.

    Raises:
        ValueError: kl_coef is not 0 and there is no reference.

    Source: arXiv 2505.17534 eq. 2, and eq. 6 with the joint advantage; PPO (arXiv 1707.06347)
    eq. 7; metric names of TRL.
    """
    if inputs.ref_logprobs is None and constants.kl_coef != 0:
        raise ValueError(f"kl_coef {constants.kl_coef} needs ref_logprobs, and none were given")
    assert inputs.advantages is not None
    mask = jnp.asarray(inputs.mask, bool)
    logprobs = jnp.where(mask, inputs.logprobs, 0.0)  # padding may hold anything, -inf included
    advantages = jax.lax.stop_gradient(inputs.advantages)[:, None]
    ratio = jnp.exp(_log_ratio(logprobs, inputs.old_logprobs, mask))
    low, high = 1.0 - constants.clip_low, 1.0 + constants.clip_high
    clipped = jnp.clip(ratio, low, high)
    per_token = -jnp.minimum(ratio * advantages, clipped * advantages)
    metrics = _clip_metrics(ratio, advantages, mask, constants.clip_low, constants.clip_high)
    if inputs.ref_logprobs is not None:
        ref_logprobs = jax.lax.stop_gradient(jnp.where(mask, inputs.ref_logprobs, 0.0))
        kl = k3_kl(logprobs, ref_logprobs)
        per_token = per_token + constants.kl_coef * kl
        metrics["kl"] = _token_sum(kl, mask)
    if inputs.entropy is not None:
        metrics["entropy"] = _token_sum(inputs.entropy, mask)
    row_tokens = mask.sum(axis=1)
    per_row = jnp.where(mask, per_token, 0.0).sum(axis=1) / jnp.maximum(row_tokens, 1)
    return per_row.sum(), (row_tokens > 0).sum().astype(jnp.float32), metrics


def negative_log_likelihood(
    inputs: LossInputs, constants: LossConstants
) -> tuple[jax.Array, jax.Array, dict[str, SumAndCount]]:
    """Returns the next-token loss of given completions: the mean over kept tokens."""
    tokens = count_tokens(inputs.mask)
    total = -jnp.where(inputs.mask, inputs.logprobs, 0.0).sum()
    metrics = {"nll": (total, tokens)}
    if inputs.entropy is not None:
        metrics["entropy"] = jnp.where(inputs.mask, inputs.entropy, 0.0).sum(), tokens
    return total, tokens, metrics


def count_rows(mask: jax.Array) -> jax.Array:
    """Returns the number of rows [N, T] with a kept token."""
    return mask.any(axis=-1).sum().astype(jnp.float32)


def count_tokens(mask: jax.Array) -> jax.Array:
    """Returns the number of kept tokens."""
    return mask.sum().astype(jnp.float32)


CLIPPED_POLICY_LOSS = Loss(clipped_policy_loss, count_rows)
NEGATIVE_LOG_LIKELIHOOD = Loss(negative_log_likelihood, count_tokens)


def k3_kl(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Returns the estimate exp(d) - d - 1 of KL(policy || reference), d = ref - policy, per token.

    Unbiased in value under samples of the policy, never negative, 0 where both agree.
    Source: Schulman, "Approximating KL divergence" (estimator k3).
    """
    delta = jnp.clip(ref_logprobs - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(delta) - delta


def mask_truncated(mask: jax.Array, ended: jax.Array) -> jax.Array:
    """Drops every token of the answers that never reached EOS.

    `mask` [N, T] bool, `ended` [N] bool (True: the answer closed with EOS). For text only:
    never apply it to image tokens, which always fill their grid and are never truncated.
    """
    return jnp.asarray(mask, bool) & jnp.asarray(ended, bool)[:, None]


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


def _log_ratio(logprobs: jax.Array, old_logprobs: jax.Array | None, mask: jax.Array) -> jax.Array:
    old = logprobs if old_logprobs is None else jnp.where(mask, old_logprobs, 0.0)
    return jnp.clip(logprobs - jax.lax.stop_gradient(old), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clip_metrics(
    ratio: jax.Array, advantages: jax.Array, mask: jax.Array, clip_low: float, clip_high: float
) -> dict[str, SumAndCount]:
    """Shares of tokens whose gradient the clip removed; `region` is either side."""
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    sides = {"low": low, "high": high, "region": low | high}
    return {f"clip_ratio/{side}_mean": _token_sum(hit, mask) for side, hit in sides.items()}


def _token_sum(values: jax.Array, mask: jax.Array) -> SumAndCount:
    total = jnp.where(mask, jax.lax.stop_gradient(values), 0.0).sum()
    return total.astype(jnp.float32), mask.sum().astype(jnp.float32)
