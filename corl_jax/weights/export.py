"""Writes a checkpoint directory of any layout: weights, config, tokenizer and processor files."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from corl_jax.errors import InputError, shorten
from corl_jax.policies.janus.checkpoint import assets
from corl_jax.policies.janus.checkpoint import original as original_layout
from corl_jax.policies.janus.checkpoint import transformers as transformers_layout
from corl_jax.policies.janus.checkpoint.generation import FILE as GENERATION_FILE
from corl_jax.policies.janus.checkpoint.generation import (
    NOTHING_STATED,
    Generation,
    parse_generation,
)
from corl_jax.policies.janus.checkpoint.settings import Layout, parse_config, write_jax
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.tokens import special_tokens
from corl_jax.weights.checkpoint import CARRIED_FILE, SOURCE_FOLDER, is_stacked
from corl_jax.weights.dtypes import is_float, named, widest
from corl_jax.weights.folders import read_unmarked
from corl_jax.weights.nan_check import watched
from corl_jax.weights.shards import (
    DEFAULT_SHARD_BYTES,
    Progress,
    TensorPlan,
    write_bytes,
    write_safetensors,
    write_tensors,
    write_text,
)
from corl_jax.weights.sources import Leaves, layer_count, leaf_dtype, mixed_dtypes, slots_by_key
from corl_jax.weights.storage import Store, read_json
from corl_jax.weights.table import Slot
from corl_jax.weights.tables import TABLES

DType = Literal["keep", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Assets:
    """Where tokenizer and processor files come from, and in which layout they are."""

    folder: Path
    layout: Layout
    config: Path  # the PyTorch config.json; may be absent


@dataclasses.dataclass(frozen=True)
class Export:
    """Everything that decides what a written directory holds."""

    layout: Layout
    config: JanusConfig
    leaves: Leaves
    assets: Assets | None
    carried: Mapping[str, Store]
    dtype: DType = "keep"
    stated_dtype: str | None = None  # what config.json must say; None leaves a copied one alone
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    as_bin: bool = False
    generation: Generation = NOTHING_STATED  # what it states replaces what the source states
    extra: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # JSON by name

    def cast_to(self, dtype: np.dtype) -> np.dtype:
        return named(self.dtype) if self.dtype != "keep" and is_float(dtype) else dtype


def plan_tensors(export: Export) -> list[TensorPlan]:
    """The tensors of the model, and for the original layout those that it only carries."""
    if export.layout == "jax":
        return [_stacked_plan(export, path) for path in export.leaves.shapes]
    slots = TABLES[export.layout].slots(export.leaves.shapes)
    plans = [_torch_plan(export, key, group) for key, group in slots_by_key(slots).items()]
    return plans + (carried_plans(export) if export.layout == "original" else [])


def _torch_plan(export: Export, key: str, group: list[Slot]) -> TensorPlan:
    leaves = export.leaves
    source = widest(leaves.dtype(slot.path, slot.layer) for slot in group)
    dtype = export.cast_to(source)

    def chunks() -> Iterator[np.ndarray]:
        for slot in group:
            leaf = leaves.read(slot.path, slot.layer)
            yield np.ascontiguousarray(slot.transform.to_torch(leaf), dtype=dtype)

    return TensorPlan(key, dtype, group[0].shape, chunks)


def _stacked_plan(export: Export, path: str) -> TensorPlan:
    leaves = export.leaves
    layers = layer_count(leaves, path, is_stacked(path))
    dtype = export.cast_to(leaf_dtype(leaves, path, layers))

    def chunks() -> Iterator[np.ndarray]:
        for layer in layers:
            yield np.ascontiguousarray(leaves.read(path, layer), dtype=dtype)

    return TensorPlan(path, dtype, leaves.shapes[path], chunks)


def carried_plans(export: Export) -> list[TensorPlan]:
    """The tensors that no forward pass reads, from whatever checkpoint has them."""
    return [_carried_plan(export, key, store) for key, store in export.carried.items()]


def _carried_plan(export: Export, key: str, store: Store) -> TensorPlan:
    info = store.infos[key]
    dtype = export.cast_to(info.dtype)

    def chunks() -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(store.read(key), dtype=dtype)

    return TensorPlan(key, dtype, info.shape, chunks)


def write_export(folder: Path, export: Export, progress: Progress | None = None) -> list[str]:
    """Fills an empty folder; returns what the reader should know about the result."""
    plans = plan_tensors(export)
    # Small files first: a directory that lacks a tokenizer should fail at once.
    write_config(folder, export, plans)
    notes = write_assets(folder, export)
    plans, not_finite = watched(plans)
    write_tensors(
        folder,
        plans,
        max_shard_bytes=export.max_shard_bytes,
        as_bin=export.as_bin,
        progress=progress,
    )
    if export.layout == "jax" and export.carried:
        (folder / SOURCE_FOLDER).mkdir(exist_ok=True)
        carried, more = watched(carried_plans(export))
        write_safetensors(folder / SOURCE_FOLDER / CARRIED_FILE, carried, progress)
        not_finite += more
    not_finite = shorten(not_finite, what="tensors with values that are NaN or infinite")
    return notes + carried_notes(export) + fused_notes(export) + not_finite


def carried_notes(export: Export) -> list[str]:
    """What an export leaves out for want of a source, or of a place in its layout."""
    if export.layout == "transformers" and export.carried:
        return [
            f"{len(export.carried)} tensors have no place in transformers' layout and are left "
            f"out ({_names(export.carried)}); --base restores them on the way back"
        ]
    if export.layout != "original":
        return []
    patterns = TABLES["original"].carried
    absent = [p for p in patterns if not any(re.fullmatch(p, key) for key in export.carried)]
    return [
        f"no source has {_readable(pattern)}, so the output lacks it; Janus does not use it, but "
        "strict loaders ask for it: give --base with an original checkpoint"
        for pattern in absent
    ]


def fused_notes(export: Export) -> list[str]:
    """Says which tensors hold parts that have different types in their source."""
    if export.layout == "jax" or export.dtype != "keep":
        return []
    groups = slots_by_key(TABLES[export.layout].slots(export.leaves.shapes))
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


def _readable(pattern: str) -> str:
    return pattern.replace(".+", "*").replace("\\", "")


def _names(keys: Mapping[str, Any]) -> str:
    return ", ".join(sorted({".".join(key.split(".")[:3]) for key in keys}))


def main_dtype(plans: list[TensorPlan]) -> str:
    """The type of most of the bytes."""
    sizes: collections.Counter[str] = collections.Counter()
    for plan in plans:
        sizes[plan.dtype.name] += plan.nbytes
    return sizes.most_common(1)[0][0]


def write_config(folder: Path, export: Export, plans: list[TensorPlan]) -> None:
    """config.json: the source's bytes where they still hold, else patched or made anew."""
    source = export.assets
    if export.layout == "jax":
        layers = {path: is_stacked(path) for path in export.leaves.shapes}
        mixed = mixed_dtypes(export.leaves, layers) if export.dtype == "keep" else {}
        layout = source.layout if source else "original"
        write_text(folder / "config.json", write_jax(export.config, layout, mixed))
        if source and source.config.is_file():
            (folder / SOURCE_FOLDER).mkdir(exist_ok=True)
            write_bytes(folder / SOURCE_FOLDER / "config.json", read_unmarked(source.config))
        return
    if source and source.layout == export.layout and source.config.is_file():
        old = read_json(source.config)
        if parse_config(old, source.config) == export.config:
            new = _patched(old, export)
            if new == old:
                write_bytes(folder / "config.json", read_unmarked(source.config))
            else:
                _json(folder / "config.json", new)
            return
    dtype = main_dtype(plans)
    if export.layout == "original":
        _json(folder / "config.json", original_layout.write(export.config, dtype))
    else:
        special = special_tokens(_tokenizer_folder(export))
        _json(folder / "config.json", transformers_layout.write(export.config, dtype, special))


