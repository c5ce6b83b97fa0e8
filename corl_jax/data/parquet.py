"""Reads parquet files as a random-access list of rows; checks them when they are opened."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from corl_jax.data import other_formats
from corl_jax.data.arrow_values import ValueReader, convert_array
from corl_jax.data.columns import resolve_columns
from corl_jax.data.row_files import find_files
from corl_jax.errors import InputError, Problems, take_first_line
from corl_jax.hub_headers import fetch_ranges, is_partial
from corl_jax.input_files import describe_lfs_pointer, has_lone_surrogate, is_lfs_pointer

CACHE_BYTES = 2**30
LARGE_GROUP_BYTES = 2**28  # some 1,000 images; `datasets` writes groups of 100

logger = logging.getLogger(__name__)


class Source(Protocol):
    """A data set for the loader: rows by number, and whole columns by name."""

    @property
    def names(self) -> Mapping[str, str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    def column(self, name: str) -> list: ...
    def where(self, row: int) -> str: ...
    def fingerprint(self) -> str | None: ...


class ParquetSource:
    """Rows of one or more parquet files by number, in file order, as dicts of Python values.

    `columns` maps a standard name (`COLUMNS`) to the name of its column in the files. Without a
    mapping both names are equal. All other columns keep their names, unless a mapped column takes
    the name. A column that is not `required` may be absent from some files; its values there are
    None. Of files of several splits those of `split` are read. Row groups are read whole and cached
    up to `cache_bytes`.

    Raises:
        InputError: on construction, with every problem of every file.
    """

    def __init__(
        self,
        data: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        columns: Mapping[str, str] | None = None,
        required: Sequence[str] = (),
        split: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        self._columns = dict(columns or {})
        self._required = tuple(required)
        self._cache_bytes = cache_bytes
        self.paths = find_files(data, split=split)
        self._open()
        if warning := _describe_large_groups(self._group_sizes):
            logger.warning("%s", warning)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Returns a row. Raises InputError if it, or its row group, cannot be read."""
        group, offset = self._locate(row)
        arrays = self._read_cached(group)
        return {
            name: self._values.read(name, arrays[column], offset) if column in arrays else None
            for name, column in self.names.items()
        }

    def column(self, name: str) -> list:
        """Returns a whole column; None in rows where it is absent or cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        column, values = self.names[name], []
        for (path, group), rows in zip(self._groups, np.diff(self._starts), strict=True):
            part: list = [None] * int(rows)
            if column in self._schemas[path].names:
                try:
                    with pq.ParquetFile(path) as file:
                        _fetch_columns(path, file, group, [column])
                        part = convert_array(file.read_row_group(group, columns=[column])[column])
                except (OSError, pa.ArrowException):
                    pass  # reported when one of its rows is asked for
            values.extend(part)
        return values

    def where(self, row: int) -> str:
        """Returns the file of a row and its number in the file, for messages."""
        path, _ = self._groups[self._locate(row)[0]]
        first = next(i for i, (other, _) in enumerate(self._groups) if other == path)
        return f"{path} row {row - int(self._starts[first])}"

    def fingerprint(self) -> str | None:
        """Returns None: reading all files at each start would take minutes."""
        return None

    # Only paths and settings are pickled: locks cannot be, and the cache would be large.
    def __getstate__(self) -> dict[str, Any]:
        pickled_names = ("paths", "_columns", "_required", "_cache_bytes")
        return {name: getattr(self, name) for name in pickled_names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        problems = Problems()
        self._schemas, row_groups = _read_footers(self.paths, problems)
        with problems.collect():
            self.names = resolve_columns(self._schemas, self._columns, self._required)
        problems.raise_any()
        self._groups = [(path, group) for path, group, _, _ in row_groups]
        self._group_sizes = [(path, size) for path, _, _, size in row_groups]
        # Row groups of 100, 100 and 50 rows -> [0, 100, 200, 250]; the last entry is the length.
        self._starts = np.cumsum([0] + [rows for _, _, rows, _ in row_groups])
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[int, dict[str, Any]] = collections.OrderedDict()
        self._cached_bytes = 0
        self._unreadable: dict[int, str] = {}
        self._values = ValueReader(self.names, self._required)

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        # starts [0, 100, 200, 250]: row 100 -> right of index 1 -> 2 - 1 = group 1, offset 0
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return group, row - int(self._starts[group])

    def _read_cached(self, group: int) -> dict[str, Any]:
        """Returns the columns of a row group, from the cache or the file."""
        # Two threads would read the same group twice. Decoding, the slow part, is outside.
        with self._lock:
            if group in self._unreadable:
                raise InputError(self._unreadable[group])
            if group not in self._cache:
                self._cache[group] = self._read(group)
                self._cached_bytes += _count_bytes(self._cache[group])
            # Least recently used first. The newest group stays, even if it is over the limit alone.
            self._cache.move_to_end(group)
            while len(self._cache) > 1 and self._cached_bytes > self._cache_bytes:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= _count_bytes(dropped)
            return self._cache[group]

    def _read(self, group: int) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, number = self._groups[group]
        present = set(self._schemas[path].names)
        columns = sorted(present.intersection(self.names.values()))
        try:
            with pq.ParquetFile(path) as file:
                _fetch_columns(path, file, number, columns)
                table = file.read_row_group(number, columns=columns)
        except (OSError, pa.ArrowException) as error:
            message = f"{path}: row group {number} is unreadable ({take_first_line(error)})"
            # Remembered: each row of the group would read the broken data again.
            self._unreadable[group] = message
            raise InputError(message) from error
        chunks = {name: table[name].chunks for name in columns}
        # Row groups of over 2 GB come in several chunks; a single array is cheaper to index.
        return {name: c[0] if len(c) == 1 else table[name] for name, c in chunks.items()}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a source, numbered from 0."""

    source: Source
    start: int
    stop: int

    @property
    def names(self) -> Mapping[str, str]:
        return self.source.names

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.source[self.start + row]

    def column(self, name: str) -> list:
        return self.source.column(name)[self.start : self.stop]

    def where(self, row: int) -> str:
        return self.source.where(self.start + row)

    def fingerprint(self) -> str | None:
        whole = self.source.fingerprint()
        return whole and f"{whole}[{self.start}:{self.stop}]"


