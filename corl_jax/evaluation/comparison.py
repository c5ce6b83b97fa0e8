"""Compares the units of two evaluations in pairs, by metric and category."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from corl_jax.errors import Problems
from corl_jax.evaluation.bootstrap import (
    DRAWS,
    PairedDifference,
    Statistic,
    average_strata,
    average_units,
    paired_bootstrap,
)
from corl_jax.evaluation.units import Unit

MEAN_OF_CATEGORIES, ALL_UNITS, WEIGHTED = "mean of categories", "all units", "weighted mean"
SHOWN_NAMES = 3


@dataclasses.dataclass(frozen=True)
class ComparedScore:
    """A row of a comparison."""

    metric: str
    category: str  # or MEAN_OF_CATEGORIES, ALL_UNITS or WEIGHTED
    units: int
    result: PairedDifference


def compare_units(
    first: Sequence[Unit],
    second: Sequence[Unit],
    draws: int = DRAWS,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
) -> list[ComparedScore]:
    """Compares every metric in every category and overall.

    `weights` are those of the categories in the suite's own overall score, if it has such.
    Raises: InputError if the evaluations have different units, categories or metrics.
    """
    check_same_units(first, second)
    others = {unit.name: unit for unit in second}
    rows = []
    for metric in dict.fromkeys(name for unit in first for name in unit.values):
        pairs: dict[str, list[tuple[float, float]]] = {}
        for unit in first:
            if metric in unit.values:
                pair = unit.values[metric], others[unit.name].values[metric]
                pairs.setdefault(unit.category, []).append(pair)
        strata = {category: np.array(values) for category, values in pairs.items()}
        rows += _compare_metric(metric, strata, draws, seed, weights)
    return rows


def check_same_units(first: Sequence[Unit], second: Sequence[Unit]) -> None:
    """Checks that both have the same units. Raises: InputError counting the others."""
    sides = {unit.name: unit for unit in first}, {unit.name: unit for unit in second}
    problems = Problems()
    for name, here, there in (("A", *sides), ("B", *sides[::-1])):
        missing_names = [unit for unit in there if unit not in here]
        if missing_names:
            problems.add(
                f"{name} lacks {len(missing_names)} of the {len(there)} units of the other: "
                f"{_list_some(missing_names)}; evaluate both on the same rows"
            )
    common = [name for name in sides[0] if name in sides[1]]
    checks: tuple[tuple[str, Callable[[Unit], object]], ...] = (
        ("another category", lambda unit: unit.category),
        ("other metrics", lambda unit: sorted(unit.values)),
    )
    for what, read in checks:
        others = [name for name in common if read(sides[0][name]) != read(sides[1][name])]
        if others:
            values = " and ".join(str(read(side[others[0]])) for side in sides)
            problems.add(
                f"{len(others)} units have {what} in B than in A, such as {others[0]} with "
                f"{values}; evaluate both in the same way"
            )
    problems.raise_any()


def _compare_metric(
    metric: str,
    strata: Mapping[str, np.ndarray],
    draws: int,
    seed: int,
    weights: Mapping[str, float] | None,
) -> list[ComparedScore]:
    """Compares a metric, of which `strata` has the values [units, 2] of each category."""

    def compare(
        category: str, groups: Sequence[np.ndarray], statistic: Statistic = average_strata
    ) -> ComparedScore:
        first, second = ([values[:, side] for values in groups] for side in (0, 1))
        result = paired_bootstrap(first, second, statistic, draws, seed)
        return ComparedScore(metric, category, sum(map(len, groups)), result)

    rows = [compare(category, [values]) for category, values in strata.items()]
    groups = [*strata.values()]
    if len(groups) > 1:
        # With as many units in each category both means are the same number.
        if len({len(values) for values in groups}) > 1:
            rows.append(compare(MEAN_OF_CATEGORIES, groups))
        rows.append(compare(ALL_UNITS, groups, average_units))
    if weights is not None and weights.keys() == strata.keys():
        factors = [weights[category] for category in strata]

        def add_weighted(values: Sequence[np.ndarray]) -> np.ndarray:
            means = [group.mean(axis=1) for group in values]
            return np.sum([f * mean for f, mean in zip(factors, means, strict=True)], axis=0)

        rows.append(compare(WEIGHTED, groups, add_weighted))
    return rows


def format_comparison(rows: Sequence[ComparedScore]) -> str:
    """Returns a table for people, with a block for each metric."""
    names = [f"{row.metric}: {row.category}" for row in rows]
    width = max(map(len, names))
    head = f"{'score':{width}}  units {'A':>9} {'B':>9} {'B - A':>9}   95% interval of B - A"
    lines = [f"{head}        p"]
    for name, row in zip(names, rows, strict=True):
        result = row.result
        numbers = [f"{x:9.4f}" for x in (result.first, result.second)]
        numbers += [f"{x:+9.4f}" for x in (result.difference,)]
        interval = f"{result.low:+.4f} .. {result.high:+.4f}"
        cells = " ".join(numbers)
        lines.append(f"{name:{width}} {row.units:6} {cells}   {interval:22} {result.p_value:8.4f}")
    return "\n".join(lines)


def _list_some(names: Sequence[str]) -> str:
    """Returns the first names."""
    text = ", ".join(repr(name) for name in names[:SHOWN_NAMES])
    return text if len(names) <= SHOWN_NAMES else f"{text}, .."
