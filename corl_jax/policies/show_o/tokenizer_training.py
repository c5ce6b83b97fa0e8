"""Computes the loss of the image tokenizer's training: reconstruct, commit, use every code.

Codes are the signs of a latent's channels, so only encoder and decoder have parameters. There is no
adversarial and no learned perceptual loss; an error on image gradients sharpens edges.

Source: Yu et al. 2023 (MAGVIT-v2, arXiv 2310.05737), section 3.1 for the quantiser and eq. 5 for
the entropy term.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.models.magvit import Magvit, look_up, quantise
from corl_jax.policies.reconstruction import measure_reconstruction, measure_spread, measure_usage
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.types import Params

COMMITMENT_WEIGHT = 0.1  # of the distance of latents to their signs
ENTROPY_WEIGHT = 0.02  # spreads the use of codes over a batch
ENTROPY_TEMPERATURE = 0.5
"""Temperature of a latent's soft choice of a code.

A channel of 1 is the bit 1 with probability sigmoid(2 / temperature).
"""
SPREAD_LATENTS = 1024
"""Most latents whose soft choices exist at once: 32 MiB of float32 for 8,192 codes."""


def tokenizer_loss(
    sizes: ShowOConfig, params: Params, pixels: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes (loss, metrics) of pixels [B, S, S, 3] in [-1, 1]."""
    # Frozen parameters have the dtype of their checkpoint; the loss is computed in float32.
    return magvit_loss(network.bind(sizes, network.cast(params, jnp.float32)).vqmodel, pixels)


def magvit_loss(
    model: Magvit,
    pixels: jax.Array,
    commitment: float = COMMITMENT_WEIGHT,
    entropy: float = ENTROPY_WEIGHT,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes (loss, metrics) of pixels [B, S, S, 3] in [-1, 1]."""
    z = model.latents(pixels)
    codes = quantise(z)
    signs = look_up(codes, z.shape[-1])
    commit = jnp.mean((z - signs) ** 2)
    # Logits of all codes: with -1 and 1 as channels their distances differ by z . code only.
    latents = _choose_latents(z.reshape(-1, z.shape[-1]))
    spread = measure_spread(latents @ model.codebook().T / ENTROPY_TEMPERATURE)
    # Straight-through: the value is that of the signs, the gradient goes to z past them.
    decoded = model.decode_latents(z + lax.stop_gradient(signs - z))
    loss, metrics = measure_reconstruction(decoded, pixels)
    loss = loss + commitment * commit + entropy * spread
    usage = measure_usage(codes, model.config.num_codes)
    return loss, metrics | {
        "vq/commitment": commit, "vq/code_usage": usage, "vq/entropy": spread,
    }  # fmt: skip


def _choose_latents(latents: jax.Array) -> jax.Array:
    """Returns at most SPREAD_LATENTS of latents [N, C], from all over the batch."""
    return latents[:: -(-len(latents) // SPREAD_LATENTS)]
