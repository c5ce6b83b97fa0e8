"""Scores WISE from a judge's scores or texts.

    corl-jax evaluate --suite wise-score --results FILE [FILE ...]
        [--version verified|legacy] [--drawn DIR] [--out DIR]

Each FILE is a scores file (*.jsonl) or the full results (*.json, with the judge's texts) of the
official scripts; give those of all three groups. Prints the score of each category with its 95%
interval (bootstrap of prompts), and the weighted overall score if none of the 1,000 ids is
missing. --out writes report.json and scores.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from corl_jax.errors import Problems, shorten
from corl_jax.evaluate.reports import add_report_options, check_report_options, write_scores
from corl_jax.input_files import parse_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    from corl_jax.evaluation.wise_rules import VERSIONS

    add = parser.add_argument
    add("--results", type=parse_path, required=True, nargs="+", metavar="FILE",
        help="scores or full results of the official scripts")  # fmt: skip
    add("--version", choices=[*VERSIONS], default="verified",
        help="verified: since April 2026; legacy: before (default %(default)s)")  # fmt: skip
    add_report_options(parser)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, and prints the scores."""
    from corl_jax.evaluation import wise_rules
    from corl_jax.evaluation.scores import format_scores

    problems = Problems()
    drawing = problems.attempt(check_report_options, args) or {}
    read_result = problems.attempt(wise_rules.read_scores, args.results, args.version)
    problems.raise_any()
    assert read_result is not None  # otherwise there was a problem
    samples, warnings = read_result
    if not samples:
        problems.add(f"{args.results[0]}: no text states a score; is --version right?")
    problems.raise_any()
    scores = wise_rules.summarize_samples(samples, args.version)
    print(f"WISE {args.version}, {len(samples)} prompts\n{format_scores(scores)}")
    missing_ids = wise_rules.find_missing_ids(samples)
    if missing_ids:
        some = ", ".join(map(str, missing_ids[:5]))
        warnings.append(
            f"no overall score: {len(missing_ids)} of the {wise_rules.PROMPTS} ids are missing, "
            f"such as {some}; give the files of all three groups, and judge these again"
        )
    sys.stderr.writelines(f"warning: {line}\n" for line in shorten(warnings, what="warnings"))
    settings = {
        "suite": args.suite,
        "version": args.version,
        "results": [str(path) for path in args.results],
    }
    content = {
        "scores": {name: dataclasses.asdict(score) for name, score in scores.items()},
        "category_weights": dict(wise_rules.VERSIONS[args.version].weights),
        "missing_ids": missing_ids,
        "warnings": warnings,
    }
    units = wise_rules.make_units(samples, args.version)
    write_scores(args.out, drawing | settings, content, units)