def _patched(config: dict[str, Any], export: Export) -> dict[str, Any]:
    """The same config with the new element type, and with the embeddings declared untied."""
    new = dict(config)
    if export.layout == "transformers":
        new["tie_word_embeddings"] = False
    return _restate_dtype(new, export.stated_dtype) if export.stated_dtype else new


def _restate_dtype(value: Any, dtype: str) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(old, str)
        else _restate_dtype(old, dtype)
        for key, old in value.items()
    }


def write_assets(folder: Path, export: Export) -> list[str]:
    """Tokenizer and processor files; returns a note for each that no source has."""
    source = export.assets
    origin = source.folder if source else None
    form = source.layout if source else "original"
    target = form if export.layout == "jax" else export.layout
    write = assets.write_original if target == "original" else assets.write_transformers
    write(origin, folder, export.config)
    if origin is not None and form == target:
        if (origin / "chat_template.json").is_file():
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        assets.copy_assets(origin, folder)
    _write_generation(folder, export)
    for name, data in export.extra.items():
        _json(folder / name, data)
    if (folder / "tokenizer.json").is_file():
        return []
    return [
        f"no tokenizer.json was found, so the output lacks one: copy it to {folder.name} by hand"
    ]


def _write_generation(folder: Path, export: Export) -> None:
    """generation_config.json: the source's bytes where nothing changes, in every layout.

    transformers' layout always has one, with the BOI id where transformers reads it. An original
    checkpoint usually has none, and the other layouts then get one only to hold stated values.
    """
    source = export.assets.folder / GENERATION_FILE if export.assets else None
    old = read_json(source) if source and source.is_file() else {}
    parse_generation(old, source or folder / GENERATION_FILE)  # a wrong value is not handed on
    stated = export.generation.as_json()
    new = {**old, **stated}
    given = old.get("generation_kwargs")
    has_boi = isinstance(given, dict) and "boi_token_id" in given
    if export.layout == "transformers" and not has_boi:
        made = transformers_layout.write_generation(special_tokens(_tokenizer_folder(export)))
        kwargs = {**(given if isinstance(given, dict) else {}), **made["generation_kwargs"]}
        new = {**made, **new, "generation_kwargs": kwargs}
    if source and new == old and source.is_file():
        write_bytes(folder / GENERATION_FILE, source.read_bytes())
    elif new:
        _json(folder / GENERATION_FILE, new)


def _tokenizer_folder(export: Export) -> Path:
    if export.assets is None:
        raise InputError(
            "transformers' layout needs the tokenizer's ids: name a model directory that has "
            "tokenizer.json, or write another layout"
        )
    return export.assets.folder


def _json(file: Path, data: dict[str, Any]) -> None:
    write_text(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
