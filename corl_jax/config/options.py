"""Lists the options of the schema, finds their types and describes these."""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeGuard

import annotated_types

from corl_jax.config.fields import Section
from corl_jax.config.schema import Config

LIMITS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "min_length": "{} or more"}
Location = tuple[str | int, ...]
"""Place in the tree of a config: ("rewards", 0, "name") is the name of the first reward."""


def describe(section: type[Section] = Config, prefix: str = "") -> str:
    """Returns a line for each option: key, default, type and meaning."""
    lines = []
    for name, field in section.model_fields.items():
        key, kind = prefix + name, field.annotation
        if is_section(kind):
            lines.append(f"{key}: {(kind.__doc__ or '').splitlines()[0]}")
            lines.append(describe(kind, f"{key}."))
            continue
        default = "required"
        if not field.is_required():
            default = format_default(field.get_default(call_default_factory=True))
        values = " ".join([describe_type(kind), *describe_limits(field.metadata)]).replace("`", "")
        lines.append(f"  {key} = {default}  # {values}; {field.description}")
    if (named := named_block(section)) is not None:
        lines.append(describe(named, f"{prefix}NAME."))
    return "\n".join(lines)


def format_default(value: Any) -> str:
    """Returns a default as YAML has it: null, true, 1.0e-06, [a, b] or text."""
    return value if isinstance(value, str) and value else json.dumps(value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (whole key, value) of each option; lists and empty blocks are values."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def describe_type(kind: Any) -> str:
    """Returns a type in the words of a reader of YAML."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return " ".join([describe_type(args[0]), *describe_limits(args[1:])])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe_type, args))
    if origin is list:
        return "list of blocks" if is_section(args[0]) else f"list of {describe_type(args[0])}"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true, false"}
    return names.get(kind, "null" if kind is type(None) else "block")


def describe_limits(metadata: Iterable[Any]) -> list[str]:
    """Returns the bounds in the metadata of a pydantic field, as "≥ 1"."""
    texts = []
    for item in metadata:
        # Field(gt=0, allow_inf_nan=False) groups its bounds; a single bound stands alone.
        for part in getattr(item, "metadata", None) or [item]:
            for name, text in LIMITS.items():
                value = getattr(part, name, None)
                if isinstance(part, annotated_types.BaseMetadata) and value is not None:
                    texts.append(text.format(value))
    return texts


def named_block(section: type[Section]) -> type[Section] | None:
    """Returns the type of the blocks that a user names in a section; None without such blocks."""
    if section.model_config.get("extra") != "allow":
        return None
    # The annotation is dict[str, BLOCK], as text because of `from __future__ import annotations`.
    return typing.get_args(typing.get_type_hints(section)["__pydantic_extra__"])[1]


def is_section(kind: Any) -> TypeGuard[type[Section]]:
    """Returns whether a type is a block of options."""
    return isinstance(kind, type) and issubclass(kind, Section)


def list_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Yields the whole key of every option, such as train.epochs; none of blocks and list items."""
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from list_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


@functools.cache
def group_keys_by_name() -> dict[str, list[str]]:
    """Returns the name of every option -> its whole keys: every -> checkpoint.every, log.every."""
    keys: dict[str, list[str]] = {}
    for key in list_keys():
        keys.setdefault(key.rpartition(".")[2], []).append(key)
    return keys


def join_key(location: Iterable[str | int]) -> str:
    """Returns the key of a location: ("train", "epochs") is train.epochs."""
    return ".".join(map(str, location))


def find_type(location: Location) -> Any:
    """Returns the type of the value at a location, with its limits; None if there is no option."""
    kind: Any = Config
    for part in location:
        kind = _find_inner_type(kind, part)
    return kind


def find_section(location: Location) -> type[Section] | None:
    """Returns the block at a location; None for a value or an unknown key."""
    kind = find_type(location)
    return kind if is_section(kind) else None


def _find_inner_type(kind: Any, part: str | int) -> Any:
    """Returns the type of a block's option, or of an item of a list or mapping."""
    if is_section(kind):
        field = kind.model_fields.get(str(part))
        if field is None:
            return named_block(kind)
        limits = tuple(field.metadata)
        # To a type checker Annotated takes no values that are known only at run time.
        annotate = typing.cast("Any", Annotated)
        return annotate[(field.annotation, *limits)] if limits else field.annotation
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _find_inner_type(args[0], part)
    if origin in (typing.Union, types.UnionType):
        inner = (_find_inner_type(choice, part) for choice in args)
        return next((choice for choice in inner if choice is not None), None)
    if origin is list and isinstance(part, int):
        return args[0]
    return args[1] if origin is dict else None


def describe_expected(kind: Any, limits: Iterable[Any] = ()) -> str:
    """Returns a type as the words that complete "expected": "an integer >= 1 or null"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return describe_expected(args[0], args[1:])
    if origin is typing.Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe_expected, args))
    if origin is list:
        item = describe_expected(args[0])
        for single, several in (("a text", "texts"), ("a block", "blocks"), ("one of", "some of")):
            item = item.replace(single, several, 1)
        return f"a list of {item}"
    if is_section(kind):
        return f"a block with the keys {', '.join(kind.model_fields)}"
    bounds = " and ".join(describe_limits(limits)).replace("≥", ">=").replace("≤", "<=")
    if kind is int:
        bounds = bounds.replace("> 0", ">= 1")
    names = {
        str: "a text", int: "an integer", float: "a number", bool: "true or false",
        type(None): "null",
    }  # fmt: skip
    return f"{names.get(kind, 'a mapping')} {bounds}".rstrip()
