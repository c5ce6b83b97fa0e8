"""Trains a very small model in minutes on a CPU: data, training, evaluation and export.

    corl-jax quickstart [--model janus|show-o|janus-flow] [--out runs/quickstart] [key=value ...]

Converts the nano Janus, Show-o or JanusFlow of this package, makes rows for training and others for
evaluation, runs unified GRPO with evaluations, and exports the result for PyTorch. Each step is a
command that is printed before it runs; the same commands train a large model. A second run
continues where the first one stopped. The training reads key=value.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from corl_jax.errors import exit_on_input_error
from corl_jax.input_files import parse_path
from corl_jax.quickstart.models import DEFAULT, STARTS


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="corl-jax quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", choices=tuple(STARTS), default=DEFAULT, help=f"default: {DEFAULT}"
    )
    outs = ", ".join(start.out for start in STARTS.values())
    parser.add_argument("--out", type=parse_path, metavar="DIR", help=f"default: {outs}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seed=1")
    args = parser.parse_intermixed_args(argv)
    # Imported here, so that help and wrong options are answered before jax is loaded.
    from corl_jax.quickstart.command import run_quickstart

    start = STARTS[args.model]
    run_quickstart(args.out or Path(start.out), args.overrides, start)


if __name__ == "__main__":
    main()