def split_held_out_rows(source: Source, n: int) -> tuple[Rows, Rows]:
    """Splits a source into (training rows, the last `n` rows for evaluation)."""
    if not 0 < n < len(source):
        raise InputError(
            f"data: cannot hold out {n} of {len(source)} rows; expected 1 to {len(source) - 1}"
        )
    cut = len(source) - n
    return Rows(source, 0, cut), Rows(source, cut, len(source))


def _read_footers(
    paths: Sequence[str], problems: Problems
) -> tuple[dict[str, Any], list[tuple[str, int, int, int]]]:
    """Returns Arrow schemas by path, and (path, row group, rows, bytes) of each row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas, row_groups = {}, []
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                meta = file.metadata
                schemas[path] = file.schema_arrow
        except (OSError, pa.ArrowException, UnicodeError) as error:
            problems.add(_describe_unreadable(path, error))
            continue
        for number in range(meta.num_row_groups):
            group = meta.row_group(number)
            if group.num_rows:
                row_groups.append((path, number, group.num_rows, group.total_byte_size))
    if schemas and not row_groups and not problems:
        problems.add(f"{', '.join(paths)}: found 0 rows; expected at least one")
    if row_groups:  # files without rows, which some writers leave, may have no columns either
        schemas = {path: schemas[path] for path, *_ in row_groups}
    return schemas, row_groups


def _fetch_columns(path: str, file: Any, number: int, names: Sequence[str]) -> None:
    """Fetches columns of a row group, if the file is a copy with its header alone."""
    # Of other files pyarrow reads what it needs itself; these fields may be damaged.
    if not is_partial(path):
        return
    parts, group = [], file.metadata.row_group(number)
    for column in range(group.num_columns):
        part = group.column(column)
        # A struct such as an image has parts like image.bytes and image.path.
        if any(f"{part.path_in_schema}.".startswith(f"{name}.") for name in names):
            start = part.dictionary_page_offset or part.data_page_offset
            parts.append((start, start + part.total_compressed_size))
    fetch_ranges(path, parts)


def _describe_unreadable(path: str, error: Exception) -> str:
    if is_lfs_pointer(Path(path)):
        return describe_lfs_pointer(Path(path))
    if has_lone_surrogate(path):
        return f"{path!a}: cannot be opened, since its name is not UTF-8; rename it"
    size = os.path.getsize(path) if os.path.exists(path) else 0
    remedy = other_formats.describe_file(path) or "copy or write it again"
    return (
        f"{path}: not a readable parquet file ({size:,} bytes; {take_first_line(error)}); {remedy}"
    )


def _describe_large_groups(sizes: Sequence[tuple[str, int]]) -> str | None:
    """Returns a warning about (path, bytes) of row groups that take much memory, or None."""
    large = [(path, size) for path, size in sizes if size > LARGE_GROUP_BYTES]
    if not large:
        return None
    path, size = max(large, key=lambda item: item[1])
    more = len({other for other, _ in large}) - 1
    others = f" (as have {more:,} more files)" if more else ""
    return (
        f"{path}: has a row group of {size / 1e6:,.0f} MB{others}. A row group is read whole and "
        f"takes two to four times its size in memory. Write the file again in smaller ones and put "
        f"the new one in its place: {other_formats.rewrite_command(path, 100)}"
    )


def _count_bytes(arrays: Mapping[str, Any]) -> int:
    return sum(array.nbytes for array in arrays.values())
