"""Reads a config with several stages, which train one model one after the other.

    output_dir: runs/x
    model: {path: mini}
    stages:
      - {name: sft, stage: self_sft, train: {max_steps: 200}}
      - {name: rl, algorithm: {tasks: self_qa}, train: {max_steps: 400}}

An entry has a name, and options on top of those of the file. Each stage becomes the config of a run
of its own in `output_dir/NAME`, which starts from the export of the stage before. A layer above
the list, another file, Python or the command line, may set options of one stage as
`stages.NAME.key`; its other options hold for all stages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from corl_jax.config.files import (
    COMMAND_LINE,
    STAGES_KEY,
    Layer,
    complete,
    drop_empty_blocks,
    dump,
    make_layers,
    read_layers,
)
from corl_jax.config.options import flatten
from corl_jax.config.schema import Config
from corl_jax.config.yaml_text import dump_yaml
from corl_jax.errors import InputError, Problems
from corl_jax.input_files import expand_path
from corl_jax.nearest import suggest_name

Stages = dict[str, Config]
"""Name of a stage -> the config of its run, in their order; the name is "" without `stages`."""
RECORD = "stages.json"
"""File in their output_dir that lists the stages."""
NAME = r"\w[\w-]*"
OF_ALL_STAGES = {
    "output_dir": "a stage is in the folder of its name; set it for all stages",
    "distributed": "all stages share their processes; set it for all stages",
}
MODEL_PATH = "model.path"
EXPORT = "export"
# Rounded weights would lose small updates of the stage before.
WHEN_HANDED_ON = Layer("default", {EXPORT: {"dtype": "float32"}})


def load_stages(path: str | Path, overrides: Sequence[str] = ()) -> Stages:
    """Returns the stages of a file with overrides of the command line, as `files.load` does.

    Raises:
        InputError: listing every problem of all stages with its origin and its key.
    """
    return _complete_stages(read_layers(Path(expand_path(path))), overrides)


def make_stages(base: str | Path | Mapping[str, Any], options: Mapping[str, Any]) -> Stages:
    """Returns the stages of a file or mapping, as `files.make_config` does. Raises: InputError."""
    return _complete_stages(make_layers(base, options), [])


def has_stages(stages: Stages) -> bool:
    """Returns whether a config has a list of stages."""
    return "" not in stages


def find_folder(stages: Stages) -> Path:
    """Returns the folder that has those of the stages."""
    return Path(next(iter(stages.values())).output_dir).parent


def stand_in_starts(stages: Stages) -> Stages:
    """Returns the stages with models that are there, so that all can be checked before the first.

    For an export that is still to be made stands the model before it: it has the same shapes.
    """
    present, model = {}, None
    for name, config in stages.items():
        if model is None or Path(config.model.path).exists():
            model = config.model
        present[name] = config.model_copy(update={"model": _move(config, model.path)})
    return present


def dump_stages(stages: Stages) -> str:
    """Returns stages as YAML that `load_stages` reads, every option with its value."""
    first = next(iter(stages.values()))
    if not has_stages(stages):
        return dump(first)
    tree: dict[str, Any] = {
        "output_dir": str(find_folder(stages)),
        "distributed": first.distributed.model_dump(mode="json"),
        "model": {"path": first.model.path},
        STAGES_KEY: [],
    }
    for name, config in stages.items():
        entry = config.model_dump(mode="json", exclude={"output_dir", "distributed"})
        del entry["model"]["path"]
        tree[STAGES_KEY].append({"name": name, **entry})
    return dump_yaml(tree)


def list_folders(folder: Path) -> list[Path]:
    """Returns the run directories of the stages in an output_dir; none if it has no stages."""
    try:
        names = json.loads((folder / RECORD).read_bytes())[STAGES_KEY]
        return [folder / name for name in names if re.fullmatch(NAME, name)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


# ---- from layers to configs


def _complete_stages(layers: Sequence[Layer], overrides: Sequence[str]) -> Stages:
    source, entries = _find_entries(layers)
    if not entries:
        return {"": complete([_drop_stages(layer) for layer in layers], overrides)}
    shared, by_name = _split_overrides(overrides)
    names = [entry.pop("name") for entry in entries]
    problems, stages = Problems(), {}
    for layer in layers:
        named = layer.tree.get(STAGES_KEY)
        problems.add(_find_unknown_names(named, names), f"{layer.source}: ")
    problems.add(_find_unknown_names(by_name, names), f"{COMMAND_LINE}: ")
    for text in [text for text in shared if re.match(rf"{STAGES_KEY}\b", text)]:
        shared.remove(text)
        problems.add(
            f"{COMMAND_LINE}: found {text!r}, expected {STAGES_KEY}.NAME.key=value with one of "
            f"the stages {', '.join(names)}"
        )
    for index, name in enumerate(names):
        chosen = _stack_layers(layers, source, entries[index], index, name)
        problems.add(_find_misplaced_options(chosen, by_name.get(name, []), name, index))
        if index + 1 < len(names):
            chosen.append(WHEN_HANDED_ON)
        with problems.collect():
            stages[name] = complete(chosen, shared, by_name.get(name, []), f"{STAGES_KEY}.{name}.")
    problems.raise_any()
    stages = _link(stages)
    problems.add(_find_chain_problems(stages), f"{source}: ")
    problems.raise_any()
    return stages


def _find_entries(layers: Sequence[Layer]) -> tuple[str, list[dict[str, Any]]]:
    """Returns (the source of the list of stages, its entries with names); none without a list.

    Raises:
        InputError: something else stands in its place, or an entry has no name of its own.
    """
    for layer in layers:
        value = layer.tree.get(STAGES_KEY)
        if isinstance(value, list) and value:
            names = [entry.get("name") if isinstance(entry, dict) else None for entry in value]
            problems = [*_find_name_problems(value, names)]
            if problems:
                raise InputError([f"{layer.source}: {STAGES_KEY}{line}" for line in problems])
            return layer.source, [drop_empty_blocks(dict(entry), Config) for entry in value]
        if value is not None and not isinstance(value, dict | list):
            raise InputError(
                f"{layer.source}: {STAGES_KEY}: found {value!r}, expected a list of blocks with a "
                "name and options; the kind of training is `stage`"
            )
    for layer in layers:
        if layer.tree.get(STAGES_KEY):
            raise InputError(
                f"{layer.source}: {STAGES_KEY}: found options by name, but no list of stages below "
                "them; give a list of blocks with a name and options"
            )
    return "", []


def _find_name_problems(entries: Sequence[Any], names: Sequence[Any]) -> Iterator[str]:
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        if not isinstance(entry, dict):
            yield f"[{index}]: found {entry!r}, expected a block with a name and options"
        elif name is None:
            yield f"[{index}].name: missing; give the stage a name, which is that of its folder"
        elif not isinstance(name, str) or not re.fullmatch(NAME, name):
            yield f"[{index}].name: found {name!r}, expected a text of letters, digits, _ and -"
        elif name in names[:index]:
            yield f"[{index}].name: found {name!r} again; give each stage a name of its own"


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Returns (the overrides of all stages, name -> those of one stage without their place)."""
    shared, by_name = [], {}
    for text in overrides:
        match = re.match(rf"{STAGES_KEY}\.([^.=]+)\.([^=]+=.*)", text, re.DOTALL)
        if match:
            by_name.setdefault(match[1], []).append(match[2])
        else:
            shared.append(text)
    return shared, by_name


