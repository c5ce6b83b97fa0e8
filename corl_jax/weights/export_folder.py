"""Fills a checkpoint directory of any kind and layout: weights, config and tokenizer files."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.errors import Problems, shorten
from corl_jax.weights.checkpoint import CARRIED_FILE, SOURCE_FOLDER
from corl_jax.weights.dtypes import DType, find_common_dtype, is_float, parse_dtype
from corl_jax.weights.folders import read_unmarked
from corl_jax.weights.kinds import OWN_LAYOUT, Assets, NetworkKind
from corl_jax.weights.nan_check import check_while_writing
from corl_jax.weights.own_config import make_own_config
from corl_jax.weights.parts import write_parts
from corl_jax.weights.shards import (
    DEFAULT_SHARD_BYTES,
    ExtraFiles,
    Progress,
    TensorPlan,
    write_bytes,
    write_extra_files,
    write_json,
    write_safetensors,
    write_tensors,
)
from corl_jax.weights.sources import (
    Leaves,
    find_leaf_dtype,
    find_mixed_dtypes,
    group_slots,
    list_layers,
)
from corl_jax.weights.storage import Store, read_json
from corl_jax.weights.table import Slot

GENERATION_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Export:
    """The inputs from which a directory is written."""

    kind: NetworkKind
    layout: str
    config: Any  # the sizes
    leaves: Leaves
    assets: Assets | None
    carried: Mapping[str, Store]
    dtype: DType = "keep"
    stated_dtype: str | None = None  # for config.json; None keeps that of a copied config.json
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    as_bin: bool = False
    # Values of generation_config.json that replace the source's.
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: ExtraFiles = dataclasses.field(default_factory=dict)

    def target_dtype(self, dtype: np.dtype) -> np.dtype:
        """Returns the dtype in which a tensor that is stored as `dtype` is written."""
        return parse_dtype(self.dtype) if self.dtype != "keep" and is_float(dtype) else dtype

    @property
    def assets_layout(self) -> str:
        """The layout of the tokenizer and processor files to write."""
        if self.layout != OWN_LAYOUT:
            return self.layout
        if self.assets:
            return self.assets.layout
        return next(iter(self.kind.tables)) if self.kind.foreign_export else OWN_LAYOUT


def write_export(folder: Path, export: Export, progress: Progress | None = None) -> list[str]:
    """Fills an empty folder; returns notes for the user."""
    plans = plan_tensors(export)
    # Small files first: a missing tokenizer must fail before gigabytes are written.
    _write_config(folder, export, plans)
    notes = _write_assets(folder, export)
    plans, not_finite = check_while_writing(plans)
    if export.kind.parts and export.layout != OWN_LAYOUT:
        write_parts(
            folder, export.kind, plans, max_shard_bytes=export.max_shard_bytes,
            as_bin=export.as_bin, progress=progress,
        )  # fmt: skip
    else:
        write_tensors(
            folder,
            plans,
            max_shard_bytes=export.max_shard_bytes,
            as_bin=export.as_bin,
            progress=progress,
        )
    if export.layout == OWN_LAYOUT and export.carried:
        (folder / SOURCE_FOLDER).mkdir(exist_ok=True)
        carried, more = check_while_writing(_plan_carried(export))
        write_safetensors(folder / SOURCE_FOLDER / CARRIED_FILE, carried, progress)
        not_finite += more
    not_finite = shorten(not_finite, what="tensors with values that are NaN or infinite")
    return notes + _describe_carried(export) + _describe_mixed_parts(export) + not_finite


def plan_tensors(export: Export) -> list[TensorPlan]:
    """Plans the tensors of the model, and those that the layout carries outside of it."""
    if export.layout == OWN_LAYOUT:
        return [_plan_leaf(export, path) for path in export.leaves.shapes]
    table = export.kind.tables[export.layout]
    slots = table.make_slots(export.leaves.shapes)
    plans = [_plan_torch(export, key, group) for key, group in group_slots(slots).items()]
    plans += _plan_derived(export)
    return plans + (_plan_carried(export) if table.carried else [])


def _plan_torch(export: Export, key: str, group: list[Slot]) -> TensorPlan:
    leaves = export.leaves
    dtype = export.target_dtype(
        find_common_dtype(leaves.dtype(slot.path, slot.layer) for slot in group)
    )

    # The parts of a fused tensor follow each other along axis 0: q [D, D], k, v -> qkv [3D, D].
    def chunks() -> Iterator[np.ndarray]:
        for slot in group:
            leaf = leaves.read(slot.path, slot.layer)
            yield np.ascontiguousarray(slot.transform.to_torch(leaf), dtype=dtype)

    return TensorPlan(key, dtype, group[0].shape, chunks)


def _plan_leaf(export: Export, path: str) -> TensorPlan:
    leaves = export.leaves
    layers = list_layers(leaves, path, export.kind.is_stacked(path))
    dtype = export.target_dtype(find_leaf_dtype(leaves, path, layers))

    def chunks() -> Iterator[np.ndarray]:
        for layer in layers:
            yield np.ascontiguousarray(leaves.read(path, layer), dtype=dtype)

    return TensorPlan(path, dtype, leaves.shapes[path], chunks)


def _plan_derived(export: Export) -> list[TensorPlan]:
    def plan(key: str, values: np.ndarray) -> TensorPlan:
        array = values.astype(export.target_dtype(values.dtype))
        return TensorPlan(key, array.dtype, array.shape, lambda: iter([array]))

    return [plan(key, values) for key, values in export.kind.derive(export.config).items()]


def _plan_carried(export: Export) -> list[TensorPlan]:
    # A function per tensor, because `chunks` runs later and must see its key and not the last one.
    def plan(key: str, store: Store) -> TensorPlan:
        info = store.infos[key]
        dtype = export.target_dtype(info.dtype)

        def chunks() -> Iterator[np.ndarray]:
            yield np.ascontiguousarray(store.read(key), dtype=dtype)

        return TensorPlan(key, dtype, info.shape, chunks)

    return [plan(key, store) for key, store in export.carried.items()]


def _describe_carried(export: Export) -> list[str]:
    """Describes tensors outside the model without a place in the layout, or without a source."""
    if export.layout == OWN_LAYOUT:
        return []
    patterns = export.kind.tables[export.layout].carried
    if export.carried and not patterns:
        names = sorted({".".join(key.split(".")[:3]) for key in export.carried})
        return [
            f"{len(export.carried)} tensors have no place in the {export.layout} layout and are "
            f"left out ({', '.join(names)}); --base restores them on the way back"
        ]
    absent = [p for p in patterns if not any(re.fullmatch(p, key) for key in export.carried)]
    return [
        f"no source has {format_pattern(pattern)}, so the output lacks it; the model does "
        f"not use it, but strict loaders ask for it: give --base with a checkpoint of the "
        f"{export.layout} layout that has it"
        for pattern in absent
    ]


def _describe_mixed_parts(export: Export) -> list[str]:
    """Describes tensors that join parts of different dtypes in their source."""
    if export.layout == OWN_LAYOUT or export.dtype != "keep":
        return []
    groups = group_slots(export.kind.tables[export.layout].make_slots(export.leaves.shapes))
    mixed = [
        key
        for key, group in groups.items()
        if len({export.leaves.dtype(slot.path, slot.layer) for slot in group}) > 1
    ]
    if not mixed:
        return []
    return [
        f"{len(mixed)} tensors ({mixed[0]}) join parts that have different types in the source; "
        "each is written in the type that holds all of its parts exactly"
    ]


def format_pattern(pattern: str) -> str:
    """Returns a regex of tensor names as a user reads it, with `*`."""
    return pattern.replace(".+", "*").replace("\\", "")


def find_main_dtype(plans: list[TensorPlan]) -> str:
    """Returns the dtype of most of the bytes."""
    sizes: collections.Counter[str] = collections.Counter()
    for plan in plans:
        sizes[plan.dtype.name] += plan.nbytes
    return sizes.most_common(1)[0][0]


def _write_config(folder: Path, export: Export, plans: list[TensorPlan]) -> None:
    """Writes config.json: the source's bytes if they are still right, else patched or new."""
    source, kind, file = export.assets, export.kind, folder / "config.json"
    foreign = kind.foreign_export
    if export.layout == OWN_LAYOUT or foreign is None:
        stacked = {path: kind.is_stacked(path) for path in export.leaves.shapes}
        mixed = find_mixed_dtypes(export.leaves, stacked) if export.dtype == "keep" else {}
        write_json(file, make_own_config(kind, export.config, export.assets_layout, mixed))
        if foreign and source and source.config.is_file():
            (folder / SOURCE_FOLDER).mkdir(exist_ok=True)
            write_bytes(folder / SOURCE_FOLDER / "config.json", read_unmarked(source.config))
        return
    if source and source.layout == export.layout and source.config.is_file():
        old = read_json(source.config)
        # The source's file keeps fields that this package does not know; a new one would lose them.
        if _parse_source(kind, source, export) == export.config:
            new = foreign.restate_config(export.layout, old)
            new = _replace_dtype(new, export.stated_dtype) if export.stated_dtype else new
            if new == old:
                write_bytes(file, read_unmarked(source.config))
            else:
                write_json(file, new)
            return
    tokenizer = source.folder if source else None
    write_json(
        file, foreign.write_config(export.layout, export.config, find_main_dtype(plans), tokenizer)
    )


