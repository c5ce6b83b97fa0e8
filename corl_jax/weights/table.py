"""A strict, invertible table between a PyTorch state dict and parameter paths.

A row pairs a torch key with a parameter path. `{layer}` in the key is the number of a slice of a
leaf that is stacked over layers. Every other placeholder occurs in both key and path. A torch
tensor of several leaves, such as a fused qkv, has one row per leaf, each with its `part`.
All transforms are permutations of elements, so both directions are exact to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from corl_jax.errors import InputError
from corl_jax.weights.storage import Box

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """The change from a torch tensor to a leaf: no leading axis of 1, last axis split, permuted.

    `split` has the sizes of the axes that the last axis of the torch tensor stands for, one of
    them -1.
    """

    axes: tuple[int, ...] | None = None
    drop_leading: bool = False
    split: tuple[int, ...] | None = None

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a torch tensor as its leaf."""
        tensor = tensor[0] if self.drop_leading else tensor
        # split (2, -1): [O, 6] -> [O, 2, 3]
        tensor = tensor if self.split is None else tensor.reshape(*tensor.shape[:-1], *self.split)
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """Inverts `to_leaf`. Both may return views, which a writer must make contiguous."""
        # argsort inverts a permutation: axes (2, 3, 1, 0) -> (3, 2, 0, 1).
        tensor = leaf if self.axes is None else leaf.transpose(np.argsort(self.axes))
        if self.split is not None:
            tensor = tensor.reshape(*tensor.shape[: -len(self.split)], -1)
        return tensor[None] if self.drop_leading else tensor

    def torch_box(self, box: Box) -> Box:
        """Returns the box of the torch tensor that holds a part of a leaf.

        The part must hold the whole of the axes in `split`: a part of them is no box in the tensor.
        """
        if self.axes is not None:
            box = tuple(box[i] for i in np.argsort(self.axes))
        if self.split is not None:
            merged = math.prod(stop - start for start, stop in box[-len(self.split) :])
            box = (*box[: -len(self.split)], (0, merged))
        return ((0, 1), *box) if self.drop_leading else box

    def torch_shape(self, shape: Shape) -> Shape:
        """Returns the torch shape of a leaf. Raises: ValueError for a leaf of another rank."""
        if self.axes is not None:
            if len(self.axes) != len(shape):
                raise ValueError(f"rank {len(shape)}, but the table expects {len(self.axes)}")
            shape = tuple(shape[i] for i in np.argsort(self.axes))
        if self.split is not None:
            shape = (*shape[: -len(self.split)], math.prod(shape[-len(self.split) :]))
        return (1, *shape) if self.drop_leading else tuple(shape)


