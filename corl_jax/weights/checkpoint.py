"""An open checkpoint of any layout: its sizes, its leaves, and what it carries besides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from corl_jax.errors import InputError
from corl_jax.params import flatten
from corl_jax.policies.janus.checkpoint.settings import Layout, layout_of, parse_config, read_config
from corl_jax.policies.janus.network import JanusConfig, abstract
from corl_jax.weights.dtypes import BFLOAT16
from corl_jax.weights.folders import pointer_problems, refuse_adapter
from corl_jax.weights.sources import JaxLeaves, Leaves, TorchLeaves
from corl_jax.weights.storage import Store, open_safetensors, open_store
from corl_jax.weights.table import Shape
from corl_jax.weights.tables import TABLES
from corl_jax.weights.wrong_names import (
    Known,
    is_known_to,
    layout_of_names,
    with_wrong_names,
)

SOURCE_FOLDER = "source"  # in a converted directory: what only its source's layout needs
CARRIED_FILE = "carried.safetensors"
_LEAF_DTYPES = {np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16}


@dataclasses.dataclass
class Checkpoint:
    """A checked checkpoint, its files open until `close`."""

    folder: Path
    layout: Layout
    source_layout: Layout  # of the tokenizer and processor files
    config: JanusConfig
    leaves: Leaves
    store: Store
    carried: dict[str, Store]  # tensors outside the model, by their key in the original layout

    @property
    def source_config(self) -> Path:
        """The PyTorch config.json; absent from a directory that no PyTorch checkpoint made."""
        return (
            self.folder / SOURCE_FOLDER if self.layout == "jax" else self.folder
        ) / "config.json"

    def close(self) -> None:
        for store in (self.store, *self.carried.values()):
            store.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def leaf_shapes(config: JanusConfig) -> dict[str, Shape]:
    """{path: shape} of every parameter of a Janus of these sizes."""
    return {path: tuple(leaf.shape) for path, leaf in flatten(abstract(config)).items()}


def is_stacked(path: str) -> bool:
    """Whether a leaf has a leading axis of layers."""
    return TABLES["transformers"].row(path)[0].stacked


def open_checkpoint(folder: Path, config: JanusConfig | None = None) -> Checkpoint:
    """Opens a directory and compares every tensor's name and shape with the config.

    Raises: InputError listing every tensor that is missing, unknown or misshapen.
    """
    file = folder / "config.json"
    refuse_adapter(folder)
    _check_pointers(folder)
    data = read_config(folder)
    layout = layout_of(data, file)
    config = config or parse_config(data, file)
    shapes = leaf_shapes(config)
    store = open_store(folder)
    try:
        found = {key: info.shape for key, info in store.infos.items()}
        if layout == "jax":
            _check_layout(folder, layout, found, shapes)
            return _open_jax(folder, config, shapes, store, data)
        table = TABLES[layout]
        slots = table.slots(shapes)
        problems = table.problems(slots, found, folder)
        if problems:
            _check_layout(folder, layout, found, shapes)
            problems = with_wrong_names(problems, table, slots, found, folder)
        if layout == "transformers" and data.get("tie_word_embeddings", True):
            problems = _with_untying(problems)
        used = {slot.key for slot in slots}
        problems += _dtype_problems(folder, store, used)
        if problems:
            raise InputError(problems)
        carried = {key: store for key in found if table.is_carried(key)}
        leaves = TorchLeaves(store, slots, shapes)
        return Checkpoint(folder, layout, layout, config, leaves, store, carried)
    except BaseException:
        store.close()
        raise


def _check_pointers(folder: Path) -> None:
    """Raises: InputError listing the Git LFS pointers among the small files and the weights."""
    problems = pointer_problems(folder)
    if not problems:
        return
    try:
        open_store(folder).close()
    except InputError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    raise InputError(problems)


def _check_layout(
    folder: Path, layout: Layout, found: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> None:
    """Raises: InputError for tensors that are named as in another layout than the config's."""
    if layout == "jax" and any(path in found for path in shapes):
        return
    layouts: dict[str, Known] = {name: is_known_to(table) for name, table in TABLES.items()}
    named = layout_of_names(found, layouts | {"jax": shapes.__contains__})
    if named not in (None, layout):
        raise InputError(
            f"{folder}: its tensors are named as in the {named} layout, but its config.json is of "
            f"the {layout} layout; put the config.json there that came with the weights"
        )


def _with_untying(problems: list[str]) -> list[str]:
    """The problems, that of an absent text head with what to do about a tied one."""
    head, table = (
        TABLES["transformers"].row(path)[0].key
        for path in ("lm_head/kernel", "language_model/embed_tokens/embedding")
    )
    return [
        f"{problem}; this checkpoint is tied (tie_word_embeddings): store a copy of {table} as "
        f"{head}, and set tie_word_embeddings to false in config.json"
        if f": {head} is missing" in problem
        else problem
        for problem in problems
    ]


def _open_jax(
    folder: Path, config: JanusConfig, shapes: dict[str, Shape], store: Store, data: dict[str, Any]
) -> Checkpoint:
    problems = []
    for path in shapes.keys() | store.infos.keys():
        if path not in store.infos:
            problems.append(f"{folder}: {path} is missing, expected with shape {shapes[path]}")
        elif path not in shapes:
            problems.append(f"{folder}: {path} is unknown with this config; correct the config")
        elif store.infos[path].shape != shapes[path]:
            found, expected = list(store.infos[path].shape), list(shapes[path])
            problems.append(
                f"{folder}: {path} has shape {found}, expected {expected} by the config"
            )
    problems = sorted(problems) + _dtype_problems(folder, store, set(shapes))
    layer_dtypes = data.get("layer_dtypes")
    problems += _layer_dtype_problems(folder, layer_dtypes, shapes)
    source: Layout = data.get("source_layout", "jax")
    if source not in ("original", "transformers"):
        problems.append(f"{folder}/config.json: source_layout is {source!r}; convert it again")
    if problems:
        raise InputError(problems)
    file = folder / SOURCE_FOLDER / CARRIED_FILE
    extra = open_safetensors([file]) if file.is_file() else None
    carried: dict[str, Store] = dict.fromkeys(extra.infos, extra) if extra else {}
    leaves = JaxLeaves(store, layer_dtypes or {})
    return Checkpoint(folder, "jax", source, config, leaves, store, carried)


def _dtype_problems(folder: Path, store: Store, keys: set[str]) -> list[str]:
    return [
        f"{folder}: {key} holds {info.dtype.name}, expected a float type; quantised checkpoints "
        "are not supported"
        for key, info in store.infos.items()
        if key in keys and info.dtype not in _LEAF_DTYPES
    ]


def _layer_dtype_problems(folder: Path, value: Any, shapes: Mapping[str, Shape]) -> list[str]:
    if not isinstance(value, dict):
        return [f"{folder}/config.json: layer_dtypes is {value!r}; convert the checkpoint again"]
    names = {dtype.name for dtype in _LEAF_DTYPES}
    return [
        f"{folder}/config.json: layer_dtypes of {path} does not fit; convert the checkpoint again"
        for path, kinds in value.items()
        if path not in shapes
        or not isinstance(kinds, list)
        or len(kinds) != shapes[path][0]
        or not all(isinstance(kind, str) and kind in names for kind in kinds)
    ]
