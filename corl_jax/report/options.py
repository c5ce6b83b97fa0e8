"""Lists the options of runs that differ from the defaults, or from each other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from corl_jax.config.fields import Section
from corl_jax.config.options import is_section
from corl_jax.config.schema import Config

MISSING = "not set"


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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (whole key, value) of each option; lists and empty blocks are values."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
