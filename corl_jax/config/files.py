"""Reads configs from YAML files, checks them, writes them and describes their options.

A config is a YAML file, optionally on top of another one (`base: other.yaml`, relative to the
file), with `key.path=value` overrides from the command line. Values are parsed as YAML. Unknown
keys are refused with the known names. All problems are reported together.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import annotated_types
import pydantic

from corl_jax.config.fields import Section
from corl_jax.config.schema import Config
from corl_jax.config.yaml_text import MAX_CHARACTERS, dump_yaml, parse_yaml
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import expand_path, read_text
from corl_jax.nearest import suggest_name

MAX_BYTES = 4 * MAX_CHARACTERS  # UTF-8 has at most four bytes a character
RENAMED = {"objective": "stage, with the value rl, sft or vq", "grpo": "algorithm"}
"""Key of an earlier version -> its name now."""
REMOVED = {
    "algorithm.std_eps": "the value is 1e-4",
    "algorithm.t2i_loss_weight": "the value is 1; set algorithm.mm2t_loss_weight",
    "data.prefetch": "the value is 2",
    "data.system_prompt": "prompts have no system text",
    "export.base": "the model of model.path supplies the tensors that training drops",
    "log.fixed_prompts": "the value is 4",
    "optimizer.eps": "the value is 1e-8",
    "rollout.pixel_dtype": "the value is float32",
    "sft.answer_column": "the column is sft_answer; data.columns gives it another name",
    "sft.caption_weight": "the value is 1; sft.caption_column: null leaves captions out",
    "sft.cfg_dropout": "the value is 0.1",
    "sft.mm2t_weight": "the value is 1; set sft.t2i_weight",
    "vq": "the weights are constants of corl_jax/policies/janus/tokenizer_training.py",
}
"""Key of an earlier version that has no successor -> what holds instead."""
LIMITS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}", "min_length": "{} or more"}


def load(
    path: str | Path, overrides: list[str] | None = None, options: Mapping[str, Any] | None = None
) -> Config:
    """Returns the config of a file with its overrides (`key.path=value`) and `options`.

    A mapping among the options is merged into the block of its name; a name may be a key.path.

    Raises:
        InputError: listing every problem with its key.
    """
    tree = _read(Path(expand_path(path)), [])
    return _complete(tree, str(path), overrides or [], options or {})


def make_config(values: Mapping[str, Any], options: Mapping[str, Any]) -> Config:
    """Returns the config of a mapping of options with other options on top, as `load`.

    Raises:
        InputError: listing every problem with its key.
    """
    return _complete(_drop_empty_blocks(_simplify(values), Config), "config", [], options)


def _complete(
    tree: dict[str, Any], source: str, overrides: list[str], options: Mapping[str, Any]
) -> Config:
    problems = Problems()
    for text in overrides:
        problems.attempt(_apply_override, tree, text)
    for key, value in options.items():
        value = _simplify(value)
        problems.attempt(_set_option, tree, key, value, f"argument {key!r}", is_merged=True)
    config = problems.attempt(validate, tree, source)
    problems.raise_any()
    assert config is not None  # otherwise there was a problem
    return config


def validate(tree: dict[str, Any], source: str) -> Config:
    """Returns the Config of a plain dict.

    Raises:
        InputError: listing every problem; each begins with `source`.
    """
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        texts_of: dict[str, list[str]] = {}
        for prefix, text in map(_explain, error.errors()):
            texts_of.setdefault(prefix, []).append(text)
    # pydantic reports a value of several types once per type: these texts are joined by "or".
    lines = [
        prefix + line
        for prefix, texts in texts_of.items()
        for line in " or ".join(texts).splitlines()
    ]
    raise InputError([f"{source}: {line}" for line in lines])


def dump(config: Config) -> str:
    """Returns the config as YAML, every option with its value."""
    return dump_yaml(config.model_dump(mode="json"))


def describe(section: type[Section] = Config, prefix: str = "") -> str:
    """Returns a line for each option: key, default, type and meaning."""
    lines = []
    for name, field in section.model_fields.items():
        key, kind = prefix + name, field.annotation
        if _is_section(kind):
            lines.append(f"{key}: {(kind.__doc__ or '').splitlines()[0]}")
            lines.append(describe(kind, f"{key}."))
            continue
        default = "required"
        if not field.is_required():
            default = repr(field.get_default(call_default_factory=True))
        values = " ".join([describe_type(kind), *describe_limits(field.metadata)]).replace("`", "")
        lines.append(f"  {key} = {default}  # {values}; {field.description}")
    if (named := named_block(section)) is not None:
        lines.append(describe(named, f"{prefix}NAME."))
    return "\n".join(lines)


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
        return "list of blocks" if _is_section(args[0]) else f"list of {describe_type(args[0])}"
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


def _read(path: Path, seen: list[Path]) -> dict[str, Any]:
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
    """Returns the tree without blocks and lists that have no value."""
    # In YAML a block whose lines are all comments has the value null.
    values = {}
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        kind = field.annotation if field else named_block(section)
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
        values[key] = value
    return values


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(tree: dict[str, Any], text: str) -> None:
    """Sets the value of an argument `key.path=value` in the tree; InputError if it is wrong."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"argument {text!r}: expected key.path=value")
    try:
        parsed = parse_yaml(value)
    except ValueError as error:
        raise InputError(f"argument {text!r}: value is not valid YAML: {error}") from None
    _set_option(tree, key, parsed, f"argument {text!r}")


