"""Turns latents into pixels and pixels into latents with the VAE of a JanusFlow."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.policies.image_chunks import choose_chunks
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.types import Params

# Activations in float32 take 75 MB an image and layer: 384 x 384 pixels of 128 channels.
CODED_AT_ONCE = 8
"""Number of images that a device codes or decodes at once."""


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def decode_images(
    config: JanusFlowConfig, params: Params, latents: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
    """Decodes the last latents of [N, T, h, w, C] to images uint8 [N, S, S, 3].

    The network computes in `dtype`.
    """
    vae = jax.tree.map(lambda x: x.astype(dtype), params["vae"])
    model = network.bind(config, params | {"vae": vae})
    return _map_chunks(model.vae.draw_pixels, latents[:, -1])


@functools.partial(jax.jit, static_argnames="config")
def encode_images(config: JanusFlowConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Encodes pixels [N, S, S, 3] in [-1, 1] to scaled latents [N, 1, h, w, C], in float32."""
    model = network.bind(config, network.cast(params, jnp.float32))
    return _map_chunks(model.vae.encode_mean, pixels)[:, None]


def _map_chunks(function: Any, arrays: jax.Array) -> jax.Array:
    """Applies a function of [n, ...] to [N, ...], a few rows at once."""
    chunks, size = choose_chunks(len(arrays), CODED_AT_ONCE)
    padded = jnp.pad(arrays, ((0, chunks * size - len(arrays)), *[(0, 0)] * (arrays.ndim - 1)))

    def apply(piece: jax.Array) -> jax.Array:
        return function(constrain(piece, "batch", None, None, None))

    results = lax.map(apply, padded.reshape(chunks, size, *padded.shape[1:]))
    results = results.reshape(-1, *results.shape[2:])[: len(arrays)]
    return constrain(results, "batch", None, None, None)
