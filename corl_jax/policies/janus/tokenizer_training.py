"""Computes the loss of the image tokenizer's training: reconstruct, commit, use every code.

Encoder, codebook and decoder are trained together. Codes and latents are unit vectors. There is no
adversarial and no learned perceptual loss; an error on image gradients sharpens edges.

Source: van den Oord et al. 2017 (arXiv 1711.00937), eq. 3; Yu et al. 2024 (MAGVIT-v2, arXiv
2310.05737), eq. 5 for the entropy term.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.models.vq import VQModel
from corl_jax.policies.janus import network
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.reconstruction import (
    PERCEPTUAL_WEIGHT,
    measure_reconstruction,
    measure_spread,
    measure_usage,
)
from corl_jax.types import Params

COMMITMENT_WEIGHT = 0.25  # of the distance of latents to their codes
ENTROPY_WEIGHT = 0.02  # spreads the use of codes over a batch
ENTROPY_TEMPERATURE = 0.05
"""Temperature of a latent's soft assignment to codes, whose similarities lie in [-1, 1]."""


def tokenizer_loss(
    sizes: JanusConfig, params: Params, pixels: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes (loss, metrics) of pixels [B, S, S, 3] in [-1, 1]."""
    # Frozen parameters have the dtype of their checkpoint; the loss is computed in float32.
    model = network.bind(sizes, network.cast(params, jnp.float32)).vqmodel
    return vq_loss(model, pixels)


def vq_loss(
    model: VQModel,
    pixels: jax.Array,
    perceptual: float = PERCEPTUAL_WEIGHT,
    commitment: float = COMMITMENT_WEIGHT,
    entropy: float = ENTROPY_WEIGHT,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes (loss, metrics) of pixels [B, S, S, 3] in [-1, 1]."""
    z = model.latents(pixels)
    codebook = model.codebook()
    similarity = jnp.einsum("nhwc,kc->nhwk", z, codebook)
    # Unit vectors: the nearest code is the one with the largest cosine.
    codes = jnp.argmax(similarity, axis=-1)
    quantised = codebook[codes]
    # Two terms with one value each and other gradients: `commit` moves latents to codes, `move`
    # codes to latents.
    commit = jnp.mean((z - lax.stop_gradient(quantised)) ** 2)
    move = jnp.mean((quantised - lax.stop_gradient(z)) ** 2)
    spread = assignment_entropy(similarity.reshape(-1, codebook.shape[0]))
    # Straight-through: the value is `quantised`, the gradient goes to z past the argmax.
    decoded = model.decode_latents(z + lax.stop_gradient(quantised - z))
    loss, metrics = measure_reconstruction(decoded, pixels, perceptual)
    loss = loss + move + commitment * commit + entropy * spread
    usage = measure_usage(codes, codebook.shape[0])
    return loss, metrics | {
        "vq/commitment": commit, "vq/code_usage": usage, "vq/entropy": spread,
    }  # fmt: skip


def assignment_entropy(similarity: jax.Array) -> jax.Array:
    """Computes the mean entropy of each latent's soft assignment minus that of the mean one."""
    # Small if each latent chooses clearly and the batch uses all codes. This keeps a small codebook
    # in use without restarts.
    return measure_spread(similarity / ENTROPY_TEMPERATURE)