def _set_option(
    tree: dict[str, Any], key: str, value: Any, where: str, *, is_merged: bool = False
) -> None:
    """Sets an option of the tree; with `is_merged` two mappings are merged."""
    *parents, leaf = key.split(".")
    for part in parents:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise InputError(f"{where}: {part} is a value, not a block of options")
        tree = child
    if is_merged and isinstance(value, dict) and isinstance(tree.get(leaf), dict):
        value = _merge(tree[leaf], value)
    tree[leaf] = value


def _simplify(value: Any) -> Any:
    """Returns a copy of a value of Python with what YAML would have: texts, lists, dicts."""
    if isinstance(value, Mapping):
        return {str(key): _simplify(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_simplify(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _explain(item: Any) -> tuple[str, str]:
    """Returns (key and value found, problem) of one of pydantic's errors."""
    # For a value of several types the location ends in the type: ("data", "path", "str").
    key = ".".join(str(part) for part in item["loc"] if part not in ("str", "list[str]"))
    if item["type"] == "extra_forbidden":
        if new := RENAMED.get(key):
            return f"{key}: ", f"has a new name; use {new}"
        if reason := REMOVED.get(key):
            return f"{key}: ", f"is no option any more; {reason}; remove it"
        known = _find_options(item["loc"][:-1])
        return f"{key}: ", f"unknown key; {suggest_name(str(item['loc'][-1]), known)}"
    if item["type"] == "missing":
        return f"{key}: ", f"missing; give it in the file or as {key}=VALUE"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_type" and key:
        # The description has the choices of an option whose names belong to a table elsewhere.
        field = _find_options(item["loc"][:-1]).get(item["loc"][-1])
        message += f": {field.description}" if field and field.annotation is str else ""
    return (f"{key}: found {item['input']!r}; " if key else "", message)


def _find_options(location: tuple) -> dict[str, pydantic.fields.FieldInfo]:
    """Returns the options of the block at a location, such as ("rewards", 0)."""
    section: Any = Config
    for part in location:
        if not isinstance(part, str):
            continue  # the number of an item in a list
        field = section.model_fields.get(part)
        kind = field.annotation if field else named_block(section)
        # list[Reward] -> Reward
        section = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
        if not _is_section(section):
            return {}  # a mapping, such as data.columns
    return section.model_fields
