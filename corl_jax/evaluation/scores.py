"""Scores with bootstrap intervals over units, and their table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from corl_jax.evaluation.bootstrap import (
    Statistic,
    average_strata,
    bootstrap_interval,
    compute_statistic,
)


@dataclasses.dataclass(frozen=True)
class Score:
    """A score with its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, strata: Sequence[np.ndarray], statistic: Statistic = average_strata) -> Score:
        """Returns the statistic of units in strata, with its bootstrap interval."""
        return cls(compute_statistic(strata, statistic), *bootstrap_interval(strata, statistic))

    def times(self, factor: float) -> Score:
        """Returns the score in another unit, such as per cent."""
        return Score(factor * self.mean, factor * self.low, factor * self.high)


def format_scores(scores: Mapping[str, Score], decimals: int = 2) -> str:
    """Returns a table for people: one line a score."""
    width = max(map(len, scores), default=0)
    lines = [f"{'score':{width}}     mean   95% interval"]
    for name, score in scores.items():
        numbers = [f"{value:.{decimals}f}" for value in (score.mean, score.low, score.high)]
        lines.append(f"{name:{width}} {numbers[0]:>8}   {numbers[1]} .. {numbers[2]}")
    return "\n".join(lines)
