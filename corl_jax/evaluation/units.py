"""`scores.jsonl`: the scores of an evaluation, a line for each unit that is drawn again.

A unit is what a bootstrap resamples: a prompt with all its images, or a question with all its
rotations. Two evaluations of the same units can be compared in pairs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.input_files import LONE_SURROGATE, has_lone_surrogate

SCORES_FILE = "scores.jsonl"
REPORT_FILE = "report.json"
"""Beside it, with `settings`, and CATEGORY_WEIGHTS if the suite's overall score has weights."""
CATEGORY_WEIGHTS = "category_weights"


@dataclasses.dataclass(frozen=True)
class Unit:
    """The scores of one unit."""

    name: str  # unique in its evaluation, and the same for every model
    category: str
    values: Mapping[str, float]  # by metric; a metric that does not apply is left out


def format_units(units: Iterable[Unit]) -> str:
    """Returns the content of `scores.jsonl`."""
    return "".join(
        json.dumps(
            {"unit": unit.name, "category": unit.category, "values": dict(unit.values)},
            ensure_ascii=False,
        )
        + "\n"
        for unit in units
    )


def read_units(folder: Path) -> list[Unit]:
    """Reads the units of an evaluation folder. Raises: InputError naming the file and the line."""
    path = folder / SCORES_FILE
    try:
        # Not splitlines(): it also splits at characters such as U+2028, which prompts may have.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); expected the --out folder of corl-jax evaluate"
        ) from error
    problems, units = Problems(), []
    for number, line in enumerate(lines, 1):
        with problems.collect(f"{path}:{number}: "):
            units.append(_parse_unit(line))
    names: set[str] = set()
    for unit in units:
        if unit.name in names:
            problems.add(f"{path}: unit {unit.name} stands twice; expected each unit once")
        names.add(unit.name)
    if lines == [""]:
        problems.add(f"{path}: is empty; expected a line for each unit")
    if not problems and not any(unit.values for unit in units):
        problems.add(f"{path}: no unit has a score; expected values of one metric or more")
    problems.raise_any()
    return units


def _parse_unit(line: str) -> Unit:
    expected = 'expected {"unit": TEXT, "category": TEXT, "values": {METRIC: NUMBER}}'
    try:
        row = json.loads(line)
        unit = Unit(
            str(row["unit"]),
            str(row["category"]),
            {str(name): float(value) for name, value in row["values"].items()},
        )
        if any(map(has_lone_surrogate, (unit.name, unit.category, *unit.values))):
            raise ValueError(LONE_SURROGATE)
    except (
        ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise InputError(f"found {line[:80]!r}; {expected}") from error
    return unit


def read_category_weights(report: Mapping[str, Any], path: Path) -> dict[str, float] | None:
    """Returns category -> weight of a report; None if its overall score has no weights.

    Raises: InputError for anything else than finite numbers.
    """
    weights = report.get(CATEGORY_WEIGHTS)
    if weights is None:
        return None
    if not isinstance(weights, dict) or not all(map(_is_finite_number, weights.values())):
        raise InputError(
            f"{path}: {CATEGORY_WEIGHTS} is {str(weights)[:80]}; expected an object with a number "
            "for each category; evaluate again"
        )
    return weights


def _is_finite_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max
