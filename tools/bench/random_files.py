"""Checkpoints of random weights without their gigabytes, for programs that read files.

A file has the whole header of a checkpoint in our own layout, and no data: it takes no room on the
disk. `draw_on_reading` makes values where a program reads them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.models import modules
from corl_jax.params import flatten
from corl_jax.policies.family import Family
from corl_jax.rewards.networks import NETWORKS
from corl_jax.weights import storage
from corl_jax.weights.dtypes import BFLOAT16, to_safetensors_name
from corl_jax.weights.kinds import NetworkKind
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.own_config import make_own_config
from corl_jax.weights.selection import SAFE_NAME
from corl_jax.weights.shards import write_json
from corl_jax.weights.storage import Box, SafetensorsStore, make_whole_box
from tools.bench.families import MeasuredFamily
from tools.bench.vocabularies import write_network
from tools.bench.weights import STD

# Values of noise that repeat. Odd, so that neighbouring rows of a matrix differ.
BLOCK = 2**22 + 1


def write_policy(folder: Path, measured: MeasuredFamily, sizes: Any) -> Path:
    """Writes the files of a policy in bfloat16, as published weights are."""
    family = measured.family
    measured.write_processor(folder, sizes)
    abstract = flatten(family.abstract(sizes))
    _write_files(folder, family.kind, sizes, abstract, choose_dtypes(family, abstract))
    return folder


def choose_dtypes(family: Family, abstract: Mapping[str, Any]) -> dict[str, np.dtype]:
    """Returns the types of a policy's parameters in a file: bfloat16, float32 where it must be."""
    exact = tuple(f"{part}/" for part in family.float32_parts)
    return {
        path: np.dtype(np.float32) if not x.shape or path.startswith(exact) else BFLOAT16
        for path, x in abstract.items()
    }


def write_reward_network(folder: Path, name: str, config: Any) -> Path:
    """Writes the files of a network of rewards in float32."""
    kind = KINDS[NETWORKS[name].kind]
    write_network(folder, kind.name, config)
    abstract = flatten(modules.make_abstract(kind.module, config))
    dtypes = dict.fromkeys(abstract, np.dtype(np.float32))
    _write_files(folder, kind, config, abstract, dtypes)
    return folder


def _write_files(
    folder: Path, kind: NetworkKind, config: Any, abstract: dict[str, Any],
    dtypes: dict[str, np.dtype],
) -> None:  # fmt: skip
    """Writes config.json and a file of weights whose data is a hole."""
    # The layout of the tokenizer and processor files.
    source = "transformers" if "transformers" in kind.tables else next(iter(kind.tables))
    write_json(folder / "config.json", make_own_config(kind, config, source, {}))
    header, end = {}, 0
    for path, x in abstract.items():
        begin, end = end, end + math.prod(x.shape) * dtypes[path].itemsize
        name = to_safetensors_name(dtypes[path])
        header[path] = {"dtype": name, "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / SAFE_NAME).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(stream.tell() + end)


@contextlib.contextmanager
def draw_on_reading(folder: Path) -> Iterator[None]:
    """Inside of the block values of files below the folder are drawn, and not read."""

    class NoiseStore(SafetensorsStore):
        def read(self, key: str, box: Box | None = None) -> np.ndarray:
            info = self.infos[key]
            if not info.file.is_relative_to(folder):  # such as the heads that ship with LPIPS
                return super().read(key, box)
            shape = [stop - start for start, stop in box or make_whole_box(info.shape)]
            return draw_values(key, tuple(shape), info.dtype)

    # All readers make their store here. Otherwise 14 GB of a 7B would be written to a disk first,
    # and holes are zeros, with which a GPU multiplies faster than with numbers.
    original = storage.SafetensorsStore
    storage.SafetensorsStore = NoiseStore
    try:
        yield
    finally:
        storage.SafetensorsStore = original


def draw_values(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns scales of 1, biases of 0, CLIP's factor of 100, and noise for all others."""
    if not shape:
        return np.full(shape, math.log(100), dtype)
    if path.endswith(("/scale", "/bias")):
        return np.full(shape, path.endswith("/scale"), dtype)
    out = np.empty(shape, dtype)
    # By bytes: NumPy copies bfloat16, a type that it does not know, more slowly.
    target, noise = out.reshape(-1).view(np.uint8), make_noise(dtype).view(np.uint8)
    for first in range(0, target.size, noise.size):
        part = target[first : first + noise.size]
        part[...] = noise[: part.size]
    return out


@functools.cache
def make_noise(dtype: np.dtype) -> np.ndarray:
    """Returns the block of noise."""
    return (STD * np.random.default_rng(0).standard_normal(BLOCK, np.float32)).astype(dtype)
