"""The command `corl-jax data`: writes rows that need no download as parquet.

corl-jax data --out DIR --rows N --seed S [--world full|small] [--split train|test|all]
corl-jax data --kind self_questions --out DIR --rows N --seed S [--exclude GENEVAL.jsonl]
corl-jax data --kind self_questions --out DIR --records RECORDS.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from corl_jax.data.drawn_world import generator as drawn_world
from corl_jax.data.drawn_world.scene import SPLITS, WORLDS
from corl_jax.data.self_questions.generator import make_generated_record, write_records
from corl_jax.data.self_questions.reader import read_excluded, read_records
from corl_jax.errors import InputError, Problems, exit_on_input_error
from corl_jax.input_files import parse_path, parse_place

DRAWN_WORLD, SELF_QUESTIONS = "drawn_world", "self_questions"
# Option -> the kind that reads it.
OWNERS = {
    "world": DRAWN_WORLD, "image_size": DRAWN_WORLD, "split": DRAWN_WORLD,
    "exclude": SELF_QUESTIONS, "records": SELF_QUESTIONS,
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's options."""
    parser = argparse.ArgumentParser(
        prog="corl-jax data",
        description="Writes rows as parquet: images of the drawn world with their texts, or "
        "prompts with questions and answers, without images.",
    )
    add = parser.add_argument
    add("--out", type=parse_place, required=True, help="new or empty directory")
    add("--kind", choices=(DRAWN_WORLD, SELF_QUESTIONS), default=DRAWN_WORLD,
        help="drawn_world: images; self_questions: prompts and questions about the model's own "
        "images (default %(default)s)")  # fmt: skip
    add("--rows", type=int, help="number of rows")
    add("--seed", type=int, help="seed of all rows")
    add("--start", type=int, default=0, help="index of the first row")
    world = parser.add_argument_group("drawn_world")
    world.add_argument(
        "--world", choices=tuple(WORLDS),
        help="small is for models of 32x32 images (default full)",
    )  # fmt: skip
    world.add_argument(
        "--image-size", type=int, help="image side in pixels (default 64; small world: 32)"
    )
    world.add_argument(
        "--split", choices=SPLITS, help="train and test share no demand (default all)"
    )
    questions = parser.add_argument_group("self_questions")
    questions.add_argument(
        "--exclude", type=parse_path, metavar="JSONL",
        help="GenEval's evaluation_metadata.jsonl, whose prompts are then left out",
    )  # fmt: skip
    questions.add_argument(
        "--records", type=parse_path, metavar="JSONL",
        help="records {tag, include, prompt, question, answer} to write, instead of new ones",
    )  # fmt: skip
    return parser


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    problems = Problems()
    for option, kind in OWNERS.items():
        if getattr(args, option) is not None and kind != args.kind:
            name = option.replace("_", "-")
            problems.add(f"--{name}: has an effect with --kind {kind} only; leave it out")
    if args.records:
        present = [name for name in ("rows", "seed", "exclude") if getattr(args, name) is not None]
        problems.add(
            f"--{name}: contradicts --records; leave out one of the two" for name in present
        )
    else:
        for name in ("rows", "seed"):
            if getattr(args, name) is None:
                problems.add(f"--{name}: missing; expected a whole number")
    problems.raise_any()
    rows, path = (_write_drawn_world if args.kind == DRAWN_WORLD else _write_questions)(args)
    print(f"{rows} rows, {path.stat().st_size / 2**20:.1f} MiB: {path}")


def _write_drawn_world(args: argparse.Namespace) -> tuple[int, Path]:
    path = drawn_world.write_rows(
        args.out, args.rows, args.seed, image_size=args.image_size, start=args.start,
        split=args.split or "all", world=args.world or "full",
    )  # fmt: skip
    return args.rows, path


def _write_questions(args: argparse.Namespace) -> tuple[int, Path]:
    if args.records:
        records = read_records(args.records)
        if not 0 <= args.start < len(records):
            raise InputError(
                f"--start: found {args.start}; expected 0 to {len(records) - 1}, as "
                f"{args.records} has {len(records)} records"
            )
        rows = records[args.start :]
        return len(rows), write_records(Path(args.out), rows)
    limits = {"--rows": (args.rows, 1), "--seed": (args.seed, 0), "--start": (args.start, 0)}
    if problems := drawn_world.find_number_problems(limits):
        raise InputError(problems)
    excluded = read_excluded(args.exclude) if args.exclude else None
    if excluded is not None:
        print(f"{len(excluded)} prompts of {args.exclude} are left out")
    numbers = range(args.start, args.start + args.rows)
    made = (make_generated_record(args.seed, number, excluded) for number in numbers)
    return len(numbers), write_records(Path(args.out), made)


if __name__ == "__main__":
    main()
