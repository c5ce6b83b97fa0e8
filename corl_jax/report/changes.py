"""Compares two estimates: their difference with its 95% interval."""

from __future__ import annotations

import dataclasses
import math

from corl_jax.estimates import Estimate, format_digits


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
        """Returns the difference with its interval, as +41.2 (+35.6 to +46.3); rates in points."""
        mean, low, high = (
            format_digits(value, self.is_rate, "+")
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
