"""Ratios of two policies' probabilities of the same choices, as they are bounded and measured.

Axes as in `types.py`: N completions, T choices. Every function is pure and can be called inside
jit. Sums come with their count, because both are added over micro-batches and devices.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

SumAndCount = tuple[jax.Array, jax.Array]

# exp() of a larger log-ratio says nothing but "far away", and an infinite ratio times an
# advantage of zero would be NaN; beyond the bound the gradient is zero.
MAX_LOG_RATIO = 20.0

NUM_RATIO_BINS, RATIO_RANGE = 50, (0.5, 1.5)
"""Bins of the histogram of importance ratios; the outer bins also hold what is beyond them."""


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
    return *sum_over_tokens(difference, mask), difference.max(initial=0.0)


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
    total, tokens = sum_over_tokens(ratio, mask)
    bins = jnp.diff(below, prepend=0.0, append=tokens)
    return ImportanceRatio(
        mean=(total, tokens), shares=(bins, tokens),
        smallest=jnp.where(mask, ratio, jnp.inf).min(initial=jnp.inf),
        largest=jnp.where(mask, ratio, 0.0).max(initial=0.0),
    )  # fmt: skip


def measure_clipping(
    ratio: jax.Array, advantages: jax.Array, mask: jax.Array, clip_low: float, clip_high: float
) -> dict[str, SumAndCount]:
    """Returns the shares of tokens whose gradient the clip removed; `region` is either side."""
    sides = find_clipped(ratio, advantages, clip_low, clip_high)
    sides["region"] = sides["low"] | sides["high"]
    return {f"clip_ratio/{side}_mean": sum_over_tokens(hit, mask) for side, hit in sides.items()}


def find_clipped(
    ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> dict[str, jax.Array]:
    """Returns whether the clip removed the gradient of each token [N, T], by side."""
    # min() takes the clipped term only if the step would go further away from the old policy.
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return {"low": low, "high": high}


def sum_over_tokens(values: jax.Array, mask: jax.Array) -> SumAndCount:
    """Returns (sum of the kept values, number of kept tokens), without gradient."""
    # Metrics must not add to the gradient of the loss that they are returned with.
    total = jnp.where(mask, jax.lax.stop_gradient(values), 0.0).sum()
    return total.astype(jnp.float32), mask.sum().astype(jnp.float32)
