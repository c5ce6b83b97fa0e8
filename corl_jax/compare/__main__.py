"""Compares two evaluations of the same prompts or questions.

    corl-jax compare A B [--json] [--draws 10000] [--seed 0]

A and B are --out folders of `corl-jax evaluate` with the same suite. Units (a prompt with all its
images, a question with all its rotations) are drawn again in pairs, within their categories.
Prints, by metric and category, both scores, B - A, its 95% interval and a two-sided p-value. The
mean over categories and the mean over all units are both given if they differ.
Exit codes: 0 done, 2 bad input, such as evaluations of different units or seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from corl_jax.errors import Problems, exit_on_input_error
from corl_jax.input_files import parse_path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corl-jax compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("first", type=parse_path, metavar="A", help="folder of an evaluation")
    add("second", type=parse_path, metavar="B", help="folder of the evaluation to compare with it")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--draws", type=int, default=10_000, help="draws of the bootstrap (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (default %(default)s)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Checks numbers and folders. Raises: InputError listing every problem."""
    problems = Problems()
    if args.draws < 1:
        problems.add(f"--draws: found {args.draws}; expected at least 1")
    if args.seed < 0:
        problems.add(f"--seed: found {args.seed}; expected 0 or more")
    for folder in (args.first, args.second):
        if not folder.is_dir():
            problems.add(
                f"{folder}: no such folder; expected the --out folder of corl-jax evaluate"
            )
    problems.raise_any()


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments and runs the command."""
    args = make_parser().parse_args(argv)
    check_arguments(args)
    # Imported here, so that help and wrong options are answered before jax is loaded.
    from corl_jax.compare.command import run_compare

    run_compare(args)


if __name__ == "__main__":
    main()
