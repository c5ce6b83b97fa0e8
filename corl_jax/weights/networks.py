"""Checkpoints of reward networks: PyTorch files in, our own directories in and out.

Each kind has a module, a parser of foreign settings and a key table per layout; the layout is
told by the tensors' names. A converted directory holds `model.safetensors`, whose keys are
parameter paths, and `config.json` with the sizes; tokenizer and image settings travel along.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from corl_jax.errors import InputError, shorten
from corl_jax.params import unflatten
from corl_jax.policies.janus.checkpoint.settings import FORMAT_VERSION, from_dict
from corl_jax.types import Params
from corl_jax.weights.atomic import whole_directory
from corl_jax.weights.dtypes import is_float, named
from corl_jax.weights.folders import pointer_problems, read_unmarked, refuse_adapter
from corl_jax.weights.kinds import TOKENIZER_FILES, NetworkKind
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.nan_check import non_finite_problem, watched
from corl_jax.weights.sharded_load import place_leaves
from corl_jax.weights.shards import (
    DEFAULT_SHARD_BYTES,
    Progress,
    TensorPlan,
    write_bytes,
    write_tensors,
    write_text,
)
from corl_jax.weights.sources import (
    JaxLeaves,
    Leaves,
    TorchLeaves,
    layer_count,
    leaf_dtype,
    read_leaf,
)
from corl_jax.weights.storage import Store, open_any_store, read_json
from corl_jax.weights.table import Shape, Table
from corl_jax.weights.wrong_names import find_wrong_names, with_wrong_names

MODEL_TYPE = "corl_jax_network"


@dataclasses.dataclass
class NetworkCheckpoint:
    """A checked checkpoint of a reward network, its files open until `close`."""

    name: str  # key of KINDS
    folder: Path
    layout: str  # a key of the kind's tables, or `jax`
    config: Any
    leaves: Leaves
    store: Store
    stacked: dict[str, bool]  # whether a leaf is read layer by layer

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.leaves.shapes.values())

    def read(self, path: str, dtype: Any = None) -> np.ndarray:
        """One whole leaf, as stored or as `dtype`."""
        return read_leaf(self.leaves, path, self.stacked[path], dtype)

    @property
    def shapes(self) -> Params:
        """The parameters as a tree of shapes."""
        flat = {
            path: jax.ShapeDtypeStruct(shape, np.float32)
            for path, shape in self.leaves.shapes.items()
        }
        return unflatten(flat)

    def place(self, shardings: Params, dtype: Any) -> Params:
        """The parameters as global arrays, scalars as stored; see `load_network`."""
        shapes = self.leaves.shapes
        return place_leaves(
            self.leaves, self.stacked.__getitem__, shardings,
            lambda path: dtype if shapes[path] else None, self.folder,
        )  # fmt: skip

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> NetworkCheckpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def recognise(path: str | Path) -> str | None:
    """The kind that a directory's config.json states; None where it states none of ours."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    data = read_json(file)
    stated = data.get("model_type")
    if stated == MODEL_TYPE:
        return data.get("network") if data.get("network") in KINDS else None
    return next((name for name, kind in KINDS.items() if stated in kind.model_types), None)


def open_network(path: str | Path, name: str) -> NetworkCheckpoint:
    """Opens a directory (or a single file) of weights of the kind `name`, and checks them all.

    Raises: InputError listing every setting and tensor that is missing, unknown or misshapen.
    """
    path, kind = Path(path), KINDS[name]
    folder = path if path.is_dir() else path.parent
    refuse_adapter(path)
    problems = pointer_problems(folder)
    if problems:
        raise InputError(problems)
    stated = recognise(path)
    if stated not in (None, name):
        raise InputError(
            f"{path}: holds a {stated} network, expected {name}; give the other directory"
        )
    store = open_any_store(path)
    try:
        if _is_converted(folder):
            return _open_converted(folder, name, store)
        found = {key: info.shape for key, info in store.infos.items()}
        layout = _layout(kind, found, path)
        config = kind.parse(folder, layout, found, problems)
        problems = problems or kind.check(config, f"{folder}: sizes")
        if problems:
            raise InputError(problems)
        table, shapes = kind.tables[layout], kind.shapes(config)
        slots = table.slots(shapes)
        problems = table.problems(slots, found, path)
        if problems:
            problems = with_wrong_names(problems, table, slots, found, path)
        keys = {slot.key for slot in slots}
        problems += _dtype_problems(path, store, keys)
        if problems:
            raise InputError(problems)
        stacked = {leaf: table.row(leaf)[0].stacked for leaf in shapes}
        leaves = TorchLeaves(store, slots, shapes)
        return NetworkCheckpoint(name, folder, layout, config, leaves, store, stacked)
    except BaseException:
        store.close()
        raise


