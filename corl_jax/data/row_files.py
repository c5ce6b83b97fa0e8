"""Finds the files of rows of a path, directory, glob, list or hub dataset id."""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import re
import urllib.parse
from collections.abc import Sequence

from corl_jax.data import other_formats, splits
from corl_jax.data.other_formats import FORMATS, SIDE_FILES, find_suffix
from corl_jax.errors import InputError, Problems, take_first_line
from corl_jax.hub_headers import fetch_snapshot
from corl_jax.input_files import expand_path

HUB_PREFIX = "hf://datasets/"
# owner/name[@revision][/glob]; the revisions that the hub makes itself have slashes.
HUB_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[^/]+|[^/]+))?(?:/(?P<pattern>.+))?"
)
ALL_FILES = "**/*.parquet"
SUFFIXES = {suffix for kind in FORMATS.values() for suffix in kind}
MAX_FILES_NAMED = 3  # in a message
_WILDCARD = re.compile(r"[*?[]")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FileChoice:
    """The files to look for in directories and globs."""

    kind: str  # name of a format in other_formats.FORMATS
    split: str | None  # None: all files, which must then be of one split

    @property
    def patterns(self) -> list[str]:
        """Globs of all files of the format below a folder."""
        ends = ("", *other_formats.COMPRESSED) if self.kind != "parquet" else ("",)
        suffixes = FORMATS[self.kind]
        return [f"**/*{suffix}{end}" for suffix in suffixes for end in ends]


def find_files(
    data: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    kind: str = "parquet",
    split: str | None = None,
) -> list[str]:
    """Returns the files named by a file, directory, glob, list of these, or hub dataset.

    Directories are searched recursively for files of the format `kind`. With `split`, files whose
    names have another split are left out. A hub dataset is parquet: `owner/name[@revision]` or
    `hf://datasets/owner/name[@revision][/GLOB]`. A local path of the same name wins. `~` and `$VAR`
    are replaced. A list may name files of several splits; this gives a warning.

    Raises:
        InputError: nothing found, one file twice, a directory, glob or hub dataset with several
            splits, or the hub cannot be reached.
    """
    entries = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not entries:
        raise InputError("data: found an empty list; expected at least one parquet file")
    choice = FileChoice(kind, split)
    paths = [path for entry in entries for path in _expand(expand_path(entry), choice)]
    _refuse_repeated_files(paths)
    if len(entries) > 1:
        _warn_of_splits(paths)
    return paths


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


def parse_hub_id(entry: str) -> re.Match[str] | None:
    """Returns the parts repo, revision and pattern of a hub dataset's id; None for a local path.

    A local path of the same name wins.
    """
    if os.path.exists(entry):
        return None
    if entry.startswith(HUB_PREFIX):
        return HUB_ID.fullmatch(entry.removeprefix(HUB_PREFIX))
    # Without hf:// only owner/name is an id; a longer path is a local one with an error in it.
    match = HUB_ID.fullmatch(entry)
    if match and (match["pattern"] or entry.startswith(".") or find_suffix(entry) in SUFFIXES):
        return None
    return match


def list_matches(entry: str) -> list[str]:
    """Returns the files and folders that a path or glob names."""
    root = find_root(entry)
    pattern = os.path.relpath(entry, root)
    return sorted(glob.glob(os.path.join(glob.escape(root), pattern), recursive=True))


def _expand(entry: str, choice: FileChoice) -> list[str]:
    if os.path.isfile(entry):
        if choice.split is None:
            return [entry]
        groups = splits.group_by_split([entry], os.path.dirname(entry) or ".")
        return _choose_split(groups, entry, choice.split)
    if os.path.isdir(entry):
        return _list_one_split(entry, None, entry, entry, choice)
    if not entry.startswith(HUB_PREFIX):
        root = find_root(entry)
        pattern = os.path.relpath(entry, root)
        if _list_files(root, pattern, choice):
            return _list_one_split(root, pattern, entry, root, choice)
    match = parse_hub_id(entry)
    if match is None:
        raise InputError(_describe_missing(entry))
    pattern = match["pattern"]
    shown = HUB_PREFIX + match["repo"] + (f"@{match['revision']}" if match["revision"] else "")
    root = _download(match["repo"], match["revision"], pattern or ALL_FILES)
    return _list_one_split(root, pattern, entry, shown, choice)


