"""Turns codes into pixels and pixels into codes with the image tokenizer of a Janus.

Normalises pixels for its vision tower.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.policies.image_chunks import choose_chunks, count_at_once
from corl_jax.policies.janus import network
from corl_jax.policies.janus.image_settings import ImageSettings, make_level_table
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.types import Params

DECODED_BYTES = 8 * 384 * 384 * 128 * 4
"""Most bytes of a layer's activations of the images that a device decodes at once.

Those of 8 images of 384 x 384 pixels, 75 MB each in float32.
"""


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def decode_images(
    config: JanusConfig, params: Params, tokens: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """Decodes codes [N, T] to images uint8 [N, S, S, 3]; the network computes in `dtype`."""
    tokenizer = jax.tree.map(lambda x: x.astype(dtype), params["vqmodel"])
    model = network.bind(config, params | {"vqmodel": tokenizer})
    chunks, size = choose_chunks(tokens.shape[0], count_decoded(config))
    padded = jnp.pad(tokens, ((0, chunks * size - tokens.shape[0]), (0, 0)))

    def decode(codes: jax.Array) -> jax.Array:
        pixels = model.vqmodel.decode(constrain(codes, "batch", "length"))
        pixels = (pixels.astype(jnp.float32) + 1) / 2 * 255
        # Truncated, not rounded, like the original.
        return jnp.clip(pixels, 0, 255).astype(jnp.uint8)

    images = lax.map(decode, padded.reshape(chunks, size, -1))
    images = images.reshape(-1, *images.shape[2:])[: tokens.shape[0]]
    return constrain(images, "batch", None, None, None)


def count_decoded(config: JanusConfig) -> int:
    """Returns how many images a device decodes at once."""
    side = math.isqrt(config.num_image_tokens) * config.vq.downsample
    return count_at_once(side, config.vq.halves.level_channels[0], DECODED_BYTES)


@functools.partial(jax.jit, static_argnames="config")
def encode_images(config: JanusConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Encodes pixels [N, S, S, 3] in [-1, 1] to codes [N, T], in float32."""
    return network.bind(config, network.cast(params, jnp.float32)).vqmodel.encode(pixels)


def normalise_pixels(settings: ImageSettings, images: jax.Array) -> jax.Array:
    """Normalises images uint8 [N, S, S, 3] of the tower's size to float32, as the processor."""
    # A table made on the host, because a device's division by the standard deviation rounds
    # differently from the image processor's.
    return _look_up_levels(make_level_table(settings), images)


@jax.jit
def _look_up_levels(levels: jax.Array, images: jax.Array) -> jax.Array:
    # Channel c: level 0..255 -> levels[level, c].
    channels = (jnp.take(levels[:, c], images[..., c], axis=0) for c in range(levels.shape[1]))
    return jnp.stack(list(channels), axis=-1)
