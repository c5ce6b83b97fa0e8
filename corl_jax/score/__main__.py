"""Computes a reward for the cases of a file.

    corl-jax score --reward NAME --input cases.jsonl [--model DIR]
                             [--network NAME=PATH ...] [--repeat N] [key=value ...]
    corl-jax score --list

NAME is a registered reward, or one of your own: FILE.py:FUNCTION.

Each line of the input is one case, a JSON object. A reward of texts reads `completion`, a reward of
images reads `image` (a path). Each also reads the columns that `--list` names: `qa_problem`,
`qa_solution`, `qa_type` (or `problem`, `solution`, `type` for short), `prompt`, `real_image` (a
path), `spec` and others. Paths are relative to the input's folder. null means that there is no
value. Columns in brackets may be left out (an answer without `qa_type` counts as OE, or as
`default_type=MC` says). Other keys are not read. Images must be squares of one size, as a model
generates them; only a reward of your own gets images of any size. key=value are the reward's
options, with values in YAML. --network gives the place of a reward network's weights, if it is not
the usual one.

Prints a line per case, {"index", "line", "reward"}, with null if the reward does not apply. The
mean goes to stderr. --repeat N calls the reward N times with the same cases, as the steps of a run
do: "reward" is that of the first call, "rewards" lists those of all calls, with null for a failed
call. stderr says which calls failed and how much the others differ; the exit code is then 1.
"""

from __future__ import annotations

import argparse

from corl_jax.errors import exit_on_input_error
from corl_jax.input_files import parse_path, parse_place


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corl-jax score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--reward", type=parse_place, metavar="NAME", help="a name of --list, or FILE.py:FUNCTION"
    )
    parser.add_argument(
        "--input", type=parse_path, metavar="FILE", help="cases, one JSON object per line"
    )
    parser.add_argument(
        "--model", type=parse_place, metavar="DIR", help="the policy, for rewards that need one"
    )
    parser.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="weights of a reward network",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="compute dtype of the networks",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of answers that the reward samples"
    )
    parser.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="call the reward N times with the same cases",
    )
    parser.add_argument("--list", action="store_true", help="show all rewards and stop")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the reward")
    return parser


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_intermixed_args(argv)
    # Imported here, so that help and wrong options are answered before jax is loaded.
    from corl_jax.score.command import run_score

    run_score(args)


if __name__ == "__main__":
    main()
