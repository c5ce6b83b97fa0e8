"""Splits images into chunks that a device codes or decodes at once."""

from __future__ import annotations

import math

from corl_jax.devices.mesh import context_batch_shards


def choose_chunks(images: int, most: int) -> tuple[int, int]:
    """Returns (chunks, images per chunk), with at most `most` images a device in a chunk."""
    # 20 images on 2 devices: 2 chunks of 10 images, not one of 16 and one of 4 filled up to 16.
    num_batch_shards = context_batch_shards()
    chunks = math.ceil(images / (most * num_batch_shards))
    return chunks, math.ceil(images / (chunks * num_batch_shards)) * num_batch_shards
