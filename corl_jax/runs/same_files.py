"""Whether two spellings of a path name one file: relative ones count from their own directory."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError
from corl_jax.input_files import expand_path

PATH_OPTIONS = (
    r"model\.path",
    r"(data|eval)\.path(\.\d+)?",
    r"networks\.\w+\.path",
    r"rewards\.\d+\.(use|options\..+)",
)
"""Options that hold a path, or may; regexes of whole keys."""
_HEADER = "# Relative paths start at "


def find_working_directory() -> str | None:
    """The directory that this process's relative paths start at; None if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def write_header() -> str:
    """A comment for the first line of a config.yaml: where its relative paths start."""
    start = find_working_directory()
    return f"{_HEADER}{json.dumps(start)}\n" if start is not None else ""


def read_header(text: str) -> str | None:
    """The directory that `write_header` noted; None in a file without it."""
    first = text.partition("\n")[0]
    if not first.startswith(_HEADER):
        return None
    try:
        start = json.loads(first.removeprefix(_HEADER))
    except ValueError:
        return None
    return start if isinstance(start, str) else None


def is_changed(key: str, was: Any, now: Any, start: str | None) -> bool:
    """True if an option has another value, or the same spelling and other files.

    `start`: where the old value's relative paths start; None if that is not known. Run and files
    may have been moved or copied together: then the old ones are gone, or of the same sizes.
    """
    is_path = any(re.fullmatch(pattern, key) for pattern in PATH_OPTIONS)
    if start is None or not is_path or not (isinstance(was, str) and isinstance(now, str)):
        return was != now
    old, new = resolve_path(was, start), resolve_path(now)
    if was != now or old == new:
        return old != new
    sizes = _sizes(old)
    return bool(sizes) and sizes != _sizes(new)


def resolve_path(value: str, start: str | None = None) -> str:
    """A path or FILE.py:FUNCTION without links and relative parts; a URL as it is."""
    if "://" in value:
        return value
    path, colon, function = value.rpartition(":")
    if not (colon and path.endswith(".py")):
        path, colon, function = value, "", ""
    with contextlib.suppress(InputError):  # a variable that is no longer set stays as it is
        path = expand_path(path)
    resolved = os.path.realpath(os.path.join(start or find_working_directory() or "", path))
    return f"{resolved}{colon}{function}"


def _sizes(resolved: str) -> dict[str, int]:
    """Bytes of each file of a path, directory or glob, by its name below it; of no file: empty."""
    path = resolved.rpartition(":")[0] if ".py:" in resolved else resolved
    sizes = {}
    for found in map(Path, [path] if os.path.exists(path) else glob.glob(path)):
        for file in [found, *found.rglob("*")] if found.is_dir() else [found]:
            if file.is_file():
                name = file.relative_to(found) if found.is_dir() else file.name
                sizes[str(name)] = file.stat().st_size
    return sizes
