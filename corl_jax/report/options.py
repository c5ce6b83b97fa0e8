"""Lists the options of runs: those given at the start, and those that differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from corl_jax.config.fields import Section
from corl_jax.config.options import flatten, is_section
from corl_jax.config.schema import Config

MISSING = "not set"


@dataclasses.dataclass(frozen=True)
class GivenRow:
    """An option that was given on top of a config, with the value that it would have else."""

    key: str
    value: str
    before: str


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run was last started with."""

    config: str
    bases: list[str]
    rows: list[GivenRow]


@dataclasses.dataclass(frozen=True)
class OptionRow:
    """An option with its value in each run."""

    key: str
    values: list[str]
    default: str

    @property
    def differs(self) -> bool:
        """Whether a run has another value than the default, or there is no default."""
        return any(value != self.default for value in self.values)

    @property
    def varies(self) -> bool:
        """Whether two runs have different values."""
        return len(set(self.values)) > 1


def list_options(configs: Sequence[Mapping[str, Any]]) -> list[OptionRow]:
    """Returns a row for each option of the configs, in the order of the first one."""
    flat, defaults = [dict(flatten(config)) for config in configs], dict(list_defaults())
    keys = dict.fromkeys(key for config in flat for key in config)
    return [
        OptionRow(
            key,
            [format_value(config[key]) if key in config else MISSING for config in flat],
            format_value(defaults[key]) if key in defaults else "required",
        )
        for key in keys
    ]


def read_start(provenance: Mapping[str, Any]) -> Start | None:
    """Returns config and options that `provenance.json` names; None if it names no config."""
    start = provenance.get("given")
    if not isinstance(start, Mapping) or "config" not in start:
        return None
    files, overrides, replaced = (start.get(name) for name in ("files", "overrides", "replaced"))
    bases = [str(file) for file in files[1:]] if isinstance(files, list) else []
    overrides = overrides if isinstance(overrides, Mapping) else {}
    replaced = replaced if isinstance(replaced, Mapping) else {}
    defaults = dict(list_defaults())

    def describe_before(key: str) -> str:
        if key in replaced:
            return format_value(replaced[key])
        return f"{MISSING}, default {format_value(defaults[key])}" if key in defaults else MISSING

    rows = [GivenRow(key, format_value(overrides[key]), describe_before(key)) for key in overrides]
    return Start(str(start["config"]), bases, rows)


def list_defaults(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (whole key, default) of each option that has one."""
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from list_defaults(field.annotation, f"{prefix}{name}.")
        elif not field.is_required():
            default = field.get_default(call_default_factory=True)
            is_block = isinstance(default, pydantic.BaseModel)
            yield prefix + name, default.model_dump(mode="json") if is_block else default


def format_value(value: Any) -> str:
    """Returns a value as a config file has it, on one line; a list of blocks as their texts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return ", ".join(_format_block(item) for item in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _format_block(block: Mapping[str, Any]) -> str:
    """Returns the name of a block, such as a reward, with its weight and options if it has any."""
    # A reward of the user's own has a place instead of a name.
    name = block.get("name") or block.get("use")
    other = {
        key: value
        for key, value in block.items()
        if key in ("weight", "options") and value not in (None, {}, 1, 1.0)
    }
    return " ".join([str(name), *(f"{key}={json.dumps(value)}" for key, value in other.items())])
