"""Weights that are no numbers, found while they are read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from corl_jax.weights.dtypes import BFLOAT16
from corl_jax.weights.shards import TensorPlan

_BLOCK = 2**20  # values looked at at once, so that the masks stay in the processor's cache
_EXPONENTS = {
    BFLOAT16: (np.uint16, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7C00),
}
"""Type -> (an integer of its size, the bits that are all set in NaN and infinity)."""


def count_non_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite; 0 for integers."""
    if array.dtype not in _EXPONENTS:
        floats = np.issubdtype(array.dtype, np.floating)
        return int(array.size - np.isfinite(array).sum()) if floats else 0
    # NumPy's own test of 16 bits takes some seven times as long.
    kind, exponent = _EXPONENTS[array.dtype]
    bits = np.ascontiguousarray(array).reshape(-1).view(kind)
    mask = kind(exponent)
    blocks = (bits[start : start + _BLOCK] for start in range(0, bits.size, _BLOCK))
    return sum(int(np.count_nonzero((block & mask) == mask)) for block in blocks)


def check_finite(where: object, path: str, array: np.ndarray) -> list[str]:
    """A line if a parameter holds values that are no numbers."""
    count = count_non_finite(array)
    if not count:
        return []
    return [
        f"{where}: {path}: {count} of {array.size} values are NaN or infinite; the file is "
        "damaged, or of a run that diverged: use another checkpoint"
    ]


def check_while_writing(plans: Sequence[TensorPlan]) -> tuple[list[TensorPlan], list[str]]:
    """(the same plans, a line for each tensor that held NaN or infinity, once it is written)."""
    lines: list[str] = []

    def one(plan: TensorPlan) -> TensorPlan:
        def chunks() -> Iterator[np.ndarray]:
            count = 0
            for chunk in plan.chunks():
                count += count_non_finite(chunk)
                yield chunk
            if count:
                lines.append(
                    f"{plan.key}: {count} of {math.prod(plan.shape)} values are NaN or infinite; "
                    "written as they are, and refused where weights are loaded"
                )

        return dataclasses.replace(plan, chunks=chunks)

    return [one(plan) for plan in plans], lines
