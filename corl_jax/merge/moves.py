"""Measures how far models moved from their base, and merges them, tensor by tensor.

A tensor is read in blocks, from all checkpoints together, so that memory holds a few blocks and the
tensor that is written.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from corl_jax.merge.inputs import MergeInputs, MergeModel
from corl_jax.merge.rules import Limits, MoveSums, Rule, find_range, find_smallest_kept
from corl_jax.weights.dtypes import is_float
from corl_jax.weights.nan_check import count_non_finite, describe_non_finite
from corl_jax.weights.shards import Progress
from corl_jax.weights.sources import Leaves, copy_array, list_layers, split_pieces
from corl_jax.weights.storage import Box, make_whole_box
from corl_jax.weights.table import Shape

TensorId = tuple[str, int | None]
"""A parameter path, and a layer of a parameter that is stacked over layers."""


@dataclasses.dataclass
class TensorMoves:
    """The moves of all models in one tensor of the PyTorch model."""

    path: str
    layer: int | None
    size: int
    moved: list[bool]  # by model
    sums: list[MoveSums]
    dots: dict[tuple[int, int], float]  # product of the moves of two models
    limits: Limits = dataclasses.field(default_factory=Limits)
    shared: list[int] | None = None  # moves that the rule's `share` names; known after the merge
    changed: float = 0.0  # sum of squares of the merged move, and of what rounding took from it
    rounded: float = 0.0
    not_finite: list[int] = dataclasses.field(default_factory=list)  # values: base, models

    @property
    def name(self) -> str:
        """The path, with the layer."""
        return self.path if self.layer is None else f"{self.path} layer {self.layer}"


def list_tensors(inputs: MergeInputs) -> list[TensorId]:
    """Returns every tensor of the PyTorch model; the layers of a parameter are several."""
    leaves, kind = inputs.base.leaves, inputs.base.kind
    return [
        (path, layer)
        for path in leaves.shapes
        for layer in list_layers(leaves, path, kind.is_stacked(path))
    ]


def measure_moves(
    inputs: MergeInputs, rule: Rule, factor: float, progress: Progress | None
) -> tuple[dict[TensorId, TensorMoves], list[str]]:
    """Reads all tensors of all models; returns their moves, and problems of NaN and infinity."""
    moves: dict[TensorId, TensorMoves] = {}
    problems: list[str] = []
    folders = [inputs.base.folder, *(model.folder for model in inputs.models)]
    for path, layer in list_tensors(inputs):
        tensor = _measure_tensor(inputs, path, layer, progress)
        for folder, count in zip(folders, tensor.not_finite, strict=True):
            problems += describe_non_finite(folder, tensor.name, count, tensor.size)
        if not problems and any(tensor.moved):
            tensor.limits = _find_limits(inputs, tensor, rule, factor)
        moves[path, layer] = tensor
    return moves, problems


def _measure_tensor(
    inputs: MergeInputs, path: str, layer: int | None, progress: Progress | None
) -> TensorMoves:
    models = inputs.models
    pairs = itertools.combinations(range(len(models)), 2)
    sums, moved = [MoveSums() for _ in models], [False] * len(models)
    dots, size, bad = dict.fromkeys(pairs, 0.0), 0, [0] * (len(models) + 1)
    base_dtype = inputs.base.leaves.dtype(path, layer)
    for _, base, values in _read_blocks(inputs.base.leaves, models, path, layer):
        size += base.size
        bad = [n + count_non_finite(block) for n, block in zip(bad, (base, *values), strict=True)]
        if any(bad):
            continue
        moves = [value - base for value in values]
        for number, (model, value) in enumerate(zip(models, values, strict=True)):
            sums[number].add_block(moves[number])
            dtype = model.leaves.dtype(path, layer)
            stored = base if dtype == base_dtype else _round_like(base, dtype)
            moved[number] |= not np.array_equal(stored, value)
        wide = [move.reshape(-1).astype(np.float64) for move in moves]
        for i, j in dots:
            dots[i, j] += float(wide[i] @ wide[j])
        if progress:
            progress(base.nbytes)
    # The base rounded to the type of a model is no move of that model.
    for number in range(len(models)):
        if not moved[number]:
            sums[number] = _make_zero_sums(size)
    dots = {pair: dot if moved[pair[0]] and moved[pair[1]] else 0.0 for pair, dot in dots.items()}
    return TensorMoves(path, layer, size, moved, sums, dots, not_finite=bad)


def _make_zero_sums(size: int) -> MoveSums:
    sums = MoveSums()
    sums.count = size
    return sums


def _find_limits(inputs: MergeInputs, tensor: TensorMoves, rule: Rule, factor: float) -> Limits:
    if rule.has_range:
        return find_range(tensor.sums, factor)
    if not rule.trims:
        return Limits()
    smallest = []
    for model, has_moved in zip(inputs.models, tensor.moved, strict=True):
        # One model after the other: this array is as large as the tensor.
        magnitudes, done = np.zeros(tensor.size, np.float32), 0
        if has_moved:
            leaves = inputs.base.leaves
            for _, base, (value,) in _read_blocks(leaves, [model], tensor.path, tensor.layer):
                magnitudes[done : done + base.size] = np.abs(value - base).reshape(-1)
                done += base.size
        smallest.append(find_smallest_kept(magnitudes))
    return Limits(smallest=tuple(smallest))


def _read_blocks(
    base: Leaves, models: Sequence[MergeModel], path: str, layer: int | None
) -> Iterator[tuple[Any, np.ndarray, list[np.ndarray]]]:
    """Yields (index, base, models) for each block of a tensor, as float32 in the leaf's order."""
    # Blocks and order are the same for every layout, so that sums over them are equal to the bit.
    for index, _, box in split_pieces(make_whole_box(_slice_shape(base, path, layer)), True):
        values = [_to_float32(model.leaves.read(path, layer, box)) for model in models]
        yield index, _to_float32(base.read(path, layer, box)), values


