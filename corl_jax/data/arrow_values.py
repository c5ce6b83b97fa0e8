"""Converts values of Arrow columns to Python values."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from corl_jax.data.columns import BYTE_ORDER_MARK, COLUMNS
from corl_jax.errors import InputError, take_first_line

# Errors of a single value: a text that is no UTF-8, a date out of Python's range.
UNREADABLE = (ValueError, OverflowError)

logger = logging.getLogger(__name__)


class ValueReader:
    """Reads single values of the columns of a source.

    `names` maps the name of a row's value to its column. A value that cannot be converted costs the
    row if its column is needed. In any other column it is None, with one warning a column.
    """

    def __init__(self, names: Mapping[str, str], required: Collection[str]):
        self._names = names
        self._needed = {*COLUMNS, *required}
        self._unread: set[str] = set()  # columns for which a warning was given

    def read(self, name: str, array: Any, offset: int) -> Any:
        """Returns value `offset` of an array. Raises InputError if it cannot be read."""
        try:
            return _convert_scalar(array[offset])
        except UNREADABLE as error:
            column = self._names[name]
            if name in self._needed:
                raise InputError(f"column {column} cannot be read ({error})") from error
            if column not in self._unread:
                self._unread.add(column)
                logger.warning(
                    "data: values of column %s, which no option names, cannot be read (%s); they "
                    "are null", column, take_first_line(error),
                )  # fmt: skip
            return None


def convert_array(array: Any) -> list:
    """Returns the values of an array; values that cannot be converted become None."""
    values = []
    for scalar in array:
        try:
            values.append(_convert_scalar(scalar))
        except UNREADABLE:
            values.append(None)  # reported when its row is asked for
    return values


def _convert_scalar(scalar: Any) -> Any:
    """Returns a scalar's value; a text loses a byte order mark at its start."""
    value = scalar.as_py()
    return value.removeprefix(BYTE_ORDER_MARK) if isinstance(value, str) else value
