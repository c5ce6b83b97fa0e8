"""Configs as files: read, merged with overrides, checked before anything else happens, described.

A config is a YAML file, optionally on top of another one (`base: other.yaml`, relative to the
file), with `key.path=value` overrides from the command line; values are parsed as YAML. Unknown
keys are refused with the nearest known name, and all problems are reported at once.
"""

from __future__ import annotations

import collections
import difflib
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import annotated_types
import pydantic
import yaml

from corl_jax.config import Config, Reward
from corl_jax.config_fields import Section
from corl_jax.errors import InputError

MAX_CHARACTERS = 2**20  # of a file; our largest has 2**11
LIMITS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "min_length": "{} or more"}


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config of a file and its overrides (`key.path=value`).

    Raises:
        InputError: every problem found, each with its key.
    """
    tree = _read(Path(path), [])
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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe(section: type[Section] = Config, prefix: str = "") -> str:
    """Every option on a line: key, default, type and meaning."""
    lines = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
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
        with path.open(encoding="utf-8") as file:
            tree = _parse(file.read(MAX_CHARACTERS + 1)) or {}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --config wants a YAML file") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: found {type(tree).__name__}, expected a mapping of options")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read(path.parent / str(base), [*seen, path.resolve()]), tree)


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
        tree[leaf] = _parse(value)
    except ValueError as error:
        return [f"argument {text!r}: value is not valid YAML: {error}"]
    return []


def _parse(text: str) -> Any:
    """A YAML document. Raises ValueError for what is none, or too large with its aliases."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        tree = yaml.load(text, _Loader)
        size = _expanded(tree, {})
    except RecursionError:
        raise ValueError("it is nested too deeply, or refers to itself") from None
    except Exception as error:  # yaml's constructors end in many types, on "!!int ''" for one
        raise ValueError(str(error) or type(error).__name__) from None
    # Aliases of aliases double a tree with every line.
    if size > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS:,} values, aliases written out")
    return tree


def _expanded(value: Any, known: dict[int, int]) -> int:
    """How many values a tree has with its aliases written out; RecursionError for a cycle."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        children = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(value)]


class _Loader(yaml.SafeLoader):
    """Plain YAML, except that 1e-4 is a number and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _explain(item: Any) -> tuple[str, str]:
    """(key and value found, what is wrong) of one of pydantic's errors."""
    # A value of several types has an error for each, with the type's name behind the key.
    key = ".".join(str(part) for part in item["loc"] if part not in ("str", "list[str]"))
    if item["type"] == "extra_forbidden":
        known = _known(item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.0)[0]
        return f"{key}: ", f"unknown key; did you mean {near}? (known: {', '.join(known)})"
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