def _slice_shape(leaves: Leaves, path: str, layer: int | None) -> Shape:
    shape = leaves.shapes[path]
    return shape if layer is None else shape[1:]


def _to_float32(array: np.ndarray) -> np.ndarray:
    out = np.empty(array.shape, np.float32)
    # A float64 beyond float32 becomes infinite, which is then reported.
    with np.errstate(over="ignore"):
        copy_array(out, array)
    return out


def _round_like(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns float32 values that are rounded to a type of 16 bits; others as they are."""
    if dtype.itemsize >= array.dtype.itemsize:
        return array
    with np.errstate(over="ignore"):
        return _to_float32(array.astype(dtype))


class MergedLeaves:
    """The leaves of the merged model. Each is merged when it is read, and the result noted."""

    concurrent = transposed = False

    def __init__(
        self, inputs: MergeInputs, moves: dict[TensorId, TensorMoves], rule: Rule, factor: float,
        choose_dtype: Callable[[np.dtype], np.dtype],
    ) -> None:  # fmt: skip
        self.shapes = inputs.base.leaves.shapes
        self._base, self._models, self._moves = inputs.base.leaves, inputs.models, moves
        self._rule, self._factor, self._choose_dtype = rule, factor, choose_dtype

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        dtype = self._base.dtype(path, layer)
        # Here and not when the file is written: merged values are rounded once.
        return self._choose_dtype(dtype) if is_float(dtype) else dtype

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        tensor = self._moves[path, layer]
        if any(tensor.moved):
            whole = self._merge(tensor)
        else:
            # Not through float32, which a float64 would not survive.
            whole = self._base.read(path, layer).astype(self.dtype(path, layer), copy=False)
        return whole if box is None else whole[tuple(slice(*ends) for ends in box)]

    def _merge(self, tensor: TensorMoves) -> np.ndarray:
        path, layer = tensor.path, tensor.layer
        out = np.empty(_slice_shape(self._base, path, layer), self.dtype(path, layer))
        tensor.changed, tensor.rounded, shared = 0.0, 0.0, np.zeros(len(self._models), np.int64)
        models = [model for model, moved in zip(self._models, tensor.moved, strict=True) if moved]
        for index, base, values in _read_blocks(self._base, models, path, layer):
            rest = iter(values)
            moves = [next(rest) - base if moved else np.zeros_like(base) for moved in tensor.moved]
            exact, counts = self._rule.combine(base, moves, tensor.limits, self._factor)
            out[index] = exact.astype(out.dtype)
            shared += counts if counts is not None else 0
            wide = exact.astype(np.float64)
            tensor.changed += float(np.square(wide - base).sum())
            tensor.rounded += float(np.square(wide - out[index].astype(np.float64)).sum())
        tensor.shared = shared.tolist() if self._rule.share else None
        return out
