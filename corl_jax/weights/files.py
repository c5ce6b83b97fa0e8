"""Checkpoints in and out: the functions that the rest of the program calls.

Three layouts are read and written alike: `original` (deepseek's Janus), `transformers` and
`jax`, our own: safetensors whose keys are parameter paths, with the source's tokenizer and
processor files beside them and, under `source/`, what only the source's layout needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError
from corl_jax.params import flatten, unflatten
from corl_jax.policies.janus.checkpoint import transformers as transformers_layout
from corl_jax.policies.janus.checkpoint.generation import NOTHING_STATED, Generation
from corl_jax.policies.janus.checkpoint.settings import Layout, detect_layout, load_config
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.tokens import special_tokens
from corl_jax.types import Params
from corl_jax.weights.atomic import whole_directory
from corl_jax.weights.checkpoint import Checkpoint, is_stacked, leaf_shapes, open_checkpoint
from corl_jax.weights.export import Assets, DType, Export, main_dtype, plan_tensors, write_export
from corl_jax.weights.hub import resolve_model_dir
from corl_jax.weights.nan_check import non_finite_problem
from corl_jax.weights.shards import DEFAULT_SHARD_BYTES, Progress
from corl_jax.weights.sources import MemoryLeaves, read_leaf
from corl_jax.weights.storage import Store

__all__ = [
    "Layout",
    "check_export",
    "convert",
    "detect_layout",
    "load_config",
    "load_params",
    "open_checkpoint",
    "resolve_model_dir",
    "save_checkpoint",
    "special_tokens",
]


def load_params(folder: str | Path, config: JanusConfig | None = None, dtype: Any = None) -> Params:
    """All parameters as a nested dict of NumPy arrays; `dtype` None keeps each as stored.

    Reads slice by slice, so that the peak is the result and one tensor more.

    Raises: InputError listing every tensor that does not fit the config, or holds NaN.
    """
    problems = []
    with open_checkpoint(Path(folder), config) as checkpoint:
        leaves = checkpoint.leaves
        flat = {}
        for path in leaves.shapes:
            flat[path] = read_leaf(leaves, path, is_stacked(path), dtype)
            problems += non_finite_problem(folder, path, flat[path])
    if problems:
        raise InputError(problems)
    return unflatten(flat)


def save_checkpoint(
    out_dir: str | Path,
    config: JanusConfig,
    params: Params,
    *,
    layout: Layout = "transformers",
    assets_from: str | Path | None = None,
    base: str | Path | None = None,
    dtype: DType = "keep",
    layer_dtypes: Mapping[str, list[str]] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    generation: Generation = NOTHING_STATED,
    extra: Mapping[str, dict[str, Any]] | None = None,
) -> list[str]:
    """Writes parameters as a checkpoint directory, whole or not at all; returns notes.

    `assets_from` is a model directory of any layout: its tokenizer and processor files are
    copied or rewritten, and what it carries besides the model goes along. `base` overrides
    where the latter comes from. With `keep` a parameter is written in the type of its
    array; `layer_dtypes` (see `placing.stored_layer_dtypes`) gives its layers types of their own.
    `generation` has values for generation_config.json, `extra` further JSON files by name.

    Raises: InputError for parameters that do not fit the config, or a folder that is taken.
    """
    flat = flatten(params)
    _check_params(config, flat)
    source = open_checkpoint(Path(assets_from)) if assets_from is not None else None
    try:
        export = Export(
            layout=layout,
            config=config,
            leaves=MemoryLeaves(flat, layer_dtypes if dtype == "keep" else None),
            assets=_assets(source) if source else None,
            carried=_fitting(source, config),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            generation=generation,
            extra=extra or {},
        )
        stated = main_dtype(plan_tensors(export))
        return _write(Path(out_dir), export, base, stated, overwrite, progress)
    finally:
        if source:
            source.close()


def check_export(layout: Layout, config: JanusConfig, base: str | Path | None = None) -> None:
    """Refuses what `save_checkpoint` would, before there are parameters to write.

    Raises: InputError for sizes that the layout cannot express, and for a base that does not fit.
    """
    problems: list[str] = []
    try:
        if layout == "transformers":
            transformers_layout.check_expressible(config)
    except InputError as error:
        problems += error.problems
    try:
        if base is not None:
            with open_checkpoint(resolve_model_dir(base)) as opened:
                _check_base(opened, config)
    except InputError as error:
        problems += [f"base: {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)


def convert(
    source: str | Path,
    out_dir: str | Path,
    *,
    layout: Layout,
    base: str | Path | None = None,
    dtype: DType = "keep",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    as_bin: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Turns a checkpoint directory of any layout into one of another; returns notes.

    One tensor is in memory at a time; with `as_bin`, one shard.

    Raises: InputError for a source that does not add up, or a folder that is taken.
    """
    with open_checkpoint(Path(source)) as checkpoint:
        export = Export(
            layout=layout,
            config=checkpoint.config,
            leaves=checkpoint.leaves,
            assets=_assets(checkpoint),
            carried=checkpoint.carried,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            as_bin=as_bin,
        )
        stated = None if dtype == "keep" else dtype
        return _write(Path(out_dir), export, base, stated, overwrite, progress)


def _write(
    out: Path,
    export: Export,
    base: str | Path | None,
    stated_dtype: str | None,
    overwrite: bool,
    progress: Progress | None,
) -> list[str]:
    opened = open_checkpoint(resolve_model_dir(base)) if base is not None else None
    try:
        carried = export.carried
        if opened:
            _check_base(opened, export.config)
            carried = opened.carried
        export = dataclasses.replace(export, carried=carried, stated_dtype=stated_dtype)
        with whole_directory(out, overwrite=overwrite) as folder:
            return write_export(folder, export, progress)
    finally:
        if opened:
            opened.close()


def _assets(checkpoint: Checkpoint) -> Assets:
    return Assets(checkpoint.folder, checkpoint.source_layout, checkpoint.source_config)


def _fitting(source: Checkpoint | None, config: JanusConfig) -> dict[str, Store]:
    """Carried tensors belong to a vision tower of the same sizes only."""
    return source.carried if source and source.config.siglip == config.siglip else {}


def _check_base(base: Checkpoint, config: JanusConfig) -> None:
    if not base.carried:
        raise InputError(
            f"{base.folder}: as --base it has nothing to give: no attention pool and no "
            "codebook_used; name a checkpoint of the original layout"
        )
    if base.config.siglip != config.siglip:
        raise InputError(
            f"{base.folder}: as --base it has another vision tower ({base.config.siglip}) than "
            f"the model ({config.siglip}); name the checkpoint that the model came from"
        )


def _check_params(config: JanusConfig, flat: dict[str, Any]) -> None:
    expected = leaf_shapes(config)
    problems = [f"parameter {path} is missing" for path in expected.keys() - flat.keys()]
    problems += [f"parameter {path} is unknown" for path in flat.keys() - expected.keys()]
    problems += [
        f"parameter {path} has shape {tuple(flat[path].shape)}, expected {expected[path]}"
        for path in expected.keys() & flat.keys()
        if tuple(flat[path].shape) != expected[path]
    ]
    if problems:
        raise InputError(sorted(problems))
