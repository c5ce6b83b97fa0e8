"""Answers and rates a data set in VLMEvalKit's TSV format, with Janus's prompts or CoRL's.

    corl-jax evaluate --suite tsv --model DIR --data NAME.tsv --out DIR
        [--prompt-style vlmevalkit|corl] [--roles pro|old] [--rows N] [--batch-size 32]
        [--max-new-tokens 2048] [--dtype float32|bfloat16] [--format tsv|xlsx] [RATING]
    corl-jax evaluate --suite tsv --predictions FILE --data NAME.tsv [--out DIR] [RATING]
    RATING: [--matcher 2026-08|2026-05|2025-05] [--answer-tag auto|off] [--mmmu-guess] [--kind KIND]

Answers are greedy. The folder has MODEL_NAME.tsv, which `vlmutil eval` of VLMEvalKit rates,
report.json, scores.jsonl for `corl-jax compare`, verdicts.jsonl, answers.jsonl (each answer as it
came) and NEXT.txt (the official command). The same command continues what a folder holds.
--predictions rates an existing prediction file without a model.
Rates are VLMEvalKit's with exact matching: an answer that no rule reads is wrong. Data sets that
need a judge get the share that rules read, and the judge's command.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from corl_jax.atomic_files import check_output_folder, create_folder
from corl_jax.errors import InputError, Problems
from corl_jax.inference import DTYPES, check_number
from corl_jax.input_files import parse_path, parse_place
from corl_jax.sampling_options import spell_option

if TYPE_CHECKING:
    from corl_jax.evaluation.tsv.rating import RatingOptions
    from corl_jax.evaluation.tsv.table import Table, Values

MODEL_OPTIONS = (
    "prompt_style", "roles", "rows", "batch_size", "max_new_tokens", "dtype", "format",
)  # fmt: skip
"""Options that have no effect on an existing prediction file."""
# Written out, because the package `evaluation` imports jax, which --help should not wait for.
MATCHER_NAMES, TAG_MODES = ("2026-08", "2026-05", "2025-05"), ("auto", "off")
PROMPT_STYLES, FORMATS = ("vlmevalkit", "corl"), ("tsv", "xlsx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    add = parser.add_argument
    add("--model", type=parse_place, help="model directory of any of the three kinds, or a hub id")
    add("--data", type=parse_path, required=True, metavar="NAME.tsv",
        help="the data set; its kind is recognised by its name, else by its columns")  # fmt: skip
    add("--predictions", type=parse_path, metavar="FILE",
        help="rate this .tsv, .xlsx or .json file, with columns index and prediction")  # fmt: skip
    add("--out", type=parse_path, metavar="DIR", help="folder of the report; needed with --model")
    add("--prompt-style", choices=PROMPT_STYLES,
        help="prompts as VLMEvalKit's, or CoRL's instruction (default vlmevalkit)")  # fmt: skip
    add("--roles", metavar="pro|old",
        help="chat roles: pro for <|User|>, old for User (default old as in VLMEvalKit, for corl "
        "as the model was trained)")  # fmt: skip
    add("--rows", type=int, metavar="N", help="answer only the first N rows with an image")
    add("--batch-size", type=int, metavar="N", help="number of answers at once (default 32)")
    add("--max-new-tokens", type=int, metavar="N",
        help="most tokens of an answer (default 2048, or what the model has room for)")  # fmt: skip
    add("--dtype", choices=DTYPES,
        help="compute dtype (default float32 on a CPU, bfloat16 elsewhere)")  # fmt: skip
    add("--format", choices=FORMATS, help="of the prediction file (default tsv)")
    add("--matcher", choices=MATCHER_NAMES, default=MATCHER_NAMES[0],
        help="version of VLMEvalKit whose rules read a choice (default %(default)s)")  # fmt: skip
    add("--answer-tag", choices=TAG_MODES,
        help="auto: what the last <answer> holds is the prediction, the rest is thinking; off: the "
        "whole text (default auto; off with --predictions)")  # fmt: skip
    add("--mmmu-guess", action="store_true",
        help="MMMU's parser guesses at random, with MMMU's seed, where it finds no letter "
        "(default: wrong)")  # fmt: skip
    add("--kind", metavar="KIND", help="kind of the data set, if its name does not say it")


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, and runs the suite."""
    problems = Problems()
    problems.add(find_option_problems(args))
    problems.raise_any()
    if args.predictions is not None:
        rate_file(args)
        return
    from corl_jax.evaluate.tsv_answers import answer_and_rate

    answer_and_rate(args)


