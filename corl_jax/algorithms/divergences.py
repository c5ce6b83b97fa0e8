"""Estimates of the KL divergence of a policy from a reference, from the log-probs of samples.

Axes as in `types.py`: N completions, T choices. Every function is pure and can be called inside
jit.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from corl_jax.algorithms.ratios import MAX_LOG_RATIO

KlEstimator = Literal["k1", "k2", "k3"]
"""Estimate of the KL divergence of one token; see `estimate_kl`."""


def estimate_kl(
    logprobs: jax.Array, ref_logprobs: jax.Array, estimator: KlEstimator = "k3"
) -> jax.Array:
    """Estimates KL(policy || reference) of each token [N, T] from the log-probs of samples.

    With d = policy - reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. All are 0 where both
    agree. k1 and k3 are unbiased in value. In a loss the gradient of k1 is 0 on average, and that
    of k2 is the gradient of a k1 penalty in the reward.
    Source: Schulman, "Approximating KL divergence".
    """
    if estimator == "k3":
        return k3_kl(logprobs, ref_logprobs)
    delta = jnp.clip(logprobs - ref_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return delta if estimator == "k1" else delta**2 / 2


def k3_kl(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Computes the estimate exp(d) - d - 1 of KL(policy || reference) per token, d = ref - policy.

    It is unbiased in value under samples of the policy, never negative, and 0 where both agree.
    Source: Schulman, "Approximating KL divergence" (estimator k3).
    """
    delta = jnp.clip(ref_logprobs - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1: exp(d) - 1 loses all digits of a small d in float32.
    return jnp.expm1(delta) - delta
