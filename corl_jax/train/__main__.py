"""Trains a unified model: reinforcement learning, supervised training, or the image tokenizer.

corl-jax train CONFIG [key=value ...]

CONFIG is a YAML file, or the name of a config that comes with the package (`corl-jax configs`).
An option may also be given as --key value. Rerunning the same command resumes from the newest sound
checkpoint of its output_dir. SIGTERM or Ctrl-C saves after the step that runs, and exits with 75.
If the config lists several stages, key=value holds for all, and stages.NAME.key=value for one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from corl_jax.config.chains import dump_stages, load_stages
from corl_jax.config.options import describe
from corl_jax.config.origins import record_command
from corl_jax.config.shipped import find_config
from corl_jax.errors import InputError, exit_on_input_error

FLAGS = ("--check", "--print-config", "--allow-changed-config", "--help", "-h")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of arguments in the form that `normalize_arguments` gives them."""
    parser = argparse.ArgumentParser(
        prog="corl-jax train",
        usage="%(prog)s CONFIG [--check] [key=value ...]",
        description=__doc__,
        epilog="Every option with its default, range and source:\n\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="CONFIG", help="the config, if it is not given first")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check config, data, weights and mesh, print sizes and steps, and exit",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config and exit"
    )
    parser.add_argument(
        "--allow-changed-config",
        action="store_true",
        help="resume with options that differ from the run's; they are listed and recorded",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=10")
    return parser


def normalize_arguments(argv: Sequence[str]) -> Iterator[str]:
    """Yields the arguments with the config as --config and each option as `key=value`.

    In: `mini/unified --train.max-steps 10 seed=1`
    Out: `--config mini/unified train.max_steps=10 seed=1`

    An option without a value stays a key alone, which the reader of configs refuses.
    """
    arguments, has_config = list(argv), any(text.startswith("--config") for text in argv)
    while arguments:
        text = arguments.pop(0)
        flag = text.replace("_", "-")
        if flag in FLAGS or text.startswith("--config="):
            yield flag if flag in FLAGS else text
        elif text.startswith("--"):
            key, equals, value = text.removeprefix("--").partition("=")
            key = key.replace("-", "_")
            # "-1" is a value, but "--seed" is the next option.
            if not equals and arguments and not arguments[0].startswith("--"):
                equals, value = "=", arguments.pop(0)
            yield f"{'--' if key == 'config' else ''}{key}{equals}{value}"
        elif "=" not in text and not has_config:
            has_config = True
            yield f"--config={text}"
        else:
            yield text


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    arguments = normalize_arguments(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_intermixed_args([*arguments])
    if args.config is None:
        raise InputError(
            "config: missing; expected `corl-jax train CONFIG`, a YAML file or one of the names "
            "that `corl-jax configs` lists"
        )
    stages = load_stages(find_config(args.config), args.overrides)
    if args.print_config:
        print(dump_stages(stages), end="")
        return
    # Imported here, so that help and wrong options are answered before jax is loaded.
    from corl_jax.train.chain import run_stages

    run_stages(
        stages, record_command(args.config, args.overrides),
        check_only=args.check, allow_changes=args.allow_changed_config,
    )  # fmt: skip


if __name__ == "__main__":
    main()
