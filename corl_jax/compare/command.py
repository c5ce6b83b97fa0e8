"""Runs `corl-jax compare`: reads both folders, checks that they fit, and prints the differences."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.evaluation.comparison import ComparedScore, compare_units, format_comparison
from corl_jax.evaluation.units import REPORT_FILE, read_category_weights, read_units
from corl_jax.input_files import read_text

SUITE = "suite"
# With other values of these the pairs would not be pairs: other noise, rows or rules of the score.
SHARED_SETTINGS = (
    SUITE, "seed", "prompts_sha256", "world", "images_per_prompt", "prompt_style", "matcher",
    "max_overlap", "method", "version", "score", "data_sha256", "answer_tag", "judge",
)  # fmt: skip


def run_compare(args: argparse.Namespace) -> None:
    """Prints the comparison. Raises: InputError listing why the folders cannot be compared."""
    problems = Problems()
    folders = (args.first, args.second)
    reports = [problems.attempt(read_report, folder) for folder in folders]
    units = [problems.attempt(read_units, folder) for folder in folders]
    problems.raise_any()
    first, second = (report["settings"] for report in reports if report is not None)
    problems.add(find_setting_problems(first, second))
    problems.raise_any()
    weights = read_category_weights(reports[0] or {}, args.first / REPORT_FILE)
    rows = compare_units(units[0] or [], units[1] or [], args.draws, args.seed, weights)
    differing = find_other_differences(first, second)
    if args.json:
        print(json.dumps(make_json(args, first, differing, rows), indent=1, ensure_ascii=False))
        return
    print(f"suite {first.get(SUITE)}; A {args.first}, B {args.second}")
    print(format_comparison(rows))
    for name, (before, after) in differing.items():
        print(f"note: {name}: A {before}, B {after}", file=sys.stderr)


def read_report(folder: Path) -> dict[str, Any]:
    """Returns the report of an evaluation with its settings. Raises: InputError if it has none."""
    path = folder / REPORT_FILE
    expected = "the report of corl-jax evaluate --out, an object with `settings`"
    text = read_text(path, expected)
    try:
        report = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected {expected}") from None
    if not isinstance(report, dict) or not isinstance(report.get("settings"), dict):
        raise InputError(f"{path}: found no settings; expected {expected}")
    return report


def find_setting_problems(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Returns a problem for each setting with which units are no pairs."""
    # Other suites have other settings, which say no more.
    names = SHARED_SETTINGS if first.get(SUITE) == second.get(SUITE) else (SUITE,)
    return [
        f"setting {name}: A has {first.get(name)}, B has {second.get(name)}; expected the same, as "
        "pairs need the same suite, noise and rules"
        for name in names
        if first.get(name) != second.get(name)
    ]


def find_other_differences(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns name -> both values of each other setting that differs."""
    names = dict.fromkeys([*first, *second])
    pairs = {name: (first.get(name), second.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def make_json(
    args: argparse.Namespace,
    settings: Mapping[str, Any],
    differing: Mapping[str, tuple[Any, Any]],
    rows: list[ComparedScore],
) -> dict[str, Any]:
    """Returns the comparison as plain values."""
    return {
        "first": str(args.first),
        "second": str(args.second),
        "suite": settings.get(SUITE),
        "draws": args.draws,
        "seed": args.seed,
        "different_settings": {name: list(pair) for name, pair in differing.items()},
        "scores": [
            {
                "metric": row.metric,
                "category": row.category,
                "units": row.units,
                **dataclasses.asdict(row.result),
            }
            for row in rows
        ],
    }
