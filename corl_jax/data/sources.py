"""Opens the rows of a path: parquet files by themselves, other formats by the library `datasets`.

The format follows from the files: a folder with parquet files is parquet, whatever else it holds. A
hub dataset is read as parquet files, or by `datasets` if a configuration or split is asked for.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.data import datasets_library, other_formats
from corl_jax.data.datasets_library import Part
from corl_jax.data.datasets_source import DatasetsSource
from corl_jax.data.other_formats import FORMATS, SAVED_FILES, SIDE_FILES
from corl_jax.data.parquet import ParquetSource, Source
from corl_jax.data.row_files import HUB_PREFIX, find_files, list_matches, parse_hub_id
from corl_jax.errors import InputError
from corl_jax.input_files import describe_lfs_pointer, expand_path, is_lfs_pointer

SAVED = "saved"  # the format of a folder that `save_to_disk` of `datasets` has written
IMAGE_FOLDER = "imagefolder"
METADATA = ("metadata.jsonl", "metadata.csv")  # of a folder of images


def open_source(
    path: str | Sequence[str],
    *,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    required: Sequence[str] = (),
) -> Source:
    """Opens the rows of files, a directory, a glob, a list of these, or a hub dataset.

    `name` (a configuration) and `revision` are those of a hub dataset. `split` is one of several.

    Raises:
        InputError: nothing found, several formats or splits, unreadable files, missing columns, or
            `datasets` is needed and not installed.
    """
    entries = [expand_path(entry) for entry in ([path] if isinstance(path, str) else path)]
    chosen: dict[str, Any] = {"columns": columns, "required": required}
    hub = [match for match in map(parse_hub_id, entries) if match]
    if revision is not None:
        entries = _add_revision(entries, len(hub), revision)
        hub = [match for match in map(parse_hub_id, entries) if match]
    if hub and (name is not None or split is not None):
        if len(entries) > 1 or hub[0]["pattern"]:
            raise InputError(
                f"data: found {', '.join(entries)} with a configuration or split; expected one hub "
                "dataset owner/name, or else files without data.name and data.split"
            )
        part = datasets_library.load_hub_part(hub[0]["repo"], hub[0]["revision"], name, split)
        return DatasetsSource([part], **chosen)
    if name is not None:
        raise InputError(
            f"data.name: found {name!r}, but {', '.join(entries)} is no hub dataset; only these "
            "have configurations; leave it out"
        )
    kind = choose_format(entries) if entries and not hub else "parquet"
    if kind == "parquet":
        return ParquetSource(path if revision is None else entries, split=split, **chosen)
    _require_library(kind, entries)
    return DatasetsSource(_load_parts(kind, entries, split), **chosen)


def choose_format(entries: Sequence[str]) -> str:
    """Returns the format of local files, folders and globs: one of FORMATS, or SAVED.

    Entries without a file of a known format count as parquet, whose reader says what is wrong.

    Raises:
        InputError: the entries hold files of several formats.
    """
    kinds = {entry: _find_format(entry) for entry in entries}
    if len(set(kinds.values())) > 1:
        formats = ", ".join(f"{entry} ({kind})" for entry, kind in kinds.items())
        raise InputError(
            f"data: found several formats: {formats}; expected one; convert the others"
        )
    return kinds[entries[0]]


def _add_revision(entries: list[str], num_hub: int, revision: str) -> list[str]:
    if num_hub != 1 or len(entries) > 1:
        raise InputError(
            f"data.revision: found {revision!r} with {', '.join(entries)}; only a single hub "
            "dataset has revisions; leave it out"
        )
    match = parse_hub_id(entries[0])
    assert match
    if match["revision"]:
        raise InputError(
            f"data.revision: found {revision!r}, but {entries[0]} names a revision too; leave one "
            "of them out"
        )
    pattern = f"/{match['pattern']}" if match["pattern"] else ""
    # The slashes of refs/pr/1 would begin a pattern.
    return [f"{HUB_PREFIX}{match['repo']}@{revision.replace('/', '%2F')}{pattern}"]


def _find_format(entry: str) -> str:
    if os.path.isfile(entry):
        return _match_format(other_formats.detect_format(entry)) or "parquet"
    if any(os.path.isfile(os.path.join(entry, file)) for file in SAVED_FILES):
        return SAVED
    matches = [entry] if os.path.isdir(entry) else list_matches(entry)
    folders = [path for path in matches if os.path.isdir(path)]
    files = [path for path in matches if path not in folders]
    files += [file for folder in folders for file in other_formats.list_files(folder)]
    files = [file for file in files if os.path.basename(file) not in SIDE_FILES]
    names = collections.Counter(_match_format(other_formats.find_suffix(file)) for file in files)
    if names["parquet"] or any(file.endswith(other_formats.PARQUET_NAMES) for file in files):
        return "parquet"
    if names[IMAGE_FOLDER] and any(os.path.basename(file) in METADATA for file in files):
        return IMAGE_FOLDER
    # Images beside a table are those that its rows name.
    tables = [kind for kind in FORMATS if names[kind] and kind != IMAGE_FOLDER]
    if len(tables) > 1:
        counts = ", ".join(f"{names[kind]:,} of {kind}" for kind in tables)
        raise InputError(
            f"data: {entry} holds files of several formats ({counts}); name those of one by a glob "
            f"such as {os.path.join(entry, '**', '*' + FORMATS[tables[0]][0])}"
        )
    return tables[0] if tables else IMAGE_FOLDER if names[IMAGE_FOLDER] else "parquet"


def _match_format(suffix: str) -> str | None:
    return next((kind for kind, suffixes in FORMATS.items() if suffix in suffixes), None)


def _require_library(kind: str, entries: Sequence[str]) -> None:
    """Raises an InputError with the two remedies if `datasets` is not installed."""
    try:
        datasets_library.import_library()
    except InputError as error:
        entry = entries[0]
        convert = ""
        if os.path.isdir(entry) and kind != SAVED:
            convert = f"; or use parquet: {entry}: {other_formats.describe_folder(entry)}"
        elif os.path.isfile(entry):
            convert = f"; or use parquet: {entry}: {other_formats.describe_file(entry)}"
        raise InputError(f"data: {', '.join(entries)} ({kind}): {error}{convert}") from error


def _load_parts(kind: str, entries: Sequence[str], split: str | None) -> list[Part]:
    if kind == SAVED:
        return [datasets_library.load_saved_part(entry, split) for entry in entries]
    if kind == IMAGE_FOLDER:
        _require_folders(entries)
        return [datasets_library.load_image_folder_part(entry, split) for entry in entries]
    files = find_files(entries, kind=kind, split=split)
    _refuse_pointers(files)
    return [datasets_library.load_file_part(kind, file) for file in files]


def _require_folders(entries: Iterable[str]) -> None:
    files = [entry for entry in entries if not os.path.isdir(entry)]
    if files:
        raise InputError(
            f"data: found the images {', '.join(files)}; expected their folder, with a "
            "metadata.jsonl whose lines have file_name and the other columns"
        )


def _refuse_pointers(files: Iterable[str]) -> None:
    pointers = [Path(file) for file in files if is_lfs_pointer(Path(file))]
    if pointers:
        raise InputError([describe_lfs_pointer(path) for path in pointers])
