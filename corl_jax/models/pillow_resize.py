"""Resizes images on the device, to the bit as Pillow's filters do on the host."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Filter = Literal["bilinear", "bicubic"]
"""A filter of Pillow, by its name in `PIL.Image.Resampling` in lower case."""

# Pillow's fixed point for 8 bits: 32 bits less 8 of a level and 2 of a sum of coefficients.
RESIZE_BITS = 32 - 8 - 2
CUBIC = -0.5
"""The free coefficient of Pillow's bicubic kernel."""


def resize_levels(levels: jax.Array, side: int, name: Filter = "bicubic") -> jax.Array:
    """Resizes squares uint8 [N, S, S, 3] to `side` pixels, to the bit as Pillow's filter `name`.

    Source: Pillow's `Resample.c`: first along rows, then along columns, each rounded to 8 bits.
    """
    size = levels.shape[1]
    # Pillow's order of rows and columns depends on the shape, and for tall images on its version.
    assert size == levels.shape[2], f"images of {levels.shape[1:3]} are no squares"
    if size == side:
        return levels
    places, weights = _list_read_pixels(size, side, name)

    def resize(x: jax.Array, axis: int) -> jax.Array:
        # The new pixels, and behind them those that each is made of: along rows
        # [N, S, side, count, 3], along columns [N, side, count, side, 3].
        read = jnp.take(x, places, axis=axis, mode="clip").astype(jnp.int32)
        products = read * np.expand_dims(weights, tuple(range(2, 5 - axis)))
        total = products.sum(axis=axis + 1) + (1 << (RESIZE_BITS - 1))
        return jnp.clip(total >> RESIZE_BITS, 0, 255).astype(jnp.uint8)

    return resize(resize(levels, 2), 1)


def _list_read_pixels(size: int, side: int, name: Filter) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels that each new one is made of, and their weights, both [side, count]."""
    exact = make_resize_weights(size, side, name) * (1 << RESIZE_BITS)
    table = np.trunc(exact + np.copysign(0.5, exact)).astype(np.int32)
    # Weights [0, 0, 5, 7, 0, 0], at most 3 of a row not 0 -> pixels [2, 3, 4], weights [5, 7, 0].
    first = (table != 0).argmax(axis=1)
    count = (size - (table[:, ::-1] != 0).argmax(axis=1) - first).max()
    places = np.minimum(first, size - count)[:, None] + np.arange(count)
    return places, np.take_along_axis(table, places, axis=1)


def make_resize_weights(size: int, side: int, name: Filter = "bicubic") -> np.ndarray:
    """Returns Pillow's weights [side, size] float64 of the pixels of each new pixel."""
    # The kernel widens where an image shrinks: 8 -> 4 pixels, bicubic: each new pixel is made of
    # about 8.
    scale = max(size / side, 1.0)
    reach = {"bilinear": 1, "bicubic": 2}[name] * scale
    centers = (np.arange(side)[:, None] + 0.5) * size / side
    first = np.trunc(np.maximum(centers - reach + 0.5, 0))
    last = np.trunc(np.minimum(centers + reach + 0.5, size))
    places = np.arange(size)[None]
    x = np.abs(places - centers + 0.5) / scale
    if name == "bilinear":
        weights = np.maximum(1 - x, 0.0)
    else:
        near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * CUBIC
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights = np.where((places >= first) & (places < last), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)
