"""Computes rates with their 95% intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from corl_jax.estimates import Z_95


@dataclasses.dataclass(frozen=True)
class Rate:
    """The fraction of successes in `n` tries and its 95% Wilson interval.

    Without tries the mean is NaN and the interval [0, 1].
    Source: Wilson 1927, JASA 22:209.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: int, n: int) -> Rate:
        """Returns the rate of `hits` successes in `n` tries."""
        if not n:
            return cls(math.nan, 0.0, 1.0, 0)
        # mean +- 1.96 standard errors would leave [0, 1], and would have no width without misses.
        mean, shrink = hits / n, 1 + Z_95**2 / n
        center = (mean + Z_95**2 / (2 * n)) / shrink
        half = Z_95 * math.sqrt(mean * (1 - mean) / n + Z_95**2 / (4 * n**2)) / shrink
        # Without hits, or with hits only, the interval ends exactly at 0 or 1. Rounding may miss.
        low = 0.0 if hits == 0 else max(center - half, 0.0)
        high = 1.0 if hits == n else min(center + half, 1.0)
        return cls(mean, low, high, n)


def format_rates(rates: Mapping[str, Rate]) -> str:
    """Returns a table for people: one line a rate, in per cent."""
    width = max(map(len, rates))
    lines = [f"{'metric':{width}}     mean   95% interval      n"]
    for name, rate in rates.items():
        mean = f"{100 * rate.mean:6.1f} %" if rate.n else f"{'-':>8}"
        interval = f"{100 * rate.low:5.1f} .. {100 * rate.high:5.1f}" if rate.n else f"{'-':>14}"
        lines.append(f"{name:{width}} {mean} {interval} {rate.n:6}")
    return "\n".join(lines)
