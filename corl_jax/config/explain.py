"""Explains the errors of pydantic in the words of a config: key, value found, value expected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from corl_jax.config.options import (
    Location,
    describe_expected,
    find_section,
    find_type,
    join_key,
)
from corl_jax.config.unknown_keys import explain_unknown_key, suggest_option


def explain_errors(errors: Iterable[Any]) -> Iterator[tuple[Location, str]]:
    """Yields (location, line) for each problem; the line begins with the key, if there is one."""
    seen = set()
    for error in errors:
        location = _find_location(error["loc"])
        # pydantic reports a value of several types once for each type.
        if error["type"] == "extra_forbidden" or not location or location not in seen:
            seen.add(location)
            yield from _explain_error(error, location)


def _explain_error(error: Any, location: Location) -> Iterator[tuple[Location, str]]:
    kind, value, key = error["type"], error["input"], join_key(location)
    message = error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        for place, text in explain_unknown_key(location, value):
            yield place, f"{join_key(place)}: {text}"
    elif kind == "missing":
        yield location, f"{key}: missing; give it in the file or as {_find_option(location)}=VALUE"
    elif not location:
        for line in message.splitlines():  # several options contradict each other
            yield tuple(line.partition(":")[0].split(".")), line
    elif kind == "value_error" or find_type(location) is None:
        yield location, f"{key}: found {value!r}; {message}"
    else:
        yield location, f"{key}: found {value!r}, expected {_describe_value(location, kind)}"


def _find_location(parts: Iterable[str | int]) -> Location:
    """Returns the location of a value, up to the name of a type that was tried there."""
    # ("data", "path", "list[str]", 0) -> ("data", "path")
    location: Location = ()
    for part in parts:
        if part in ("str", "list[str]") and find_section(location) is None:
            break
        location = (*location, part)
    return location


def _describe_value(location: Location, error_type: str) -> str:
    """Returns the type of the value at a location, and for a block how to set an option of it."""
    expected = describe_expected(find_type(location))
    if error_type == "finite_number":
        return expected.replace("a number", "a finite number")
    parent, is_in_list = find_section(location[:-1]), any(isinstance(x, int) for x in location)
    parent_names = parent.model_fields if parent else {}
    if find_section(location) and not is_in_list:
        # networks.ofload=true: a block with names of the user's takes any key.
        near = None if str(location[-1]) in parent_names else suggest_option(location)
        return f"{expected}; {near or f'set one of them as {_find_option(location)}=VALUE'}"
    field = parent_names.get(str(location[-1]))
    if error_type == "string_type" and field and field.annotation is str:
        # The description has the choices of an option whose names belong to a table elsewhere.
        return f"{expected}: {field.description}"
    return expected


def _find_option(location: Location) -> str:
    """Returns the key at a location; for a block the key of its first option."""
    section = find_section(location)
    return join_key((*location, next(iter(section.model_fields))) if section else location)
