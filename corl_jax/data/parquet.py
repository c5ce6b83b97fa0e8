"""Parquet files as a random-access list of rows, checked when opened."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from corl_jax.data import other_formats
from corl_jax.data.parquet_files import find_files, first_line
from corl_jax.errors import InputError
from corl_jax.input_files import describe_lfs_pointer, is_lfs_pointer

COLUMNS = ("prompt", "real_image", "qa_problem", "qa_solution", "qa_type")
IMAGE_COLUMN = "real_image"
CACHE_BYTES = 2**30


class Source(Protocol):
    """What the loader needs of a data set: rows by number, and whole columns by name."""

    @property
    def names(self) -> Mapping[str, str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    def column(self, name: str) -> list: ...
    def where(self, row: int) -> str: ...


class ParquetSource:
    """Rows of one or more parquet files by number, in file order, as dicts of Python values.

    `columns` maps a standard name (`COLUMNS`) to the file's name for it; a standard name that
    is not mapped is looked for under its own name. Every other column of the file is kept under
    its own name, unless a mapped column takes that name.
    Row groups are read whole and kept, the least recently used ones dropped beyond
    `cache_bytes`. Only paths and settings are pickled.

    Raises:
        InputError: on construction, with every problem of every file.
    """

    def __init__(
        self,
        data: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        columns: Mapping[str, str] | None = None,
        required: Sequence[str] = (),
        cache_bytes: int = CACHE_BYTES,
    ):
        self._columns = dict(columns or {})
        self._required = tuple(required)
        self._cache_bytes = cache_bytes
        self.paths = find_files(data)
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row. Raises InputError when it, or its row group, cannot be read."""
        group, offset = self._locate(row)
        arrays, values = self._arrays(group), {}
        for name, column in self.names.items():
            try:
                values[name] = arrays[column][offset].as_py()
            except (ValueError, OverflowError) as error:  # no UTF-8, no date
                raise InputError(f"column {column} cannot be read ({error})") from error
        return values

    def column(self, name: str) -> list:
        """A whole column by standard or own name, None in unreadable row groups."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        values: list = []
        for (path, group), rows in zip(self._groups, np.diff(self._starts), strict=True):
            try:
                with pq.ParquetFile(path) as file:
                    table = file.read_row_group(group, columns=[self.names[name]])
                values.extend(table[self.names[name]].to_pylist())
            # Reported when one of its rows is asked for.
            except (OSError, pa.ArrowException, ValueError, OverflowError):
                values.extend([None] * int(rows))
        return values

    def where(self, row: int) -> str:
        """The file and the row in it, for messages."""
        path, _ = self._groups[self._locate(row)[0]]
        first = next(i for i, (other, _) in enumerate(self._groups) if other == path)
        return f"{path} row {row - int(self._starts[first])}"

    def __getstate__(self) -> dict[str, Any]:
        kept = ("paths", "_columns", "_required", "_cache_bytes")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        schema, row_groups = _read_footers(self.paths)
        self.names = _resolve_columns(schema, self._columns, self._required, self.paths[0])
        self._groups = [(path, group) for path, group, _ in row_groups]
        self._starts = np.cumsum([0] + [rows for _, _, rows in row_groups])
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[int, dict[str, Any]] = collections.OrderedDict()
        self._cached_bytes = 0
        self._unreadable: dict[int, str] = {}

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return group, row - int(self._starts[group])

    def _arrays(self, group: int) -> dict[str, Any]:
        """The columns of a row group, from the cache or the file."""
        with self._lock:  # one reader at a time; decoding, which is the slow part, is outside
            if group in self._unreadable:
                raise InputError(self._unreadable[group])
            if group not in self._cache:
                self._cache[group] = self._read(group)
                self._cached_bytes += _size(self._cache[group])
            self._cache.move_to_end(group)
            while len(self._cache) > 1 and self._cached_bytes > self._cache_bytes:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= _size(dropped)
            return self._cache[group]

    def _read(self, group: int) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, number = self._groups[group]
        columns = list(set(self.names.values()))
        try:
            with pq.ParquetFile(path) as file:
                table = file.read_row_group(number, columns=columns)
        except (OSError, pa.ArrowException) as error:
            message = f"{path}: row group {number} is unreadable ({first_line(error)})"
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


def held_out(source: Source, n: int) -> tuple[Rows, Rows]:
    """(training rows, the last `n` rows) for evaluation when no file of its own is given."""
    if not 0 < n < len(source):
        raise InputError(
            f"data: cannot hold out {n} of {len(source)} rows; expected 1 to {len(source) - 1}"
        )
    cut = len(source) - n
    return Rows(source, 0, cut), Rows(source, cut, len(source))


def _read_footers(paths: Sequence[str]) -> tuple[Any, list[tuple[str, int, int]]]:
    """The common schema, and (path, row group, rows) of every row group that has rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    problems, schemas, row_groups = [], {}, []
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                meta = file.metadata
                schemas[path] = file.schema_arrow
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            problems.append(_describe_unreadable(path, error))
            continue
        rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        row_groups += [(path, group, count) for group, count in enumerate(rows) if count]
    first = next(iter(schemas), None)
    for path, schema in schemas.items():
        difference = _schema_difference(schema, schemas[first])
        if difference:
            problems.append(f"{path}: its columns differ from those of {first}: {difference}")
    if schemas and not row_groups and not problems:
        problems.append(f"{', '.join(paths)}: found 0 rows; expected at least one")
    if problems:
        raise InputError(problems)
    return schemas[first], row_groups


