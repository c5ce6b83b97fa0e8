"""Splits images into chunks that a device codes or decodes at once."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from corl_jax.devices.mesh import context_batch_shards

FEW = 8
"""Images that a CPU codes at once: more are no faster, because they do not fit into its caches."""


def count_at_once(side: int, channels: int, limit: int) -> int:
    """Returns how many images a device codes at once.

    `limit` are the bytes of the float32 activations [images, side, side, channels] of a layer.
    """
    # A chunk of a few small images leaves a GPU idle: 8 of 64 x 64 pixels are a hundredth of its
    # threads.
    if jax.default_backend() == "cpu":
        return FEW
    return max(1, limit // (side**2 * channels * jnp.dtype(jnp.float32).itemsize))


def choose_chunks(images: int, most: int) -> tuple[int, int]:
    """Returns (chunks, images per chunk), with at most `most` images a device in a chunk."""
    # 20 images on 2 devices: 2 chunks of 10 images, not one of 16 and one of 4 filled up to 16.
    num_batch_shards = context_batch_shards()
    chunks = math.ceil(images / (most * num_batch_shards))
    return chunks, math.ceil(images / (chunks * num_batch_shards)) * num_batch_shards
