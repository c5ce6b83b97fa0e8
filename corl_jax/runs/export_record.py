"""Reads the record in an export, so that an old export is not taken for the run's result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.weights.folders import ADAPTER_CONFIG

RECORD_FILE = "corl_jax_export.json"
MARKS = (RECORD_FILE, "config.json", ADAPTER_CONFIG)
"""Every export has one of these files; a folder with none of them is no export."""


def list_place_problems(folder: Path) -> list[str]:
    """Lists what forbids an export at `folder`: a file, a link, or foreign files inside."""
    if not (folder.exists() or folder.is_symlink()):
        return []
    remedy = "move it away: the export of the trained model comes here"
    if folder.is_symlink() or not folder.is_dir():
        return [f"{folder}: found a file or a link, expected a folder; {remedy}"]
    if any(folder.iterdir()) and not is_export(folder):
        return [f"{folder}: found files that are not of an export; {remedy}"]
    return []


def is_export(folder: Path) -> bool:
    """Returns whether a folder has one of the MARKS."""
    return any((folder / name).is_file() for name in MARKS)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Returns the record of an export; None without a folder, {} without a readable record."""
    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_up_to_date(before: Mapping[str, Any] | None, record: Mapping[str, Any]) -> bool:
    """Returns whether the record of an export has all values of `record`."""
    return {name: (before or {}).get(name) for name in record} == dict(record)


def describe_age(folder: Path, steps: int) -> str | None:
    """Returns a line about an export of fewer than `steps` steps; None without such an export."""
    record = read_record(folder)
    step = (record or {}).get("step")
    # Not isinstance: True is an int in Python, and a damaged record may hold it.
    if record is None or (type(step) is int and step >= steps):
        return None
    return (
        f"{folder} is of {name_step(record)}; it stays as it is until the run has done its "
        f"{steps} steps"
    )


def name_step(record: dict[str, Any]) -> str:
    """Returns the step of an export in words."""
    step = record.get("step")
    return f"step {step}" if type(step) is int else "an unknown step"


def rename_stale(folder: Path, record: dict[str, Any] | None) -> list[str]:
    """Renames an export that is not of the run's last step; returns a line about it."""
    if record is None or not is_export(folder):
        return []
    name = f"export_of_{name_step(record).replace(' ', '_')}"
    aside, number = folder.with_name(name), 1
    while aside.exists():
        aside, number = folder.with_name(f"{name}-{number}"), number + 1
    folder.rename(aside)
    return [
        f"{folder} was of {name_step(record)} and is now {aside}; export.layout none writes none"
    ]
