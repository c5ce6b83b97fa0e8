"""Computes means over seeds and differences with the same seeds, with their 95% intervals."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class SeedMean:
    """A mean over seeds with its 95% interval."""

    mean: float
    half_width: float | None  # of the interval; None with one seed, which tells of no spread
    num_seeds: int

    @property
    def low(self) -> float:
        """The lower end of the interval; the mean without one."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """The upper end of the interval; the mean without one."""
        return self.mean + (self.half_width or 0.0)


def mean_over_seeds(values: Sequence[float]) -> SeedMean:
    """Returns the mean of at least one value with Student's t-interval: mean +- t s / sqrt(n).

    s is the standard deviation (ddof 1), t the quantile of n - 1 degrees of freedom.
    Source: Student 1908, Biometrika 6:1.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return SeedMean(mean, None, count)
    # Imported here, because help and dry runs do without it.
    from scipy.stats import t

    quantile = float(t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return SeedMean(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> SeedMean | None:
    """Returns the mean of `values - baseline` over the seeds that both have; None without one.

    Both map a seed to a value. What a seed changes in both alike cancels out.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    return mean_over_seeds(differences) if differences else None
