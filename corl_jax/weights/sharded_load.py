"""Loads parameters onto a mesh: each process reads the parts of its devices, leaf by leaf.

The peak of host memory is one leaf, or this process's part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from corl_jax.errors import Problems
from corl_jax.params import flatten, unflatten
from corl_jax.types import Params
from corl_jax.weights.nan_check import check_finite
from corl_jax.weights.sources import Leaves, read_leaf
from corl_jax.weights.storage import Box

DTypes = Callable[[str], Any]
"""path -> dtype of a parameter; None for the stored one."""


def place_leaves(
    leaves: Leaves, stacked: Callable[[str], bool], shardings: Params, dtype: DTypes, source: object
) -> Params:
    """Returns the leaves of `shardings` as global arrays; `stacked` tells which have layers.

    Raises: InputError listing the parameters of `source` that hold NaN.
    """
    problems = Problems()

    def place(path: str, sharding: Sharding) -> jax.Array:
        shape = leaves.shapes[path]
        box, local = read_local_part(leaves, path, stacked(path), sharding, dtype(path))
        problems.add(check_finite(source, path, local))

        # Called for each local device with its index into the global array. box [(4, 8)], index
        # [6:8] -> local[2:4].
        def take_shard(index: Any) -> Any:
            ends = zip(_make_box(index, shape), box, strict=True)
            return local[tuple(slice(a - first, b - first) for (a, b), (first, _) in ends)]

        return jax.make_array_from_callback(shape, sharding, take_shard)

    flat = {path: place(path, sharding) for path, sharding in flatten(shardings).items()}
    problems.raise_any()
    return unflatten(flat)


def read_local_part(
    leaves: Leaves, path: str, stacked: bool, sharding: Sharding, dtype: Any
) -> tuple[Box, np.ndarray]:
    """Reads this process's part of a leaf; returns the smallest box around it, and its values."""
    shape = leaves.shapes[path]
    indices = sharding.addressable_devices_indices_map(shape).values()
    boxes = [_make_box(index, shape) for index in indices]
    # Devices [0:2] and [2:4] of 8 rows -> box (0, 4). It may hold rows of no local device, if the
    # mesh orders devices otherwise; a leaf is read once all the same.
    box = tuple(
        (min(start for start, _ in axis), max(stop for _, stop in axis))
        for axis in zip(*boxes, strict=True)
    )
    return box, read_leaf(leaves, path, stacked, dtype, box)


def _make_box(index: Any, shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
