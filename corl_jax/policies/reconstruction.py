"""The parts of an image tokenizer's loss that all families share: pixels, and the use of codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

PERCEPTUAL_WEIGHT = 0.5  # of the error of image gradients beside that of pixels


def measure_reconstruction(
    decoded: jax.Array, pixels: jax.Array, perceptual: float = PERCEPTUAL_WEIGHT
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes (loss, metrics) of decoded pixels [B, S, S, 3] beside those in [-1, 1]."""
    error = jnp.mean(jnp.abs(decoded - pixels))
    # Differences of neighbouring pixels along rows and columns: the hard edges of flat shapes.
    edges = sum(jnp.mean(jnp.abs(jnp.diff(decoded - pixels, axis=axis))) for axis in (1, 2))
    # / 2: as for pixels in [0, 1]
    rmse = jnp.sqrt(jnp.mean((jnp.clip(decoded, -1, 1) - pixels) ** 2)) / 2
    metrics = {"vq/l1": error, "vq/edges": edges, "vq/rmse": rmse}
    return error + perceptual * edges, metrics


def measure_spread(logits: jax.Array) -> jax.Array:
    """Computes the mean entropy of each latent's choice of a code minus that of the mean choice.

    `logits` [N, K] are those of a soft choice. The result is small if each latent chooses clearly
    and all of them together use all codes.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    per_latent = -(probabilities * jax.nn.log_softmax(logits, axis=-1)).sum(axis=-1).mean()
    mean = probabilities.mean(axis=0)
    return per_latent + (mean * jnp.log(mean + 1e-9)).sum()


def measure_usage(codes: jax.Array, num_codes: int) -> jax.Array:
    """Computes the fraction of all codes that occur in `codes`."""
    return jnp.zeros(num_codes).at[codes.reshape(-1)].set(1.0).mean()
