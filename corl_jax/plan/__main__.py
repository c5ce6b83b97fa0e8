"""Compiles a run for devices that need not exist, to see whether it fits and what it costs.

corl-jax plan CONFIG --topology v5e:4x4 [key=value ...]

Compiles the training step and the samplers of a config as the run would, from shapes alone:
no weights, no data, no TPU. Prints memory, operations and collectives of each device, and an
estimate of the time. Exit code 1: it does not fit.
"""

from __future__ import annotations

import argparse
import sys

from corl_jax.config.chains import has_stages, load_stages, stand_in_starts
from corl_jax.config.shipped import find_config
from corl_jax.config.stages import STAGE_FACTS
from corl_jax.errors import InputError, exit_on_input_error


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="corl-jax plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="CONFIG", help="the config, if it is not given first")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="a TPU slice, v4, v5e, v5p or v6e with its shape in chips (v5e:4x4, v5p:2x2x2); or "
        "local, the devices present",
    )
    parser.add_argument(
        "--model",
        metavar="SIZES",
        help="published sizes by name (default: of the model's config.json, or those "
        "that its name states)",
    )
    for task, option in (("image generation", "image"), ("image understanding", "text")):
        parser.add_argument(
            f"--{option}-prompt",
            type=int,
            metavar="TOKENS",
            help=f"longest {task} prompt of a batch (default: as in the first batch, if tokenizer "
            "and data are here, else data.max_prompt_length)",
        )
    _add_memory_arguments(parser)
    parser.add_argument(
        "--only",
        action="append",
        metavar="PROGRAM",
        help="compile only programs whose name starts so, such as update; may be repeated",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. mesh.fsdp=-1")
    return parser.parse_intermixed_args(argv)


def _add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stored",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="dtype of the model's files, and so of frozen parameters (default: bfloat16)",
    )
    parser.add_argument(
        "--hbm", type=float, metavar="GIB", help="memory of a device, instead of the known one"
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.0,
        metavar="GIB",
        help="memory of each device for reward networks, which are not compiled (default 0)",
    )


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_arguments(argv)
    # A word without = is the config, as in `corl-jax train CONFIG`.
    if args.config is None:
        words = [text for text in args.overrides if "=" not in text]
        if not words:
            raise InputError("config: missing; expected `corl-jax plan CONFIG --topology ...`")
        args.config = words[0]
        args.overrides.remove(words[0])
    stages = load_stages(find_config(args.config), args.overrides)
    # Imported here, so that help and wrong options are answered before jax is loaded.
    from corl_jax.plan.command import DOES_NOT_FIT_EXIT_CODE, run_plan

    present = stand_in_starts(stages)
    sampling = {name: c for name, c in present.items() if STAGE_FACTS[c.stage].has_rollouts}
    fits = True
    for name, config in (sampling or present).items():
        if has_stages(stages):
            print(f"stage {name}", flush=True)
        fits &= run_plan(args, config)
    for name in present.keys() - sampling.keys() if sampling else ():
        print(f"stage {name} is not planned: it samples no completions")
    if not fits:
        sys.exit(DOES_NOT_FIT_EXIT_CODE)


if __name__ == "__main__":
    main()
