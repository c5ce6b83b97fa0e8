"""The VAE of Stable Diffusion (diffusers' AutoencoderKL): images to continuous latents and back.

Encoder and decoder are those of `vq.py` without attention in their levels. The encoder gives a
normal distribution for each latent. Images are NHWC in [-1, 1], with sides that are multiples of
`downsample`. Models of latents see them multiplied by `scaling_factor`.

Parameters are float32 or bfloat16, and the network computes in their type. float16 overflows in the
decoder.

Sources: Rombach et al. 2022 (latent diffusion, arXiv 2112.10752), Podell et al. 2023 (SDXL,
arXiv 2307.01952), whose sizes are the defaults.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax.models.magvit import to_uint8
from corl_jax.models.vq import Decoder, Encoder, HalvesConfig, make_conv

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
"""Limits of the logarithm of a latent's variance."""


@dataclasses.dataclass(frozen=True)
class SdVaeConfig:
    """Sizes of the VAE; the defaults are those of stabilityai/sdxl-vae."""

    latent_channels: int = 4
    block_channels: tuple[int, ...] = (128, 256, 512, 512)  # the first is the finest resolution
    num_res_blocks: int = 2  # of each level of the encoder; the decoder has one more
    norm_groups: int = 32
    scaling_factor: float = 0.13025

    @property
    def downsample(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.block_channels) - 1)

    @property
    def halves(self) -> HalvesConfig:
        """The sizes of encoder and decoder."""
        return HalvesConfig(
            base_channels=self.block_channels[0],
            level_channels=self.block_channels,
            num_res_blocks=self.num_res_blocks,
            has_attention=False,
            groups=self.norm_groups,
        )


class SdVae(nnx.Module):
    """Encoder and decoder."""

    def __init__(self, config: SdVaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        latents = config.latent_channels
        # Twice the channels: means, and logarithms of variances.
        self.encoder = Encoder(config.halves, 2 * latents, rngs=rngs)
        self.quant_conv = make_conv(2 * latents, 2 * latents, 1, rngs=rngs)
        self.post_quant_conv = make_conv(latents, latents, 1, rngs=rngs)
        self.decoder = Decoder(config.halves, latents, rngs=rngs)

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes the latents' distribution given pixels [N, H, W, 3] in [-1, 1].

        Returns mean and logarithm of the variance, both [N, H / f, W / f, C] float32, not scaled.
        """
        moments = self.quant_conv(self.encoder(pixels.astype(self._dtype)))
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Computes pixels [N, H, W, 3] float32, not clipped, of latents that are not scaled."""
        pixels = self.decoder(self.post_quant_conv(latents.astype(self._dtype)))
        return pixels.astype(jnp.float32)

    def encode_mean(self, pixels: jax.Array) -> jax.Array:
        """Computes scaled latents, the means, [N, h, w, C] float32 of pixels [N, H, W, 3]."""
        return self.encode(pixels)[0] * self.config.scaling_factor

    def decode_scaled(self, latents: jax.Array) -> jax.Array:
        """Computes pixels [N, H, W, 3] float32, not clipped, of scaled latents [N, h, w, C]."""
        return self.decode(latents.astype(jnp.float32) / self.config.scaling_factor)

    def draw_pixels(self, latents: jax.Array) -> jax.Array:
        """Computes images [N, H, W, 3] uint8 of scaled latents [N, h, w, C]: cut off, not rounded.

        Source: deepseek-ai/Janus, `demo/app_janusflow.py`.
        """
        return to_uint8(self.decode_scaled(latents))

    @property
    def _dtype(self) -> Any:
        """The type in which the network computes, that of its parameters."""
        dtype = self.post_quant_conv.kernel[...].dtype
        if dtype == jnp.float16:
            raise ValueError("the VAE's float16 overflows; cast its parameters to float32")
        return dtype
