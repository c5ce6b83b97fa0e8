"""Scores DPG-Bench from a judge's answers.

    corl-jax evaluate --suite dpg-score --results FILE --csv dpg_bench.csv
        [--first-row-bug | --no-first-row-bug] [--images-per-prompt 4] [--drawn DIR] [--out DIR]

FILE is the *_detail.txt that the official script writes beside its results, or JSON lines with
`{"item_id": .., "answers": {NUMBER: ANSWER, ..}}` for each picture. Prints the score as the
official script computes it (it drops the first question of the first prompt, and takes
categories from the last picture before parents count) and corrected, with 95% intervals
(bootstrap of prompts). --first-row-bug, the default, makes the first the score of the report.
--out writes report.json and scores.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from corl_jax.errors import Problems
from corl_jax.evaluate.reports import add_report_options, check_report_options, write_scores
from corl_jax.input_files import parse_path

RELEASED, CORRECTED = "as released", "corrected"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    add = parser.add_argument
    add("--results", type=parse_path, required=True, metavar="FILE", help="the judge's answers")
    add("--csv", type=parse_path, required=True, metavar="FILE", help="dpg_bench.csv")
    add("--first-row-bug", action=argparse.BooleanOptionalAction, default=True,
        help="leave out the first question, as the official script does")  # fmt: skip
    add("--images-per-prompt", type=int, default=4, metavar="N",
        help="pictures that each prompt should have (default %(default)s)")  # fmt: skip
    add_report_options(parser)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, and prints and writes the scores."""
    from corl_jax.evaluation.dpg_rules import make_units

    drawing, answers, tables = score_answers(args)
    chosen = RELEASED if args.first_row_bug else CORRECTED
    report = summarize_tables(tables, chosen)
    report["warnings"] = list_warnings(answers, tables, args.images_per_prompt)
    sys.stderr.writelines(f"warning: {line}\n" for line in report["warnings"])
    settings = {
        "suite": args.suite,
        "results": str(args.results),
        "csv": str(args.csv),
        "score": chosen,
    }
    units = make_units(tables[chosen][0])
    write_scores(args.out, drawing | settings, report, units)


def score_answers(
    args: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the settings of the drawn images, the answers, and the tables of scores.

    The tables have the scored and the failed prompts of both ways to compute scores.

    Raises: InputError listing all problems of the options and the files.
    """
    from corl_jax.evaluation import dpg_rules

    problems = Problems()
    if args.images_per_prompt < 1:
        problems.add(f"--images-per-prompt: found {args.images_per_prompt}; expected at least 1")
    drawing = problems.attempt(check_report_options, args)
    questions = problems.attempt(dpg_rules.read_questions, args.csv)
    answers = None
    if questions:
        answers = problems.attempt(dpg_rules.read_answers, args.results, questions)
    problems.raise_any()
    assert questions and answers  # otherwise there was a problem
    shortened = dpg_rules.read_questions(args.csv, drop_first=True)
    tables = {
        RELEASED: dpg_rules.score_prompts(answers, shortened),
        CORRECTED: dpg_rules.score_prompts(answers, questions),
    }
    scored, failed = tables[RELEASED if args.first_row_bug else CORRECTED]
    if not scored:
        item, reason = next(iter(failed.items()))
        problems.add(f"{args.results}: no prompt can be scored; {item} {reason}")
    problems.raise_any()
    return drawing or {}, answers, tables


def summarize_tables(tables: dict[str, Any], chosen: str) -> dict[str, Any]:
    """Prints the scores and returns them for the report."""
    from corl_jax.evaluation import dpg_rules
    from corl_jax.evaluation.scores import format_scores

    totals = {
        name: dpg_rules.summarize_prompts(scored) for name, (scored, _) in tables.items() if scored
    }
    print(f"DPG-Bench, in per cent; the score of the report is that {chosen}")
    print(format_scores(totals))
    categories = {
        name: dpg_rules.average_categories(scored, as_released=name == RELEASED)
        for name, (scored, _) in tables.items()
    }
    for level in (0, 1):
        print(format_categories({name: levels[level] for name, levels in categories.items()}))
    return {
        "scores": {name: dataclasses.asdict(score) for name, score in totals.items()},
        "categories": {
            name: dict(zip(("broad", "detailed"), levels, strict=True))
            for name, levels in categories.items()
        },
    }


def format_categories(categories: dict[str, dict[str, float]]) -> str:
    """Returns a table of the categories with a column for each way to compute them."""
    names = dict.fromkeys(name for scores in categories.values() for name in scores)
    width = max([len("category"), *map(len, names)])
    lines = [f"{'category':{width}} " + " ".join(f"{column:>11}" for column in categories)]
    for name in names:
        numbers = [scores.get(name) for scores in categories.values()]
        cells = [f"{'-':>11}" if value is None else f"{value:11.2f}" for value in numbers]
        lines.append(f"{name:{width}} " + " ".join(cells))
    return "\n".join(lines)


def list_warnings(
    answers: dict[str, Any], tables: dict[str, Any], images_per_prompt: int
) -> list[str]:
    """Returns warnings for what makes the score another one than DPG-Bench's."""
    from corl_jax.evaluation.dpg_rules import PROMPTS

    warnings = []
    if len(answers) != PROMPTS:
        warnings.append(f"{len(answers)} prompts have answers; DPG-Bench has {PROMPTS}")
    others = [item for item, pictures in answers.items() if len(pictures) != images_per_prompt]
    if others:
        warnings.append(
            f"{len(others)} prompts have not {images_per_prompt} pictures, such as {others[0]} "
            f"with {len(answers[others[0]])}"
        )
    for name, (_, failed) in tables.items():
        for item, reason in [*failed.items()][:3]:
            warnings.append(f"{name}: prompt {item} is left out: {reason}")
        if len(failed) > 3:
            warnings.append(f"{name}: {len(failed) - 3} more prompts are left out")
    return warnings
