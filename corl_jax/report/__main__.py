"""Writes a report of one or several runs: one HTML file without links to other files.

    corl-jax report RUN [RUN ...] [--out report.html] [--figures DIR]

RUN is a run directory (`output_dir` of a training), finished or not. The page shows what was
trained, the evaluations before and after with their 95% intervals, images before and after, curves,
the best and the worst groups of completions, phases and options. Several runs are compared: a
column each in the tables, a line each in the charts. A training writes the same page of itself at
its end, as `report.html` in its run directory. The output_dir of several stages stands for the run
of each. For the folder of a study it is the study's page.

--figures writes files for a README or a paper: before_after.png (images of the first run) and
curves.svg (evaluations and rewards of all runs). The page is then written only if --out is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from corl_jax.config.chains import list_folders
from corl_jax.errors import InputError, Problems, exit_on_input_error
from corl_jax.input_files import parse_path

DEFAULT_OUT = Path("report.html")
CONFIG, METRICS, STUDY = "config.yaml", "metrics.jsonl", "study.yaml"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corl-jax report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=parse_path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--out", type=parse_path, metavar="FILE", help=f"the page (default: {DEFAULT_OUT})"
    )
    parser.add_argument(
        "--figures", type=parse_path, metavar="DIR", help="folder for figures as files"
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Checks that each run is a run directory, and that the page and the figures can be written.

    Raises:
        InputError: listing all problems.
    """
    problems = Problems()
    if is_study(args.runs):
        if args.figures is not None:
            problems.add(f"--figures: {args.runs[0]} is a study, whose figure.svg is there already")
    else:
        for run in args.runs:
            problems.attempt(check_run, run)
    if args.out is not None:
        if args.out.is_dir():
            problems.add(f"--out: {args.out} is a directory; expected the name of an HTML file")
        elif not args.out.absolute().parent.is_dir():
            problems.add(f"--out: {args.out.parent}: no such directory; create it first")
    if args.figures is not None and args.figures.exists() and not args.figures.is_dir():
        problems.add(f"--figures: {args.figures} is a file; expected the name of a directory")
    problems.raise_any()


def is_study(runs: Sequence[Path]) -> bool:
    """Returns whether the only path is the folder of a study."""
    return len(runs) == 1 and (runs[0] / STUDY).is_file()


def check_run(run: Path) -> None:
    """Checks that a path is a run directory.

    Raises:
        InputError: it is none; names the runs inside of it, if there are any.
    """
    if not run.exists():
        raise InputError(f"{run}: no such directory; expected the output_dir of a training")
    if not run.is_dir():
        raise InputError(f"{run} is a file; expected the output_dir of a training")
    if (run / CONFIG).is_file() or (run / METRICS).is_file():
        return
    inside = sorted(path.parent for path in run.glob(f"*/{CONFIG}"))
    hint = f"; did you mean {', '.join(map(str, inside[:5]))}?" if inside else ""
    raise InputError(
        f"{run}: found neither {CONFIG} nor {METRICS}; expected the output_dir of a training{hint}"
    )


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    args.runs = [run for path in args.runs for run in list_folders(path) or [path]]
    check_arguments(args)
    if is_study(args.runs):
        from corl_jax.study.page import write_study_page

        write_study_page(args.runs[0], args.out or DEFAULT_OUT)
        print(args.out or DEFAULT_OUT)
        return
    # Imported here, so that help and wrong paths are answered before jax is loaded.
    from corl_jax.report.command import run_report

    out = args.out if args.out or args.figures else DEFAULT_OUT
    run_report(args.runs, out, args.figures)


if __name__ == "__main__":
    main()
