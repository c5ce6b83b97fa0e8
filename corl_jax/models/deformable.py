"""Multi-scale deformable attention: each query looks at a few learned places of feature maps.

Source: Zhu et al. 2020 (arXiv 2010.04159) eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from corl_jax.models.layers import make_linear

NUM_POINTS = 4  # places per query, head and level
IN_BOUNDS = "promise_in_bounds"

Sides = Sequence[tuple[int, int]]
"""Heights and widths of the levels."""


class DeformableAttention(nnx.Module):
    """x [B, Q, D] and `positions` [Q, D] -> [B, Q, D]; Q are the positions of all levels in order.

    Queries are the positions of the levels themselves. Places are relative to the query's own.
    """

    def __init__(self, width: int, num_heads: int, num_levels: int, *, rngs: nnx.Rngs):
        self.num_heads, self.num_levels = num_heads, num_levels
        places = num_heads * num_levels * NUM_POINTS
        self.sampling_offsets = make_linear(width, 2 * places, bias=True, rngs=rngs)
        self.attention_weights = make_linear(width, places, bias=True, rngs=rngs)
        self.value_proj = make_linear(width, width, bias=True, rngs=rngs)
        self.output_proj = make_linear(width, width, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, sides: Sides) -> jax.Array:
        batch, queries, width = x.shape
        heads, levels = self.num_heads, self.num_levels

        def split(features: jax.Array, *shape: int) -> jax.Array:
            """[B, Q, H * rest] -> [B, H, Q, *shape]."""
            return features.reshape(batch, queries, heads, *shape).swapaxes(1, 2)

        query = x + positions
        # float32: bfloat16 would round a place among 100 positions by up to a quarter.
        offsets = split(self.sampling_offsets(query).astype(jnp.float32), levels, NUM_POINTS, 2)
        weights = split(self.attention_weights(query).astype(jnp.float32), levels * NUM_POINTS)
        weights = jax.nn.softmax(weights, axis=-1).reshape(*offsets.shape[:-1])
        value = split(self.value_proj(x), width // heads)
        centres = jnp.asarray(list_centres(sides))[:, None]  # [Q, 1, 2]
        out = jnp.zeros(value.shape, jnp.float32)
        first = 0
        for level, (height, columns) in enumerate(sides):
            # Offsets are in positions of the level, centres in fractions of the image.
            size = jnp.array([columns, height], jnp.float32)
            places = centres * size - 0.5 + offsets[:, :, :, level]
            maps = value[:, :, first : first + height * columns]
            out += sample_bilinear(maps, (height, columns), places, weights[:, :, :, level])
            first += height * columns
        out = out.swapaxes(1, 2).reshape(batch, queries, width)
        return self.output_proj(out.astype(x.dtype))


def sample_bilinear(
    maps: jax.Array, side: tuple[int, int], places: jax.Array, weights: jax.Array
) -> jax.Array:
    """Computes weighted sums of a map at places between its positions: [B, H, Q, C] float32.

    `maps` [B, H, height * width, C], `places` [B, H, Q, P, 2] as (x, y), where 0 is the centre of
    the first position, `weights` [B, H, Q, P]. Outside of the map are zeros, as in PyTorch's
    `grid_sample` with `align_corners=False` and `padding_mode="zeros"`.
    """
    height, width = side
    corner = jnp.floor(places)
    fraction = places - corner
    total = jnp.zeros((*places.shape[:3], maps.shape[-1]), jnp.float32)
    # The indices are clipped, so the gather needs no check of its own.
    take_rows = jax.vmap(jax.vmap(lambda table, rows: table.at[rows].get(mode=IN_BOUNDS)))
    for down in (0, 1):
        for right in (0, 1):
            x, y = corner[..., 0] + right, corner[..., 1] + down
            share = jnp.abs(1 - right - fraction[..., 0]) * jnp.abs(1 - down - fraction[..., 1])
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            share = jnp.where(inside, share * weights, 0.0)
            # Clipped before the integers: a far place would overflow them.
            index = jnp.clip(y, 0, height - 1) * width + jnp.clip(x, 0, width - 1)
            index = index.astype(jnp.int32)
            # One point after the other, so that XLA fuses gathers, products and sums: the sum over
            # an axis of gathered rows took 3 times as long, and as much memory, on a CPU.
            for point in range(places.shape[3]):
                rows = take_rows(maps, index[..., point]).astype(jnp.float32)
                total += rows * share[..., point, None]
    return total


def list_centres(sides: Sides) -> np.ndarray:
    """Returns the centres (x, y) of all positions as fractions of the image, [Q, 2] float32."""
    centres = []
    for height, width in sides:
        y, x = np.divmod(np.arange(height * width), width)
        # A row of two positions: 0.25, 0.75
        centres.append(np.stack([(x + 0.5) / width, (y + 0.5) / height], axis=-1))
    return np.concatenate(centres).astype(np.float32)
