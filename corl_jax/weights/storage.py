"""Reads named tensors from files, one at a time and never a whole shard.

Every header and index is checked before the first tensor is read. A damaged or hostile file is
refused with its name and a remedy.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from corl_jax.errors import InputError, Problems
from corl_jax.input_files import describe_lfs_pointer, is_lfs_pointer, read_text
from corl_jax.weights.dtypes import SAFETENSORS
from corl_jax.weights.selection import (
    BIN_NAME,
    BIN_PATTERNS,
    INDEX,
    SAFE_NAME,
    STANDARD,
    Selection,
    list_weights,
    select_weights,
    warn_of_other_weights,
)

MAX_HEADER_BYTES = 2**24  # a thousand tensors take 2**17; parsed JSON takes some 30 times as much
MAX_JSON_BYTES = 2**26  # of a config, an index or a tokenizer; the largest known one has 2**25
MAX_KEY = 256  # characters of a tensor's name
MAX_MALFORMED = 100  # entries in messages; a hostile file could fill the memory with lines
_AGAIN = "download or copy it again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The shape, dtype and place of a tensor, known without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int = 0  # of the data in a safetensors file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Box = tuple[tuple[int, int], ...]
"""A part of an array: [start, stop) along each of its axes."""


def make_whole_box(shape: tuple[int, ...]) -> Box:
    """Returns the box of a whole array."""
    return tuple((0, size) for size in shape)


class Store(Protocol):
    """Tensors by name."""

    infos: dict[str, TensorInfo]
    concurrent: bool  # several threads may read

    def read(self, key: str, box: Box | None = None) -> np.ndarray:
        """Reads the tensor, or the part of it in a box, as a fresh contiguous array."""
        ...

    def close(self) -> None: ...


class SafetensorsStore:
    """The tensors of one or more safetensors files."""

    concurrent = True

    def __init__(self, infos: dict[str, TensorInfo]):
        self.infos = infos
        # For `pread` into fresh arrays: the pages of a memory map would count as the process's.
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def read(self, key: str, box: Box | None = None) -> np.ndarray:
        info = self.infos[key]
        box = make_whole_box(info.shape) if box is None else box
        out = np.empty([stop - start for start, stop in box], info.dtype)
        if not out.nbytes:
            return out
        # Behind the last split axis the box is contiguous in the file. Shape [4, 6, 5], box
        # [1:3, 2:4, :]: axis 1 is the last split one, outer = 1. For each of the 2 rows one read of
        # 2 * 5 values; strides [30, 5, 1], corner = 1 * 30 + 2 * 5 = 40.
        split = [axis for axis, ends in enumerate(box) if ends != (0, info.shape[axis])]
        outer = split[-1] if split else 0
        pieces = out.reshape(*out.shape[:outer], -1).view(np.uint8)
        strides = [math.prod(info.shape[axis + 1 :]) for axis in range(len(box))]
        corner = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
        for place in np.ndindex(*out.shape[:outer]):
            steps = sum(i * stride for i, stride in zip(place, strides, strict=False))
            offset = info.offset + (corner + steps) * info.dtype.itemsize
            self._fill(info, pieces[place].data, offset)
        return out

    def _fill(self, info: TensorInfo, view: memoryview, offset: int) -> None:
        # Opened on the first read: a checkpoint can have many shards. Several threads read, so
        # without the lock one file could be opened twice.
        with self._opening:
            if info.file not in self._descriptors:
                self._descriptors[info.file] = os.open(info.file, os.O_RDONLY)
        done = 0
        while done < len(view):  # one call of `preadv` returns at most 2 GiB on Linux
            count = os.preadv(self._descriptors[info.file], [view[done:]], offset + done)
            if count == 0:
                raise InputError(f"{info.file}: ended while being read; {_AGAIN}")
            done += count

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


class JoinedStore:
    """The tensors of two stores without a common name."""

    def __init__(self, first: Store, second: Store):
        self.infos = first.infos | second.infos
        self.concurrent = first.concurrent and second.concurrent
        self._first, self._second = first, second

    def read(self, key: str, box: Box | None = None) -> np.ndarray:
        return (self._first if key in self._first.infos else self._second).read(key, box)

    def close(self) -> None:
        self._first.close()
        self._second.close()


class PrefixedStore:
    """The tensors of a store, with a prefix before each name."""

    def __init__(self, store: Store, prefix: str):
        self.infos = {f"{prefix}{key}": info for key, info in store.infos.items()}
        self.concurrent = store.concurrent
        self._store, self._prefix = store, prefix

    def read(self, key: str, box: Box | None = None) -> np.ndarray:
        return self._store.read(key.removeprefix(self._prefix), box)

    def close(self) -> None:
        self._store.close()


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads and checks the names, shapes and places of the tensors of a safetensors file.

    Raises: InputError for a file that is not whole and well-formed.
    """
    # 8 bytes: the header's length, little-endian; then the header, JSON; then the data.
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise InputError(_describe_bad_start(file, size))
            header = json.loads(stream.read(length), object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); {_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file}: its safetensors header is not valid ({error}); {_AGAIN}"
        ) from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: its safetensors header is not an object; {_AGAIN}")
    return _check_entries(file, header, data_start=8 + length, size=size)


