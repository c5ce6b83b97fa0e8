"""Summarises T2I-CompBench from the files that its scorers wrote.

    corl-jax evaluate --suite compbench-score --results DIR [--prompts examples/dataset]
        [--images-per-prompt 10] [--drawn DIR] [--out DIR]

DIR has a folder for each category (color, shape, texture, spatial, 3d_spatial, non_spatial,
numeracy, complex, or these names with `_val`) with the `annotation_*` folders of the scorers. The
product over noun chunks and the 3-in-1 score are computed if their scripts did not run; the second
needs --prompts. Prints the mean of each category with its 95% interval (bootstrap of prompts).
--out writes report.json and scores.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corl_jax.errors import InputError, Problems
from corl_jax.evaluate.reports import add_report_options, check_report_options, write_scores
from corl_jax.input_files import parse_path

if TYPE_CHECKING:
    from corl_jax.evaluation.units import Unit

PROMPTS_PER_CATEGORY = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    add = parser.add_argument
    add("--results", type=parse_path, required=True, metavar="DIR",
        help="folder of the categories' folders")  # fmt: skip
    add("--prompts", type=parse_path, metavar="DIR",
        help="examples/dataset of T2I-CompBench, for the 3-in-1 score")  # fmt: skip
    add("--images-per-prompt", type=int, default=10, metavar="N",
        help="images of each prompt (default %(default)s)")  # fmt: skip
    add_report_options(parser)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, and prints the scores."""
    from corl_jax.evaluation.scores import Score, format_scores

    drawing, units = read_categories(args)
    scores = {
        category: Score.of([np.array([unit.values["score"] for unit in group])])
        for category, group in units.items()
    }
    print(format_scores(scores, decimals=4))
    warnings = [
        f"{category}: {len(group)} prompts; T2I-CompBench has {PROMPTS_PER_CATEGORY}"
        for category, group in units.items()
        if len(group) != PROMPTS_PER_CATEGORY
    ]
    sys.stderr.writelines(f"warning: {line}\n" for line in warnings)
    settings = {
        "suite": args.suite,
        "results": str(args.results),
        "images_per_prompt": args.images_per_prompt,
    }
    content = {
        "scores": {name: dataclasses.asdict(score) for name, score in scores.items()},
        "warnings": warnings,
    }
    all_units = [unit for group in units.values() for unit in group]
    write_scores(args.out, drawing | settings, content, all_units)


def read_categories(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[Unit]]]:
    """Returns the settings of the drawn images, and category -> its units.

    Raises: InputError listing all problems.
    """
    from corl_jax.evaluation import compbench_rules

    problems, units = Problems(), {}
    if args.images_per_prompt < 1:
        problems.add(f"--images-per-prompt: found {args.images_per_prompt}; expected at least 1")
    drawing = problems.attempt(check_report_options, args)
    problems.raise_any()
    for category in compbench_rules.FOLDERS:
        folders = [args.results / name for name in (category, f"{category}_val")]
        folder = next((path for path in folders if path.is_dir()), None)
        if folder is not None:
            with problems.collect():
                answers = read_category(folder, category, args)
                units[category] = compbench_rules.make_units(
                    answers, category, args.images_per_prompt
                )
    if not units and not problems:
        problems.add(
            f"--results {args.results}: found no folder of a category; expected one of "
            f"{', '.join(compbench_rules.FOLDERS)}"
        )
    problems.raise_any()
    return drawing or {}, units


def read_category(folder: Path, category: str, args: argparse.Namespace) -> np.ndarray:
    """Returns the score of each image of a category. Raises: InputError if files are missing."""
    from corl_jax.evaluation import compbench_rules

    if category != compbench_rules.COMPLEX:
        return compbench_rules.find_result(folder, category)
    written = folder / compbench_rules.COMPLEX_RESULT / compbench_rules.RESULT_FILE
    if written.is_file():
        return compbench_rules.read_result(written)
    if args.prompts is None:
        raise InputError(
            f"{folder}: found no {compbench_rules.COMPLEX_RESULT}; run 3_in_1.py, or name its "
            "prompts with --prompts examples/dataset"
        )
    return compbench_rules.find_complex(folder, args.prompts, args.images_per_prompt)
