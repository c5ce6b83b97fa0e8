"""Turns codes into pixels and pixels into codes with the image tokenizer of a Show-o."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.models.magvit import Magvit, to_uint8
from corl_jax.policies.image_chunks import choose_chunks
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.network import ShowOConfig
from corl_jax.types import Params

# Activations in float32 take 134 MB an image and layer: 512 x 512 pixels of 128 channels.
CODED_AT_ONCE = 8
"""Number of images that a device codes or decodes at once."""


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def decode_images(
    config: ShowOConfig, params: Params, tokens: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """Decodes codes [N, M] to images uint8 [N, S, S, 3]; the network computes in `dtype`."""
    tokenizer = jax.tree.map(lambda x: x.astype(dtype), params["vqmodel"])
    model = network.bind(config, params | {"vqmodel": tokenizer})
    chunks, size = choose_chunks(tokens.shape[0], CODED_AT_ONCE)
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
    chunks, size = choose_chunks(len(pixels), CODED_AT_ONCE)
    padded = jnp.pad(pixels, ((0, chunks * size - len(pixels)), *[(0, 0)] * 3))

    def encode(images: jax.Array) -> jax.Array:
        return tokenizer.encode(constrain(images, "batch", None, None, None))

    codes = lax.map(encode, padded.reshape(chunks, size, *padded.shape[1:]))
    return constrain(codes.reshape(-1, codes.shape[-1])[: len(pixels)], "batch", "length")
