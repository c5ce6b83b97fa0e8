"""Resizes images on the device, to the bit as Pillow's bicubic filter does on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Pillow's fixed point for 8 bits: 32 bits less 8 of a level and 2 of a sum of coefficients.
RESIZE_BITS = 32 - 8 - 2
CUBIC = -0.5
"""The free coefficient of Pillow's bicubic kernel."""


def resize_levels(levels: jax.Array, side: int) -> jax.Array:
    """Resizes squares uint8 [N, S, S, 3] to `side` pixels, to the bit as Pillow's bicubic filter.

    Source: Pillow's `Resample.c`: first along rows, then along columns, each rounded to 8 bits.
    """
    if levels.shape[1] == side:
        return levels
    weights = make_resize_weights(levels.shape[1], side) * (1 << RESIZE_BITS)
    table = jnp.asarray(np.trunc(weights + np.copysign(0.5, weights)), jnp.int32)

    def apply(equation: str, x: jax.Array) -> jax.Array:
        total = jnp.einsum(equation, table, x.astype(jnp.int32)) + (1 << (RESIZE_BITS - 1))
        return jnp.clip(total >> RESIZE_BITS, 0, 255)

    resized = apply("oy,nyxc->noxc", apply("ox,nyxc->nyoc", levels))
    return resized.astype(jnp.uint8)


def make_resize_weights(size: int, side: int) -> np.ndarray:
    """Returns Pillow's bicubic weights [side, size] float64 of the pixels of each new pixel."""
    # The kernel widens where an image shrinks: 8 -> 4 pixels: each new pixel is made of about 8.
    scale = max(size / side, 1.0)
    centers = (np.arange(side)[:, None] + 0.5) * size / side
    first = np.trunc(np.maximum(centers - 2 * scale + 0.5, 0))
    last = np.trunc(np.minimum(centers + 2 * scale + 0.5, size))
    places = np.arange(size)[None]
    x = np.abs(places - centers + 0.5) / scale
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights = np.where((places >= first) & (places < last), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)
