"""Pixels and codes: the image tokenizer of a Janus in both directions."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.devices.mesh import constrain, context_batch_shards
from corl_jax.policies.janus import network
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.types import Params

VQ_BATCH = 8
"""Images that a device decodes at once: activations in float32 take 75 MB an image and layer."""


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def decode_images(
    config: JanusConfig, params: Params, tokens: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """uint8 [N, S, S, 3] of codes [N, T], computed in `dtype`, truncated like the original."""
    tokenizer = jax.tree.map(lambda x: x.astype(dtype), params["vqmodel"])
    model = network.bind(config, params | {"vqmodel": tokenizer})
    chunks, size = _vq_chunks(tokens.shape[0])
    padded = jnp.pad(tokens, ((0, chunks * size - tokens.shape[0]), (0, 0)))

    def decode(codes: jax.Array) -> jax.Array:
        pixels = model.vqmodel.decode(constrain(codes, "batch", "length"))
        pixels = (pixels.astype(jnp.float32) + 1) / 2 * 255
        return jnp.clip(pixels, 0, 255).astype(jnp.uint8)

    images = lax.map(decode, padded.reshape(chunks, size, -1))
    images = images.reshape(-1, *images.shape[2:])[: tokens.shape[0]]
    return constrain(images, "batch", None, None, None)


def _vq_chunks(images: int) -> tuple[int, int]:
    """(chunks, images a chunk): at most VQ_BATCH a device, spread evenly over all of them."""
    ways = context_batch_shards()
    chunks = math.ceil(images / (VQ_BATCH * ways))
    return chunks, math.ceil(images / (chunks * ways)) * ways


@functools.partial(jax.jit, static_argnames="config")
def encode_images(config: JanusConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Returns the codes [N, T] of pixels [N, S, S, 3] in [-1, 1], computed in float32."""
    return network.bind(config, network.cast(params, jnp.float32)).vqmodel.encode(pixels)