def find_hub_dataset(entry: str) -> str | None:
    """Returns owner/name of an entry that `find_files` takes from the hub; None for a path."""
    match = parse_hub_id(entry)
    return match["repo"] if match else None


def _describe_missing(entry: str) -> str:
    text = (
        f"data: {entry} not found; expected a parquet file, a directory or glob of them, or a hub "
        "dataset id owner/name"
    )
    root = find_root(entry)
    if not _WILDCARD.search(entry) or not os.path.isdir(root):
        return text
    return f"{text}. {root}: {other_formats.describe_folder(root)}"


def find_root(pattern: str) -> str:
    """Returns the folder of a glob above its first wildcard."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if _WILDCARD.search(part)), len(parts) - 1)
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")


def _list_files(root: str, pattern: str | None, choice: FileChoice) -> list[str]:
    """Returns the files that match a pattern below `root`, and the files in matching folders.

    Without a pattern, all files of the format below `root`.
    """
    prefix = "" if root == "." else glob.escape(root)
    files: set[str] = set()
    for part in [pattern] if pattern else choice.patterns:
        for path in glob.glob(os.path.join(prefix, part), recursive=True):
            if os.path.isfile(path):
                if pattern or os.path.basename(path) not in SIDE_FILES:
                    files.add(path)
            # The pattern **/*.parquet also matches a folder `rows.parquet`, and the files in it.
            elif pattern and not pattern.endswith(ALL_FILES):
                files.update(_list_files(path, None, choice))
    # Sorted: the order of rows must not depend on the file system.
    return sorted(files)


def _list_one_split(
    root: str, pattern: str | None, entry: str, shown: str, choice: FileChoice
) -> list[str]:
    """Returns the files that match a pattern below `root`; all must be of one split.

    `shown` is the name of `root` as a user writes it.
    """
    paths = _list_files(root, pattern, choice)
    if not paths:
        problem = f"data: {entry} holds no file that matches {pattern or choice.patterns[0]}"
        if shown.startswith(HUB_PREFIX):
            converted = f"{shown.partition('@')[0]}@refs/convert/parquet"
            raise InputError(
                f"{problem}; the hub's own conversion may be at {converted}, and with data.split "
                "the library `datasets` reads other formats"
            )
        raise InputError(f"{problem}; {other_formats.describe_folder(root)}")
    groups = splits.group_by_split(paths, root)
    if choice.split is not None:
        return _choose_split(groups, entry, choice.split)
    if splits.has_several_splits(groups):
        part = splits.suggest_pattern(groups, root, lambda part: _list_files(root, part, choice))
        parts = [part] if isinstance(part, str) else part
        names = [name if shown == "." else f"{shown.rstrip('/')}/{name}" for name in parts]
        more = ", .." if len(names) > MAX_FILES_NAMED else ""
        example_list = f"[{', '.join(names[:MAX_FILES_NAMED])}{more}]"
        example = names[0] if isinstance(part, str) else example_list
        raise InputError(
            f"data: {entry} holds {splits.describe_groups(groups)}; set data.split to one, or name "
            f"its files, for example {example}"
        )
    return paths


def _choose_split(groups: dict[frozenset[str], list[str]], entry: str, split: str) -> list[str]:
    """Returns the files of one split. Without any split in their names all files are `train`."""
    words = splits.find_splits(split) or frozenset([split])
    paths = groups.get(words)
    if paths is None and words == {"train"} and not splits.has_several_splits(groups):
        paths = groups.get(frozenset())
    if paths is None:
        names = splits.describe_groups(groups) if any(groups) else "files that name no split"
        raise InputError(
            f"data: {entry} has no split {split}; it holds {names}; name one of these, or the files"
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
