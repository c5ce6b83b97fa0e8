"""Writes checkpoints: from parameters in memory, or converted from another checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.atomic_files import check_not_read, create_folder
from corl_jax.errors import InputError, Problems
from corl_jax.params import flatten
from corl_jax.types import Params
from corl_jax.weights.checkpoint import Checkpoint, open_checkpoint
from corl_jax.weights.dtypes import DType
from corl_jax.weights.export_folder import (
    Export,
    find_main_dtype,
    format_pattern,
    plan_tensors,
    write_export,
)
from corl_jax.weights.hub import resolve_model_dir
from corl_jax.weights.kinds import OWN_LAYOUT, NetworkKind
from corl_jax.weights.parts import list_read_folders
from corl_jax.weights.shards import DEFAULT_SHARD_BYTES, ExtraFiles, Progress
from corl_jax.weights.sources import MemoryLeaves


def save_checkpoint(
    out: str | Path,
    kind: NetworkKind,
    config: Any,
    params: Params,
    *,
    layout: str = OWN_LAYOUT,
    assets_from: str | Path | None = None,
    base: str | Path | None = None,
    dtype: DType = "keep",
    layer_dtypes: Mapping[str, list[str]] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    generation: Mapping[str, Any] | None = None,
    extra: ExtraFiles | None = None,
) -> list[str]:
    """Writes parameters as a checkpoint directory, whole or not at all; returns notes.

    The export takes tokenizer and processor files from `assets_from`, a model directory of any
    layout, and the tensors outside the model from there or from `base`. `keep` writes a parameter
    in the dtype of its array, or of its layers in `layer_dtypes` (see `read_layer_dtypes`).
    `generation` has values for generation_config.json, `extra` further files by name.

    Raises: InputError for parameters that do not fit the config, or a folder that is taken.
    """
    check_export(kind, layout, config)
    flat = flatten(params)
    _check_params(kind, config, flat)
    source = open_checkpoint(assets_from, kind) if assets_from is not None else None
    try:
        export = Export(
            kind=kind,
            layout=layout,
            config=config,
            leaves=MemoryLeaves(flat, layer_dtypes if dtype == "keep" else None),
            assets=source.assets if source else None,
            carried=source.carried if source and _fits_carried(source, config) else {},
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            generation=generation or {},
            extra=extra or {},
        )
        # Parameters in memory may have another dtype than the source's config.json states.
        stated = find_main_dtype(plan_tensors(export))
        export = dataclasses.replace(export, stated_dtype=stated)
        return _write(Path(out), export, base, overwrite, progress)
    finally:
        if source:
            source.close()


def convert(
    source: str | Path,
    out: str | Path,
    kind: NetworkKind,
    *,
    layout: str = OWN_LAYOUT,
    base: str | Path | None = None,
    dtype: DType = "keep",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    as_bin: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Converts a checkpoint of any layout into a directory of another; returns notes.

    One tensor is in memory at a time; with `as_bin`, one shard.

    Raises: InputError for a source that does not add up, or a folder that is taken.
    """
    _check_layout(kind, layout)
    with open_checkpoint(source, kind) as checkpoint:
        check_export(kind, layout, checkpoint.config)
        export = Export(
            kind=kind,
            layout=layout,
            config=checkpoint.config,
            leaves=checkpoint.leaves,
            assets=checkpoint.assets,
            carried=checkpoint.carried,
            dtype=dtype,
            # With `keep` the tensors are the source's, and so is what its config.json states.
            stated_dtype=None if dtype == "keep" else dtype,
            max_shard_bytes=max_shard_bytes,
            as_bin=as_bin,
        )
        check_not_read(Path(out), list_read_folders(Path(source), kind))
        return _write(Path(out), export, base, overwrite, progress)


def check_export(
    kind: NetworkKind, layout: str, config: Any, base: str | Path | None = None
) -> None:
    """Checks before a run what `save_checkpoint` would refuse after it.

    Raises: InputError for sizes that the layout cannot express, and for a base that does not fit.
    """
    _check_layout(kind, layout)
    problems = Problems()
    if layout != OWN_LAYOUT and kind.foreign_export:
        problems.attempt(kind.foreign_export.check, layout, config)
    if base is not None:
        with (
            problems.collect("base: "),
            open_checkpoint(resolve_model_dir(base), kind) as checkpoint,
        ):
            _check_base(checkpoint, config)
    problems.raise_any()


def _check_layout(kind: NetworkKind, layout: str) -> None:
    if layout not in kind.written_layouts:
        raise InputError(
            f"layout {layout!r}: a {kind.name} network is written as "
            f"{' or '.join(kind.written_layouts)}; choose one of them"
        )


def _check_params(kind: NetworkKind, config: Any, flat: Mapping[str, Any]) -> None:
    expected = kind.shapes(config)
    problems = [f"parameter {path} is missing" for path in expected.keys() - flat.keys()]
    problems += [f"parameter {path} is unknown" for path in flat.keys() - expected.keys()]
    problems += [
        f"parameter {path} has shape {tuple(flat[path].shape)}, expected {expected[path]}"
        for path in expected.keys() & flat.keys()
        if tuple(flat[path].shape) != expected[path]
    ]
    if problems:
        raise InputError(sorted(problems))


def _fits_carried(source: Checkpoint, config: Any) -> bool:
    """Returns whether the tensors that a checkpoint carries fit a model of these sizes."""
    foreign = source.kind.foreign_export
    return not foreign or foreign.carried_sizes(source.config) == foreign.carried_sizes(config)


def _check_base(base: Checkpoint, config: Any) -> None:
    kind = base.kind
    if not base.carried:
        layouts = [name for name, table in kind.tables.items() if table.carried]
        patterns = [format_pattern(p) for name in layouts for p in kind.tables[name].carried]
        raise InputError(
            f"{base.folder}: as --base it has nothing to give: no {' and no '.join(patterns)}; "
            f"name a checkpoint of the {' or '.join(layouts)} layout"
        )
    if not _fits_carried(base, config) and kind.foreign_export:
        old, new = (kind.foreign_export.carried_sizes(c) for c in (base.config, config))
        raise InputError(
            f"{base.folder}: as --base it has other sizes ({old}) than the model ({new}); name the "
            "checkpoint that the model came from"
        )


def _write(
    out: Path,
    export: Export,
    base: str | Path | None,
    overwrite: bool,
    progress: Progress | None,
) -> list[str]:
    if base is not None and not export.kind.carries:
        raise InputError(
            f"--base: found {base}, but a {export.kind.name} network carries nothing; drop it"
        )
    checkpoint = open_checkpoint(resolve_model_dir(base), export.kind) if base is not None else None
    try:
        if checkpoint:
            _check_base(checkpoint, export.config)
            check_not_read(out, list_read_folders(checkpoint.folder, export.kind))
            export = dataclasses.replace(export, carried=checkpoint.carried)
        with create_folder(out, overwrite=overwrite) as folder:
            return write_export(folder, export, progress)
    finally:
        if checkpoint:
            checkpoint.close()