def _describe_bad_start(file: Path, size: int) -> str:
    if is_lfs_pointer(file):
        return describe_lfs_pointer(file)
    return (
        f"{file}: {size} bytes that do not begin with a safetensors header; it is truncated or "
        f"another kind of file; {_AGAIN}"
    )


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json.loads keeps the last of two equal keys: two readers could see different tensors.
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("it names a key twice")
    return out


def _check_entries(
    file: Path, header: dict[str, Any], *, data_start: int, size: int
) -> dict[str, TensorInfo]:
    header = {key: value for key, value in header.items() if key != "__metadata__"}
    infos, spans, problems = {}, [], find_bad_names(file, header)
    if problems:
        raise InputError(problems)
    for key, entry in header.items():
        try:
            info, end = _parse_entry(file, entry, data_start)
        except (TypeError, KeyError, ValueError) as error:
            problems.append(f"{file}: tensor {key!r} has a malformed entry ({error}); {_AGAIN}")
            if len(problems) == MAX_MALFORMED:
                break
            continue
        infos[key] = info
        spans.append((info.offset, end))
    if problems:
        raise InputError(problems)
    # Every byte of the data belongs to exactly one tensor, as the format demands.
    position = data_start
    for begin, end in sorted(spans):
        if begin != position:
            raise InputError(f"{file}: tensors overlap or leave a gap in the file; {_AGAIN}")
        position = end
    if position != size:
        raise InputError(f"{file}: {size} bytes found, its header promises {position}; {_AGAIN}")
    return infos


def find_bad_names(file: Path, keys: Iterable[str]) -> list[str]:
    """Lists tensors with names that cannot be real: too long, a path, unprintable."""
    # This package uses no name as a path, but another program that gets the file later may do so.
    bad = (
        key
        for key in keys
        if not 0 < len(key) <= MAX_KEY
        or not key.isprintable()
        or key.startswith("/")
        or "\\" in key
        or ".." in key.split("/")
    )
    return [
        f"{file}: a tensor is named {key[:40]!r}{'..' if len(key) > 40 else ''} ({len(key)} "
        f"characters), expected a plain name of at most {MAX_KEY}; do not use this file"
        for key in itertools.islice(bad, MAX_MALFORMED)
    ]


