"""Reads a model that is a base and a directory of adapters, as if the two were merged.

It reads the directories that `adapters.save_adapter` writes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.errors import InputError, Problems
from corl_jax.weights.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from corl_jax.weights.kinds import NetworkKind, PeftFormat
from corl_jax.weights.selection import STANDARD
from corl_jax.weights.sources import Leaves, TorchLeaves
from corl_jax.weights.storage import Box, Store, make_whole_box, open_safetensors, read_json
from corl_jax.weights.table import Shape

_PLAIN = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
    "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
"""Settings of PEFT with the one value that is read here; an absent setting has this value."""


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """The settings of adapters that decide what is added to the kernels."""

    rank: int
    scale: float  # alpha / rank
    base: str | None  # the base model's directory or hub id


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder has adapters and no model beside them."""
    has_model = any((folder / name).is_file() for name in STANDARD)
    return (folder / ADAPTER_CONFIG).is_file() and not has_model


def read_adapter_settings(folder: Path) -> AdapterSettings:
    """Reads adapter_config.json.

    Raises: InputError listing every setting that is malformed or not supported.
    """
    file = folder / ADAPTER_CONFIG
    data, problems = read_json(file), Problems()
    for name, plain in _PLAIN.items():
        value = data.get(name, plain)
        # PEFT writes null, an empty list or an empty object for "none of them".
        if value != plain and (value or plain):
            problems.add(
                f"{file}: {name} is {value!r}, expected {plain!r}; merge the adapter with peft "
                "(merge_and_unload), and give the merged model"
            )
    rank: Any = data.get("r")
    alpha: Any = data.get("lora_alpha")
    base = data.get("base_model_name_or_path")
    if type(rank) is not int or rank < 1:
        problems.add(f"{file}: r is {rank!r}, expected a whole number of at least 1")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        problems.add(f"{file}: lora_alpha is {alpha!r}, expected a number")
    problems.raise_any()
    return AdapterSettings(rank, alpha / rank, base if isinstance(base, str) and base else None)


class AdaptedLeaves:
    """The leaves of a base, in which kernels with an adapter are W + A B alpha / rank, float32."""

    transposed = True

    def __init__(self, base: Leaves, adapters: Leaves, scale: float):
        self.shapes = base.shapes
        self.concurrent = base.concurrent and adapters.concurrent
        self._base, self._adapters, self._scale = base, adapters, np.float32(scale)

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        is_adapted = self._find_adapter(path) is not None
        return np.dtype(np.float32) if is_adapted else self._base.dtype(path, layer)

    def read(self, path: str, layer: int | None, box: Box | None = None) -> np.ndarray:
        name, shape = self._find_adapter(path), self.shapes[path]
        kernel = self._base.read(path, layer, box)
        if name is None:
            return kernel
        inputs, outputs = make_whole_box(shape if layer is None else shape[1:])
        inputs, outputs = (inputs, outputs) if box is None else box
        ranks = (0, self._adapters.shapes[f"{name}/lora_a"][-1])
        # Box (rows, columns) of A B: these rows of A [in, r] and these columns of B [r, out].
        a = self._adapters.read(f"{name}/lora_a", layer, (inputs, ranks)).astype(np.float32)
        b = self._adapters.read(f"{name}/lora_b", layer, (ranks, outputs)).astype(np.float32)
        return kernel.astype(np.float32) + (a @ b) * self._scale

    def _find_adapter(self, path: str) -> str | None:
        """Returns the name of the dense layer of a path if it has an adapter."""
        name = path.removesuffix("/kernel")
        return name if f"{name}/lora_a" in self._adapters.shapes and name != path else None


def open_adapters(folder: Path, kind: NetworkKind, base: Leaves) -> tuple[AdaptedLeaves, Store]:
    """Opens a directory of adapters on their base; returns the leaves and the store to close.

    Raises: InputError listing every setting and tensor that does not fit the base.
    """
    if kind.peft is None:
        raise InputError(f"{folder}: holds adapters, but PEFT has no {kind.name} network")
    settings = read_adapter_settings(folder)
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise InputError(f"{file}: not found, beside {ADAPTER_CONFIG}; copy it again")
    store = open_safetensors([file])
    try:
        leaves = _match_adapters(file, kind.peft, base.shapes, store, settings)
    except BaseException:  # KeyboardInterrupt too: the store has an open file
        store.close()
        raise
    return AdaptedLeaves(base, leaves, settings.scale), store


def _match_adapters(
    file: Path, form: PeftFormat, kernels: Mapping[str, Shape], store: Store,
    settings: AdapterSettings,
) -> TorchLeaves:  # fmt: skip
    stored: dict[str, Any] = {key: info.shape for key, info in store.infos.items()}
    shapes: dict[str, Shape] = {}
    for path, shape in kernels.items():
        name = path.removesuffix("/kernel")
        if name == path or not form.table.has_leaf(f"{name}/lora_a"):
            continue
        *layers, inputs, outputs = shape
        pair: dict[str, Shape] = {
            f"{name}/lora_a": (*layers, inputs, settings.rank),
            f"{name}/lora_b": (*layers, settings.rank, outputs),
        }
        # A projection has adapters in all layers or in none; one tensor shows which.
        if any(slot.key in stored for slot in form.table.make_slots(pair)):
            shapes |= pair
    slots = form.table.make_slots(shapes)
    problems = form.table.find_problems(slots, stored, file)
    if not shapes:
        problems.append(f"{file}: found no adapter of this network")
    if problems:
        raise InputError(problems)
    return TorchLeaves(store, slots, shapes)
