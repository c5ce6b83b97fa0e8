"""Estimates with their 95% intervals, and the interval of a difference of two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

Z_95 = 1.96


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float  # equal to the mean if the interval is not known
    high: float
    is_rate: bool  # a fraction of tries, shown in percent

    def format_mean(self) -> str:
        """Returns the mean with few digits; a rate in percent."""
        return f"{_format_digits(self.mean, self.is_rate)}{'%' if self.is_rate else ''}"

    def format(self) -> str:
        """Returns the mean with its interval, as 64.3% (60.0 to 68.3)."""
        if self.low == self.high == self.mean:
            return self.format_mean()
        low, high = (_format_digits(value, self.is_rate) for value in (self.low, self.high))
        return f"{self.format_mean()} ({low} to {high})"


@dataclasses.dataclass(frozen=True)
class Change:
    """The difference of two estimates with its 95% interval."""

    difference: float
    low: float
    high: float
    is_rate: bool

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval does not contain 0, else `same`."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "same"

    def format(self) -> str:
        """Returns the difference with its interval, as +41.2 (35.6 to 46.3); rates in points."""
        mean, low, high = (
            _format_digits(value, self.is_rate, "+")
            for value in (self.difference, self.low, self.high)
        )
        return f"{mean} ({low} to {high})"


def compare(first: Estimate, last: Estimate) -> Change:
    """Returns the change from one estimate to another, as if they were independent.

    Two evaluations of the same rows are not independent: the interval is then rather too wide.
    Source: Newcombe 1998, Statistics in Medicine 17:873, method 10.
    """
    difference = last.mean - first.mean
    # The side of each interval that lies in the direction of a smaller or larger difference.
    below = math.hypot(last.mean - last.low, first.high - first.mean)
    above = math.hypot(last.high - last.mean, first.mean - first.low)
    return Change(difference, difference - below, difference + above, last.is_rate)


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


def _format_digits(value: float, is_rate: bool, sign: str = "") -> str:
    return format(100 * value, f"{sign}.1f") if is_rate else format(value, f"{sign}.3g")
