"""The rules of a merge: how the moves of several models become one tensor.

The move d_k of model k is its tensor minus the tensor of the base, in float32. A rule sees one
tensor of the PyTorch model at a time, such as the q projection of one layer. It gets the tensor
block by block, and before that the `Limits` that need all of its values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

TRIM_DENSITY = 0.2
"""The share of a tensor's moves that `ties` keeps, the largest ones. Source: arXiv 2306.01708."""


class MoveSums:
    """Mean, standard deviation and norm of one model's moves in a tensor, from its blocks."""

    def __init__(self) -> None:
        self.count, self.mean = 0, 0.0
        self._deviations = 0.0  # sum of (d - mean)^2

    def add_block(self, move: np.ndarray) -> None:
        """Adds a block. The sums are float64, because float32 loses the mean of tiny moves."""
        wide = move.astype(np.float64)
        mean, count = float(wide.mean()), self.count + wide.size
        gap = mean - self.mean
        # Source: Chan et al. 1979, the update of a variance by a second sample. A difference of two
        # large sums of squares would cancel.
        self._deviations += float(np.square(wide - mean).sum())
        self._deviations += gap * gap * self.count * wide.size / count
        self.mean += gap * wide.size / count
        self.count = count

    @property
    def squares(self) -> float:
        """The sum of the squares of the moves."""
        return self._deviations + self.count * self.mean * self.mean

    @property
    def std(self) -> float:
        """The unbiased standard deviation; NaN for a single value, as in PyTorch."""
        return math.sqrt(self._deviations / (self.count - 1)) if self.count > 1 else math.nan

    @property
    def norm(self) -> float:
        """The Euclidean norm of the moves."""
        return math.sqrt(self.squares)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Values of a whole tensor that a rule compares its moves with."""

    low: float = math.nan  # gaussian: a move between both, values of float32, is inside
    high: float = math.nan
    smallest: tuple[float, ...] = ()  # ties: the smallest magnitude that is kept, for each model


Combine = Callable[
    [np.ndarray, Sequence[np.ndarray], Limits, float], tuple[np.ndarray, list[int] | None]
]
"""(base, moves, limits, lambda) -> (merged block, number of the moves of each model that `share`
names)."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of RULES."""

    combine: Combine
    models: int | None = None  # the number of models; None: two or more
    factor: float | None = None  # default of lambda; None: the rule does not read it
    share: str | None = None  # the moves that `combine` counts
    has_range: bool = False  # reads Limits.low and high
    trims: bool = False  # reads Limits.smallest


def find_range(sums: Sequence[MoveSums], factor: float) -> Limits:
    """Returns the range of the moves that count as small: mu -+ lambda sigma.

    mu = (mean d_1 + mean d_2) / 2; sigma = min(std d_1, std d_2), unbiased.
    Source: `weight_merging_gaussian` of the released code, `utils.py`; arXiv 2501.10661.
    """
    means = [np.float32(values.mean) for values in sums]
    mu = sum(means, np.float32(0)) / np.float32(len(means))
    width = np.float32(factor) * np.float32(min(values.std for values in sums))
    return Limits(low=float(mu - width), high=float(mu + width))


def find_smallest_kept(magnitudes: np.ndarray) -> float:
    """Returns the smallest of the TRIM_DENSITY largest values; reorders the flat array."""
    count = max(1, round(TRIM_DENSITY * magnitudes.size))
    place = magnitudes.size - count
    magnitudes.partition(place)
    return float(magnitudes[place])


def combine_gaussian(
    base: np.ndarray, moves: Sequence[np.ndarray], limits: Limits, factor: float
) -> tuple[np.ndarray, list[int]]:
    """Adds the moves outside of the range whole, and half of those inside. Counts those outside.

    base + sum_k d_k [not inside_k] + 0.5 sum_k d_k [inside_k]; inside_k = low < d_k < high.
    Source: as `find_range`.
    """
    # Strict: a range without width holds nothing, so the move of a single model is not halved. NaN
    # of a tensor with one value compares false, so its moves count as outside too.
    inside = [(limits.low < move) & (move < limits.high) for move in moves]
    large = [np.where(mask, np.float32(0), move) for mask, move in zip(inside, moves, strict=True)]
    small = [np.where(mask, move, np.float32(0)) for mask, move in zip(inside, moves, strict=True)]
    merged = base + _add_up(large) + np.float32(0.5) * _add_up(small)
    return merged, [int(mask.size - np.count_nonzero(mask)) for mask in inside]


def combine_mean(
    base: np.ndarray, moves: Sequence[np.ndarray], limits: Limits, factor: float
) -> tuple[np.ndarray, None]:
    """Adds the mean of the moves."""
    return base + _add_up(moves) / np.float32(len(moves)), None


def combine_sum(
    base: np.ndarray, moves: Sequence[np.ndarray], limits: Limits, factor: float
) -> tuple[np.ndarray, None]:
    """Adds all moves. Source: task arithmetic, arXiv 2212.04089, with a factor of 1."""
    return base + _add_up(moves), None


def combine_ties(
    base: np.ndarray, moves: Sequence[np.ndarray], limits: Limits, factor: float
) -> tuple[np.ndarray, list[int]]:
    """Adds lambda times the mean of the kept moves that have the elected sign. Counts these.

    A model's smaller moves are set to 0. The sign of the sum of the rest is elected, and moves of
    the other sign are left out of the mean.
    Source: arXiv 2306.01708, algorithm 1; trimmed in each tensor and not in the whole model.
    """
    trimmed = [
        np.where(np.abs(move) >= np.float32(smallest), move, np.float32(0))
        for move, smallest in zip(moves, limits.smallest, strict=True)
    ]
    sign = np.sign(_add_up(trimmed))
    # A move of 0 is in no mean, and no move is where the elected sign is 0.
    used = [move * sign > 0 for move in trimmed]
    total = _add_up(
        [np.where(mask, move, np.float32(0)) for mask, move in zip(used, trimmed, strict=True)]
    )
    number = _add_up(used)
    merged = base + np.float32(factor) * (total / np.maximum(number, np.float32(1)))
    return merged, [int(np.count_nonzero(mask)) for mask in used]


def _add_up(arrays: Sequence[np.ndarray]) -> np.ndarray:
    total = arrays[0].astype(np.float32)
    for array in arrays[1:]:
        total += array
    return total


RULES: dict[str, Rule] = {
    "gaussian": Rule(combine_gaussian, models=2, factor=2.0, share="outside", has_range=True),
    "mean": Rule(combine_mean),
    "sum": Rule(combine_sum),
    "ties": Rule(combine_ties, factor=1.0, share="used", trims=True),
}
"""Every rule of a merge, by name."""
DEFAULT_RULE = "gaussian"
"""The rule of the released code."""
