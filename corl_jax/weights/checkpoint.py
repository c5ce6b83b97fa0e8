"""Opens a checkpoint of any kind and layout, checks all of it, and loads its parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from corl_jax.errors import InputError, Problems
from corl_jax.params import unflatten
from corl_jax.types import Params
from corl_jax.weights.dtypes import BFLOAT16
from corl_jax.weights.folders import find_pointers, refuse_adapter
from corl_jax.weights.kinds import OWN_LAYOUT, Assets, NetworkKind
from corl_jax.weights.nan_check import check_finite
from corl_jax.weights.own_config import parse_own_config
from corl_jax.weights.parts import join_parts
from corl_jax.weights.recognise import (
    check_named_layout,
    find_layout_of_tensors,
    find_stated_layout,
    read_config,
)
from corl_jax.weights.sharded_load import DTypes, place_leaves
from corl_jax.weights.sources import (
    JaxLeaves,
    Leaves,
    TorchLeaves,
    find_leaf_dtype,
    find_mixed_dtypes,
    list_layers,
    read_leaf,
)
from corl_jax.weights.storage import (
    JoinedStore,
    Store,
    open_any_store,
    open_safetensors,
    open_store,
)
from corl_jax.weights.table import Shape
from corl_jax.weights.wrong_names import shorten_wrong_names

SOURCE_FOLDER = "source"  # in a converted directory: files that only its source's layout needs
CARRIED_FILE = "carried.safetensors"
# 8-bit floats are not here: without their scales they are a quantised checkpoint.
_FLOATS = {np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16}


@dataclasses.dataclass
class Checkpoint:
    """A checked checkpoint, whose files are open until `close`."""

    kind: NetworkKind
    folder: Path
    layout: str
    source_layout: str  # of the tokenizer and processor files
    config: Any  # the sizes
    leaves: Leaves
    store: Store
    carried: dict[str, Store]  # tensors outside the model, by their key in the foreign layout

    @property
    def assets(self) -> Assets:
        """The tokenizer and processor files and the foreign config.json for an export."""
        # A converted directory has two: config.json of our layout, and source/config.json.
        is_converted = self.layout == OWN_LAYOUT
        config = (self.folder / SOURCE_FOLDER if is_converted else self.folder) / "config.json"
        return Assets(self.folder, self.source_layout, config)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.leaves.shapes.values())

    @property
    def shapes(self) -> Params:
        """The parameters as a tree of ShapeDtypeStruct."""
        flat = {
            path: jax.ShapeDtypeStruct(shape, np.float32)
            for path, shape in self.leaves.shapes.items()
        }
        return unflatten(flat)

    def load(self, dtype: Any = None) -> Params:
        """Returns all parameters as NumPy arrays; `dtype` None keeps each as stored.

        The peak of memory is the result and one tensor.

        Raises: InputError listing the parameters that hold NaN or infinity.
        """
        problems, flat = Problems(), {}
        for path, shape in self.leaves.shapes.items():
            # A scalar stays as stored: it is a scale, and its rounding would scale every output.
            leaf_dtype = dtype if shape else None
            flat[path] = read_leaf(self.leaves, path, self.kind.is_stacked(path), leaf_dtype)
            problems.add(check_finite(self.folder, path, flat[path]))
        problems.raise_any()
        return unflatten(flat)

    def place(self, shardings: Params, dtype: Any) -> Params:
        """Returns the parameters as global arrays; scalars stay as stored."""
        shapes = self.leaves.shapes
        return place_leaves(
            self.leaves, self.kind.is_stacked, shardings,
            lambda path: dtype if shapes[path] else None, self.folder,
        )  # fmt: skip

    def close(self) -> None:
        """Closes all files."""
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


def open_checkpoint(path: str | Path, kind: NetworkKind, config: Any = None) -> Checkpoint:
    """Opens a directory, and compares every tensor's name, shape and type with the sizes.

    `config` replaces the sizes that the directory states. `path` may be a single file of weights,
    unless the kind's config.json states the layout.

    Raises: InputError listing every setting and tensor that is missing, unknown or misshapen.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    refuse_adapter(path)

    _check_pointers(folder, lambda: _open_weights(path, kind))
    data = read_config(folder, kind)
    layout = find_stated_layout(data, folder, kind)
    # Before the weights, if possible: a wrong config makes every tensor look wrong.
    if layout is not None:
        config = config or _parse_config(data, folder, kind, layout, {})
    store = _open_weights(path, kind)
    try:
        stored = {key: info.shape for key, info in store.infos.items()}
        if layout is None:
            layout = find_layout_of_tensors(stored, path, kind, data)
            store = join_parts(_add_packaged_tensors(store, kind), kind, folder)
            stored = {key: info.shape for key, info in store.infos.items()}
            config = config or _parse_config(data, folder, kind, layout, stored)
        elif layout != OWN_LAYOUT:
            store = join_parts(store, kind, folder)
        open_layout = _open_own if layout == OWN_LAYOUT else _open_foreign
        return open_layout(path, kind, layout, config, store, data)
    except BaseException:  # KeyboardInterrupt too: the store has open files
        store.close()
        raise


