"""Configs as files: read, merged with overrides, checked before anything else happens, described.

A config is a YAML file, optionally on top of another one (`base: other.yaml`, relative to the
file), with `key.path=value` overrides from the command line; values are parsed as YAML. Unknown
keys are refused with the nearest known name, and all problems are reported at once.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import annotated_types
import pydantic

from corl_jax.config.fields import Section
from corl_jax.config.schema import Config, Reward
from corl_jax.config.yaml_text import MAX_CHARACTERS, dump_yaml, parse_yaml
from corl_jax.errors import InputError
from corl_jax.input_files import expand_path, read_text
from corl_jax.nearest import suggest_name

MAX_BYTES = 4 * MAX_CHARACTERS  # of a file; UTF-8 has at most four bytes a character
RENAMED = {"objective": "stage, with the value rl, sft or vq", "grpo": "algorithm"}
"""Key of an earlier version -> what it is called now."""
LIMITS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "min_length": "{} or more"}


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config of a file and its overrides (`key.path=value`).

    Raises:
        InputError: every problem found, each with its key.
    """
    tree = _read(Path(expand_path(path)), [])
    problems = [line for text in overrides or [] for line in _override(tree, text)]
    try:
        config = validate(tree, str(path))
    except InputError as error:
        raise InputError([*problems, *error.problems]) from None
    if problems:
        raise InputError(problems)
    return config


def validate(tree: dict[str, Any], source: str) -> Config:
    """A Config of a plain dict; `source` names it in errors."""
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        found: dict[str, list[str]] = {}
        for prefix, text in map(_explain, error.errors()):
            found.setdefault(prefix, []).append(text)
    lines = [key + line for key, texts in found.items() for line in " or ".join(texts).splitlines()]
    raise InputError([f"{source}: {line}" for line in lines])


def dump(config: Config) -> str:
    """The resolved config as YAML, every option with its value."""
    return dump_yaml(config.model_dump(mode="json"))


def describe(section: type[Section] = Config, prefix: str = "") -> str:
    """Every option on a line: key, default, type and meaning."""
    lines = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        kind = field.annotation
        if _is_section(kind):
            lines.append(f"{key}: {(kind.__doc__ or '').splitlines()[0]}")
            lines.append(describe(kind, f"{key}."))
            continue
        default = (
            "required"
            if field.is_required()
            else repr(field.get_default(call_default_factory=True))
        )
        values = " ".join([kind_text(kind), *limits(field.metadata)]).replace("`", "")
        note = f"; {field.description}" if field.description else ""
        lines.append(f"  {key} = {default}  # {values}{note}")
    return "\n".join(lines)


def kind_text(kind: Any) -> str:
    """A type as a reader of YAML names it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return " ".join([kind_text(args[0]), *limits(args[1:])])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(kind_text, args))
    if origin is list:
        return "list of blocks" if args[0] is Reward else f"list of {kind_text(args[0])}"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true, false"}
    return names.get(kind, "null" if kind is type(None) else "block")


def limits(metadata: Iterable[Any]) -> list[str]:
    """Bounds, as pydantic and annotated_types keep them."""
    found = []
    for item in metadata:
        for part in getattr(item, "metadata", None) or [item]:
            for name, text in LIMITS.items():
                value = getattr(part, name, None)
                if isinstance(part, annotated_types.BaseMetadata) and value is not None:
                    found.append(text.format(value))
    return found


def _read(path: Path, seen: list[Path]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path}: its `base` leads back to itself; remove one of the links")
    try:
        tree = parse_yaml(read_text(path, "a YAML file of options", MAX_BYTES)) or {}
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: found {type(tree).__name__}, expected a mapping of options")
    tree = _drop_empty_blocks(tree, Config)
    base = tree.pop("base", None)
    if base is None:
        return tree
    try:
        below = path.parent / expand_path(str(base))
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None
    return _merge(_read(below, [*seen, path.resolve()]), tree)


def _drop_empty_blocks(tree: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """Leaves out blocks and lists without a value, as where all their lines are comments."""
    kept = {}
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        kind = field.annotation if field else None
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
        if value is None and (_is_section(kind) or typing.get_origin(kind) in (list, dict)):
            continue
        if _is_section(inner):
            if isinstance(value, dict):
                value = _drop_empty_blocks(value, inner)
            elif isinstance(value, list):
                value = [
                    _drop_empty_blocks(item, inner) if isinstance(item, dict) else item
                    for item in value
                ]
        kept[key] = value
    return kept


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], text: str) -> list[str]:
    """Sets one value; returns what is wrong with the argument."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        return [f"argument {text!r}: expected key.path=value"]
    *parents, leaf = key.split(".")
    for part in parents:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            return [f"argument {text!r}: {part} is a value, not a block of options"]
        tree = child
    try:
        tree[leaf] = parse_yaml(value)
    except ValueError as error:
        return [f"argument {text!r}: value is not valid YAML: {error}"]
    return []


def _explain(item: Any) -> tuple[str, str]:
    """(key and value found, what is wrong) of one of pydantic's errors."""
    # A value of several types has an error for each, with the type's name behind the key.
    key = ".".join(str(part) for part in item["loc"] if part not in ("str", "list[str]"))
    if item["type"] == "extra_forbidden":
        if new := RENAMED.get(key):
            return f"{key}: ", f"has a new name; use {new}"
        known = _known(item["loc"][:-1])
        return f"{key}: ", f"unknown key; {suggest_name(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{key}: ", f"missing; give it in the file or as {key}=VALUE"
    message = item["msg"].removeprefix("Value error, ")
    return (f"{key}: found {item['input']!r}; " if key else "", message)


def _known(location: tuple) -> list[str]:
    section: Any = Config
    for part in location:
        if isinstance(part, str):
            section = Reward if part == "rewards" else section.model_fields[part].annotation
    return list(section.model_fields)
