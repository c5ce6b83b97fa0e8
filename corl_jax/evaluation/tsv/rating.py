"""The result of rating a data set's answers, and what all ratings share."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from corl_jax.evaluation.bootstrap import Statistic, bootstrap_interval
from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.matching.matchers import DEFAULT_MATCHER, MATCHERS, Matcher
from corl_jax.evaluation.tsv.table import Values
from corl_jax.evaluation.units import Unit

OVERALL = "Overall"
NO_SPLIT = "none"
PER_CENT = 100.0


@dataclasses.dataclass(frozen=True)
class RatingOptions:
    """The choices that a rating depends on."""

    matcher_name: str = DEFAULT_MATCHER
    guess_seed: int | None = None  # of MMMU's random guesses; None counts them as wrong

    @property
    def matcher(self) -> Matcher:
        """The rules that read a choice."""
        return MATCHERS[self.matcher_name]


@dataclasses.dataclass(frozen=True)
class Score:
    """A score that is no rate, on the harness's scale, with its 95% bootstrap interval."""

    value: float
    low: float
    high: float
    n: int  # units


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How the rules read one answer."""

    index: Any
    extracted: str | None  # None: no rule reads it
    correct: bool


@dataclasses.dataclass
class Rating:
    """The rating of a data set's answers."""

    # As the harness prints it: a dict for each row of its table, with its names and scales.
    table: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rates: dict[str, Rate] = dataclasses.field(default_factory=dict)
    scores: dict[str, Score] = dataclasses.field(default_factory=dict)
    units: list[Unit] = dataclasses.field(default_factory=list)
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    is_final: bool = True  # False: a judge has to rate the rest

    @property
    def unread(self) -> list[Any]:
        """The indices of the answers that no rule reads."""
        return [verdict.index for verdict in self.verdicts if verdict.extracted is None]


Rater = Callable[[Sequence[Values], RatingOptions], Rating]
"""(rows with `prediction`, options) -> their rating."""


def group_rows(rows: Sequence[Values], column: str) -> dict[str, list[int]]:
    """Returns the numbers of the rows of each value of a column, in the order of the values.

    Rows without a value are in no group.
    """
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row.get(column) is not None:
            groups.setdefault(str(row[column]), []).append(number)
    return dict(sorted(groups.items()))


def has_column(rows: Sequence[Values], column: str) -> bool:
    """Returns whether the rows have a column, filled or not."""
    return bool(rows) and column in rows[0]


def rate_hits(hits: Sequence[bool]) -> Rate:
    """Returns the rate of hits."""
    return Rate.of(sum(map(bool, hits)), len(hits))


def average(hits: Sequence[Any]) -> float:
    """Returns a mean; NaN of nothing, as the harness."""
    return sum(hits) / len(hits) if hits else math.nan


def score_strata(value: float, strata: Sequence[np.ndarray], statistic: Statistic) -> Score:
    """Returns a value with the bootstrap interval of its statistic over units within strata."""
    low, high = bootstrap_interval(strata, statistic)
    return Score(float(value), low, high, sum(map(len, strata)))


def describe_missing_answers(rows: Sequence[Values]) -> list[str]:
    """Returns a note if some rows state no answer, which then counts as wrong."""
    missing = Counter(row.get("answer") is None for row in rows)[True]
    return [f"{missing} of {len(rows)} rows state no answer and count as wrong"] if missing else []


def make_units(rows: Sequence[Values], values: Sequence[Mapping[str, float]]) -> list[Unit]:
    """Returns a unit for each row, named by its index, in its category."""
    return [
        Unit(str(row["index"]), str(row.get("category") or row.get("split") or NO_SPLIT), scores)
        for row, scores in zip(rows, values, strict=True)
    ]
