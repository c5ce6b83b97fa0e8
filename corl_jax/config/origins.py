"""Records what a run was started with: a config, and options on top of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from corl_jax.config.files import Layer, merge_layers, read_layers, simplify
from corl_jax.config.options import flatten
from corl_jax.config.schema import Config
from corl_jax.config.shipped import find_config, name_config
from corl_jax.config.yaml_text import parse_yaml

IN_PYTHON = "options in Python"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the user has given to a run; plain values of JSON."""

    config: str  # a file or a name, or IN_PYTHON
    files: list[str]  # that file, then its `base`, then the base of that one
    overrides: dict[str, Any]  # key.path -> value given on top
    replaced: dict[str, Any]  # key.path -> value that the files have in its place, if any


def record_command(config: str, arguments: Sequence[str]) -> Origin:
    """Returns the origin of a command with arguments `key.path=value` that were read before."""
    pairs = (text.partition("=") for text in arguments)
    return _record(config, {key: parse_yaml(value) for key, _, value in pairs})


def record_call(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config, options: Mapping[str, Any]
) -> Origin:
    """Returns the origin of a call in Python whose config and options were read before."""
    return _record(config, dict(flatten(simplify(options))))


def _record(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config, overrides: Mapping[str, Any]
) -> Origin:
    name, files = IN_PYTHON, []
    if isinstance(config, Config):
        layers = [Layer(name, config.model_dump(mode="json"))]
    elif isinstance(config, Mapping):
        layers = [Layer(name, simplify(config))]
    else:
        name = os.fspath(config)
        layers = read_layers(find_config(name))
        files = [name_config(layer.source) for layer in layers]
    tree, replaced = merge_layers(layers), {}
    for key in overrides:
        value: Any = tree
        with contextlib.suppress(KeyError, TypeError):  # the files have no such key or block
            for part in key.split("."):
                value = value[part]
            replaced[key] = value
    return Origin(name, files, _make_plain(overrides), _make_plain(replaced))


def _make_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values as JSON has them; what it does not know becomes a text."""
    return json.loads(json.dumps(simplify(values), default=str))