def _parse_entry(file: Path, entry: Mapping[str, Any], data_start: int) -> tuple[TensorInfo, int]:
    """Returns a tensor's info and the end of its data in the file.

    Raises: TypeError, KeyError or ValueError for an inconsistent entry.
    """
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    # Below 2**62 the offsets fit C's 64-bit integers.
    numbers = [*shape, begin, end]
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"shape {shape}, data_offsets {[begin, end]}")
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"dtype {entry['dtype']!r} is not supported")
    info = TensorInfo(tuple(shape), SAFETENSORS[entry["dtype"]], file, data_start + begin)
    if info.nbytes != end - begin:
        raise ValueError(f"shape {shape} needs {info.nbytes} bytes, {end - begin} are given")
    return info, data_start + end


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises: InputError naming the file."""
    text = read_text(file, "a JSON file of settings", MAX_JSON_BYTES)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds a JSON {type(value).__name__}, expected an object")
    return value


def read_index(file: Path) -> dict[str, Path]:
    """Reads {key: shard file} from an index.json; the shards must be in the same folder.

    Raises: InputError listing names that point elsewhere and shards that are absent.
    """
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{file}: no weight_map found; {_AGAIN}")
    names = {name if isinstance(name, str) else repr(name) for name in weight_map.values()}
    problems, suffix = Problems(), Path(file.name.removesuffix(INDEX)).suffix
    for name in sorted(names):
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name or "\\" in name:
            problems.add(f"{file}: shard {name!r} lies outside the folder; refuse this checkpoint")
        elif not os.path.isfile(file.parent / name):  # False for names that no file can have
            problems.add(f"{file.parent / name}: is missing, named by {file.name}; {_AGAIN}")
        elif not name.endswith(suffix):
            problems.add(
                f"{file}: names {name}, expected {suffix} files; it is the index of another save: "
                "remove it, or give it the name that belongs to its files"
            )
    problems.raise_any()
    return {key: file.parent / name for key, name in weight_map.items()}


def open_store(folder: Path) -> Store:
    """Opens a folder's weights with standard names, in the order of `select_weights`.

    Raises: InputError for a folder without weights, or with damaged ones.
    """
    selection = select_weights(folder)
    if selection is None:
        partial = [file.name for file in list_weights(folder)]
        name = SAFE_NAME if any(file.endswith(".safetensors") for file in partial) else BIN_NAME
        hint = f"; found {', '.join(partial[:3])} without {name}{INDEX}" if partial else ""
        raise InputError(f"{folder}: no weights found, expected one of {', '.join(STANDARD)}{hint}")
    return _open_selection(folder, selection)


def open_any_store(path: Path, stem: str | None = None) -> Store:
    """Opens the weights in a folder under any names, or in a single file.

    Files named `stem` come first, then standard names (see `open_store`), then all safetensors
    files together, then all PyTorch files.

    Raises: InputError for a place without weights, or with damaged ones.
    """
    if path.is_file():
        return _open_files([path], is_bin=path.suffix != ".safetensors")
    selection = select_weights(path, any_name=True, stem=stem)
    if selection is None:
        raise InputError(
            f"{path}: no weights found, expected {stem or '*'}.safetensors, or a file of PyTorch "
            f"({', '.join(pattern[1:] for pattern in BIN_PATTERNS)}); {_AGAIN}"
        )
    return _open_selection(path, selection)


def _open_selection(folder: Path, selection: Selection) -> Store:
    weight_map = read_index(selection.index) if selection.index else None
    files = sorted(set(weight_map.values())) if weight_map else list(selection.files)
    warn_of_other_weights(folder, selection, files)
    store = _open_files(files, is_bin=selection.is_bin)
    if selection.index and weight_map:
        _check_index(selection.index, weight_map, store)
    return store


def _open_files(files: list[Path], *, is_bin: bool) -> Store:
    if is_bin:
        from corl_jax.weights.torch_bin import BinStore

        return BinStore(files)
    return open_safetensors(files)


def open_safetensors(files: list[Path]) -> SafetensorsStore:
    """Opens safetensors files as one store.

    Raises: InputError listing the damaged files and the tensors that two files hold.
    """
    infos: dict[str, TensorInfo] = {}
    problems = Problems()
    for file in files:
        with problems.collect():
            tensors = read_header(file)
            problems.add(find_shared_keys(infos, tensors, file))
            infos.update(tensors)
    problems.raise_any()
    return SafetensorsStore(infos)


def find_shared_keys(
    before: Mapping[str, TensorInfo], keys: Iterable[str], file: Path
) -> list[str]:
    """Lists the earlier files that have tensors of the same names as `file`."""
    shared: dict[Path, list[str]] = {}
    for key in keys:
        if key in before:
            shared.setdefault(before[key].file, []).append(key)
    return [
        f"{other.parent}: {other.name} and {file.name} both hold {names[0]}"
        + (f" and {len(names) - 1} more tensors of the same names" if len(names) > 1 else "")
        + "; they are two checkpoints, or two copies of one: keep one of them in the folder, or "
        "give the path of the file itself"
        for other, names in shared.items()
    ]


def _check_index(index: Path, weight_map: dict[str, Path], store: Store) -> None:
    problems = Problems()
    for key, file in weight_map.items():
        if key not in store.infos:
            problems.add(f"{file}: {key} is missing, promised by {index.name}; {_AGAIN}")
        elif store.infos[key].file != file:
            problems.add(f"{index}: {key} is in {store.infos[key].file.name}, not {file.name}")
    for key in store.infos.keys() - weight_map.keys():
        problems.add(f"{store.infos[key].file}: {key} is not listed in {index.name}; {_AGAIN}")
    problems.raise_any()