SAME = Transform()
DENSE = Transform(axes=(1, 0))  # [out, in] -> [in, out]
CONV = Transform(axes=(2, 3, 1, 0))  # OIHW -> HWIO
POINTWISE = Transform(axes=(1, 2, 3, 0), split=(1, 1, -1))  # [out, in] -> [1, 1, in, out]
DROP_LEADING = Transform(drop_leading=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One pairing; `part` = (index, count) where the leaf is a block of the tensor's axis 0."""

    key: str
    path: str
    transform: Transform = SAME
    part: tuple[int, int] = (0, 1)

    @property
    def stacked(self) -> bool:
        """True if the row stands for a tensor of each layer."""
        return "{layer}" in self.key


@dataclasses.dataclass(frozen=True)
class Slot:
    """A row for one slice of one leaf, and the part of the torch tensor that holds it."""

    key: str
    path: str
    layer: int | None  # slice of a stacked leaf
    part: tuple[int, int]
    transform: Transform
    shape: Shape  # of the whole torch tensor

    def box(self, box: Box) -> Box:
        """Returns the box of the whole torch tensor that holds a part of the leaf's slice."""
        box = self.transform.torch_box(box)
        if self.transform.split is not None and box[-1][1] != self.shape[-1]:
            raise ValueError(f"{self.path}: its first axes cannot be split over devices")
        index, count = self.part
        if count == 1:
            return box
        # Fused qkv [3D, D], k is part (1, 3): its rows 0:2 are rows D:D+2 of the tensor.
        first = index * (self.shape[0] // count)
        (start, stop), *rest = box
        return ((first + start, first + stop), *rest)


@functools.cache
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    # "layers.{layer}.weight" -> r"layers\.(?P<layer>0|[1-9][0-9]*)\.weight". "01" is no number: two
    # names would mean the same tensor.
    pieces = re.split(r"\{(\w+)\}", pattern)
    names = (f"(?P<{name}>0|[1-9][0-9]*)" for name in pieces[1::2])
    out = re.escape(pieces[0])
    for name, literal in zip(names, pieces[2::2], strict=True):
        out += name + re.escape(literal)
    return re.compile(out)


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one layout, and the torch keys that have no leaf.

    `carried` keys belong to the layout, but the model does not use them; an export takes them
    from a base checkpoint. `dropped` keys are derived buffers, which no loader needs.
    """

    name: str
    rows: tuple[Row, ...]
    carried: tuple[str, ...] = ()  # regexes
    dropped: tuple[str, ...] = ()  # regexes

    def is_carried(self, key: str) -> bool:
        """Returns whether a key has no leaf, but is kept for an export."""
        return any(re.fullmatch(pattern, key) for pattern in self.carried)

    def is_dropped(self, key: str) -> bool:
        """Returns whether a key has no leaf and is not needed."""
        return any(re.fullmatch(pattern, key) for pattern in self.dropped)

    def matches(self, key: str) -> bool:
        """Returns whether a row has this torch key."""
        return any(_compile_pattern(row.key).fullmatch(key) for row in self.rows)

    def has_leaf(self, path: str) -> bool:
        """Returns whether a row has this parameter path."""
        return any(_compile_pattern(row.path).fullmatch(path) for row in self.rows)

    def find_row(self, path: str) -> tuple[Row, dict[str, str]]:
        """Returns the one row of a leaf, and the values of its placeholders."""
        hits = [(row, m) for row in self.rows if (m := _compile_pattern(row.path).fullmatch(path))]
        if len(hits) != 1:
            count = "no row" if not hits else f"{len(hits)} rows"
            raise InputError(f"{path}: {count} of the {self.name} table match it, expected one")
        return hits[0][0], hits[0][1].groupdict()

    def make_slots(self, leaves: Mapping[str, Shape]) -> list[Slot]:
        """Returns every torch tensor, or part of one, that holds these leaves.

        Raises: InputError listing leaves without a row, or two leaves in one place.
        """
        slots, problems = [], []
        for path, shape in leaves.items():
            try:
                slots += self._make_slots_of(path, tuple(shape))
            except (InputError, ValueError) as error:
                lines = error.problems if isinstance(error, InputError) else [f"{path}: {error}"]
                problems += lines
        problems += _find_overlaps(slots)
        if problems:
            raise InputError(problems)
        return slots

    def _make_slots_of(self, path: str, shape: Shape) -> Iterator[Slot]:
        row, values = self.find_row(path)
        layers: Iterable[int | None] = range(shape[0]) if row.stacked else (None,)
        shape = shape[1:] if row.stacked else shape
        # Leaf [24, 2048, 2048] of a fused qkv: slices [2048, 2048], torch tensors [6144, 2048].
        torch_shape = row.transform.torch_shape(shape)
        if row.part[1] > 1:
            torch_shape = (torch_shape[0] * row.part[1], *torch_shape[1:])
        for layer in layers:
            key = _fill(row.key, {**values, "layer": str(layer)})
            yield Slot(key, path, layer, row.part, row.transform, torch_shape)

    def find_problems(
        self, slots: Iterable[Slot], stored: Mapping[str, Shape], where: Any
    ) -> list[str]:
        """Lists the tensors that are unknown, missing or of another shape."""
        expected = {slot.key: slot.shape for slot in slots}
        out = []
        for key, shape in expected.items():
            if key not in stored:
                out.append(f"{where}: {key} is missing, expected with shape {list(shape)}")
            elif tuple(stored[key]) != shape:
                out.append(
                    f"{where}: {key} has shape {list(stored[key])}, expected {list(shape)} by "
                    "the config; correct the config or use the checkpoint that it belongs to"
                )
        for key in stored:
            if key not in expected and not self.is_carried(key) and not self.is_dropped(key):
                out.append(
                    f"{where}: {key} is unknown to the {self.name} layout with this config; "
                    "correct the config's number of layers, or remove the tensor"
                )
        return out


def _find_overlaps(slots: Iterable[Slot]) -> list[str]:
    """Lists places with two leaves, and tensors with a part that has no leaf."""
    feeds: dict[str, dict[int, str]] = {}
    counts: dict[str, set[int]] = {}
    problems = []
    for slot in slots:
        parts = feeds.setdefault(slot.key, {})
        if slot.part[0] in parts:
            problems.append(f"{slot.key}: fed by both {parts[slot.part[0]]} and {slot.path}")
        parts[slot.part[0]] = slot.path
        counts.setdefault(slot.key, set()).add(slot.part[1])
    for key, sizes in counts.items():
        if set(feeds[key]) != set(range(max(sizes))) or len(sizes) != 1:
            problems.append(f"{key}: only parts {sorted(feeds[key])} of {max(sizes)} have a leaf")
    return problems


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: values[m[1]], pattern)