def _drop_stages(layer: Layer) -> Layer:
    tree = {key: value for key, value in layer.tree.items() if key != STAGES_KEY}
    return Layer(layer.source, tree)


def _stack_layers(
    layers: Sequence[Layer], source: str, entry: dict[str, Any], index: int, name: str
) -> list[Layer]:
    """Returns the layers of one stage: all, each below what it says of this stage alone."""
    stack, is_below = [], False
    for layer in layers:
        value = layer.tree.get(STAGES_KEY)
        if isinstance(value, dict) and not is_below and isinstance(value.get(name), dict):
            tree = drop_empty_blocks(value[name], Config)
            stack.append(Layer(layer.source, tree, f"{STAGES_KEY}.{name}."))
        elif isinstance(value, list) and not is_below and layer.source == source:
            stack.append(Layer(source, entry, f"{STAGES_KEY}[{index}]."))
            is_below = True  # lists are replaced, so those of lower layers do not count
        stack.append(_drop_stages(layer))
    return stack


def _find_unknown_names(named: Any, names: Sequence[str]) -> Iterator[str]:
    for name in named if isinstance(named, dict) else ():
        if name not in names:
            yield f"{STAGES_KEY}.{name}: no stage of this name; {suggest_name(str(name), names)}"


def _find_misplaced_options(
    layers: Sequence[Layer], overrides: Sequence[str], name: str, index: int
) -> Iterator[str]:
    """Yields a line for each option of one stage that only all stages together can have."""
    refused = dict(OF_ALL_STAGES)
    if index:
        refused[MODEL_PATH] = (
            "it starts from the stage before; remove it, or train from there by a config of its own"
        )
    keys_by_place = {
        f"{layer.source}: {layer.place}{key}": key
        for layer in layers
        if layer.place
        for key, _ in flatten(layer.tree)
    }
    for text in overrides:
        key = text.partition("=")[0]
        keys_by_place[f"{COMMAND_LINE}: {STAGES_KEY}.{name}.{key}"] = key
    for place, key in keys_by_place.items():
        if reason := refused.get(key) or refused.get(key.partition(".")[0]):
            yield f"{place}: is no option of one stage: {reason}"


# ---- the stages together


def _move(config: Config, path: str) -> Any:
    return config.model.model_copy(update={"path": path})


def _link(stages: Stages) -> Stages:
    """Returns the stages, each in its folder, and with the export of the one before as model."""
    linked, before = {}, None
    for name, config in stages.items():
        changes: dict[str, Any] = {"output_dir": str(Path(config.output_dir, name))}
        if before is not None:
            changes["model"] = _move(config, str(Path(before.output_dir, EXPORT)))
        linked[name] = before = config.model_copy(update=changes)
    return linked


def _find_chain_problems(stages: Stages) -> Iterator[str]:
    names, places = list(stages), {}
    for index, (name, config) in enumerate(stages.items()):
        place, later = f"{STAGES_KEY}[{index}]", names[index + 1 : index + 2]
        if later and config.export.layout == "none":
            yield (
                f"{place}.export.layout: found none, but {later[0]} starts from the export of "
                f"{name}; choose a layout"
            )
        if later and config.lora.rank and config.export.lora == "adapter":
            yield (
                f"{place}.export.lora: found adapter, but {later[0]} starts from the export of "
                f"{name}, which must be a whole model; set it to merged"
            )
        directory = config.checkpoint.directory
        if directory is not None and directory in places:
            yield (
                f"{place}.checkpoint.directory: found {directory}, which {places[directory]} has "
                "too; give each stage its own, or leave it out"
            )
        places[directory] = name