def _describe_unreadable(path: str, error: Exception) -> str:
    if is_lfs_pointer(Path(path)):
        return describe_lfs_pointer(Path(path))
    size = os.path.getsize(path) if os.path.exists(path) else 0
    remedy = other_formats.describe_file(path) or "copy or write it again"
    return f"{path}: not a readable parquet file ({size:,} bytes; {first_line(error)}); {remedy}"


def _schema_difference(schema: Any, expected: Any) -> str:
    here = {field.name: str(field.type) for field in schema}
    there = {field.name: str(field.type) for field in expected}
    names = [name for name in {**there, **here} if here.get(name) != there.get(name)]
    return "; ".join(
        f"{name} is {here.get(name, 'absent')}, not {there.get(name, 'absent')}" for name in names
    )


def _resolve_columns(
    schema: Any, columns: Mapping[str, str], required: Sequence[str], path: str
) -> dict[str, str]:
    """{name given out: column of the file}, with every problem reported at once."""
    problems = [
        f"data.columns.{name}: unknown standard name; expected one of {', '.join(COLUMNS)}"
        for name in columns
        if name not in COLUMNS
    ]
    found = list(schema.names)
    names = {name: columns.get(name, name) for name in COLUMNS if columns.get(name, name) in found}
    for name in dict.fromkeys((*required, *(name for name in columns if name in COLUMNS))):
        wanted = columns.get(name, name)
        if wanted not in found:
            near = difflib.get_close_matches(wanted, found, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            remedy = (
                f"set data.columns.{name} to the column that holds it"
                if name in COLUMNS
                else "add it to the data, or leave out what asks it"
            )
            problems.append(
                f"{path}: column {wanted} (for {name}) is missing; {hint}found "
                f"{', '.join(found)}; {remedy}"
            )
    for name, column in names.items():
        problems += _type_problem(path, name, schema.field(column))
    if problems:
        raise InputError(problems)
    taken = set(names.values())
    return names | {name: name for name in found if name not in taken and name not in names}


def _type_problem(path: str, name: str, field: Any) -> list[str]:
    import pyarrow as pa

    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if name == IMAGE_COLUMN:
        if pa.types.is_struct(kind):
            inner = [part.type for part in kind if part.name == "bytes"]
            kind = inner[0] if inner else kind
        good = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        expected = "struct<bytes: binary, path: string> or binary"
    else:
        good = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        expected = "string"
    if good or pa.types.is_null(kind):
        return []
    return [f"{path}: column {field.name} (for {name}) is {field.type}; expected {expected}"]


def _size(arrays: Mapping[str, Any]) -> int:
    return sum(array.nbytes for array in arrays.values())