def load_params(
    path: str | Path, kind: NetworkKind, config: Any = None, dtype: Any = None
) -> Params:
    """Returns all parameters as NumPy arrays; see `open_checkpoint` and `Checkpoint.load`."""
    with open_checkpoint(path, kind, config) as checkpoint:
        return checkpoint.load(dtype)


def load_sharded(
    folder: str | Path, kind: NetworkKind, config: Any, shardings: Params, dtype: DTypes
) -> Params:
    """Returns the parameters that `shardings` names, a tree of Sharding, as global arrays.

    Raises: InputError listing every tensor that does not fit the config, or holds NaN.
    """
    with open_checkpoint(folder, kind, config) as checkpoint:
        return place_leaves(checkpoint.leaves, kind.is_stacked, shardings, dtype, folder)


def load_config(folder: str | Path, kind: NetworkKind) -> Any:
    """Returns the sizes that a directory states; reads its tensors only if config.json lacks them.

    Raises: InputError listing every field that is malformed or not supported.
    """
    folder = Path(folder)
    data = read_config(folder, kind)
    layout = find_stated_layout(data, folder, kind)
    if layout is None:
        with open_checkpoint(folder, kind) as checkpoint:
            return checkpoint.config
    return _parse_config(data, folder, kind, layout, {})


def read_stored_dtypes(folder: str | Path, kind: NetworkKind, config: Any = None) -> dict[str, Any]:
    """Returns {path: dtype} as stored: one that holds all layers of a parameter exactly."""
    with open_checkpoint(folder, kind, config) as checkpoint:
        leaves = checkpoint.leaves
        return {
            path: find_leaf_dtype(leaves, path, list_layers(leaves, path, kind.is_stacked(path)))
            for path in leaves.shapes
        }


def read_layer_dtypes(
    folder: str | Path, kind: NetworkKind, config: Any = None
) -> dict[str, list[str]]:
    """Returns {path: dtype names of its layers} for the parameters whose layers differ in dtype."""
    with open_checkpoint(folder, kind, config) as checkpoint:
        stacked = {path: kind.is_stacked(path) for path in checkpoint.leaves.shapes}
        return find_mixed_dtypes(checkpoint.leaves, stacked)


def detect_layout(folder: str | Path, kind: NetworkKind) -> str:
    """Returns the layout of a directory of the kind.

    Raises: InputError for a directory that holds no checkpoint of the kind.
    """
    folder = Path(folder)
    layout = find_stated_layout(read_config(folder, kind), folder, kind)
    if layout is not None:
        return layout
    with open_checkpoint(folder, kind) as checkpoint:
        return checkpoint.layout


def _open_weights(path: Path, kind: NetworkKind) -> Store:
    # A policy is published under standard names; reward networks also as a single .pth file.
    if kind.needs_config:
        return open_store(path)
    return open_any_store(path, kind.parts[0].stem if kind.parts else None)


def _check_pointers(folder: Path, open_weights: Callable[[], Store]) -> None:
    """Looks for Git LFS pointers among the small files.

    Raises: InputError listing these, and what is wrong with the weights.
    """
    # In a clone without Git LFS usually all large files are pointers: one message names them all.
    problems = Problems()
    problems.add(find_pointers(folder))
    if problems:
        with problems.collect():
            open_weights().close()
    problems.raise_any()


def _parse_config(
    data: dict[str, Any], folder: Path, kind: NetworkKind, layout: str, stored: Mapping[str, Shape]
) -> Any:
    file = folder / "config.json"
    if layout == OWN_LAYOUT:
        return parse_own_config(kind, data, file)
    assert kind.parse is not None  # it has a foreign layout
    problems = Problems()
    config = kind.parse(folder, layout, stored, problems)
    if not problems:
        problems.add(kind.check(config, f"{file if data else folder}: sizes"))
    problems.raise_any()
    return config


def _add_packaged_tensors(store: Store, kind: NetworkKind) -> Store:
    """Returns the store with the tensors that ship with this package, unless it has one of them."""
    if kind.packaged is None:
        return store
    packaged = open_safetensors([kind.packaged])
    if store.infos.keys() & packaged.infos.keys():
        return store
    return JoinedStore(store, packaged)