def _parse_source(kind: NetworkKind, source: Assets, export: Export) -> Any:
    """Returns the sizes that the source's foreign config.json states.

    Sizes that it leaves to the tensors are those of the tensors to be written.

    Raises: InputError listing every field that is malformed or not supported.
    """
    assert kind.parse is not None  # it has a foreign layout
    problems = Problems()
    slots = kind.tables[export.layout].make_slots(export.leaves.shapes)
    shapes = {slot.key: slot.shape for slot in slots}
    config = kind.parse(source.config.parent, source.layout, shapes, problems)
    problems.raise_any()
    return config


def _replace_dtype(value: Any, dtype: str) -> Any:
    # Nested, because each tower's section has a dtype: {"text_config": {"dtype": ..}}. transformers
    # calls it `torch_dtype` in older files.
    if not isinstance(value, dict):
        return value
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(old, str)
        else _replace_dtype(old, dtype)
        for key, old in value.items()
    }


def _write_assets(folder: Path, export: Export) -> list[str]:
    """Writes all small files except config.json; returns notes for the user."""
    source, foreign = export.assets, export.kind.foreign_export
    if foreign:
        notes = foreign.write_assets(
            folder, export.layout, export.config, source, export.generation
        )
    else:
        notes = []
        for name in export.kind.files:
            if source and (source.folder / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                write_bytes(folder / name, read_unmarked(source.folder / name))
        if export.generation:
            written = folder / GENERATION_FILE  # copied above, if the kind has it among its files
            old = read_json(written) if written.is_file() else {}
            write_json(written, {**old, **export.generation})
    write_extra_files(folder, export.extra)
    return notes
