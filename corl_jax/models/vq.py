"""VQ-16: the tokenizer that turns an image into a grid of codes and back.

Its encoder, its decoder and their blocks are those of other convolutional autoencoders too.

Codebook rows and latents have unit length, so the nearest code is the one of greatest cosine.
Images are NHWC in [-1, 1]; codes are in raster order.

Source: Sun et al. 2024 (LlamaGen, arXiv 2406.06525), whose tokenizer Janus uses.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Sizes of the tokenizer; the defaults are those of every released Janus."""

    num_embeddings: int = 16384
    embed_dim: int = 8
    z_channels: int = 256
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2

    @property
    def downsample(self) -> int:
        """Pixels per code, along each side."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def halves(self) -> HalvesConfig:
        """The sizes of encoder and decoder."""
        return HalvesConfig(
            base_channels=self.base_channels,
            level_channels=tuple(self.base_channels * n for n in self.channel_multiplier),
            num_res_blocks=self.num_res_blocks,
            has_attention=True,
        )


@dataclasses.dataclass(frozen=True)
class HalvesConfig:
    """Sizes of an encoder and of the decoder that mirrors it."""

    base_channels: int  # of the encoder's first convolution
    level_channels: tuple[int, ...]  # of each resolution; the first is the finest
    num_res_blocks: int  # of each level of the encoder; the decoder has one more
    has_attention: bool  # after each block of the lowest resolution
    groups: int = 32  # of the norms


def make_conv(inputs: int, outputs: int, size: int, *, rngs: nnx.Rngs) -> nnx.Conv:
    """Makes a square convolution of stride 1 with same padding."""
    return nnx.Conv(inputs, outputs, (size, size), padding=size // 2, rngs=rngs)


def make_group_norm(channels: int, groups: int = 32, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Makes a group norm."""
    # flax's fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    return nnx.GroupNorm(
        channels, num_groups=groups, epsilon=1e-6, use_fast_variance=False, rngs=rngs
    )


