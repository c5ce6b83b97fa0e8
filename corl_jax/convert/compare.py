"""Compares two checkpoints of any layouts, slice by slice under their common names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from corl_jax.params import flatten
from corl_jax.weights.checkpoint import Checkpoint, open_checkpoint
from corl_jax.weights.dtypes import find_common_dtype
from corl_jax.weights.kinds import NetworkKind
from corl_jax.weights.sources import list_layers

BLOCK_VALUES = 2**22


@dataclasses.dataclass
class Comparison:
    """The result of a comparison, as lines to print; a note is no difference."""

    tensors: int  # compared; the layers of a part are one
    stored: tuple[int, int]  # tensors in the files of each checkpoint
    differences: list[str]
    notes: list[str]


def compare(
    a: Path,
    b: Path,
    kind: NetworkKind,
    *,
    ignore_dtype: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Compares sizes and tensors bitwise, dtypes included.

    Raises: InputError for a checkpoint that does not add up.
    """
    with open_checkpoint(a, kind) as first, open_checkpoint(b, kind) as second:
        stored = len(first.store.infos), len(second.store.infos)
        result = Comparison(0, stored, _compare_configs(first, second), [])
        for path in first.leaves.shapes:
            if second.leaves.shapes.get(path) != first.leaves.shapes[path]:
                other = second.leaves.shapes.get(path)
                result.differences.append(f"{path}: {first.leaves.shapes[path]} against {other}")
                continue
            lines = list(_compare_leaf(first, second, path, ignore_dtype, progress))
            result.differences += lines
            result.tensors += 1
        extra = second.leaves.shapes.keys() - first.leaves.shapes.keys()
        result.differences += [f"{path}: only in {b}" for path in sorted(extra)]
        _compare_carried(first, second, result, ignore_dtype)
    return result


def _compare_configs(a: Checkpoint, b: Checkpoint) -> list[str]:
    old, new = (flatten(dataclasses.asdict(checkpoint.config)) for checkpoint in (a, b))
    return [
        f"config {name.replace('/', '.')}: {old[name]} against {new[name]}"
        for name in old
        if old[name] != new[name]
    ]


def _compare_leaf(
    a: Checkpoint,
    b: Checkpoint,
    path: str,
    ignore_dtype: bool,
    progress: Callable[[int], None] | None,
) -> Iterator[str]:
    for layer in list_layers(a.leaves, path, a.kind.is_stacked(path)):
        x, y = a.leaves.read(path, layer), b.leaves.read(path, layer)
        line = describe_difference(x, y, ignore_dtype)
        if line:
            yield f"{path}{'' if layer is None else f' layer {layer}'}: {line}"
        if progress:
            progress(x.nbytes)


def describe_difference(x: np.ndarray, y: np.ndarray, ignore_dtype: bool) -> str | None:
    """Describes the difference of two arrays; None for equal arrays."""
    if x.shape != y.shape:
        return f"shape {x.shape} against {y.shape}"
    wide = find_common_dtype((x.dtype, y.dtype))
    same, unequal, gap = True, 0, 0.0
    for a, b in _split_blocks(x, y, wide):
        # Bytes, so that NaN equals NaN and 0.0 differs from -0.0.
        if a.tobytes() != b.tobytes():
            same = False
            count, largest = _count_differences(a, b)
            unequal, gap = unequal + count, max(gap, largest)
    numbers = f"{unequal} of {x.size} values differ, by at most {gap:.3g}"
    if x.dtype == y.dtype:
        return None if same else numbers
    if same and ignore_dtype:
        return None
    return f"{x.dtype.name} against {y.dtype.name}, {'values equal' if same else numbers}"


def _split_blocks(
    x: np.ndarray, y: np.ndarray, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of rows of both arrays, widened to `dtype`."""
    # BLOCK_VALUES values at a time: a float64 copy of a whole tensor can be gigabytes.
    x, y = np.atleast_1d(x), np.atleast_1d(y)
    rows = max(1, BLOCK_VALUES * x.shape[0] // max(1, x.size))
    for start in range(0, x.shape[0], rows):
        block = slice(start, start + rows)
        yield x[block].astype(dtype, order="C"), y[block].astype(dtype, order="C")


def _count_differences(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    unequal = ~(a64 == b64)
    # Infinity minus infinity is NaN, which nanmax skips.
    with np.errstate(invalid="ignore"):
        gap = np.nanmax(np.abs(a64 - b64)[unequal], initial=0.0)
    return int(unequal.sum()), float(gap)


def _compare_carried(a: Checkpoint, b: Checkpoint, result: Comparison, ignore_dtype: bool) -> None:
    """Compares tensors outside the model; a layout without a place for them gets only a note."""
    for key in sorted(a.carried.keys() & b.carried.keys()):
        line = describe_difference(a.carried[key].read(key), b.carried[key].read(key), ignore_dtype)
        result.tensors += 1
        if line:
            result.differences.append(f"{key}: {line}")
    for checkpoint, other in ((a, b), (b, a)):
        only = sorted(checkpoint.carried.keys() - other.carried.keys())
        lines = [f"{key}: only in {checkpoint.folder}" for key in only]
        # A converted directory is judged by its source: it carries what the source carried.
        table = other.kind.tables.get(other.source_layout)
        if table is not None and not table.carried:
            result.notes += lines
        else:
            result.differences += lines
