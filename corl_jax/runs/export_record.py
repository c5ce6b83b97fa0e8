"""What an export says of itself, so that an old one is not taken for the run's result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corl_jax.weights.folders import ADAPTER_CONFIG

RECORD_FILE = "corl_jax_export.json"
MARKS = (RECORD_FILE, "config.json", ADAPTER_CONFIG)
"""Files of which an export has one; a folder with none of them is somebody else's."""


def list_place_problems(folder: Path) -> list[str]:
    """What the export could not take the place of: a file, a link, a folder of other files."""
    if not (folder.exists() or folder.is_symlink()):
        return []
    remedy = "move it away: the export of the trained model comes here"
    if folder.is_symlink() or not folder.is_dir():
        return [f"{folder}: is no folder of its own; {remedy}"]
    if any(folder.iterdir()) and not is_export(folder):
        return [f"{folder}: holds files that are no export; {remedy}"]
    return []


def is_export(folder: Path) -> bool:
    """True for a folder with a file that every export has one of."""
    return any((folder / name).is_file() for name in MARKS)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself; None without an export, {} for one that says nothing."""
    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def describe_age(folder: Path, steps: int) -> str | None:
    """A line for an export of fewer than `steps` steps, which stays until the run is done."""
    record = read_record(folder)
    step = (record or {}).get("step")
    if record is None or (type(step) is int and step >= steps):
        return None
    return (
        f"{folder} is of {name_step(record)}; it stays as it is until the run has done its "
        f"{steps} steps"
    )


def name_step(record: dict[str, Any]) -> str:
    """The step of an export, in words."""
    step = record.get("step")
    return f"step {step}" if type(step) is int else "an unknown step"


def rename_stale(folder: Path, record: dict[str, Any] | None) -> list[str]:
    """Moves an export away that is not of the run's last step; returns a line that says so."""
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
