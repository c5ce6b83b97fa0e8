"""Writes the folder of a suite: report.json and scores.jsonl, which `corl-jax compare` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.atomic_files import create_folder
from corl_jax.evaluation.units import REPORT_FILE, SCORES_FILE, Unit, format_units


def write_scores(
    out: Path,
    report: Mapping[str, Any],
    units: Sequence[Unit],
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes the report, the scores of the units and further texts by name; all or none.

    Raises: InputError if the folder cannot be written.
    """
    texts = {
        REPORT_FILE: json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        SCORES_FILE: format_units(units),
        **(files or {}),
    }
    with create_folder(out) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
