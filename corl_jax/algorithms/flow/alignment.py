"""REPA: a network that draws learns states like the features of an image encoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def measure_alignment(states: jax.Array, features: jax.Array) -> jax.Array:
    """Computes the mean cosine [N] of states and features [N, T, C], place by place, in float32.

    No gradient flows into the features. The loss is minus this number.
    Source: REPA (arXiv 2410.06940); JanusFlow (arXiv 2411.07975), section 3.
    """
    cosines = _normalise(states) * lax.stop_gradient(_normalise(features))
    return cosines.sum(axis=-1).mean(axis=-1)


def _normalise(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    # The gradient of a length is infinite at a vector of zeros.
    return x * lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)
