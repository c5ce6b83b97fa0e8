"""The config.json of our own layout: the sizes of a network, written and read exactly."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.weights.foreign_config import MAX_SIZE
from corl_jax.weights.kinds import NETWORK_TYPE, NetworkKind

FORMAT_VERSION = 1
MAX_LAYERS, MAX_DEPTH = 10_000, 8


def make_own_config(
    kind: NetworkKind, config: Any, source_layout: str, layer_dtypes: dict[str, list[str]]
) -> dict[str, Any]:
    """Returns the JSON of a converted directory's config.json.

    `layer_dtypes` maps a path to the dtypes of its layers, if these differ in the source.
    """
    form = kind.own_format
    return {
        "model_type": form.model_type,
        "format_version": FORMAT_VERSION,
        **({"network": kind.name} if form.model_type == NETWORK_TYPE else {}),
        "source_layout": source_layout,
        form.sizes: _drop_absent(dataclasses.asdict(config)),
        "layer_dtypes": layer_dtypes,
    }


def _drop_absent(sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes without optional parts that a network lacks."""
    return {name: value for name, value in sizes.items() if value is not None}


def parse_own_config(kind: NetworkKind, data: dict[str, Any], file: Path) -> Any:
    """Returns the sizes that a converted directory's config.json states.

    Raises: InputError listing every size that is missing, unknown or malformed.
    """
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version is {version!r}, expected {FORMAT_VERSION}; convert the "
            "PyTorch checkpoint again with this version"
        )
    where, problems = f"{file}: {kind.own_format.sizes}", Problems()
    config = build_config(kind.config, data.get(kind.own_format.sizes), where, problems)
    if not problems:
        problems.add(kind.check(config, where))
    problems.raise_any()
    return config


def build_config(kind: type, data: Any, where: str, problems: Problems) -> Any:
    """Builds a config dataclass from JSON: all fields present, none unknown, types exact.

    A field whose default is None is the config of an optional part, and may be absent. Adds
    problems to `problems`; a field with a problem keeps its default.
    """
    defaults = kind()
    if not isinstance(data, dict):
        problems.add(f"{where} is {data!r}, expected an object")
        return defaults
    fields = {field.name for field in dataclasses.fields(kind)}
    optional = {name for name in fields if getattr(defaults, name) is None}
    missing = sorted(fields - optional - data.keys())
    problems.add(f"{where}.{name} is missing" for name in missing)
    problems.add(f"{where}.{name} is unknown" for name in sorted(data.keys() - fields))
    values = {}
    for name in fields & data.keys():
        default, value = getattr(defaults, name), data[name]
        if name in optional:
            part = _find_optional_part(kind, name)
            values[name] = build_config(part, value, f"{where}.{name}", problems)
        elif dataclasses.is_dataclass(default):
            values[name] = build_config(type(default), value, f"{where}.{name}", problems)
        # JSON has no tuples: (0.5, 0.5, 0.5) is written as a list.
        elif isinstance(default, tuple) and isinstance(value, list):
            values[name] = tuple(_read_value(name, default[0], item) for item in value)
            if not value or None in values[name]:
                problems.add(f"{where}.{name} is {value!r}, expected like {list(default)}")
                values[name] = default
        else:
            values[name] = _read_value(name, default, value)
            if values[name] is None:
                problems.add(f"{where}.{name} is {value!r}, expected like {default!r}")
                values[name] = default
    return dataclasses.replace(defaults, **values)


def _find_optional_part(kind: type, name: str) -> type:
    """Returns the dataclass of a field that is annotated `Config | None`."""
    choices: tuple[type, ...] = typing.get_args(typing.get_type_hints(kind)[name])
    return next(choice for choice in choices if choice is not type(None))


def _read_value(name: str, default: Any, value: Any) -> Any:
    """Returns the value in the type of `default`; None for another type or out of bounds."""
    if isinstance(default, float):
        # The mean of an image's channels may be 0; a width, an epsilon or a deviation may not.
        fits = type(value) in (int, float) and (
            0 < value < 1e12 or (value, name) == (0, "image_mean")
        )
        return float(value) if fits else None
    # `type`, not isinstance: true is no size, although bool is a subclass of int.
    if type(value) is not type(default):
        return None
    least = 0 if name.endswith("_token_id") else 1
    return value if isinstance(value, bool | str) or least <= value <= _find_limit(name) else None


def _find_limit(name: str) -> int:
    # Sizes that count modules have a small limit: a loop in Python makes the modules one by one.
    if name.endswith("num_layers") or name == "num_res_blocks":
        return MAX_LAYERS
    return MAX_DEPTH if name.endswith("_depth") else MAX_SIZE
