"""Merges models that were trained from one base into one model.

corl-jax merge --base DIR --models A B --out DIR [--rule gaussian|mean|sum|ties] [--lambda 2]
               [--params REGEX]

Base and models are directories of any layout (original, transformers or jax) or hub ids; a model
may also be an adapter for PEFT. d_k is a tensor of model k minus the tensor of the base.
  gaussian  two models: large d_k are added whole, small ones averaged
  mean      base + mean of the d_k
  sum       base + sum of the d_k
  ties      base + lambda * mean of the largest d_k of the elected sign
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from corl_jax.errors import Problems, exit_on_input_error
from corl_jax.input_files import parse_path, parse_place
from corl_jax.merge.rules import DEFAULT_RULE, RULES
from corl_jax.weights.hub import check_place


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corl-jax merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--base", type=parse_place, required=True, metavar="DIR",
        help="the model from which all models were trained",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=parse_place, required=True, nargs="+", metavar="DIR",
        help="the trained models, or adapters for PEFT",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=parse_path, required=True, metavar="DIR", help="folder to be made"
    )
    parser.add_argument(
        "--rule", choices=tuple(RULES), default=DEFAULT_RULE, help="default: %(default)s"
    )
    parser.add_argument(
        "--lambda", dest="factor", type=parse_factor, metavar="X",
        help="gaussian: half of the width of the averaged range, in standard deviations (default: "
        "2); ties: factor of the merged change (default: 1); the other rules do not read it",
    )  # fmt: skip
    parser.add_argument(
        "--params", metavar="REGEX",
        help="paths of the parameters to merge, such as 'language_model/.*'; all others must equal "
        "the base (default: those that a training trains by default)",
    )  # fmt: skip
    _add_output_arguments(parser)
    return parser


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout", metavar="NAME", help="original, transformers or jax (default: the base's)"
    )
    parser.add_argument(
        "--dtype", choices=("keep", "float32", "bfloat16"), default="keep",
        help="element type of the output (default: %(default)s, that of the base)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def parse_factor(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def check_models(args: argparse.Namespace) -> None:
    """Checks the number of models, and that each place exists or has the form of a hub id.

    Raises:
        InputError: listing every problem.
    """
    problems, number = Problems(), RULES[args.rule].models
    count = len(args.models)
    if count < 2 or (number and count != number):
        expected = number or "two or more"
        problems.add(f"--models: found {count}, expected {expected} with --rule {args.rule}")
    for place in (args.base, *args.models):
        problems.attempt(check_place, place)
    problems.raise_any()


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments and runs the command."""
    args = make_parser().parse_args(argv)
    check_models(args)
    if args.factor is not None and RULES[args.rule].factor is None:
        message = f"--lambda {args.factor:g} has no effect with --rule {args.rule}"
        print(f"warning: {message}", file=sys.stderr)
    # Imported here, so that help and wrong options are answered before jax is loaded.
    from corl_jax.merge.command import run_merge

    run_merge(args)


if __name__ == "__main__":
    main()
