"""Writes named tensors as sharded safetensors (or .bin) files, one tensor in memory at a time.

A header needs shapes only, so it is written first. The data follows chunk by chunk.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.atomic_files import replace_file
from corl_jax.weights.dtypes import to_safetensors_name
from corl_jax.weights.selection import BIN_NAME, SAFE_NAME
from corl_jax.weights.storage import read_header

DEFAULT_SHARD_BYTES = 4 * 1000**3
_ALIGN = 8
Progress = Callable[[int], None]
"""Called with the bytes just written."""
ExtraFiles = Mapping[str, dict[str, Any] | bytes]
"""Name of a file -> its JSON, or its bytes."""


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: its chunks, concatenated along axis 0, are the whole tensor."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(
    folder: Path,
    plans: Sequence[TensorPlan],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    as_bin: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes one file, or several with their index; returns the files. A tensor is never split."""
    shards = _split_into_shards(plans, max_shard_bytes)
    stem, suffix = (BIN_NAME if as_bin else SAFE_NAME).split(".")
    write = write_bin if as_bin else write_safetensors
    if len(shards) == 1:
        write(folder / f"{stem}.{suffix}", shards[0], progress)
        return [folder / f"{stem}.{suffix}"]
    files, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        write(folder / name, shard, progress)
        files.append(folder / name)
        weight_map.update({plan.key: name for plan in shard})
    total = sum(plan.nbytes for plan in plans)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / f"{stem}.{suffix}.index.json", json.dumps(index, indent=2) + "\n")
    return files


def _split_into_shards(plans: Sequence[TensorPlan], limit: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        # A tensor larger than the limit is alone in its shard.
        if shards[-1] and size + plan.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.nbytes
    return shards


def write_safetensors(
    file: Path, plans: Sequence[TensorPlan], progress: Progress | None = None
) -> None:
    """Writes one safetensors file, and reads its header back."""
    ordered, start = _make_start(plans)
    with replace_file(file) as stream:
        stream.write(start)
        for plan in ordered:
            for chunk in _check_chunks(plan):
                stream.write(chunk.reshape(-1).view(np.uint8).data)
                if progress:
                    progress(chunk.nbytes)
    # Finds a file that the disk cut short before it is taken for whole.
    read_header(file)


def count_safetensors_bytes(plans: Sequence[TensorPlan]) -> int:
    """Returns the size of the file that `write_safetensors` would write."""
    return len(_make_start(plans)[1]) + sum(plan.nbytes for plan in plans)


def _make_start(plans: Sequence[TensorPlan]) -> tuple[list[TensorPlan], bytes]:
    """Returns the tensors in the order of their data, and the bytes before the data."""
    # Wide elements first: each tensor then starts at a multiple of its element size.
    ordered = sorted(plans, key=lambda plan: -np.dtype(plan.dtype).itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in ordered:
        header[plan.key] = {
            "dtype": to_safetensors_name(plan.dtype),
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.nbytes],
        }
        offset += plan.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces, which the format allows behind the JSON, so that the data begins at a multiple of 8.
    text += b" " * (-len(text) % _ALIGN)
    return ordered, len(text).to_bytes(8, "little") + text


def _check_chunks(plan: TensorPlan) -> Iterator[np.ndarray]:
    written = 0
    for chunk in plan.chunks():
        if chunk.dtype != plan.dtype:
            raise AssertionError(f"{plan.key}: a {chunk.dtype} chunk in a {plan.dtype} tensor")
        if chunk.nbytes:
            # A transposed view must not be written as its untransposed buffer.
            yield np.ascontiguousarray(chunk)
        written += chunk.nbytes
    if written != plan.nbytes:
        raise AssertionError(f"{plan.key}: {written} bytes written, planned {plan.nbytes}")


def write_bin(file: Path, plans: Sequence[TensorPlan], progress: Progress | None = None) -> None:
    """Writes one PyTorch file. torch.save needs the whole shard in memory."""
    from corl_jax.weights.torch_bin import import_torch, to_torch

    torch = import_torch(file)
    state = {}
    for plan in plans:
        chunks = list(_check_chunks(plan))
        whole = np.concatenate(chunks) if len(chunks) > 1 else np.array(chunks[0])
        state[plan.key] = to_torch(whole.reshape(plan.shape))
        if progress:
            progress(plan.nbytes)
    with replace_file(file) as stream:
        torch.save(state, stream)


def write_json(file: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all."""
    write_bytes(file, text.encode("utf-8"))


def write_extra_files(folder: Path, files: ExtraFiles) -> None:
    """Writes further files of an export, each whole or not at all."""
    for name, data in files.items():
        if isinstance(data, bytes):
            write_bytes(folder / name, data)
        else:
            write_json(folder / name, data)


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    with replace_file(file) as stream:
        stream.write(data)
