"""Finds the parquet files of a path, directory, glob, list or hub dataset id."""

from __future__ import annotations

import glob
import logging
import os
import re
import urllib.parse
from collections.abc import Sequence

from corl_jax.data import other_formats, splits
from corl_jax.errors import InputError, Problems
from corl_jax.hub_headers import fetch_snapshot
from corl_jax.input_files import expand_path

HUB_PREFIX = "hf://datasets/"
# owner/name[@revision][/glob]; the revisions that the hub makes itself have slashes.
HUB_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[^/]+|[^/]+))?(?:/(?P<pattern>.+))?"
)
ALL_FILES = "**/*.parquet"
MAX_FILES_NAMED = 3  # in a message
_WILDCARD = re.compile(r"[*?[]")

logger = logging.getLogger(__name__)


def find_files(data: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Returns the parquet files named by a file, directory, glob, list of these, or hub dataset.

    A hub dataset is `owner/name[@revision]` or `hf://datasets/owner/name[@revision][/GLOB]`. A
    local path of the same name wins. Directories are searched recursively. `~` and `$VAR` are
    replaced. A list may name files of several splits; this gives a warning.

    Raises:
        InputError: nothing found, one file twice, a directory, glob or hub dataset with several
            splits, or the hub cannot be reached.
    """
    entries = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not entries:
        raise InputError("data: found an empty list; expected at least one parquet file")
    paths = [path for entry in entries for path in _expand(expand_path(entry))]
    _refuse_repeated_files(paths)
    if len(entries) > 1:
        _warn_of_splits(paths)
    return paths


def take_first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refuse_repeated_files(paths: Sequence[str]) -> None:
    """Raises an InputError for files that are named twice, also under two spellings."""
    problems = Problems()
    spelling: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real not in spelling:
            spelling[real] = path
            continue
        first = spelling[real]
        other = "" if first == path else f": {path} is the same file"
        problems.add(f"data: {first} is named twice{other}; name it once")
    problems.raise_any()


def _warn_of_splits(paths: Sequence[str]) -> None:
    folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
    groups = splits.group_by_split(paths, os.path.commonpath(folders))
    if splits.has_several_splits(groups):
        logger.warning(
            "data: the list names %s; the rows of all are read", splits.describe_groups(groups)
        )


def _expand(entry: str) -> list[str]:
    if os.path.isfile(entry):
        return [entry]
    if os.path.isdir(entry):
        return _list_one_split(entry, ALL_FILES, entry, entry)
    if not entry.startswith(HUB_PREFIX):
        root = _find_root(entry)
        if _list_files(root, os.path.relpath(entry, root)):
            return _list_one_split(root, os.path.relpath(entry, root), entry, root)
    match = _match_hub_id(entry)
    if match is None:
        raise InputError(_describe_missing(entry))
    pattern = match["pattern"] or ALL_FILES
    shown = HUB_PREFIX + match["repo"] + (f"@{match['revision']}" if match["revision"] else "")
    root = _download(match["repo"], match["revision"], pattern)
    return _list_one_split(root, pattern, entry, shown)


def _match_hub_id(entry: str) -> re.Match[str] | None:
    """Returns the parts of a hub dataset's id; None for a text that is none."""
    if entry.startswith(HUB_PREFIX):
        return HUB_ID.fullmatch(entry.removeprefix(HUB_PREFIX))
    # Without hf:// only owner/name is an id; a longer path is a local one with an error in it.
    match = HUB_ID.fullmatch(entry)
    if match and (match["pattern"] or entry.startswith(".") or entry.endswith(".parquet")):
        return None
    return match


def find_hub_dataset(entry: str) -> str | None:
    """Returns owner/name of an entry that `find_files` takes from the hub; None for a path."""
    match = None if os.path.exists(entry) else _match_hub_id(entry)
    return match["repo"] if match else None


def _describe_missing(entry: str) -> str:
    text = (
        f"data: {entry} not found; expected a parquet file, a directory or glob of them, or a hub "
        "dataset id owner/name"
    )
    root = _find_root(entry)
    if not _WILDCARD.search(entry) or not os.path.isdir(root):
        return text
    return f"{text}. {root}: {other_formats.describe_folder(root)}"


def _find_root(pattern: str) -> str:
    """Returns the folder of a glob above its first wildcard."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if _WILDCARD.search(part)), len(parts) - 1)
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")


def _list_files(root: str, pattern: str) -> list[str]:
    """Returns the files that match a pattern below `root`, and the files in matching folders."""
    prefix = "" if root == "." else glob.escape(root)
    files = set()
    for path in glob.glob(os.path.join(prefix, pattern), recursive=True):
        if os.path.isfile(path):
            files.add(path)
        # The pattern **/*.parquet also matches a folder `rows.parquet`, and the files in it.
        elif not pattern.endswith(ALL_FILES):
            inside = glob.glob(os.path.join(glob.escape(path), ALL_FILES), recursive=True)
            files.update(filter(os.path.isfile, inside))
    # Sorted: the order of rows must not depend on the file system.
    return sorted(files)


def _list_one_split(root: str, pattern: str, entry: str, shown: str) -> list[str]:
    """Returns the files that match a pattern below `root`; all must be of one split.

    `shown` is the name of `root` as a user writes it.
    """
    paths = _list_files(root, pattern)
    if not paths:
        problem = f"data: {entry} holds no file that matches {pattern}"
        if shown.startswith(HUB_PREFIX):
            converted = f"{shown.partition('@')[0]}@refs/convert/parquet"
            raise InputError(f"{problem}; the hub's own conversion may be at {converted}")
        raise InputError(f"{problem}; {other_formats.describe_folder(root)}")
    groups = splits.group_by_split(paths, root)
    if splits.has_several_splits(groups):
        part = splits.suggest_pattern(groups, root, lambda part: _list_files(root, part))
        parts = [part] if isinstance(part, str) else part
        names = [name if shown == "." else f"{shown.rstrip('/')}/{name}" for name in parts]
        more = ", .." if len(names) > MAX_FILES_NAMED else ""
        example_list = f"[{', '.join(names[:MAX_FILES_NAMED])}{more}]"
        example = names[0] if isinstance(part, str) else example_list
        raise InputError(
            f"data: {entry} holds {splits.describe_groups(groups)}; name the files of one, for "
            f"example {example}"
        )
    return paths


def _download(repo: str, revision: str | None, pattern: str) -> str:
    """Downloads the files of a hub dataset that match; returns their folder in the hub's cache."""
    if not pattern.endswith(".parquet"):  # a folder
        pattern = f"{pattern.rstrip('/')}/*.parquet"
    try:
        return fetch_snapshot(
            repo,
            repo_type="dataset",
            # refs%2Fconvert%2Fparquet, as in the hub's URLs
            revision=revision and urllib.parse.unquote(revision),
            # In the hub's patterns * matches slashes too, and **/ would exclude files at the top.
            allow_patterns=[pattern.removeprefix("**/")],
        )
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        raise InputError(
            f"data: {repo} is neither a local path nor a dataset that could be fetched from the "
            f"hub ({type(error).__name__}: {take_first_line(error)}). Offline, fetch it elsewhere "
            f"with `hf download --repo-type dataset {repo} --local-dir DIR` and give DIR"
        ) from error
