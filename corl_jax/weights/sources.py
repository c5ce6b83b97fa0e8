"""Reads parameter slices from a torch layout, from our own directory or from memory.

All three sources give the dtype and the values of a slice. So any layout can be written from any
other without the whole model in memory.
"""

from __future__ import annotations

import collections
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from corl_jax.weights.dtypes import BFLOAT16, find_common_dtype, parse_dtype
from corl_jax.weights.storage import Box, Store, make_whole_box
from corl_jax.weights.table import Shape, Slot

READERS = min(8, os.cpu_count() or 1)
PIECE = 2**22
"""Values of a leaf without layers that one thread reads at a time."""
COLUMNS = 64
"""Columns of a transposed array copied at a time, few enough to stay in the CPU cache."""


class Leaves(Protocol):
    """Parameter leaves by path; `layer` picks a slice of a leaf that is stacked over layers."""

    shapes: dict[str, Shape]
    concurrent: bool  # several threads may read
    transposed: bool  # the source may hold matrices as [out, in]

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        """Returns the dtype of the slice in its source."""
        ...

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        """Returns the slice, or the part of it in a box, in its source's dtype."""
        ...


class TorchLeaves:
    """Reads the leaves of a checkpoint in a PyTorch layout."""

    def __init__(self, store: Store, slots: list[Slot], shapes: dict[str, Shape]):
        self.shapes = shapes
        self.concurrent, self.transposed = store.concurrent, True
        self._store = store
        self._slots = {(slot.path, slot.layer): slot for slot in slots}

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        return self._store.infos[self._slots[path, layer].key].dtype

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        slot, shape = self._slots[path, layer], self.shapes[path]
        box = make_whole_box(shape if layer is None else shape[1:]) if box is None else box
        # The box is in the leaf's axes: rows 0:4 of [in, out] are columns 0:4 of torch's [out, in].
        return slot.transform.to_leaf(self._store.read(slot.key, slot.box(box)))


class JaxLeaves:
    """Reads the leaves of a converted directory.

    A stacked leaf has one dtype in the file. `layer_dtypes` has the dtypes that its slices had in
    their source, if these differed.
    """

    def __init__(self, store: Store, layer_dtypes: Mapping[str, list[str]]):
        self.shapes = {path: info.shape for path, info in store.infos.items()}
        self.concurrent, self.transposed = store.concurrent, False
        self._store = store
        self._layer_dtypes = layer_dtypes

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        if layer is not None and path in self._layer_dtypes:
            return parse_dtype(self._layer_dtypes[path][layer])
        return self._store.infos[path].dtype

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        if layer is None:
            return self._store.read(path, box)
        box = make_whole_box(self.shapes[path][1:]) if box is None else box
        # One layer of [L, ..]: the box gets its axis, and [0] removes it.
        array = self._store.read(path, ((layer, layer + 1), *box))[0]
        return array.astype(self.dtype(path, layer), copy=False)


class MemoryLeaves:
    """Reads leaves that are NumPy or JAX arrays in memory.

    `layer_dtypes` has the dtypes in which to write slices, for leaves whose slices had different
    dtypes in their source.
    """

    concurrent = transposed = False

    def __init__(
        self, flat: Mapping[str, Any], layer_dtypes: Mapping[str, list[str]] | None = None
    ):
        self.shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
        self._flat = flat
        self._layer_dtypes = layer_dtypes or {}

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        if layer is not None and path in self._layer_dtypes:
            return parse_dtype(self._layer_dtypes[path][layer])
        return np.dtype(self._flat[path].dtype)

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        leaf = self._flat[path]
        # A slice of a device array is fetched alone; the array itself may be gigabytes.
        leaf = leaf if layer is None else leaf[layer]
        array = np.asarray(leaf if box is None else leaf[tuple(slice(*ends) for ends in box)])
        return array.astype(self.dtype(path, layer), copy=False)


def list_layers(leaves: Leaves, path: str, stacked: bool) -> list[int | None]:
    """Returns the slices of a leaf: the numbers of its layers, or None for the whole."""
    return list(range(leaves.shapes[path][0])) if stacked else [None]


def find_leaf_dtype(leaves: Leaves, path: str, layers: list[int | None]) -> np.dtype:
    """Returns the dtype that holds all slices of a leaf exactly."""
    return find_common_dtype(leaves.dtype(path, layer) for layer in layers)


