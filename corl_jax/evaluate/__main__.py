"""Measures a model, or scores what others have measured.

corl-jax evaluate --suite NAME ...
corl-jax evaluate --suite NAME --help
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from corl_jax.errors import InputError, exit_on_input_error
from corl_jax.evaluate.suites import COMMAND_SUITES, DEFAULT_SUITE
from corl_jax.nearest import suggest_name


def list_suites() -> str:
    """Returns the help's list of all suites, a line each."""
    width = max(map(len, COMMAND_SUITES))
    lines = [f"  {name:{width}}  {suite.help}" for name, suite in COMMAND_SUITES.items()]
    return "\n".join(["suites:", *lines])


def choose_suite(argv: Sequence[str] | None) -> str:
    """Returns the name of the suite that the arguments ask for. Raises: InputError if unknown."""
    parser = argparse.ArgumentParser(
        prog="corl-jax evaluate", add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--suite", default=DEFAULT_SUITE)
    name = parser.parse_known_args(argv)[0].suite
    if name not in COMMAND_SUITES:
        raise InputError(
            f"--suite: found {name}; {suggest_name(name, COMMAND_SUITES, 'expected one of')}"
        )
    return name


def build_parser(suite: str) -> argparse.ArgumentParser:
    """Returns the parser of the options of a suite."""
    module = importlib.import_module(COMMAND_SUITES[suite].module)
    parser = argparse.ArgumentParser(
        prog="corl-jax evaluate",
        description=module.__doc__,
        epilog=list_suites(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--suite",
        default=DEFAULT_SUITE,
        metavar="NAME",
        help="what is measured (default %(default)s)",
    )
    module.add_arguments(parser)
    return parser


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    suite = choose_suite(argv)
    args = build_parser(suite).parse_args(argv)
    importlib.import_module(COMMAND_SUITES[suite].module).run(args)


if __name__ == "__main__":
    main()
