"""Summarises GenEval 2 from the scores that its evaluation.py wrote.

    corl-jax evaluate --suite geneval2-score --results score_lists.json
        --data geneval2_data.jsonl [--method auto|soft_tifa|tifa|vqascore] [--drawn DIR] [--out DIR]

Prints Soft-TIFA GM and AM (or TIFA, or VQAScore), the means by skill and by number of atoms, in
per cent, with 95% intervals (bootstrap of prompts). --out writes report.json and scores.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from corl_jax.errors import Problems
from corl_jax.evaluate.reports import add_report_options, check_report_options, write_scores
from corl_jax.input_files import parse_path

GUESSED = "auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    from corl_jax.evaluation.soft_tifa import METHODS

    add = parser.add_argument
    add("--results", type=parse_path, required=True, metavar="FILE",
        help="the --output_file of GenEval 2's evaluation.py")  # fmt: skip
    add("--data", type=parse_path, required=True, metavar="FILE", help="geneval2_data.jsonl")
    add("--method", choices=(GUESSED, *METHODS), default=GUESSED,
        help="method of the scores (default: read from their form)")  # fmt: skip
    add_report_options(parser)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, and prints the summary."""
    from corl_jax.evaluation import soft_tifa
    from corl_jax.evaluation.scores import format_scores

    problems = Problems()
    drawing = problems.attempt(check_report_options, args) or {}
    prompts = problems.attempt(soft_tifa.read_prompts, args.data) or []
    lists = problems.attempt(soft_tifa.read_score_lists, args.results, prompts) if prompts else []
    problems.raise_any()
    assert lists is not None  # otherwise there was a problem
    method = soft_tifa.guess_method(lists, prompts) if args.method == GUESSED else args.method
    scores = soft_tifa.summarize_lists(lists, prompts, method)
    print(f"method: {method}, {len(prompts)} prompts, in per cent\n{format_scores(scores)}")
    warnings = []
    if len(prompts) != soft_tifa.PROMPTS:
        warnings.append(f"{len(prompts)} prompts; GenEval 2 has {soft_tifa.PROMPTS}")
    sys.stderr.writelines(f"warning: {line}\n" for line in warnings)
    settings = {
        "suite": args.suite,
        "results": str(args.results),
        "data": str(args.data),
        "method": method,
    }
    content = {
        "scores": {name: dataclasses.asdict(score) for name, score in scores.items()},
        "warnings": warnings,
    }
    units = soft_tifa.make_units(lists, prompts, method)
    write_scores(args.out, drawing | settings, content, units)
