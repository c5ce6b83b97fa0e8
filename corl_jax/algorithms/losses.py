"""Losses of given completions: log-probs, advantages and masks in, a sum and a count out.

Axes as in `types.py`: N completions, T choices. Every function is pure and can be called inside
jit. Losses and metrics are (sum, count). Both are added over micro-batches and devices and divided
once, which gives exactly the value of the whole batch.

A loss of reinforcement learning is a function that gives a loss to each token, and
`reduce_policy_loss`, which adds the KL penalty and reduces tokens to one number.

The equations of CoRL (arXiv 2505.17534): eq. 2 in `clip_token_ratios`, which is eq. 6 when the
advantages are those of the unified reward and `kl_coef` is 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from corl_jax.algorithms.divergences import KlEstimator, estimate_kl, k3_kl
from corl_jax.algorithms.ratios import (
    MAX_LOG_RATIO,
    SumAndCount,
    find_clipped,
    measure_clipping,
    sum_over_tokens,
)

Extremes = tuple[dict[str, jax.Array], dict[str, jax.Array]]
"""(largest, smallest) by metric name; none of them is negative."""

Reduction = Literal["sequence_mean", "token_mean", "constant"]
"""How the losses of tokens become one number; see `count_terms`."""


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """The arrays of one segment that a loss may read; None where a stage has none."""

    logprobs: jax.Array  # [N, T] float32, of the policy; the gradient flows through them
    mask: jax.Array  # [N, T], True on the choices in the loss
    advantages: jax.Array | None = None  # [N]
    old_logprobs: jax.Array | None = None  # [N, T]; None: the policy itself
    ref_logprobs: jax.Array | None = None  # [N, T]; None: no KL penalty
    entropy: jax.Array | None = None  # [N, T], without gradient
    # [N, T], as the sampler recorded them; read for `importance_cap` alone
    sampler_logprobs: jax.Array | None = None
    weights: jax.Array | None = None  # [N, T], factors of the tokens' losses; None: all 1
    kl: jax.Array | None = None  # [N, T] exact divergences, which no estimate then replaces
    # [N, T], raised beside the log-probs of given completions; see `flow.alignment`
    alignment: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class LossConstants:
    """The constants of a loss; hashable, because jit takes them as a static argument."""

    kl_coef: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    reduction: Reduction = "sequence_mean"
    kl_estimator: KlEstimator = "k3"
    dual_clip: float | None = None  # largest ratio of a token with a negative advantage
    importance_cap: float | None = None  # largest factor that corrects for the sampler
    advantage_clip: float | None = None  # largest size of an advantage
    alignment_weight: float = 0.0  # of `LossInputs.alignment`


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss, and the count that divides its sum."""

    # The count reads masks only, so it is known before any log-prob: the first micro-batch can be
    # scaled by the count of the whole batch.

    compute: Callable[
        [LossInputs, LossConstants], tuple[jax.Array, jax.Array, dict[str, SumAndCount]]
    ]  # -> (sum, count, metrics)
    count: Callable[[Any, LossConstants], jax.Array]  # (mask [N, T], constants) -> count
    # -> metrics whose largest and smallest value over rows counts; None: there are none
    extremes: Callable[[LossInputs, LossConstants], Extremes] | None = None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a loss of single tokens reads; 0 at masked places."""

    logprobs: jax.Array  # [N, T] of the policy, with gradient
    log_ratio: jax.Array  # [N, T] policy against old policy, with gradient
    advantages: jax.Array  # [N, 1]
    mask: jax.Array  # [N, T] bool


TokenLoss = Callable[[Tokens, LossConstants], tuple[jax.Array, jax.Array | None]]
"""(tokens, constants) -> (losses [N, T], ratios [N, T] that were clipped, or None)."""


def clip_token_ratios(
    tokens: Tokens, constants: LossConstants
) -> tuple[jax.Array, jax.Array | None]:
    """Computes -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), and rho [N, T].

    rho = exp(logprobs - old_logprobs). Without old log-probs (one update per rollout) rho is 1 and
    the gradient is that of REINFORCE. `dual_clip` bounds rho in the first term, which matters for
    negative advantages alone.
    Source: arXiv 2505.17534 eq. 2, and eq. 6 with the joint advantage; PPO (arXiv 1707.06347)
    eq. 7; dual clip (arXiv 1912.09729); a higher `clip_high`: DAPO (arXiv 2503.14476).
    """
    # The clip is PPO's. Eq. 2 has none, and the released code never uses its clip range (Q9).
    ratio = jnp.exp(tokens.log_ratio)
    return _clip(ratio, tokens.advantages, constants), ratio


def clip_mean_ratios(
    tokens: Tokens, constants: LossConstants
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the clipped loss of s = exp(mean of the row's log-ratios) for each token, and s.

    Source: GSPO (arXiv 2507.18071), with the gradient of each token apart as in its GSPO-token.
    """
    counts = jnp.maximum(tokens.mask.sum(axis=1, keepdims=True), 1)
    return _clip_row_ratio(tokens, constants, tokens.log_ratio.sum(axis=1, keepdims=True) / counts)


