"""What every command does first: the compilation cache, and a model by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from corl_jax.data.processor import Processor
from corl_jax.errors import InputError
from corl_jax.models import janus
from corl_jax.models.janus import JanusConfig
from corl_jax.sharding import param_shardings
from corl_jax.types import Params
from corl_jax.weights.files import load_config, load_params, open_checkpoint, resolve_model_dir
from corl_jax.weights.folders import pointer_problems
from corl_jax.weights.placing import load_sharded

CACHE_DIR = "jax_compilation_cache_dir"
LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"
JAX_DEFAULT_SECONDS = 1.0


class Model(NamedTuple):
    """A checkpoint, ready to use."""

    config: JanusConfig
    params: Params
    processor: Processor
    path: Path


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, where the user says or in the usual place.

    Small ones too, unless the user says otherwise: a start has a hundred of them.
    """
    said = LEAST_SECONDS.upper() in os.environ
    if not said and getattr(jax.config, LEAST_SECONDS) == JAX_DEFAULT_SECONDS:
        jax.config.update(LEAST_SECONDS, 0.0)
    if getattr(jax.config, CACHE_DIR) is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update(CACHE_DIR, str(Path(home) / "corl_jax" / "xla"))


def inspect_model(path_or_hub_id: str | Path) -> tuple[JanusConfig, Processor, Path]:
    """What the small files of a checkpoint say, and that its tensors are whole and fit.

    Of the weights only names, shapes and sizes are looked at; no device starts.

    Raises:
        InputError: listing every file, setting and tensor that is missing, malformed or at odds.
    """
    folder = resolve_model_dir(path_or_hub_id)
    problems = pointer_problems(folder)
    config = processor = None
    try:
        config = load_config(folder)
    except InputError as error:
        problems += error.problems
    try:
        processor = Processor.from_dir(folder)
    except InputError as error:
        problems += error.problems
    if config is not None:
        try:
            open_checkpoint(folder, config).close()
        except InputError as error:
            problems += error.problems
    if config is not None and processor is not None:
        tokens, rows = len(processor.tokenizer), config.llama.vocab_size
        if tokens > rows:
            problems.append(
                f"{folder / 'tokenizer.json'}: found {tokens} tokens, the network embeds {rows}; "
                "copy the tokenizer from the checkpoint that the network came from"
            )
    if problems or config is None or processor is None:
        raise InputError(dict.fromkeys(problems))  # several readers may have met the same one
    return config, processor, folder


def load_model(path_or_hub_id: str | Path, dtype: Any = None, mesh: Mesh | None = None) -> Model:
    """A checkpoint of any of the three kinds, its parameters on a mesh or the default device.

    `dtype` casts them to a compute dtype (the image tokenizer stays float32); None keeps each
    as it is stored.

    Raises:
        InputError: as `inspect_model`.
    """
    config, processor, folder = inspect_model(path_or_hub_id)
    if mesh is not None:
        shardings = param_shardings(janus.abstract(config), mesh)

        def kept(path: str) -> Any:
            return None if dtype is None else janus.compute_dtype(path, dtype)

        return Model(config, load_sharded(folder, config, shardings, kept), processor, folder)
    params = load_params(folder, config)
    if dtype is not None:
        params = janus.cast(params, dtype)
    return Model(config, jax.device_put(params), processor, folder)
