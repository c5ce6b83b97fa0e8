"""Where parameter slices come from: a torch layout, our own directory, or memory.

All three answer the same two questions, so that any layout is written from any other without
the whole model in memory: which type does a slice have, and what does it hold.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from corl_jax.weights.dtypes import named, widest
from corl_jax.weights.storage import Box, Store, whole
from corl_jax.weights.table import Shape, Slot


class Leaves(Protocol):
    """Parameter leaves by path; `layer` picks a slice of a leaf that is stacked over layers."""

    shapes: dict[str, Shape]

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        """The type of the slice in its source."""
        ...

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        """The slice, or the part of it in a box, of its source's type."""
        ...


class TorchLeaves:
    """Leaves of a checkpoint in a PyTorch layout."""

    def __init__(self, store: Store, slots: list[Slot], shapes: dict[str, Shape]):
        self.shapes = shapes
        self._store = store
        self._slots = {(slot.path, slot.layer): slot for slot in slots}

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        return self._store.infos[self._slots[path, layer].key].dtype

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        slot, shape = self._slots[path, layer], self.shapes[path]
        box = whole(shape if layer is None else shape[1:]) if box is None else box
        return slot.transform.to_leaf(self._store.read(slot.key, slot.box(box)))


class JaxLeaves:
    """Leaves of a converted directory.

    A stacked leaf has one type there; `layer_dtypes` says what each slice was in its source,
    where those differed.
    """

    def __init__(self, store: Store, layer_dtypes: Mapping[str, list[str]]):
        self.shapes = {path: info.shape for path, info in store.infos.items()}
        self._store = store
        self._layer_dtypes = layer_dtypes

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        if layer is not None and path in self._layer_dtypes:
            return named(self._layer_dtypes[path][layer])
        return self._store.infos[path].dtype

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        if layer is None:
            return self._store.read(path, box)
        box = whole(self.shapes[path][1:]) if box is None else box
        array = self._store.read(path, ((layer, layer + 1), *box))[0]
        return array.astype(self.dtype(path, layer), copy=False)


class MemoryLeaves:
    """Leaves held in memory as NumPy or JAX arrays."""

    def __init__(self, flat: Mapping[str, Any]):
        self.shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
        self._flat = flat

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        return np.dtype(self._flat[path].dtype)

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        leaf = self._flat[path]
        # A slice of a device array is fetched alone; the array itself may be gigabytes.
        leaf = leaf if layer is None else leaf[layer]
        return np.asarray(leaf if box is None else leaf[tuple(slice(*ends) for ends in box)])


def layer_count(leaves: Leaves, path: str, stacked: bool) -> list[int | None]:
    """The slices of a leaf: its layers, or the one whole."""
    return list(range(leaves.shapes[path][0])) if stacked else [None]


def leaf_dtype(leaves: Leaves, path: str, layers: list[int | None]) -> np.dtype:
    """The one type that holds all slices of a leaf exactly."""
    return widest(leaves.dtype(path, layer) for layer in layers)


def read_leaf(
    leaves: Leaves, path: str, stacked: bool, dtype: Any = None, box: Box | None = None
) -> np.ndarray:
    """A leaf, or the part of it in a box, slice by slice; `dtype` None is the stored one."""
    layers = layer_count(leaves, path, stacked)
    box = whole(leaves.shapes[path]) if box is None else box
    out = np.empty([stop - start for start, stop in box], dtype or leaf_dtype(leaves, path, layers))
    if not stacked:
        out[...] = leaves.read(path, None, box)
        return out
    for place, layer in enumerate(range(*box[0])):
        out[place] = leaves.read(path, layer, box[1:])
    return out


def mixed_dtypes(leaves: Leaves, stacked: Mapping[str, bool]) -> dict[str, list[str]]:
    """{path: type of each slice} for the leaves whose slices differ in type."""
    out = {}
    for path in leaves.shapes:
        kinds = [leaves.dtype(path, n) for n in layer_count(leaves, path, stacked[path])]
        if len(set(kinds)) > 1:
            out[path] = [kind.name for kind in kinds]
    return out


def slots_by_key(slots: list[Slot]) -> dict[str, list[Slot]]:
    """The slots that make up each torch tensor, in the order of its parts."""
    out: dict[str, list[Slot]] = collections.defaultdict(list)
    for slot in slots:
        out[slot.key].append(slot)
    return {key: sorted(group, key=lambda slot: slot.part) for key, group in out.items()}
