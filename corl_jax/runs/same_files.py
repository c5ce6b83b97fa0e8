"""Decides whether two paths name the same file. Each relative path has a start directory."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError
from corl_jax.input_files import expand_path

_HEADER = "# Relative paths start at "


def find_working_directory() -> str | None:
    """Returns the directory where relative paths of this process start; None if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def write_header() -> str:
    """Returns a comment for the first line of config.yaml: where its relative paths start."""
    start = find_working_directory()
    return f"{_HEADER}{json.dumps(start)}\n" if start is not None else ""


def read_header(text: str) -> str | None:
    """Returns the directory in the line of `write_header`; None in a file without that line."""
    first = text.partition("\n")[0]
    if not first.startswith(_HEADER):
        return None
    try:
        start = json.loads(first.removeprefix(_HEADER))
    except ValueError:
        return None
    return start if isinstance(start, str) else None


def is_changed(was: Any, now: Any, start: str | None, is_path: bool) -> bool:
    """Returns whether an option has another value, or names other files by the same path.

    `start`: where relative paths of the old value start; None if that is not known. `is_path`:
    whether the option's value may be a path.
    """
    if start is None or not is_path or not (isinstance(was, str) and isinstance(now, str)):
        return was != now
    old, new = resolve_path(was, start), resolve_path(now)
    # Sizes are compared below only if the same text names two places.
    if was != now or old == new:
        return old != new
    # Run and files may have been moved or copied together: then the old files are gone, or have
    # the same sizes as the new ones.
    sizes = _read_sizes(old)
    return bool(sizes) and sizes != _read_sizes(new)


def resolve_path(value: str, start: str | None = None) -> str:
    """Returns a path or FILE.py:FUNCTION without links and relative parts; a URL as it is."""
    if "://" in value:
        return value
    path, colon, function = value.rpartition(":")
    # A colon may be a part of a plain path.
    if not (colon and path.endswith(".py")):
        path, colon, function = value, "", ""
    with contextlib.suppress(InputError):  # a variable that is no longer set is kept
        path = expand_path(path)
    resolved = os.path.realpath(os.path.join(start or find_working_directory() or "", path))
    return f"{resolved}{colon}{function}"


def stamp_files(folders: Iterable[Path]) -> str:
    """Returns a hash of names, sizes and times of change of all files; their bits are not read.

    With an equal stamp the files are almost certainly the same. With another one they may be.
    """
    lines = []
    for folder in sorted(set(folders)):
        for file in sorted([folder, *folder.rglob("*")] if folder.is_dir() else [folder]):
            if file.is_file():
                status = file.stat()
                lines.append(f"{os.path.realpath(file)}\t{status.st_size}\t{status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _read_sizes(resolved: str) -> dict[str, int]:
    """Returns file name -> bytes for a file, the files of a directory, or those of a glob."""
    # FILE.py:FUNCTION -> FILE.py
    path = resolved.rpartition(":")[0] if ".py:" in resolved else resolved
    sizes = {}
    for root in map(Path, [path] if os.path.exists(path) else glob.glob(path)):
        for file in [root, *root.rglob("*")] if root.is_dir() else [root]:
            if file.is_file():
                name = file.relative_to(root) if root.is_dir() else file.name
                sizes[str(name)] = file.stat().st_size
    return sizes