def load_network(path: str | Path, name: str, dtype: Any = None) -> tuple[Any, Params]:
    """(config, parameters as NumPy arrays); `dtype` None keeps each as stored, scalars stay so.

    A scalar is a scale whose rounding to bfloat16 would scale every score.

    Raises: InputError as `open_network`, and listing the parameters that hold NaN.
    """
    with open_network(path, name) as opened:
        shapes = opened.leaves.shapes
        flat = {leaf: opened.read(leaf, dtype if shapes[leaf] else None) for leaf in shapes}
        problems = [line for leaf in flat for line in non_finite_problem(path, leaf, flat[leaf])]
        if problems:
            raise InputError(problems)
        return opened.config, unflatten(flat)


def convert_network(
    source: str | Path,
    out: str | Path,
    name: str,
    *,
    dtype: str = "keep",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> NetworkCheckpoint:
    """Writes a network's checkpoint as our own directory, whole or not at all; returns the source.

    `say` is told of tensors with values that are no numbers.

    Raises: InputError for a source that does not add up, or a folder that is taken.
    """
    with open_network(source, name) as opened:
        plans, not_finite = watched([_plan(opened, path, dtype) for path in opened.leaves.shapes])
        with whole_directory(Path(out), overwrite=overwrite) as folder:
            settings = {
                "model_type": MODEL_TYPE,
                "format_version": FORMAT_VERSION,
                "network": name,
                "sizes": dataclasses.asdict(opened.config),
            }
            write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
            for file in TOKENIZER_FILES:
                if (opened.folder / file).is_file():
                    (folder / file).parent.mkdir(exist_ok=True)
                    write_bytes(folder / file, read_unmarked(opened.folder / file))
            write_tensors(folder, plans, max_shard_bytes=max_shard_bytes, progress=progress)
        for note in shorten(not_finite, what="tensors with values that are NaN or infinite"):
            say(note)
        return opened


def _plan(opened: NetworkCheckpoint, path: str, dtype: str) -> TensorPlan:
    leaves = opened.leaves
    layers = layer_count(leaves, path, opened.stacked[path])
    kept = leaf_dtype(leaves, path, layers)
    target = named(dtype) if dtype != "keep" and is_float(kept) else kept

    def chunks() -> Iterator[np.ndarray]:
        for layer in layers:
            yield np.ascontiguousarray(leaves.read(path, layer), dtype=target)

    return TensorPlan(path, target, leaves.shapes[path], chunks)


def _layout(kind: NetworkKind, found: Mapping[str, Shape], where: Path) -> str:
    """The layout whose table knows the most of the tensors.

    Raises: InputError where no table knows one, but all of them under other names.
    """

    def known(table: Table) -> int:
        return sum(table.matches(key) for key in found)

    layout = max(kind.tables, key=lambda layout: known(kind.tables[layout]))
    if not known(kind.tables[layout]):
        # The sizes are partly told by the tensors, so wrong names would be reported as wrong sizes.
        wrong = [find_wrong_names(found, table) for table in kind.tables.values()]
        explained = [names for names in wrong if names]
        if explained:
            best = max(explained, key=lambda names: len(names.corrected))
            raise InputError(f"{where}: {best.problem}")
    return layout


def _is_converted(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == MODEL_TYPE


def _open_converted(folder: Path, name: str, store: Store) -> NetworkCheckpoint:
    file, problems = folder / "config.json", []
    data = read_json(file)
    if data.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version is {data.get('format_version')!r}, expected {FORMAT_VERSION}; "
            "convert the PyTorch checkpoint again with this version"
        )
    if data.get("network") != name:
        problems.append(f"{file}: network is {data.get('network')!r}, expected {name!r}")
    config = from_dict(KINDS[name].config, data.get("sizes"), f"{file}: sizes", problems)
    problems = problems or KINDS[name].check(config, f"{file}: sizes")
    if problems:
        raise InputError(problems)
    shapes = KINDS[name].shapes(config)
    if not shapes.keys() & store.infos.keys():
        raise InputError(
            f"{folder}: its config.json is of a converted network, but no tensor of its weights "
            "is; convert the PyTorch checkpoint again"
        )
    for path in sorted(shapes.keys() | store.infos.keys()):
        found = store.infos[path].shape if path in store.infos else None
        if found != shapes.get(path):
            problems.append(
                f"{folder}: {path}: found {list(found) if found is not None else 'nothing'}, "
                f"expected {list(shapes[path]) if path in shapes else 'nothing'}; convert it again"
            )
    problems += _dtype_problems(folder, store, set(shapes))
    if problems:
        raise InputError(problems)
    return NetworkCheckpoint(
        name, folder, "jax", config, JaxLeaves(store, {}), store, dict.fromkeys(shapes, False)
    )


def _dtype_problems(where: Path, store: Store, keys: set[str]) -> list[str]:
    return [
        f"{where}: {key} holds {info.dtype.name}, expected a float type; quantised checkpoints "
        "are not supported"
        for key, info in store.infos.items()
        if key in keys and not is_float(info.dtype)
    ]