def find_option_problems(args: argparse.Namespace) -> list[str]:
    """Lists options that are wrong, contradict each other or would have no effect."""
    problems = Problems()
    for name in ("rows", "batch_size", "max_new_tokens"):
        problems.add(check_number(spell_option(name), getattr(args, name), 1, whole=True))
    if (args.model is None) == (args.predictions is None):
        problems.add(
            "--model, --predictions: expected one of them: a model that answers, or a file of "
            "answers"
        )
    if args.predictions is not None:
        problems.add(
            f"{spell_option(name)}: has no effect on --predictions; leave it out"
            for name in MODEL_OPTIONS
            if getattr(args, name) is not None
        )
        if args.out is not None:
            problems.attempt(check_output_folder, args.out, "--out")
    elif args.out is None:
        problems.add("--out: expected a folder for the answers")
    return list(problems)


def make_rating_options(args: argparse.Namespace) -> RatingOptions:
    """Returns the choices of the rating."""
    from corl_jax.evaluation.matching.mmmu import GUESS_SEED
    from corl_jax.evaluation.tsv.rating import RatingOptions

    return RatingOptions(args.matcher, GUESS_SEED if args.mmmu_guess else None)


def tell_unused_options(args: argparse.Namespace, kind: str) -> None:
    """Prints a warning for each option of the rating that this kind does not read."""
    from corl_jax.evaluation.tsv.kinds import KINDS, YES_NO

    if args.matcher != MATCHER_NAMES[0] and (KINDS[kind].question == YES_NO or kind == "wemath"):
        print(f"warning: --matcher: has no effect on {kind}", file=sys.stderr)
    if args.mmmu_guess and kind != "mmmu":
        print(f"warning: --mmmu-guess: has no effect on {kind}", file=sys.stderr)


def rate_file(args: argparse.Namespace) -> None:
    """Rates an existing prediction file."""
    from corl_jax.evaluate import tsv_report
    from corl_jax.evaluation.tsv.kinds import KINDS, recognise_kind
    from corl_jax.evaluation.tsv.table import read_predictions, read_table
    from corl_jax.weights.hashing import hash_file

    table = read_table(args.data, needs_images=False)
    kind = recognise_kind(table, args.kind)
    rows, num_missing = read_predictions(args.predictions, table)
    check_rows(kind, rows)
    tell_unused_options(args, kind)
    rows, mode = apply_answer_tags(rows, args), args.answer_tag or "off"
    options = make_rating_options(args)
    settings = {
        "suite": "tsv", "data": str(args.data), "data_sha256": hash_file(args.data),
        "predictions": str(args.predictions), "predictions_sha256": hash_file(args.predictions),
        "kind": kind, "matcher": args.matcher, "judge": KINDS[kind].judge, "answer_tag": mode,
        "mmmu_guess_seed": options.guess_seed,
    }  # fmt: skip
    counts = count_rows(table, rows) | {"rows_without_prediction": num_missing}
    report = tsv_report.rate_rows(table, kind, rows, options, settings, counts)
    tsv_report.print_report(report)
    if args.out is not None:
        with create_folder(args.out) as folder:
            command = tsv_report.describe_command(args.predictions, table, kind)
            tsv_report.write_files(folder, report, command)
        print(f"report: {args.out}", file=sys.stderr)


def check_rows(kind: str, rows: list[Values]) -> None:
    """Raises: InputError listing what keeps the rows from being rated."""
    from corl_jax.evaluation.tsv.kinds import KINDS

    problems = Problems()
    problems.add(KINDS[kind].find_problems(rows))
    problems.raise_any()


def apply_answer_tags(rows: list[Values], args: argparse.Namespace) -> list[Values]:
    """Returns the rows with the content of the last tag as prediction, if that is asked for."""
    from corl_jax.evaluation.matching.answer_tags import OPEN, split_answer

    if args.answer_tag == "auto":
        return [{**row, "prediction": split_answer(row["prediction"]).prediction} for row in rows]
    tagged = sum(OPEN in row["prediction"] for row in rows)
    if tagged and args.answer_tag is None:
        print(
            f"warning: {tagged} of {len(rows)} predictions contain {OPEN}, which VLMEvalKit's "
            "rules do not read; --answer-tag auto takes what it holds",
            file=sys.stderr,
        )
    return rows


def count_rows(table: Table, rows: list[Values]) -> dict[str, Any]:
    """Returns the counts of rows for the report."""
    return {"rows": len(rows), "rows_without_image": table.num_dropped}


def require_rows(table: Table, rows: int | None) -> int:
    """Returns how many rows are answered. Raises: InputError if there are not so many."""
    if rows is not None and rows > len(table.rows):
        raise InputError(
            f"--rows: found {rows}, but {table.path} has {len(table.rows)} rows with an image; ask "
            "for at most these, or leave --rows out"
        )
    return rows or len(table.rows)
