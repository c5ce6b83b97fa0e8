"""Reads and formats estimates: a mean or a rate with its 95% interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

Z_95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float  # equal to the mean if the interval is not known
    high: float
    is_rate: bool  # a fraction of tries, shown in percent

    def format_mean(self) -> str:
        """Returns the mean with few digits; a rate in percent."""
        return f"{format_digits(self.mean, self.is_rate)}{'%' if self.is_rate else ''}"

    def format(self) -> str:
        """Returns the mean with its interval, as 64.3% (60.0 - 68.3) or 0.5 (0.4 - 0.6)."""
        if self.low == self.high == self.mean:
            return self.format_mean()
        low, high = (format_digits(value, self.is_rate) for value in (self.low, self.high))
        # Between numbers with signs a dash would look like one more sign.
        between = "to" if self.low < 0 else "-"
        return f"{self.format_mean()} ({low} {between} {high})"


def read_estimate(line: Mapping[str, Any], name: str) -> Estimate | None:
    """Returns a metric of an evaluation with the interval that the line has; None without value.

    NAME_low and NAME_high are the interval of a rate; NAME_stderr is a standard error.
    """
    numbers = [line.get(name + end) for end in ("", "_low", "_high", "_stderr")]
    mean, low, high, error = (
        float(x) if isinstance(x, int | float) and math.isfinite(x) else None for x in numbers
    )
    if mean is None:
        return None
    if low is not None and high is not None:
        return Estimate(mean, low, high, True)
    half = Z_95 * (error or 0.0)
    return Estimate(mean, mean - half, mean + half, False)


def format_digits(value: float, is_rate: bool, sign: str = "") -> str:
    """Returns a number with few digits; a rate in percent without its sign. `sign`: + shows it."""
    return format(100 * value, f"{sign}.1f") if is_rate else format(value, f"{sign}.3g")
