"""Computes the loss of the VAE's training: reconstruct, and keep latents near a unit normal.

There is no adversarial and no learned perceptual loss; an error on image gradients sharpens edges.

Source: Kingma and Welling 2013 (arXiv 1312.6114), appendix B for the divergence; Rombach et al.
2022 (arXiv 2112.10752), section 3.1 for its small weight; Hoffman and Johnson 2016 (ELBO surgery)
for its two terms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.models.sd_vae import SdVae
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.policies.reconstruction import measure_reconstruction
from corl_jax.types import Params

INFORMATION_WEIGHT = 3e-4  # of what latents tell about their image, which leaves room for noise
SCALE_WEIGHT = 0.1  # of the divergence of all latents together from a unit normal


def tokenizer_loss(
    sizes: JanusFlowConfig, params: Params, pixels: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes (loss, metrics) of pixels [B, S, S, 3] in [-1, 1]."""
    # Frozen parameters have the dtype of their checkpoint; the loss is computed in float32.
    return vae_loss(network.bind(sizes, network.cast(params, jnp.float32)).vae, pixels)


def vae_loss(
    model: SdVae,
    pixels: jax.Array,
    information: float = INFORMATION_WEIGHT,
    scale: float = SCALE_WEIGHT,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes (loss, metrics) of pixels [B, S, S, 3] in [-1, 1]."""
    mean, logvar = model.encode(pixels)
    # Of scaled latents: the noise of a flow expects that they are about as large as itself.
    mean = mean * model.config.scaling_factor
    logvar = logvar + 2 * jnp.log(model.config.scaling_factor)
    centre = mean.mean(axis=(0, 1, 2))  # [C]
    variance = jnp.mean((mean - centre) ** 2 + jnp.exp(logvar), axis=(0, 1, 2))
    # The usual divergence of each latent from a unit normal is the sum of both terms. They have
    # weights of their own: the decoder is content with any scale, so a small one would move it too
    # slowly.
    informed = jnp.mean(jnp.log(variance) - logvar) / 2
    scaled = jnp.mean(variance + centre**2 - 1 - jnp.log(variance)) / 2
    noise = jax.random.normal(make_key(pixels), mean.shape)
    decoded = model.decode_scaled(mean + jnp.exp(logvar / 2) * noise)
    loss, metrics = measure_reconstruction(decoded, pixels)
    return loss + information * informed + scale * scaled, metrics | {
        "vq/information": informed, "vq/scale": scaled,
        "vq/latent_std": jnp.sqrt(variance.mean()),
        "vq/latent_noise": jnp.sqrt(jnp.mean(jnp.exp(logvar))),
    }  # fmt: skip


def make_key(pixels: jax.Array) -> jax.Array:
    """Makes a random key that differs from batch to batch."""
    # A sum of integers: that of numbers depends on its order, and so on the number of devices.
    bits = lax.bitcast_convert_type(pixels.astype(jnp.float32), jnp.uint32)
    return jax.random.fold_in(jax.random.key(0), bits.sum(dtype=jnp.uint32))
