"""Bootstrap intervals: units are drawn again within their strata, such as prompts within tasks.

An array of a stratum has a row for each unit, [units, ...]. A statistic reads a sequence of
resampled strata [draws, units, ...] and returns a value for each draw, [draws].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from corl_jax.errors import InputError

Statistic = Callable[[Sequence[np.ndarray]], np.ndarray]

DRAWS = 10_000
LEVELS = (0.025, 0.975)  # a 95% interval
# Numbers that are resampled at once: 32 MiB of float64, whatever the number of units.
CHUNK_SIZE = 2**22


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The difference of two evaluations of the same units, second minus first."""

    first: float
    second: float
    difference: float
    low: float  # 95% interval of the difference
    high: float
    p_value: float  # two-sided, of the hypothesis that the difference is 0


def average_strata(strata: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the unweighted mean over strata of each stratum's mean over its units."""
    return np.mean([values.mean(axis=1) for values in strata], axis=0)


def average_units(strata: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the mean over the units of all strata."""
    return np.concatenate(list(strata), axis=1).mean(axis=1)


def compute_statistic(strata: Sequence[np.ndarray], statistic: Statistic = average_strata) -> float:
    """Returns the statistic of the strata as they are."""
    return float(statistic([np.asarray(values, np.float64)[None] for values in strata])[0])


def bootstrap_interval(
    strata: Sequence[np.ndarray],
    statistic: Statistic = average_strata,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the 95% percentile interval (low, high) of a statistic.

    Raises: InputError if there is no stratum, a stratum is empty, or a value is not finite.
    """
    strata = _check_strata(strata)
    values = _resample(strata, statistic, draws, seed)
    low, high = np.quantile(values, LEVELS)
    return float(low), float(high)


def paired_bootstrap(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    statistic: Statistic = average_strata,
    draws: int = DRAWS,
    seed: int = 0,
) -> PairedDifference:
    """Compares two evaluations whose rows are the same units in the same order.

    Each draw takes the same units of both. The p-value is twice the share of draws on the other
    side of 0, at most 1; draws that equal 0 count on both sides.

    Raises: InputError as `bootstrap_interval`, or if the shapes differ.
    """
    first, second = _check_strata(first), _check_strata(second)
    shapes = [[values.shape for values in strata] for strata in (first, second)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"paired bootstrap: found strata of shapes {shapes[0]} and {shapes[1]}; expected the "
            "same units in both evaluations"
        )
    # Pairs lie in a second axis, so that one set of draws serves both: [units, 2, ...].
    pairs = [np.stack(pair, axis=1) for pair in zip(first, second, strict=True)]

    def subtract(strata: Sequence[np.ndarray]) -> np.ndarray:
        sides = [statistic([values[:, :, side] for values in strata]) for side in (0, 1)]
        return sides[1] - sides[0]

    differences = _resample(pairs, subtract, draws, seed)
    low, high = np.quantile(differences, LEVELS)
    # One more on both sides of the fraction: a p-value of 0 would claim more than draws can show.
    tails = [(1 + np.sum(side)) / (1 + draws) for side in (differences <= 0, differences >= 0)]
    before, after = (compute_statistic(side, statistic) for side in (first, second))
    p_value = float(min(1.0, 2 * min(tails)))
    return PairedDifference(before, after, after - before, float(low), float(high), p_value)


def _check_strata(strata: Sequence[np.ndarray]) -> list[np.ndarray]:
    arrays = [np.asarray(values, np.float64) for values in strata]
    if not arrays:
        raise InputError("bootstrap: found no strata; expected at least one with a unit")
    for number, values in enumerate(arrays):
        if values.ndim < 1 or not values.size:
            raise InputError(f"bootstrap: stratum {number} is empty; expected at least one unit")
        if not np.isfinite(values).all():
            raise InputError(
                f"bootstrap: stratum {number} holds a value that is not finite; leave such units "
                "out, or give them a score"
            )
    return arrays


def _resample(
    strata: Sequence[np.ndarray], statistic: Statistic, draws: int, seed: int
) -> np.ndarray:
    """Returns the statistic of each draw, [draws]."""
    rng = np.random.default_rng(seed)
    size = sum(values.size for values in strata)
    pieces = [
        statistic(
            [values[rng.integers(len(values), size=(rows, len(values)))] for values in strata]
        )
        for rows in _split_draws(draws, max(1, CHUNK_SIZE // size))
    ]
    return np.concatenate(pieces)


def _split_draws(draws: int, rows: int) -> Iterator[int]:
    # draws = 10, rows = 4 -> 4, 4, 2
    for start in range(0, draws, rows):
        yield min(rows, draws - start)
