"""Options and files that the suites of scores share.

--out becomes a folder with report.json and scores.jsonl, which `corl-jax compare` reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.atomic_files import check_output_folder, create_folder
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import parse_path, read_text

MANIFEST_FILE = "manifest.json"


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Adds --drawn and --out."""
    add = parser.add_argument
    add("--drawn", type=parse_path, metavar="DIR",
        help="folder in which corl-jax evaluate drew the images: its model and seed go into the "
        "report")  # fmt: skip
    add("--out", type=parse_path, metavar="DIR", help="a new or empty folder for the report")


def check_report_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of the drawn images; none without --drawn.

    Raises: InputError listing problems of both options.
    """
    problems = Problems()
    if args.out is not None:
        problems.attempt(check_output_folder, args.out, "--out")
    settings = problems.attempt(read_drawing, args.drawn) if args.drawn is not None else {}
    problems.raise_any()
    return settings or {}


def read_drawing(folder: Path, option: str = "--drawn") -> dict[str, Any]:
    """Returns the settings with which a folder's images were drawn. Raises: InputError."""
    path = folder / MANIFEST_FILE
    expected = "the manifest of corl-jax evaluate, an object with `settings`"
    text = read_text(path, expected)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{option}: {path}: not JSON ({error}); expected {expected}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("settings"), dict):
        raise InputError(f"{option}: {path}: found no settings; expected {expected}")
    return manifest["settings"]


def write_scores(
    out: Path | None,
    settings: Mapping[str, Any],
    content: Mapping[str, Any],
    units: Sequence[Any],
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes the report, the scores of the units and further texts by name; all or none.

    Nothing is written without a folder. Raises: InputError if the folder cannot be written.
    """
    if out is None:
        return
    from corl_jax.evaluation.units import REPORT_FILE, SCORES_FILE, format_units

    report = {"settings": settings, **content}
    texts = {
        REPORT_FILE: json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        SCORES_FILE: format_units(units),
        **(files or {}),
    }
    with create_folder(out) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
