"""The trained model as a directory that PyTorch loads: whole, or its adapters alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from corl_jax import rows
from corl_jax.config import Config
from corl_jax.input_files import expand_path
from corl_jax.models import janus
from corl_jax.sharding import map_with_path
from corl_jax.train.optimizer import merge
from corl_jax.train.run import Run
from corl_jax.train.step import TrainState
from corl_jax.types import Params
from corl_jax.weights import adapters, files
from corl_jax.weights.dtypes import named
from corl_jax.weights.hub import split_hub_id


def export(
    folder: Path, config: Config, run: Run, state: TrainState, model_dir: Path, primary: bool,
    beat: Callable[[], None] = lambda: None,
) -> list[str]:  # fmt: skip
    """Writes the export of a run, whole or not at all; returns what its reader should know.

    Every process takes part in fetching the parameters, the primary one keeps and writes them.
    `model_dir` has the weights that the run started from. `beat` is called as the work proceeds.
    """
    options, lora = config.export, run.model_config.llama.lora
    if options.lora == "adapter":
        trained = fetched(state.params, primary, beat)
        if not primary:
            return []
        assert lora is not None  # or the config would have been refused
        fits = files.detect_layout(model_dir) == "transformers"
        base, revision = _base(config.model.path, model_dir) if fits else (None, None)
        adapters.save_adapter(
            folder, trained, lora, base=base, revision=revision, dtype=options.dtype,
            progress=lambda _: beat(),
        )  # fmt: skip
        return [] if fits else [_no_base(config.model.path)]
    params, gone = fetched(merge(state.params, run.frozen), primary, beat), 0.0
    if not primary:
        return []
    dtypes, layer_dtypes = run.source_dtypes, run.layer_dtypes
    if options.dtype != "keep":
        dtypes, layer_dtypes = dict.fromkeys(dtypes, named(options.dtype)), {}
    if lora is not None:
        params, gone = adapters.merged(params, lora, dtypes, beat, layer_dtypes)
    params = map_with_path(lambda path, leaf: leaf.astype(dtypes[path], copy=False), params)
    assert options.layout != "none"  # or nobody would have asked for an export
    notes = files.save_checkpoint(
        folder, janus.base(run.model_config), params, layout=options.layout,
        assets_from=model_dir, base=options.base, dtype=options.dtype,
        layer_dtypes=layer_dtypes, progress=lambda _: beat(),
    )  # fmt: skip
    return [*notes, *([_rounded(gone)] if gone else [])]


def fetched(params: Params, keep: bool, beat: Callable[[], None] = lambda: None) -> Params:
    """Parameters on the host, a leaf at a time; None for each where they are not to `keep`."""

    def one(leaf: jax.Array) -> np.ndarray | None:
        array = rows.whole(leaf)
        beat()
        return array if keep else None

    return jax.tree.map(one, params)


def _base(path: str, model_dir: Path) -> tuple[str, str | None]:
    """`model.path` as PEFT reads it: (directory, None), or (hub id, revision)."""
    directory = expand_path(path)
    return (directory, None) if Path(directory) == model_dir else split_hub_id(path)


def _no_base(source: str) -> str:
    return (
        f"the adapter names no base model, because {source} is not in transformers' layout: give "
        "peft a transformers export of it (python -m tools.convert_weights)"
    )


def _rounded(gone: float) -> str:
    return (
        f"rounding the merged kernels removed {gone:.1%} of what the adapters add; export.dtype "
        "float32 or export.lora adapter keeps all of it"
    )
