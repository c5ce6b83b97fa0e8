"""Runs a study: variants of a config with several seeds, then one table and a figure.

    corl-jax study STUDY [key=value ...] [--dry-run] [--jobs N] [--devices 0,1]

STUDY is a YAML file, or the name of a study that comes with the package (`corl-jax configs`). A
key=value replaces a key of the study, as in seeds=[0], or sets an option of all its runs, as in
train.max_steps=20. The same command again continues: finished runs are not started again, and a
failed one goes on from its last checkpoint. Writes table.md, table.csv, figure.svg and study.html
into the study's output_dir. Ctrl-C stops all runs after the step that runs, and exits with 75.
"""

from __future__ import annotations

import argparse
import sys

from corl_jax.config.shipped import find_study
from corl_jax.errors import InputError, Problems, exit_on_input_error
from corl_jax.merge.rules import DEFAULT_RULE, RULES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corl-jax study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("study", metavar="STUDY", help="a YAML file, or the name of a study of the package")
    add("words", nargs="*", metavar="key=value", help="e.g. seeds=[0] train.max_steps=20")
    add("--dry-run", action="store_true", help="print the runs and their cost, and exit")
    add("--jobs", type=int, metavar="N",
        help="runs at once (default: one for each of --devices, else 1); on a GPU they share "
        "its memory")  # fmt: skip
    add("--devices", metavar="LIST", help="GPUs to spread the runs over, as in 0,1")
    return parser


def check_arguments(args: argparse.Namespace) -> list[str]:
    """Checks the numbers; returns the devices.

    Raises:
        InputError: --jobs or --devices cannot be used.
    """
    devices = [part.strip() for part in (args.devices or "").split(",") if part.strip()]
    if args.devices is not None and (not devices or len(set(devices)) < len(devices)):
        raise InputError(f"--devices: found {args.devices!r}; expected different ones, as in 0,1")
    if args.jobs is not None and args.jobs < 1:
        raise InputError(f"--jobs: found {args.jobs}; expected at least 1")
    return devices


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_intermixed_args(argv)
    devices = check_arguments(args)
    from corl_jax.study.schema import find_merge_problems, load_study
    from corl_jax.study.study_runs import list_warnings, resolve_runs

    study = load_study(find_study(args.study), args.words)
    problems = Problems()
    rules = {name: rule.models for name, rule in RULES.items()}
    problems.add(find_merge_problems(study, rules, DEFAULT_RULE))
    problems.raise_any()
    runs = resolve_runs(study)
    for line in list_warnings(study, runs):
        print(f"warning: {line}", file=sys.stderr)
    # Imported here, so that a wrong study is answered before jax is loaded.
    from corl_jax.study.command import describe_plan, run_study

    if args.dry_run:
        print(describe_plan(study, runs))
        return
    sys.exit(run_study(study, runs, args.jobs or max(len(devices), 1), devices))


if __name__ == "__main__":
    main()
