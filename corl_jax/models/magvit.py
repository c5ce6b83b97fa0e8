"""MAGVIT-v2: the tokenizer of Show-o, whose codes are the signs of a latent's channels.

A code is a binary number with a bit for each channel; the first channel is the highest bit. The
quantiser has no parameters. Encoder and decoder are no mirror images of each other. Images are NHWC
in [-1, 1], with sides that are multiples of `downsample`; codes are in raster order.

Source: Yu et al. 2023 (MAGVIT-v2, arXiv 2310.05737), as trained for Show-o (arXiv 2408.12528).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from corl_jax.models.vq import Downsample, Level, Mid, Upsample, make_conv, make_group_norm


@dataclasses.dataclass(frozen=True)
class MagvitConfig:
    """Sizes of the tokenizer; the defaults are those of showlab/magvitv2.

    The first level of both halves has the full resolution.
    """

    z_channels: int = 13
    base_channels: int = 128  # of the encoder's first convolution
    encoder_channels: tuple[int, ...] = (128, 256, 256, 512, 512)
    encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)

    @property
    def num_codes(self) -> int:
        """The number of different codes."""
        return 2**self.z_channels

    @property
    def downsample(self) -> int:
        """Pixels per code, along each side."""
        return 2 ** (len(self.encoder_channels) - 1)


class Encoder(nnx.Module):
    """Pixels [N, H, W, 3] -> latents [N, H / f, W / f, z_channels], whose signs are the bits."""

    def __init__(self, config: MagvitConfig, *, rngs: nnx.Rngs):
        channels, last = config.encoder_channels, len(config.encoder_channels) - 1
        self.conv_in = make_conv(3, config.base_channels, 3, rngs=rngs)
        self.down = nnx.List([])
        for index, outputs in enumerate(channels):
            inputs = channels[index - 1] if index else config.base_channels
            level = Level(inputs, outputs, config.encoder_blocks[index], False, rngs)
            if index != last:
                level.downsample = Downsample(outputs, rngs=rngs)
            self.down.append(level)
        self.mid = Mid(channels[-1], rngs=rngs)
        self.norm_out = make_group_norm(channels[-1], rngs=rngs)
        self.conv_out = make_conv(channels[-1], config.z_channels, 3, rngs=rngs)
        self.quant_conv = make_conv(config.z_channels, config.z_channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(jax.nn.silu(self.norm_out(self.mid(x)))))


class Decoder(nnx.Module):
    """Latents [N, h, w, z_channels] -> pixels [N, h * f, w * f, 3]."""

    def __init__(self, config: MagvitConfig, *, rngs: nnx.Rngs):
        channels, last = config.decoder_channels, len(config.decoder_channels) - 1
        self.post_quant_conv = make_conv(config.z_channels, config.z_channels, 1, rngs=rngs)
        self.conv_in = make_conv(config.z_channels, channels[-1], 3, rngs=rngs)
        self.mid = Mid(channels[-1], rngs=rngs)
        self.up = nnx.List([])
        for index, outputs in enumerate(channels):
            inputs = channels[min(index + 1, last)]
            level = Level(inputs, outputs, config.decoder_blocks[index], False, rngs)
            if index:
                level.upsample = Upsample(outputs, rngs=rngs)
            self.up.append(level)
        self.norm_out = make_group_norm(channels[0], rngs=rngs)
        self.conv_out = make_conv(channels[0], 3, 3, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        # Levels have the checkpoint's numbers: up.0 is the full resolution and runs last.
        for level in self.up[::-1]:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Magvit(nnx.Module):
    """Encoder, look-up-free quantiser and decoder."""

    def __init__(self, config: MagvitConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def latents(self, pixels: jax.Array) -> jax.Array:
        """Computes latents [N, h, w, z_channels], not quantised, of pixels [N, H, W, 3]."""
        return self.encoder(pixels)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Computes codes [N, h * w] int32 in raster order of pixels [N, H, W, 3] in [-1, 1]."""
        return quantise(self.latents(pixels)).reshape(len(pixels), -1)

    def codebook(self) -> jax.Array:
        """Returns the codes' latents [num_codes, z_channels] float32, of -1 and 1."""
        return jnp.asarray(make_codebook(self.config.z_channels))

    def decode_latents(self, quantised: jax.Array) -> jax.Array:
        """Computes pixels [N, H, W, 3], not clipped, of latents [N, h, w, z_channels]."""
        return self.decoder(quantised)

    def decode_grid(self, codes: jax.Array) -> jax.Array:
        """Computes pixels [N, H, W, 3], not clipped, of grids of codes [N, h, w]."""
        return self.decode_latents(look_up(codes, self.config.z_channels))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Computes pixels [N, H, H, 3], not clipped, of codes [N, M] of a square image."""
        return self.decode_grid(_make_square(codes))

    def decode_soft(self, weights: jax.Array) -> jax.Array:
        """Computes pixels [N, H, H, 3] of weights [N, M, num_codes] over the codes of each place.

        Weights of one-hot rows give the same as `decode`.
        """
        return self.decode_latents(_make_square(weights @ self.codebook()))


def quantise(latents: jax.Array) -> jax.Array:
    """Returns the codes [...] int32 of latents [..., channels]."""
    # channels (0.3, -2, 0.1) -> bits 1 0 1 -> 5; a channel of exactly 0 is a bit 0
    powers = 2 ** jnp.arange(latents.shape[-1] - 1, -1, -1, dtype=jnp.int32)
    return ((latents > 0) * powers).sum(axis=-1, dtype=jnp.int32)


def look_up(codes: jax.Array, channels: int) -> jax.Array:
    """Returns the latents [..., channels] float32 of codes [...]: 1 for a bit 1, -1 for a bit 0."""
    bits = codes[..., None] >> jnp.arange(channels - 1, -1, -1) & 1
    return (2 * bits - 1).astype(jnp.float32)


def make_codebook(channels: int) -> np.ndarray:
    """Returns the latents [2^channels, channels] float32 of all codes in their order."""
    bits = np.arange(2**channels)[:, None] >> np.arange(channels - 1, -1, -1) & 1
    return (2 * bits - 1).astype(np.float32)


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Converts pixels in [-1, 1] to uint8: clipped, and cut off, not rounded."""
    return (jnp.clip((pixels + 1) / 2, 0, 1) * 255).astype(jnp.uint8)


def _make_square(x: jax.Array) -> jax.Array:
    # 256 codes -> a grid of 16 x 16, row by row
    side = round(x.shape[1] ** 0.5)
    return x.reshape(len(x), side, side, *x.shape[2:])