def _open_foreign(
    path: Path, kind: NetworkKind, layout: str, config: Any, store: Store, data: dict[str, Any]
) -> Checkpoint:
    stored = {key: info.shape for key, info in store.infos.items()}
    table, shapes = kind.tables[layout], kind.shapes(config)
    slots = table.make_slots(shapes)
    problems = table.find_problems(slots, stored, path)
    if problems:
        # The likely causes first: another layout, then one prefix on all names. Only other problems
        # are listed tensor by tensor.
        check_named_layout(path, kind, layout, stored, shapes)
        problems = shorten_wrong_names(problems, table, slots, stored, path)
    if kind.explain:
        problems = kind.explain(problems, layout, data)
    problems += _check_dtypes(path, store, {slot.key for slot in slots})
    problems += _check_derived(path, store, kind.derive(config))
    if problems:
        raise InputError(problems)
    folder = path.parent if path.is_file() else path
    carried = {key: store for key in stored if table.is_carried(key)}
    leaves = TorchLeaves(store, slots, shapes)
    return Checkpoint(kind, folder, layout, layout, config, leaves, store, carried)


def _open_own(
    path: Path, kind: NetworkKind, layout: str, config: Any, store: Store, data: dict[str, Any]
) -> Checkpoint:
    folder = path.parent if path.is_file() else path
    stored = {key: info.shape for key, info in store.infos.items()}
    shapes = kind.shapes(config)
    # Not one name is right: a list of all of them would say less.
    if not stored.keys() & shapes.keys():
        check_named_layout(folder, kind, layout, stored, shapes)
        raise InputError(
            f"{folder}: its config.json is of a converted {kind.name} network, but no tensor "
            "of its weights is; convert the PyTorch checkpoint again"
        )
    problems = Problems()
    for key in sorted(shapes.keys() | stored.keys()):
        if key not in stored:
            expected = list(shapes[key])
            problems.add(f"{folder}: {key} is missing, expected with shape {expected}")
        elif key not in shapes:
            problems.add(f"{folder}: {key} is unknown with this config; correct the config")
        elif stored[key] != shapes[key]:
            problems.add(
                f"{folder}: {key} has shape {list(stored[key])}, expected {list(shapes[key])} by "
                "the config"
            )
    problems.add(_check_dtypes(folder, store, set(shapes)))
    layer_dtypes = data.get("layer_dtypes", {})
    problems.add(_check_layer_dtypes(folder, layer_dtypes, shapes))
    source = data.get("source_layout", OWN_LAYOUT)
    # Tokenizer and processor files of a kind with foreign exports are always of one of its layouts.
    layouts = list(kind.tables) if kind.foreign_export else [*kind.tables, OWN_LAYOUT]
    if source not in layouts:
        problems.add(f"{folder}/config.json: source_layout is {source!r}; convert it again")
    problems.raise_any()
    file = folder / SOURCE_FOLDER / CARRIED_FILE
    extra = open_safetensors([file]) if file.is_file() else None
    carried: dict[str, Store] = dict.fromkeys(extra.infos, extra) if extra else {}
    leaves = JaxLeaves(store, layer_dtypes)
    return Checkpoint(kind, folder, layout, source, config, leaves, store, carried)


def _check_dtypes(where: Path, store: Store, keys: set[str]) -> list[str]:
    return [
        f"{where}: {key} holds {info.dtype.name}, expected a float type; quantised checkpoints "
        "are not supported"
        for key, info in store.infos.items()
        if key in keys and info.dtype not in _FLOATS
    ]


def _check_derived(where: Path, store: Store, derived: Mapping[str, np.ndarray]) -> list[str]:
    return [
        f"{where}: {key} does not hold the values that the network's sizes give it; it is damaged, "
        "or of another kind of network"
        for key, values in derived.items()
        if key in store.infos and not np.array_equal(store.read(key), values)
    ]


def _check_layer_dtypes(folder: Path, value: Any, shapes: Mapping[str, Shape]) -> list[str]:
    if not isinstance(value, dict):
        return [f"{folder}/config.json: layer_dtypes is {value!r}; convert the checkpoint again"]
    names = {dtype.name for dtype in _FLOATS}
    return [
        f"{folder}/config.json: layer_dtypes of {path} does not fit; convert the checkpoint again"
        for path, dtypes in value.items()
        if path not in shapes
        or not isinstance(dtypes, list)
        or not shapes[path]
        or len(dtypes) != shapes[path][0]
        or not all(isinstance(name, str) and name in names for name in dtypes)
    ]
