"""Finds the column of parquet files for each standard name, and checks that it can be read.

Files are read one by one, so their schemas may differ in columns that nothing reads. A column of
nulls fits every type. All Arrow types of texts are one kind, and so are those of bytes and lists.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.nearest import suggest_name

COLUMNS = ("prompt", "real_image", "qa_problem", "qa_solution", "qa_type")
IMAGE_COLUMN = "real_image"
ANSWER_COLUMN = "sft_answer"  # the answer to qa_problem that supervised fine-tuning learns
BYTE_ORDER_MARK = "\ufeff"  # of a CSV file: its first column's name then begins with it

logger = logging.getLogger(__name__)


def resolve_columns(
    schemas: Mapping[str, Any], columns: Mapping[str, str], required: Sequence[str]
) -> dict[str, str]:
    """Returns the column of the files for each name of a row.

    `schemas` are Arrow schemas by path. See `ParquetSource` for `columns` and `required`.

    Raises:
        InputError: with every problem of every column.
    """
    known = (*COLUMNS, ANSWER_COLUMN)
    problems = Problems()
    for name in columns:
        if name not in known:
            problems.add(f"data.columns.{name}: unknown key; {suggest_name(name, known)}")
    for path, schema in schemas.items():
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        problems.add(f"{path}: has several columns {name}; rename all but one" for name in twice)
    if not schemas or any(
        len(set(schema.names)) < len(schema.names) for schema in schemas.values()
    ):
        raise InputError(problems)
    # Name without a byte order mark -> name in the files
    spelling = {
        name.removeprefix(BYTE_ORDER_MARK): name
        for schema in schemas.values()
        for name in schema.names
    }
    names = {
        name: spelling[columns.get(name, name)]
        for name in known
        if columns.get(name, name) in spelling and (name in COLUMNS or name in columns)
    }
    mapped = [name for name in columns if name in known]
    for name in dict.fromkeys((*required, *mapped)):
        column = columns.get(name, name)
        if column not in spelling:
            problems.add(_describe_missing(next(iter(schemas)), name, column, list(spelling)))
        elif name in required:
            problems.add(_check_files(schemas, name, spelling[column]))
    for name, column in names.items():
        problems.add(_check_types(schemas, name, column))
    problems.raise_any()
    _warn_of_absent(schemas, {n: column for n, column in names.items() if n not in required})
    # All other columns keep their names, so that rewards can read them.
    taken = set(names.values())
    rest = {n: column for n, column in spelling.items() if column not in taken and n not in names}
    return names | rest


def is_same_kind(first: Any, second: Any) -> bool:
    """Returns whether values of two Arrow types can be in one column; null fits every type."""
    from pyarrow import types

    first, second = _unwrap_type(first), _unwrap_type(second)
    if types.is_null(first) or types.is_null(second):
        return True
    for is_kind in (_is_text, _is_bytes, _is_number, types.is_boolean, types.is_struct):
        if is_kind(first):
            return bool(is_kind(second))
    if _is_list(first) and _is_list(second):
        return is_same_kind(first.value_type, second.value_type)
    return bool(first == second)


def _describe_missing(path: str, name: str, column: str, known: list[str]) -> str:
    remedy = (
        f"set data.columns.{name} to the column that holds it"
        if name in (*COLUMNS, ANSWER_COLUMN)
        else "add it to the data, or leave out what asks it"
    )
    nearest = suggest_name(column, known, "found")
    return f"{path}: column {column} (for {name}) is missing; {nearest}; {remedy}"


def _check_files(schemas: Mapping[str, Any], name: str, column: str) -> list[str]:
    """Lists problems of files without a required column, or with another kind of values in it."""
    present = [path for path, schema in schemas.items() if column in schema.names]
    absent = [path for path in schemas if path not in present]
    first = present[0]
    kinds: dict[str, list[str]] = {}
    for path in present:
        kinds.setdefault(str(schemas[path].field(column).type), []).append(path)
    expected = schemas[first].field(column).type
    problems = [
        f"{_name_files(paths)}: column {column} (for {name}) is {kind} and in {first} {expected}; "
        "expected one type"
        for kind, paths in kinds.items()
        if name not in COLUMNS and not is_same_kind(schemas[paths[0]].field(column).type, expected)
    ]
    if absent:
        problems.append(
            f"{_name_files(absent)}: column {column} (for {name}) is absent, which {first} has; "
            "add it, with nulls where nothing is known, or name the files without these"
        )
    return problems


def _check_types(schemas: Mapping[str, Any], name: str, column: str) -> list[str]:
    """Lists problems of a standard column's types that are not of its kind."""
    from pyarrow import types

    is_good, expected = _is_text, "string; write it as text"
    if name == IMAGE_COLUMN:
        is_good = _is_image
        expected = "struct<bytes: binary, path: string> or binary (how: docs/how_to/data.md)"
    wrong: dict[str, list[str]] = {}
    for path, schema in schemas.items():
        if column not in schema.names:
            continue
        kind = schema.field(column).type
        if not is_good(_unwrap_type(kind)) and not types.is_null(kind):
            wrong.setdefault(str(kind), []).append(path)
    return [
        f"{_name_files(paths)}: column {column} (for {name}) is {kind}; expected {expected}"
        for kind, paths in wrong.items()
    ]


def _warn_of_absent(schemas: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for name, column in names.items():
        absent = [path for path, schema in schemas.items() if column not in schema.names]
        if absent:
            logger.warning(
                "%s: column %s (for %s) is absent; its rows have null there",
                _name_files(absent), column, name,
            )  # fmt: skip


def _name_files(paths: Sequence[str]) -> str:
    more = len(paths) - 1
    return paths[0] if not more else f"{paths[0]} and {more:,} more file{'s' * (more > 1)}"


def _unwrap_type(kind: Any) -> Any:
    """Returns the type of the values in a dictionary or an extension type."""
    import pyarrow as pa

    while True:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_number(kind: Any) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or types.is_floating(kind)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _is_image(kind: Any) -> bool:
    """Returns whether a type holds images: bytes, the hub's Image struct, or a list of these."""
    from pyarrow import types

    if _is_list(kind):
        kind = _unwrap_type(kind.value_type)
    if types.is_struct(kind):
        inner = [_unwrap_type(field.type) for field in kind if field.name == "bytes"]
        return bool(inner) and (_is_bytes(inner[0]) or types.is_null(inner[0]))
    return _is_bytes(kind) or types.is_null(kind)
