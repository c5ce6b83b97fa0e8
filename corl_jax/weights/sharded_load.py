"""From files onto a mesh: each process reads what its own devices hold, a leaf at a time.

The host's peak is one leaf, or this process's part of it, and not the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from corl_jax.errors import InputError
from corl_jax.params import flatten, unflatten
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.types import Params
from corl_jax.weights.checkpoint import is_stacked, open_checkpoint
from corl_jax.weights.nan_check import non_finite_problem
from corl_jax.weights.sources import Leaves, layer_count, leaf_dtype, mixed_dtypes, read_leaf
from corl_jax.weights.storage import Box

DTypes = Callable[[str], Any]
"""path -> dtype of a parameter; None is as stored."""


def load_sharded(
    folder: str | Path, config: JanusConfig, shardings: Params, dtype: DTypes
) -> Params:
    """The parameters that `shardings` names, a tree of jax Shardings, as global arrays.

    Raises: InputError listing every tensor that does not fit the config, or holds NaN.
    """
    with open_checkpoint(Path(folder), config) as checkpoint:
        return place_leaves(checkpoint.leaves, is_stacked, shardings, dtype, folder)


def stored_dtypes(folder: str | Path, config: JanusConfig) -> dict[str, Any]:
    """path -> dtype of each parameter in its files: the one that holds all of its layers."""
    with open_checkpoint(Path(folder), config) as checkpoint:
        leaves = checkpoint.leaves
        return {
            path: leaf_dtype(leaves, path, layer_count(leaves, path, is_stacked(path)))
            for path in leaves.shapes
        }


def stored_layer_dtypes(folder: str | Path, config: JanusConfig) -> dict[str, list[str]]:
    """path -> name of each layer's dtype, for the parameters whose layers differ in type."""
    with open_checkpoint(Path(folder), config) as checkpoint:
        stacked = {path: is_stacked(path) for path in checkpoint.leaves.shapes}
        return mixed_dtypes(checkpoint.leaves, stacked)


def place_leaves(
    leaves: Leaves, stacked: Callable[[str], bool], shardings: Params, dtype: DTypes, source: object
) -> Params:
    """Global arrays of the leaves that `shardings` names; `stacked` says which have layers.

    Raises: InputError listing the parameters of `source` that hold NaN.
    """
    problems: list[str] = []

    def placed(path: str, sharding: Sharding) -> jax.Array:
        shape = leaves.shapes[path]
        box, local = local_part(leaves, path, stacked(path), sharding, dtype(path))
        problems.extend(non_finite_problem(source, path, local))

        def shard(index: Any) -> Any:
            ends = zip(_box(index, shape), box, strict=True)
            return local[tuple(slice(a - first, b - first) for (a, b), (first, _) in ends)]

        return jax.make_array_from_callback(shape, sharding, shard)

    flat = {path: placed(path, one) for path, one in flatten(shardings).items()}
    if problems:
        raise InputError(problems)
    return unflatten(flat)


def local_part(
    leaves: Leaves, path: str, stacked: bool, sharding: Sharding, dtype: Any
) -> tuple[Box, np.ndarray]:
    """What this process's devices hold of a leaf: the smallest box around it, and its values."""
    shape = leaves.shapes[path]
    held = sharding.addressable_devices_indices_map(shape).values()
    boxes = [_box(index, shape) for index in held]
    box = tuple(
        (min(start for start, _ in axis), max(stop for _, stop in axis))
        for axis in zip(*boxes, strict=True)
    )
    return box, read_leaf(leaves, path, stacked, dtype, box)


def _box(index: Any, shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
