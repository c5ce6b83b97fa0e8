"""Finds the parquet files that a path, directory, glob, list or hub dataset id names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

from corl_jax.errors import InputError

HUB_PREFIX = "hf://datasets/"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test|eval)(?![a-z0-9])", re.IGNORECASE)


def find_files(data: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Parquet files named by a file, directory, glob, list of these, or hub dataset id.

    A hub id is `owner/name` or `hf://datasets/owner/name[/glob]`; a local path of the same
    name wins. Directories are searched recursively.

    Raises:
        InputError: nothing found, several splits mixed, or the hub cannot be reached.
    """
    entries = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not entries:
        raise InputError("data: found an empty list; expected at least one parquet file")
    paths = [path for entry in entries for path in _expand(os.fspath(entry))]
    doubled = sorted({path for path in paths if paths.count(path) > 1})
    if doubled:
        raise InputError([f"data: {path} is named twice" for path in doubled])
    return paths


def _expand(entry: str) -> list[str]:
    if os.path.isfile(entry):
        return [entry]
    if entry.startswith(HUB_PREFIX):
        owner, name, *rest = [*entry.removeprefix(HUB_PREFIX).split("/", 2), "**/*.parquet"]
        local = _download(f"{owner}/{name}", rest[0].removeprefix("**/"))
        return _from_directory(local, rest[0], entry)
    if os.path.isdir(entry):
        return _from_directory(entry, "**/*.parquet", entry)
    found = sorted(path for path in glob.glob(entry, recursive=True) if os.path.isfile(path))
    if found:
        return found
    if HUB_ID.fullmatch(entry) and not entry.endswith(".parquet"):
        return _from_directory(_download(entry), "**/*.parquet", entry)
    raise InputError(
        f"data: {entry} not found; expected a parquet file, a directory or glob of them, or a "
        "hub dataset id owner/name"
    )


def _from_directory(directory: str, pattern: str, entry: str) -> list[str]:
    found = sorted(glob.glob(os.path.join(glob.escape(directory), pattern), recursive=True))
    if not found:
        raise InputError(f"data: {entry} holds no file that matches {pattern}")
    matches = [SPLIT_NAME.match(os.path.basename(path)) for path in found]
    splits = sorted({match.group(1) for match in matches if match})
    if len(splits) > 1:  # training on the test split would otherwise go unnoticed
        raise InputError(
            f"data: {entry} holds the splits {', '.join(splits)}; name the files of one, for "
            f"example {entry.rstrip('/')}/**/{splits[-1]}*.parquet"
            + ("" if os.path.isdir(entry) or entry.startswith("hf:") else f" after {HUB_PREFIX}")
        )
    return found


def _download(repo: str, pattern: str = "*.parquet") -> str:
    """A local snapshot of a hub dataset's files that match; the hub's cache makes it cheap."""
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(
            repo, repo_type="dataset", allow_patterns=[pattern]
        )
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        raise InputError(
            f"data: {repo} is neither a local path nor a dataset that could be fetched from the "
            f"hub ({type(error).__name__}: {first_line(error)}). Offline, fetch it elsewhere "
            f"with `hf download --repo-type dataset {repo} --local-dir DIR` and give DIR"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