class ResBlock(nnx.Module):
    """Two normalised 3x3 convolutions and a shortcut, which is 1x1 if the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int = 32, *, rngs: nnx.Rngs):
        self.norm1 = make_group_norm(inputs, groups, rngs=rngs)
        self.conv1 = make_conv(inputs, outputs, 3, rngs=rngs)
        self.norm2 = make_group_norm(outputs, groups, rngs=rngs)
        self.conv2 = make_conv(outputs, outputs, 3, rngs=rngs)
        if inputs != outputs:
            self.nin_shortcut = make_conv(inputs, outputs, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nnx.Module):
    """Single-head self-attention over all positions of the feature map."""

    def __init__(self, channels: int, groups: int = 32, *, rngs: nnx.Rngs):
        self.norm = make_group_norm(channels, groups, rngs=rngs)
        self.q = make_conv(channels, channels, 1, rngs=rngs)
        self.k = make_conv(channels, channels, 1, rngs=rngs)
        self.v = make_conv(channels, channels, 1, rngs=rngs)
        self.proj_out = make_conv(channels, channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self.norm(x)
        batch, height, width, channels = x.shape
        query, key, value = (
            # [N, H, W, C] -> [N, H * W, 1 head, C]
            f(normed).reshape(batch, height * width, 1, channels)
            for f in (self.q, self.k, self.v)
        )
        h = jax.nn.dot_product_attention(query, key, value)
        return x + self.proj_out(h.reshape(batch, height, width, channels))


class Downsample(nnx.Module):
    """Halves each side: one row and column of zeros on the far sides, then stride 2."""

    # Not "SAME" with zeros on both sides: the original pads right and bottom only, and another
    # padding shifts the grid of codes.

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles each side by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = make_conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Mid(nnx.Module):
    """The bottleneck: residual, attention, residual."""

    def __init__(self, channels: int, groups: int = 32, *, rngs: nnx.Rngs):
        self.block_1 = ResBlock(channels, channels, groups, rngs=rngs)
        self.attn_1 = AttnBlock(channels, groups, rngs=rngs)
        self.block_2 = ResBlock(channels, channels, groups, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention at the lowest one."""

    downsample: Downsample  # of all levels of an encoder but the last
    upsample: Upsample  # of a decoder

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attention: bool, rngs: nnx.Rngs,
        groups: int = 32,
    ):  # fmt: skip
        # The first block changes the width: inputs 128, outputs 256 -> [128, 256, 256]
        widths = [inputs] + [outputs] * (blocks - 1)
        self.block = nnx.List([ResBlock(width, outputs, groups, rngs=rngs) for width in widths])
        if attention:
            self.attn = nnx.List([AttnBlock(outputs, groups, rngs=rngs) for _ in widths])

    def __call__(self, x: jax.Array) -> jax.Array:
        for index, block in enumerate(self.block):
            x = block(x)
            if hasattr(self, "attn"):
                x = self.attn[index](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class Encoder(nnx.Module):
    """Pixels [N, H, W, 3] -> features [N, H / f, W / f, outputs]."""

    def __init__(self, config: HalvesConfig, outputs: int, *, rngs: nnx.Rngs):
        channels, groups = config.level_channels, config.groups
        last = len(channels) - 1
        self.conv_in = make_conv(3, config.base_channels, 3, rngs=rngs)
        self.down = nnx.List([])
        for index, width in enumerate(channels):
            inputs = channels[index - 1] if index else config.base_channels
            attention = config.has_attention and index == last
            level = Level(inputs, width, config.num_res_blocks, attention, rngs, groups)
            if index != last:
                level.downsample = Downsample(width, rngs=rngs)
            self.down.append(level)
        self.mid = Mid(channels[-1], groups, rngs=rngs)
        self.norm_out = make_group_norm(channels[-1], groups, rngs=rngs)
        self.conv_out = make_conv(channels[-1], outputs, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents [N, h, w, inputs] -> pixels [N, h * f, w * f, 3]."""

    def __init__(self, config: HalvesConfig, inputs: int, *, rngs: nnx.Rngs):
        # From the lowest resolution up; checkpoints number the levels in this order too.
        channels, groups = config.level_channels[::-1], config.groups
        last = len(channels) - 1
        self.conv_in = make_conv(inputs, channels[0], 3, rngs=rngs)
        self.mid = Mid(channels[0], groups, rngs=rngs)
        self.up = nnx.List([])
        for index, width in enumerate(channels):
            attention = config.has_attention and index == 0
            level = Level(
                channels[max(index - 1, 0)], width, config.num_res_blocks + 1, attention, rngs,
                groups,
            )  # fmt: skip
            if index != last:
                level.upsample = Upsample(width, rngs=rngs)
            self.up.append(level)
        self.norm_out = make_group_norm(channels[-1], groups, rngs=rngs)
        self.conv_out = make_conv(channels[-1], 3, 3, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(z))
        for level in self.up:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class VQModel(nnx.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config.halves, config.z_channels, rngs=rngs)
        self.decoder = Decoder(config.halves, config.z_channels, rngs=rngs)
        self.quantize = nnx.Embed(config.num_embeddings, config.embed_dim, rngs=rngs)
        self.quant_conv = make_conv(config.z_channels, config.embed_dim, 1, rngs=rngs)
        self.post_quant_conv = make_conv(config.embed_dim, config.z_channels, 1, rngs=rngs)

    def codebook(self) -> jax.Array:
        """Returns the codes' vectors [num_embeddings, embed_dim], of unit length."""
        return normalize(jnp.asarray(self.quantize.embedding[...]))

    def latents(self, pixels: jax.Array) -> jax.Array:
        """Computes unit latents [N, h, w, embed_dim] of pixels [N, H, W, 3] in [-1, 1]."""
        return normalize(self.quant_conv(self.encoder(pixels)))

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Computes codes [N, h * w] int32 in raster order of pixels [N, H, W, 3] in [-1, 1]."""
        z = self.latents(pixels)
        similarity = jnp.einsum("nhwc,kc->nhwk", z, self.codebook())
        return jnp.argmax(similarity, axis=-1).reshape(z.shape[0], -1).astype(jnp.int32)

    def decode_latents(self, quantised: jax.Array) -> jax.Array:
        """Computes pixels [N, H, W, 3] of code vectors [N, h, w, embed_dim]."""
        return self.decoder(self.post_quant_conv(quantised))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Computes pixels [N, H, W, 3], roughly in [-1, 1] (not clipped), of codes [N, h * w]."""
        # 576 codes -> a grid of 24 x 24, row by row
        side = round(codes.shape[-1] ** 0.5)
        return self.decode_latents(self.codebook()[codes].reshape(codes.shape[0], side, side, -1))


def normalize(x: jax.Array) -> jax.Array:
    """Divides rows by their norm, at least 1e-12, as torch's `normalize` does."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
