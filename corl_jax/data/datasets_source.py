"""Reads rows that the library `datasets` has loaded, by number and by column."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from corl_jax.data.arrow_values import ValueReader, convert_array
from corl_jax.data.columns import COLUMNS, IMAGE_COLUMN, resolve_columns
from corl_jax.data.datasets_library import Part, import_library
from corl_jax.errors import InputError, Problems, take_first_line

ROWS_AT_ONCE = 1000  # of a column


class DatasetsSource:
    """Rows of parts by number, one part after the other, as dicts of Python values.

    `columns` and `required` are those of `ParquetSource`. An image may be bytes, the hub's Image,
    or a path, absolute or from the part's folder.

    Raises:
        InputError: on construction, with the problems of all columns.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        columns: Mapping[str, str] | None = None,
        required: Sequence[str] = (),
    ):
        image_column = (columns or {}).get(IMAGE_COLUMN, IMAGE_COLUMN)
        self._parts = [part for part in parts if len(part.rows)]
        if not self._parts:
            names = ", ".join(part.name for part in parts)
            raise InputError(f"{names}: found 0 rows; expected at least one")
        schemas = {part.name: _describe_schema(part.rows, image_column) for part in self._parts}
        self.names = resolve_columns(schemas, columns or {}, required)
        _refuse_mixed_values(self._parts, self.names, required)
        self._values = ValueReader(self.names, required)
        # Parts of 100 and 50 rows -> [0, 100, 150]
        self._starts = [0, *itertools.accumulate(len(part.rows) for part in self._parts)]
        self._required = tuple(required)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Returns a row. Raises InputError if a value that is needed cannot be read."""
        part, offset = self._locate(row)
        table = _read_table(part, offset)
        values = {
            name: self._values.read(name, table[column], 0)
            for name, column in self.names.items()
            if column in table.column_names
        }
        values = dict.fromkeys(self.names) | values
        if IMAGE_COLUMN in values:
            values[IMAGE_COLUMN] = _find_image(values[IMAGE_COLUMN], part)
        return values

    def column(self, name: str) -> list:
        """Returns a whole column; None in rows where it is absent or cannot be read."""
        values: list = []
        for part in self._parts:
            for array in _iterate_column(part, self.names[name]):
                values.extend(convert_array(array))
        return values

    def where(self, row: int) -> str:
        """Returns the file of a row and its number in the file, for messages."""
        part, offset = self._locate(row)
        return f"{part.name} row {offset}{_read_label(part, offset)}"

    def fingerprint(self) -> str | None:
        """Returns a hash of the texts that are needed and of the sizes of the images."""
        if self._fingerprint is None:
            total = hashlib.sha256()
            for name in sorted({*COLUMNS, *self._required}.intersection(self.names)):
                total.update(name.encode())
                for part in self._parts:
                    for array in _iterate_column(part, self.names[name]):
                        total.update(_digest(array))
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def _locate(self, row: int) -> tuple[Part, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        # starts [0, 100, 150]: row 100 -> right of index 1 -> 2 - 1 = part 1, offset 0
        index = bisect.bisect_right(self._starts, row) - 1
        return self._parts[index], row - self._starts[index]


def _describe_schema(rows: Any, image_column: str) -> Any:
    """Returns the Arrow schema of rows; texts in the column of images are paths of images."""
    import pyarrow as pa

    schema = rows.features.arrow_schema
    index = schema.get_field_index(image_column)
    kind = schema.field(index).type if index >= 0 else pa.null()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        schema = schema.set(index, pa.field(image_column, image))
    return schema


def _refuse_mixed_values(
    parts: Sequence[Part], names: Mapping[str, str], required: Sequence[str]
) -> None:
    """Raises an InputError for needed columns of JSON whose rows have different types."""
    problems = Problems()
    for part in parts:
        for name in sorted({*COLUMNS, *required}.intersection(names)):
            feature = part.rows.features.get(names[name])
            if type(feature).__name__ == "Json":  # the library's newest versions have it
                problems.add(
                    f"{part.name}: column {names[name]} (for {name}) has values of several types; "
                    "expected texts alone; write numbers in quotes"
                )
    problems.raise_any()


def _read_table(part: Part, offset: int) -> Any:
    import pyarrow as pa

    try:
        return part.rows[offset : offset + 1]
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{part.name} row {offset} is unreadable ({take_first_line(error)})"
        ) from error


def _read_label(part: Part, offset: int) -> str:
    """Returns " (NAME)" with the row's file or key; empty where there is none."""
    if part.label_column not in part.rows.column_names:
        return ""
    value = _read_table(part, offset)[part.label_column][0].as_py()
    name = value.get("path") if isinstance(value, Mapping) else value
    return f" ({name})" if name else ""


def _iterate_column(part: Part, column: str) -> Iterator[Any]:
    """Yields the Arrow arrays of a column; nulls where the part lacks it."""
    import pyarrow as pa

    if column not in part.rows.column_names:
        yield pa.nulls(len(part.rows))
        return
    rows = part.rows.select_columns([column])
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE][column]


def _digest(array: Any) -> bytes:
    """Returns a hash of values; of encoded images their sizes alone, so that no image is read."""
    import pyarrow as pa
    import pyarrow.compute

    # By name, since type checkers do not know these functions, which pyarrow makes when imported.
    call = pyarrow.compute.call_function
    if pa.types.is_struct(array.type) and "bytes" in [field.name for field in array.type]:
        array = call("struct_field", [array], pyarrow.compute.StructFieldOptions(["bytes"]))
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        array = call("binary_length", [array])
    return hashlib.sha256(repr(convert_array(array)).encode("utf-8", "replace")).digest()


def _find_image(value: Any, part: Part) -> Any:
    """Returns an image's bytes, or the path of its file, instead of a struct without bytes."""
    if isinstance(value, list):
        return [_find_image(item, part) for item in value]
    path = value
    if isinstance(value, Mapping):
        if value.get("bytes") is not None or not value.get("path"):
            return value
        path = value["path"]
    if not isinstance(path, str):
        return value
    path = os.path.join(part.folder, path) if part.folder else path
    if not part.trusted and not _is_in_cache(path):
        # A stranger's data set must not choose files of this machine.
        raise InputError(
            f"image: bytes is null and only the path {path!r} is given; expected the image itself"
        )
    return path


def _is_in_cache(path: str) -> bool:
    from huggingface_hub import constants

    config = import_library().config
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    real = os.path.realpath(path)
    return os.path.isabs(path) and any(
        real.startswith(os.path.join(os.path.realpath(folder), "")) for folder in caches
    )