def clip_sequence_ratios(
    tokens: Tokens, constants: LossConstants
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the clipped loss of the ratio of the whole completion for each token, and it.

    The ratio is exp(sum of the row's log-ratios). The loss is meant for the reduction
    `sequence_mean`, with which each token of a row has the gradient A / N, whatever the row's
    length.
    Source: RLOO (arXiv 2402.14740), which sees a completion as one action.
    """
    counts = jnp.maximum(tokens.mask.sum(axis=1, keepdims=True), 1)
    total = tokens.log_ratio.sum(axis=1, keepdims=True)
    # The mean over n tokens divides by n, which the ratio of a whole completion must not see.
    return _clip_row_ratio(tokens, constants, total, token_weight=counts)


def weigh_logprobs_by_ratio(
    tokens: Tokens, constants: LossConstants
) -> tuple[jax.Array, jax.Array | None]:
    """Computes -stop_gradient(min(rho, 1 + clip_high)) A logprob of each token, and rho.

    A large ratio is bounded, but its token keeps a gradient. `clip_low` is not read.
    Source: CISPO, MiniMax-M1 (arXiv 2506.13585). TRL's `epsilon_high` of this loss is
    the bound itself, here 1 + clip_high.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(tokens.log_ratio))
    bounded = jnp.minimum(ratio, 1.0 + constants.clip_high)
    return -bounded * tokens.advantages * tokens.logprobs, ratio


def weigh_logprobs(tokens: Tokens, constants: LossConstants) -> tuple[jax.Array, jax.Array | None]:
    """Computes -A logprob of each token, REINFORCE's loss; there is no ratio.

    Source: ReMax (arXiv 2310.10505).
    """
    return -tokens.advantages * tokens.logprobs, None


def _clip(ratio: jax.Array, advantages: jax.Array, constants: LossConstants) -> jax.Array:
    clipped = jnp.clip(ratio, 1.0 - constants.clip_low, 1.0 + constants.clip_high)
    if constants.dual_clip is not None:
        # For A < 0 and a large rho the minimum is rho A, without a bound. With rho <= c it is at
        # least c A. For A > 0 the clip stops before c, which is above 1 + clip_high.
        ratio = jnp.minimum(ratio, constants.dual_clip)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def _clip_row_ratio(
    tokens: Tokens, constants: LossConstants, log_ratio: jax.Array, token_weight: Any = 1
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the clipped loss of exp(log_ratio) of each row [N, 1] at each token, and the ratio.

    The gradient at a token is `token_weight` times the ratio times that of the token's log-prob.
    """
    # One ratio for all tokens, but each with the gradient of its own log-prob: the sum over a row
    # is the same, and factors of single tokens (`LossInputs.weights`) act on those tokens.
    total = jax.lax.stop_gradient(log_ratio)
    # A sum of many bounded log-ratios can be large again.
    bounded = jnp.clip(total, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    token_part = token_weight * (tokens.log_ratio - jax.lax.stop_gradient(tokens.log_ratio))
    ratio = jnp.exp(bounded + jnp.where(total == bounded, token_part, 0.0))
    return _clip(ratio, tokens.advantages, constants), ratio


def reduce_policy_loss(
    token_loss: TokenLoss, inputs: LossInputs, constants: LossConstants
) -> tuple[jax.Array, jax.Array, dict[str, SumAndCount]]:
    """Computes the loss of a batch from that of each token, with the KL penalty.

    loss = reduction of (w l_t + kl_coef KL_t) over kept tokens. w is the token's weight, times
    min(exp(old - sampler), importance_cap) with such a cap.
    Returns (sum, count, metrics); sum / count is the loss. See `count_terms` for the reductions.
    Metrics are (sum, number of tokens): `clip_ratio/low_mean`, `clip_ratio/high_mean`,
    `clip_ratio/region_mean`; `kl` (k3) with a reference; `entropy` with entropies.

    Raises:
        ValueError: kl_coef is not 0 and there is no reference, or there is a cap and no sampler.

    Source: arXiv 2505.17534 eq. 2 for the KL term; metric names of TRL.
    """
    if inputs.ref_logprobs is None and inputs.kl is None and constants.kl_coef != 0:
        raise ValueError(f"kl_coef {constants.kl_coef} needs ref_logprobs, and none were given")
    assert inputs.advantages is not None
    mask = jnp.asarray(inputs.mask, bool)
    # Padding may hold anything, -inf included, and -inf * 0 would be NaN in the gradient.
    logprobs = jnp.where(mask, inputs.logprobs, 0.0)
    advantages = jax.lax.stop_gradient(inputs.advantages)[:, None]
    if constants.advantage_clip is not None:
        advantages = jnp.clip(advantages, -constants.advantage_clip, constants.advantage_clip)
    log_ratio = _compute_log_ratio(logprobs, inputs.old_logprobs, mask)
    tokens = Tokens(logprobs, log_ratio, advantages, mask)
    per_token, ratio = token_loss(tokens, constants)
    if constants.importance_cap is not None:
        per_token = per_token * correct_for_sampler(inputs, constants.importance_cap)
    if inputs.weights is not None:
        per_token = per_token * jax.lax.stop_gradient(inputs.weights)
    metrics = {}
    if ratio is not None:
        metrics |= measure_clipping(
            ratio, advantages, mask, constants.clip_low, constants.clip_high
        )
    if (pair := _measure_kl(inputs, logprobs, mask, constants.kl_estimator)) is not None:
        kl, logged = pair  # the KL term of eq. 2, which eq. 6 does not have
        if constants.kl_coef:
            per_token = per_token + constants.kl_coef * kl
        metrics["kl"] = sum_over_tokens(logged, mask)
    if inputs.entropy is not None:
        metrics["entropy"] = sum_over_tokens(inputs.entropy, mask)
    return (
        _sum_terms(per_token, mask, constants.reduction),
        count_terms(mask, constants),
        metrics,
    )


def _measure_kl(
    inputs: LossInputs, logprobs: jax.Array, mask: jax.Array, estimator: KlEstimator
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the KL divergences [N, T] for the loss and for the log; None without a reference."""
    if inputs.kl is not None:
        kl = jnp.where(mask, inputs.kl, 0.0)
        return kl, kl
    if inputs.ref_logprobs is None:
        return None
    ref_logprobs = jax.lax.stop_gradient(jnp.where(mask, inputs.ref_logprobs, 0.0))
    # k1 can be negative, which no limit of a KL divergence expects.
    return estimate_kl(logprobs, ref_logprobs, estimator), k3_kl(logprobs, ref_logprobs)


def _sum_terms(per_token: jax.Array, mask: jax.Array, reduction: Reduction) -> jax.Array:
    per_row = jnp.where(mask, per_token, 0.0).sum(axis=1)
    if reduction == "sequence_mean":
        # A row without tokens (a truncated answer that was masked) would be 0 / 0.
        per_row = per_row / jnp.maximum(mask.sum(axis=1), 1)
    return per_row.sum()


def count_terms(mask: jax.Array, constants: LossConstants) -> jax.Array:
    """Returns the number that divides the sum of a reduction, from the mask [N, T].

    `sequence_mean`: the rows with a kept token, each of which counts by the mean of its tokens
    (GRPO). `token_mean`: the kept tokens of the batch (DAPO). `constant`: N * T, kept or not; T is
    the longest completion that the config allows (Dr.GRPO).
    """
    if constants.reduction == "constant":
        return jnp.float32(mask.shape[0] * mask.shape[1])
    return count_rows(mask) if constants.reduction == "sequence_mean" else count_tokens(mask)


def correct_for_sampler(inputs: LossInputs, cap: float) -> jax.Array:
    """Computes min(exp(old - sampler), cap) [N, T], without gradient; 1 at masked places.

    The old policy is that of the trainer before its updates, whose log-probs can differ from those
    that the sampler recorded, by rounding or by another program.
    Raises: ValueError if the sampler's log-probs are not known.
    Source: truncated importance sampling, in TRL the mode `token_truncate`.
    """
    if inputs.sampler_logprobs is None:
        raise ValueError("importance_cap needs the log-probs of the sampler, and none were given")
    mask = jnp.asarray(inputs.mask, bool)
    old = inputs.logprobs if inputs.old_logprobs is None else inputs.old_logprobs
    difference = jnp.where(mask, old, 0.0) - jnp.where(mask, inputs.sampler_logprobs, 0.0)
    ratio = jnp.exp(jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def weigh_by_entropy(entropy: jax.Array, mask: jax.Array, share: float = 1.0) -> jax.Array:
    """Returns the weights [N, T] of tokens by their entropy [N, T], in each row by itself.

    With a share below 1 the weight is 1 for the tokens of highest entropy, at least one, and 0 for
    the others. With share 1 it is the entropy over the row's mean entropy.
    Source: arXiv 2506.01939 for the share, which that paper takes over a whole batch. A row by
    itself has the same weights in every micro-batch.
    """
    mask = jnp.asarray(mask, bool)
    tokens = mask.sum(axis=1, keepdims=True)
    if share < 1.0:
        # In float32, 0.72 of 700 tokens is a little more than 504.
        num_kept = jnp.maximum(jnp.ceil(share * tokens * (1 - 1e-6)), 1).astype(jnp.int32)
        ordered = -jnp.sort(-jnp.where(mask, entropy, -jnp.inf), axis=1)
        # The least entropy that is kept; ties with it stay.
        threshold = jnp.take_along_axis(ordered, num_kept - 1, axis=1)
        return (mask & (entropy >= threshold)).astype(jnp.float32)
    mean = jnp.where(mask, entropy, 0.0).sum(axis=1, keepdims=True) / jnp.maximum(tokens, 1)
    # A row that is certain of every token has no entropies to compare.
    return jnp.where(mean > 0, jnp.where(mask, entropy, 0.0) / jnp.where(mean > 0, mean, 1.0), 1.0)


def find_clip_extremes(inputs: LossInputs, constants: LossConstants) -> Extremes:
    """Returns the largest and the smallest share of clipped tokens in one completion.

    The smallest is infinite if no row has a token.
    """
    assert inputs.advantages is not None
    mask = jnp.asarray(inputs.mask, bool)
    logprobs = jnp.where(mask, inputs.logprobs, 0.0)
    ratio = jnp.exp(_compute_log_ratio(logprobs, inputs.old_logprobs, mask))
    hits = find_clipped(ratio, inputs.advantages[:, None], constants.clip_low, constants.clip_high)
    tokens = mask.sum(axis=1)
    low, high = [
        (hits[side] & mask).sum(axis=1) / jnp.maximum(tokens, 1) for side in ("low", "high")
    ]
    smallest = jnp.where(tokens > 0, low, jnp.inf).min()
    return {"clip_ratio/high_max": high.max()}, {"clip_ratio/low_min": smallest}


def count_rows(mask: jax.Array) -> jax.Array:
    """Returns the number of rows of a mask [N, T] with a kept token."""
    # float32 like the sums, so that both are added over micro-batches in one tree.
    return mask.any(axis=-1).sum().astype(jnp.float32)


def count_tokens(mask: jax.Array) -> jax.Array:
    """Returns the number of kept tokens of a mask [N, T]."""
    return mask.sum().astype(jnp.float32)


def make_policy_loss(token_loss: TokenLoss, *, by_token: bool = False) -> Loss:
    """Returns the loss of a batch whose tokens have the losses of `token_loss`.

    `by_token`: the ratio differs between the tokens of a row, so that the share of clipped tokens
    has extremes over rows.
    """
    extremes = find_clip_extremes if by_token else None
    return Loss(functools.partial(reduce_policy_loss, token_loss), count_terms, extremes)


CLIPPED_POLICY_LOSS = make_policy_loss(clip_token_ratios, by_token=True)


def mask_truncated(mask: jax.Array, ended: jax.Array) -> jax.Array:
    """Returns the mask without the tokens of answers that never reached EOS.

    `mask` [N, T] bool; `ended` [N] bool is True for an answer that closed with EOS.
    """
    # For texts only. Image codes always fill their grid and have no EOS: all would be dropped.
    return jnp.asarray(mask, bool) & jnp.asarray(ended, bool)[:, None]


def mask_indifferent(mask: jax.Array, advantages: jax.Array) -> jax.Array:
    """Returns the mask [N, T] without the rows whose advantage [N] is 0, as in equal groups.

    They do not count in the mean over rows, and have no KL penalty.
    Source: Flow-GRPO (arXiv 2505.05470), released code.
    """
    return jnp.asarray(mask, bool) & (advantages != 0)[:, None]


def _compute_log_ratio(
    logprobs: jax.Array, old_logprobs: jax.Array | None, mask: jax.Array
) -> jax.Array:
    # logprobs - stop_gradient(logprobs) is 0 with the gradient of logprobs: exp() of it is 1, and
    # its gradient is REINFORCE's.
    old = logprobs if old_logprobs is None else jnp.where(mask, old_logprobs, 0.0)
    return jnp.clip(logprobs - jax.lax.stop_gradient(old), -MAX_LOG_RATIO, MAX_LOG_RATIO)
