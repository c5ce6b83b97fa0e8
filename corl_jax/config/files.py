"""Reads configs from YAML files, checks them and writes them.

A config is a YAML file, optionally on top of another one (`base: other.yaml`, relative to the
file), with `key.path=value` overrides from the command line. Values are parsed as YAML. Unknown
keys are refused with the option that was meant. All problems are reported together, each with the
file that has the value, or with "command line".
"""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from corl_jax.config.explain import explain_errors
from corl_jax.config.fields import Section
from corl_jax.config.options import (
    Location,
    describe_expected,
    find_section,
    find_type,
    is_section,
    named_block,
)
from corl_jax.config.schema import Config
from corl_jax.config.shipped import find_config, list_configs
from corl_jax.config.unknown_keys import list_known_keys, suggest_option
from corl_jax.config.yaml_text import MAX_CHARACTERS, dump_yaml, parse_yaml
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import expand_path, read_text

MAX_BYTES = 4 * MAX_CHARACTERS  # UTF-8 has at most four bytes a character
COMMAND_LINE = "command line"
STAGES_KEY = "stages"
"""Key of the list that `config.chains` reads."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The options of one file of a config, or of a call in Python."""

    source: str
    tree: dict[str, Any]
    place: str = ""  # of the tree in its source, in front of a key, such as "stages[1]."


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Returns the config of a file with its overrides (`key.path=value`).

    Raises:
        InputError: listing every problem with its origin, a file or the command line, and its key.
    """
    return _complete_single(read_layers(Path(expand_path(path))), overrides or [])


def make_config(base: str | Path | Mapping[str, Any], options: Mapping[str, Any]) -> Config:
    """Returns the config of a file or of a mapping of options, with `options` on top.

    A mapping among `options` is merged into the block of its name. A name may be a `key.path`.

    Raises:
        InputError: listing every problem with its origin, a file or an argument, and its key.
    """
    return _complete_single(make_layers(base, options), [])


def make_layers(base: str | Path | Mapping[str, Any], options: Mapping[str, Any]) -> list[Layer]:
    """Returns the layers of a call in Python; see `make_config`."""
    top: dict[str, Any] = {}
    for key, value in options.items():
        value = simplify(value)
        for part in reversed(key.split(".")):
            value = {part: value}
        top = _merge(top, value)
    if isinstance(base, Mapping):
        below = [Layer("config", drop_empty_blocks(simplify(base), Config))]
    else:
        below = read_layers(Path(expand_path(base)))
    return [Layer("argument", top), *below] if top else below


def simplify(value: Any) -> Any:
    """Returns a copy of a value of Python with what YAML would have: texts, lists, dicts."""
    if isinstance(value, Mapping):
        return {str(key): simplify(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [simplify(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _complete_single(layers: Sequence[Layer], overrides: Sequence[str]) -> Config:
    """Returns the config of layers that describe one run. Raises: InputError."""
    for layer in layers:
        if layer.tree.get(STAGES_KEY) is not None:
            raise InputError(
                f"{layer.source}: {STAGES_KEY}: found several stages, expected one run; only "
                "`corl-jax train` and `corl-jax plan` take them; a study has `after` instead"
            )
    return complete(layers, overrides)


def complete(
    layers: Sequence[Layer], overrides: Sequence[str], own_overrides: Sequence[str] = (),
    place: str = "",
) -> Config:  # fmt: skip
    """Returns the config of layers, the first on top, with overrides of the command line.

    `own_overrides` come last; the command line has `place` in front of their keys.

    Raises:
        InputError: listing every problem with its origin and its key.
    """
    tree, problems = merge_layers(layers), Problems()
    origins: dict[Location, str] = {}  # location -> what stands in front of its key
    for start, texts in (("", overrides), (place, own_overrides)):
        for text in texts:
            with problems.collect(f"{COMMAND_LINE}: {start}"):
                origins[_apply_override(tree, text)] = f"{COMMAND_LINE}: {start}"
    config = problems.attempt(_validate, tree, lambda place: _find_origin(place, layers, origins))
    problems.raise_any()
    assert config is not None  # otherwise there was a problem
    return config


def validate(tree: dict[str, Any], source: str) -> Config:
    """Returns the Config of a plain dict.

    Raises:
        InputError: listing every problem; each begins with `source`.
    """
    return _validate(tree, lambda _: f"{source}: ")


def _validate(tree: dict[str, Any], find_origin: Callable[[Location], str]) -> Config:
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        problems = [*explain_errors(error.errors())]
    raise InputError([f"{find_origin(location)}{line}" for location, line in problems])


def dump(config: Config) -> str:
    """Returns the config as YAML, every option with its value."""
    return dump_yaml(config.model_dump(mode="json"))


def read_layers(path: Path, seen: Sequence[Path] = ()) -> list[Layer]:
    """Returns the layers of a config: its file, and below it those of its `base`.

    `seen`: the files that led to this one.

    Raises:
        InputError: a file cannot be read, is no mapping, or its `base` leads back to it.
    """
    # Resolved, so that a link to an earlier file counts as the same file.
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
    # Before the merge: an empty block must not hide the block of the base.
    tree = drop_empty_blocks(tree, Config)
    base = tree.pop("base", None)
    if base is None:
        return [Layer(str(path), tree)]
    try:
        below = path.parent / expand_path(str(base))
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None
    if not below.exists() and str(base) in list_configs():
        below = find_config(str(base))
    return [Layer(str(path), tree), *read_layers(below, [*seen, path.resolve()])]


def drop_empty_blocks(tree: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """Returns the tree without blocks and lists that have no value."""
    # In YAML a block whose lines are all comments has the value null.
    values = {}
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        kind = field.annotation if field else named_block(section)
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
        if value is None and (is_section(kind) or typing.get_origin(kind) in (list, dict)):
            continue
        if is_section(inner):
            if isinstance(value, dict):
                value = drop_empty_blocks(value, inner)
            elif isinstance(value, list):
                value = [
                    drop_empty_blocks(item, inner) if isinstance(item, dict) else item
                    for item in value
                ]
        values[key] = value
    return values


def merge_layers(layers: Sequence[Layer]) -> dict[str, Any]:
    """Returns the options of layers, the first on top, as a tree that may be changed."""
    return dict(functools.reduce(_merge, (layer.tree for layer in reversed(layers))))


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(tree: dict[str, Any], text: str) -> Location:
    """Sets the value of an argument `key.path=value` in the tree, and returns its location.

    Raises:
        InputError: the argument has another form, or its key leads through a value.
    """
    key, equals, value = text.partition("=")
    location = tuple(key.split("."))
    if not equals or not all(location):
        raise InputError(_explain_argument(text, location))
    *parents, leaf = location
    for part in parents:
        child = tree.get(part, {})
        if isinstance(child, list):
            raise InputError(f"{key}: {part} is a list, which is given whole: {part}=[..]")
        if not isinstance(child, dict):
            raise InputError(f"{key}: {part} is {child!r}, not a block of options")
        # A copy, because the file has this block too, and YAML's aliases make several of one.
        tree[part] = tree = dict(child)
    try:
        tree[leaf] = parse_yaml(value)
    except ValueError as error:
        raise InputError(f"{key}: value is not valid YAML: {error}") from None
    return location


def _explain_argument(text: str, location: Location) -> str:
    """Returns what is wrong with an argument that is not of the form `key.path=value`."""
    kind = find_type(location)
    if kind is not None and not find_section(location):
        example = "true" if kind is bool else "VALUE"
        return f"{text}: found no value, expected {describe_expected(kind)}, as in {text}={example}"
    hint = suggest_option(location) or (list_known_keys(location) if location[1:] else None)
    return f"found {text!r}, expected key=value" + (f"; {hint}" if hint else "")


def _find_origin(
    location: Location, layers: Sequence[Layer], overrides: Mapping[Location, str]
) -> str:
    """Returns what stands in front of the key of a value: its file or "command line", and place.

    `overrides`: the same for each location that the command line has.
    """
    key = tuple(map(str, location))
    for override, origin in reversed([*overrides.items()]):
        if key[: len(override)] == override:
            return origin
    for layer in layers:
        if _has_value(layer.tree, location):
            return f"{layer.source}: {layer.place}"
    # A block that only the command line has.
    for override, origin in reversed([*overrides.items()]):
        if override[: len(key)] == key:
            return origin
    # Missing in all stages it is missing in their file.
    return next(f"{layer.source}: " for layer in layers if not layer.place)


def _has_value(tree: Any, location: Location) -> bool:
    """Returns whether a tree has a value at a location, or in place of a block around it."""
    for part in location:
        if not isinstance(tree, dict):
            return True  # a list is never merged, so all of its items have one origin
        if part not in tree:
            return False
        tree = tree[part]
    return True
