"""Element types by name, as safetensors, PyTorch and NumPy call them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DType = Literal["keep", "float32", "bfloat16"]
"""Element type of an output; `keep` writes each tensor in its stored type."""

SAFETENSORS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


def to_safetensors_name(dtype: np.dtype) -> str:
    """Returns the name in a safetensors header. Raises: KeyError for an unsupported dtype."""
    return _NAMES[np.dtype(dtype)]


def is_float(dtype: np.dtype) -> bool:
    """Returns whether a dtype is a floating-point one."""
    # By name, because NumPy does not count bfloat16 and the 8-bit types as floating.
    return _NAMES.get(np.dtype(dtype)) in _FLOATS


def parse_dtype(name: str) -> np.dtype:
    """Returns the dtype of a name such as 'bfloat16' or 'float32'."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def find_common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Returns the narrowest dtype that holds every value of these dtypes exactly."""
    kinds = list(dict.fromkeys(np.dtype(dtype) for dtype in dtypes))
    out = kinds[0]
    for kind in kinds[1:]:
        try:
            out = np.promote_types(out, kind)
        except TypeError:
            # NumPy finds no common type of two small floats neither of which holds the other,
            # such as bfloat16 and float16; float32 holds every float of up to 16 bits.
            out = np.dtype(np.float32)
    return out