def read_leaf(
    leaves: Leaves, path: str, stacked: bool, dtype: Any = None, box: Box | None = None
) -> np.ndarray:
    """Reads a leaf, or the part of it in a box, slice by slice; `dtype` None is the stored one."""
    layers = list_layers(leaves, path, stacked)
    box = make_whole_box(leaves.shapes[path]) if box is None else box
    out = np.empty(
        [stop - start for start, stop in box], dtype or find_leaf_dtype(leaves, path, layers)
    )

    def fill(piece: Piece) -> None:
        where, layer, part = piece
        copy_array(out[where], leaves.read(path, layer, part))

    # Threads help although Python has a lock: `pread` and NumPy's copies release it.
    pieces = list(_split_layers(box) if stacked else split_pieces(box, leaves.transposed))
    if leaves.concurrent and len(pieces) > 1:
        with ThreadPoolExecutor(READERS) as readers:
            for _ in readers.map(fill, pieces):
                pass  # an error of a thread is raised here
    else:
        for piece in pieces:
            fill(piece)
    return out


Piece = tuple[Any, int | None, Box]
"""(index into the result, layer, box in the source)."""


def _split_layers(box: Box) -> Iterator[Piece]:
    # box ((2, 4), (0, 8)) -> (0, layer 2, ((0, 8),)), (1, layer 3, ((0, 8),)). The ellipsis makes
    # `out[where]` an array also for a leaf [L], whose layer is one number.
    return (((place, ...), layer, box[1:]) for place, layer in enumerate(range(*box[0])))


def split_pieces(box: Box, transposed: bool) -> Iterator[Piece]:
    """Splits a box into pieces of about PIECE values, which are almost contiguous in the file."""
    sizes = [stop - start for start, stop in box]
    if math.prod(sizes) <= PIECE:
        yield ..., None, box
        return
    # The largest matrices have the vocabulary as their longest axis, which is outermost in torch's
    # files: leaf [2048, 102400] is torch's [102400, 2048]; pieces of axis 1 are whole rows there.
    axis = int(np.argmax(sizes)) if transposed else 0
    rows = math.ceil(sizes[axis] / math.ceil(math.prod(sizes) / PIECE))
    for start, stop in itertools.pairwise([*range(0, sizes[axis], rows), sizes[axis]]):
        first = box[axis][0]
        part = (*box[:axis], (first + start, first + stop), *box[axis + 1 :])
        yield (*[slice(None)] * axis, slice(start, stop)), None, part


def copy_array(out: np.ndarray, source: np.ndarray) -> None:
    """Copies values: out[...] = source."""
    # bfloat16 is copied by its bits: NumPy does not know the type, and holds the interpreter's lock
    # while it copies or widens it. The bits of a bfloat16 are the upper half of the float32's:
    # 1.0 is 0x3F80, and 0x3F800000.
    if source.dtype == BFLOAT16 and out.dtype == np.float32:
        bits = out.view(np.uint32)
        _copy_by_columns(bits, source.view(np.uint16))
        bits <<= 16
    elif source.dtype == out.dtype == BFLOAT16:
        _copy_by_columns(out.view(np.uint16), source.view(np.uint16))
    else:
        _copy_by_columns(out, source)


def _copy_by_columns(out: np.ndarray, source: np.ndarray) -> None:
    if source.ndim < 2 or source.flags.c_contiguous:
        out[...] = source
        return
    # A transposed source: its columns are contiguous, the result's rows are. Whole rows at once
    # would load a cache line of the source for every value.
    for start in range(0, out.shape[-1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        out[..., columns] = source[..., columns]


def find_mixed_dtypes(leaves: Leaves, stacked: Mapping[str, bool]) -> dict[str, list[str]]:
    """Returns {path: dtype name of each slice} for the leaves whose slices differ in dtype."""
    out = {}
    for path in leaves.shapes:
        kinds = [leaves.dtype(path, n) for n in list_layers(leaves, path, stacked[path])]
        if len(set(kinds)) > 1:
            out[path] = [kind.name for kind in kinds]
    return out


def group_slots(slots: list[Slot]) -> dict[str, list[Slot]]:
    """Returns the slots of each torch tensor, in the order of its parts."""
    out: dict[str, list[Slot]] = collections.defaultdict(list)
    for slot in slots:
        out[slot.key].append(slot)
    return {key: sorted(group, key=lambda slot: slot.part) for key, group in out.items()}
