"""Writes the files that the arguments of `corl-jax report` ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corl_jax.atomic_files import replace_file
from corl_jax.errors import InputError
from corl_jax.report.figures import write_figures
from corl_jax.report.page import render_page
from corl_jax.report.read import read_runs
from corl_jax.runs.directory import REPORT


def run_report(runs: Sequence[Path], out: Path | None, figures: Path | None) -> None:
    """Writes the page, the figures, or both (None: not that), and prints their names.

    Raises:
        InputError: a file cannot be written, or the run has nothing to draw.
    """
    records = read_runs(runs)
    try:
        if figures is not None:
            for path in write_figures(records, figures):
                print(path)
        if out is not None:
            page = render_page(records)
            with replace_file(out) as file:
                file.write(page)
            print(f"{out}  ({len(page) / 2**20:.1f} MiB)")
    except OSError as error:
        raise InputError(
            f"{error.filename or out or figures}: {error.strerror}; name a place that can be "
            "written"
        ) from None


def write_run_report(run: Path) -> Path:
    """Writes the page of a run into its directory, unless the same page is there already.

    Raises:
        OSError: it cannot be written.
    """
    page, path = render_page(read_runs([run])), run / REPORT
    if not path.exists() or path.read_bytes() != page:
        with replace_file(path) as file:
            file.write(page)
    return path
