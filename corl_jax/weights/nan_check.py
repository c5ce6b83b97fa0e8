"""Finds NaN and infinite weights while they are read or written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from corl_jax.weights.dtypes import BFLOAT16
from corl_jax.weights.shards import TensorPlan

_BLOCK = 2**20  # values tested at once, so that the masks stay in the processor's cache
_EXPONENTS = {
    BFLOAT16: (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
}
"""Type -> (an integer of its size, the bits that are all set in NaN and infinity)."""


def count_non_finite(array: np.ndarray) -> int:
    """Returns how many values are NaN or infinite; 0 for integers."""
    if array.dtype not in _EXPONENTS:
        floats = np.issubdtype(array.dtype, np.floating)
        return int(array.size - np.isfinite(array).sum()) if floats else 0
    # NumPy's test of 16-bit floats takes some seven times as long.
    kind, exponent = _EXPONENTS[array.dtype]
    # bfloat16 is 1 sign, 8 exponent and 7 mantissa bits: 0x7F80 = 0 11111111 0000000. NaN and
    # infinity have all exponent bits set; their mantissa makes the difference.
    bits = np.ascontiguousarray(array).reshape(-1).view(kind)
    mask = kind(exponent)
    blocks = (bits[start : start + _BLOCK] for start in range(0, bits.size, _BLOCK))
    return sum(int(np.count_nonzero((block & mask) == mask)) for block in blocks)


def check_finite(where: object, path: str, array: np.ndarray) -> list[str]:
    """Returns a problem if a parameter holds NaN or infinity."""
    return describe_non_finite(where, path, count_non_finite(array), array.size)


def describe_non_finite(where: object, path: str, count: int, size: int) -> list[str]:
    """Returns a problem if `count` of a parameter's `size` values are NaN or infinite."""
    if not count:
        return []
    return [
        f"{where}: {path}: {count} of {size} values are NaN or infinite; the file is "
        "damaged, or of a run that diverged: use another checkpoint"
    ]


def check_while_writing(plans: Sequence[TensorPlan]) -> tuple[list[TensorPlan], list[str]]:
    """Returns (plans that count NaN and infinity, a list that gets a line for each such tensor)."""
    lines: list[str] = []

    # Counted on the way to the file, so that no tensor is read twice. The list is complete when all
    # plans are written.
    def count(plan: TensorPlan) -> TensorPlan:
        def count_chunks() -> Iterator[np.ndarray]:
            bad = 0
            for chunk in plan.chunks():
                bad += count_non_finite(chunk)
                yield chunk
            if bad:
                lines.append(
                    f"{plan.key}: {bad} of {math.prod(plan.shape)} values are NaN or infinite; "
                    "written as they are, and refused where weights are loaded"
                )

        return dataclasses.replace(plan, chunks=count_chunks)

    return [count(plan) for plan in plans], lines
