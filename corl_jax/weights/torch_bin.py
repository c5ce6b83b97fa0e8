"""Reads PyTorch's own files (`.bin`, `.pth`, `.pt`); no other module needs torch.

Files are memory-mapped. Legacy files, of PyTorch before 1.6, can only be read whole.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.errors import InputError, Problems
from corl_jax.input_files import describe_lfs_pointer, is_lfs_pointer
from corl_jax.weights.dtypes import BFLOAT16, parse_dtype
from corl_jax.weights.storage import Box, TensorInfo, find_bad_names, find_shared_keys

_AGAIN = "download or copy it again"
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
ZIP_START = b"PK\x03\x04"
MAX_LEGACY_BYTES = 4 * 2**30
MAX_PICKLE_BYTES = 2**25  # of the names and shapes; unpickled, they take up to 60 times as much
_DTYPES = {
    *("float64", "float32", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
}


def import_torch(file: Path) -> Any:
    """Imports PyTorch to read a file. Raises: InputError if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{file}: a PyTorch file needs PyTorch, which is not installed; install it "
            "(`pip install torch`), or use a safetensors checkpoint"
        ) from error
    return torch


class BinStore:
    """The tensors of one or more PyTorch files."""

    # One file is open at a time: the pages of a mapped file count as memory of the process.
    concurrent = False

    def __init__(self, files: list[Path]):
        self.infos: dict[str, TensorInfo] = {}
        self._open: tuple[Path, dict[str, Any]] | None = None
        problems = Problems()
        for file in files:
            tensors = problems.attempt(self._load_tensors, file) or {}
            problems.add(find_shared_keys(self.infos, tensors, file))
            for key, tensor in tensors.items():
                name = str(tensor.dtype).removeprefix("torch.")
                if name not in _DTYPES:
                    problems.add(f"{file}: {key} is {name}, which is not supported")
                    continue
                self.infos[key] = TensorInfo(tuple(tensor.shape), parse_dtype(name), file)
        problems.raise_any()

    def read(self, key: str, box: Box | None = None) -> np.ndarray:
        tensor = self._load_tensors(self.infos[key].file)[key]
        tensor = tensor if box is None else tensor[tuple(slice(*ends) for ends in box)]
        return to_numpy(tensor).copy()

    def _load_tensors(self, file: Path) -> dict[str, Any]:
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = (file, load_bin(file))
        return self._open[1]

    def close(self) -> None:
        self._open = None


def to_numpy(tensor: Any) -> np.ndarray:
    """Returns a view as a NumPy array."""
    torch = import_torch(Path("a tensor"))
    if tensor.dtype == torch.bfloat16:  # `numpy()` raises for it
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return tensor.contiguous().numpy()


def to_torch(array: np.ndarray) -> Any:
    """Inverts `to_numpy`."""
    torch = import_torch(Path("a tensor"))
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def load_bin(file: Path) -> dict[str, Any]:
    """Loads {key: tensor} from a PyTorch file, or from the `state_dict` of a training checkpoint.

    Raises: InputError for another kind of file, or a compressed archive, or a large legacy file.
        Also for values that are not plain tensors, and tensors that exceed their storage.
    """
    if is_lfs_pointer(file):
        raise InputError(describe_lfs_pointer(file))
    torch = import_torch(file)
    legacy = _is_legacy(file)
    try:
        # weights_only: the unpickler accepts tensors and plain containers, and runs no code.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=not legacy)
    except Exception as error:  # a damaged pickle can raise any error
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{file}: PyTorch cannot load it ({line}); {_AGAIN}") from error
    return _check_state(file, state)


def _is_legacy(file: Path) -> bool:
    """Returns True for a legacy file, False for an archive; else raises InputError."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LEGACY_START))
            size = stream.seek(0, os.SEEK_END)
        legacy = start == LEGACY_START
        # An archive may hide behind another kind of file, as which PyTorch would read it.
        if not legacy and not start.startswith(ZIP_START):
            raise ValueError(f"it starts with {start[:8]!r}")
        entries = [] if legacy else _list_entries(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); {_AGAIN}") from error
    except Exception as error:  # zipfile raises several kinds for a damaged archive
        raise InputError(f"{file}: is not a whole PyTorch file ({error}); {_AGAIN}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{file}: is a compressed archive; PyTorch does not write those")
    # An entry's size bounds the memory it can take; overlapping entries would multiply it.
    if sum(entry.file_size for entry in entries) > size:
        raise InputError(f"{file}: its entries overlap: they claim more than its {size} bytes")
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise InputError(
                f"{file}: {entry.filename} has {entry.file_size} bytes, expected at most "
                f"{MAX_PICKLE_BYTES}: it holds names and shapes; save the tensors alone again"
            )
    if legacy and size > MAX_LEGACY_BYTES:
        raise InputError(
            f"{file}: {size} bytes in the format of PyTorch before 1.6, which must be read whole; "
            f"expected at most {MAX_LEGACY_BYTES}; load and save it again with a newer PyTorch"
        )
    return legacy


def _list_entries(file: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(file) as archive:
        return archive.infolist()


def _check_state(file: Path, state: Any) -> dict[str, Any]:
    torch = import_torch(file)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise InputError(f"{file}: holds a {type(state).__name__}, expected a dict of tensors")
    problems = find_bad_names(file, (key for key in state if isinstance(key, str)))
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            problems.append(f"{file}: {key!r} is a {type(value).__name__}, expected a tensor")
        elif value.layout != torch.strided or value.is_quantized:
            problems.append(f"{file}: {key} is sparse or quantised, expected a plain tensor")
        # A stride of 0 makes a huge tensor from a few bytes.
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            problems.append(f"{file}: {key} claims more elements than its storage holds")
    if problems:
        raise InputError(problems)
    return dict(state)
