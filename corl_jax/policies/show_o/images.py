"""Turns codes into pixels and pixels into codes with the image tokenizer of a Show-o."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.models.magvit import Magvit, MagvitConfig, to_uint8
from corl_jax.policies.image_chunks import choose_chunks, count_at_once
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.types import Params

CODED_BYTES = 8 * 512 * 512 * 128 * 4
"""Most bytes of a layer's activations of the images that a device codes or decodes at once.

Those of 8 images of 512 x 512 pixels, 134 MB each in float32.
"""


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def decode_images(
    config: ShowOConfig, params: Params, tokens: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """Decodes codes [N, M] to images uint8 [N, S, S, 3]; the network computes in `dtype`."""
    tokenizer = jax.tree.map(lambda x: x.astype(dtype), params["vqmodel"])
    model = network.bind(config, params | {"vqmodel": tokenizer})
    chunks, size = choose_chunks(
        tokens.shape[0], count_coded(config.magvit, math.isqrt(tokens.shape[1]))
    )
    padded = jnp.pad(tokens, ((0, chunks * size - tokens.shape[0]), (0, 0)))

    def decode(codes: jax.Array) -> jax.Array:
        return to_uint8(model.vqmodel.decode(constrain(codes, "batch", "length")))

    images = lax.map(decode, padded.reshape(chunks, size, -1))
    images = images.reshape(-1, *images.shape[2:])[: tokens.shape[0]]
    return constrain(images, "batch", None, None, None)


@functools.partial(jax.jit, static_argnames="config")
def encode_images(config: ShowOConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Encodes pixels [N, S, S, 3] in [-1, 1] to codes [N, M], in float32."""
    model = network.bind(config, network.cast(params, jnp.float32))
    return encode_in_chunks(model.vqmodel, pixels)


def encode_in_chunks(tokenizer: Magvit, pixels: jax.Array) -> jax.Array:
    """Encodes pixels [N, S, S, 3] in [-1, 1] to codes [N, M], a few images at once."""
    chunks, size = choose_chunks(
        len(pixels), count_coded(tokenizer.config, pixels.shape[1] // tokenizer.config.downsample)
    )
    padded = jnp.pad(pixels, ((0, chunks * size - len(pixels)), *[(0, 0)] * 3))

    def encode(images: jax.Array) -> jax.Array:
        return tokenizer.encode(constrain(images, "batch", None, None, None))

    codes = lax.map(encode, padded.reshape(chunks, size, *padded.shape[1:]))
    return constrain(codes.reshape(-1, codes.shape[-1])[: len(pixels)], "batch", "length")


def count_coded(sizes: MagvitConfig, grid: int) -> int:
    """Returns how many images of grid x grid codes a device codes or decodes at once."""
    # The first levels have the full resolution.
    channels = max(sizes.base_channels, sizes.encoder_channels[0], sizes.decoder_channels[0])
    return count_at_once(grid * sizes.downsample, channels, CODED_BYTES)
