"""Which kind of checkpoint a directory holds, and the JanusConfig that it means."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal

from corl_jax.errors import InputError
from corl_jax.models.siglip import SiglipConfig
from corl_jax.policies.janus.checkpoint import original as original_layout
from corl_jax.policies.janus.checkpoint import transformers as transformers_layout
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.weights.foreign_config import MAX_SIZE, Fields
from corl_jax.weights.storage import read_json

Layout = Literal["original", "transformers", "jax"]
LAYOUTS: tuple[Layout, ...] = typing.get_args(Layout)
MODEL_TYPES: dict[str, Layout] = {
    "multi_modality": "original",
    "janus": "transformers",
    "corl_jax": "jax",
}
FORMAT_VERSION = 1
MAX_LAYERS, MAX_DEPTH = 10_000, 8


def detect_layout(folder: str | Path) -> Layout:
    """Raises: InputError for a directory without a config.json of a known kind."""
    return layout_of(read_config(Path(folder)), Path(folder) / "config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """The raw config.json."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(
            f"{file}: not found, expected in a model directory; give the folder that holds the "
            "checkpoint's config.json and weights"
        )
    return read_json(file)


def layout_of(data: dict[str, Any], file: Path) -> Layout:
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise InputError(
            f"{file}: model_type is {kind!r}, expected one of {', '.join(MODEL_TYPES)}; "
            "this is not a Janus checkpoint"
        )
    return MODEL_TYPES[kind]


def load_config(folder: str | Path) -> JanusConfig:
    """The sizes of a checkpoint in any of the three layouts, not yet compared with its tensors.

    Raises: InputError listing every field that is malformed or not supported.
    """
    folder = Path(folder)
    return parse_config(read_config(folder), folder / "config.json")


def parse_config(data: dict[str, Any], file: Path) -> JanusConfig:
    """As `load_config`, from the parsed file."""
    layout, problems = layout_of(data, file), []
    if layout == "jax":
        return _parse_jax(data, file)
    parser = original_layout if layout == "original" else transformers_layout
    config = parser.parse(data, str(file), problems)
    problems = problems or _inconsistent(config, str(file))
    if problems:
        raise InputError(problems)
    return config


def parse_vision(data: dict[str, Any], file: Path) -> SiglipConfig | None:
    """The vision tower alone, also of a file that lacks the rest; None where it has none.

    Raises: InputError listing every field that is malformed or not supported.
    """
    problems: list[str] = []
    top = Fields(str(file), data, problems)
    vision = top.section("vision_config")
    kind = data.get("model_type")
    layout = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if layout == "jax" or "janus" in data:
        stored = top.section("janus").section("siglip")
        usual = SiglipConfig()
        siglip = dataclasses.replace(
            usual,
            image_size=stored.size("image_size", usual.image_size),
            patch_size=stored.size("patch_size", usual.patch_size),
        )
    elif layout == "original" or "params" in vision.data:
        siglip = original_layout.siglip_config(vision)
    elif layout == "transformers" or vision.data:
        siglip = transformers_layout.siglip_config(vision)
    else:
        siglip = None
    if problems:
        raise InputError(problems)
    return siglip


def _inconsistent(config: JanusConfig, where: str) -> list[str]:
    """Sizes that do not divide as the network needs."""
    llama, siglip, vq = config.llama, config.siglip, config.vq
    checks = [
        ("attention heads", llama.num_heads, "key-value heads", llama.num_kv_heads),
        ("vision width", siglip.hidden_size, "vision heads", siglip.num_heads),
        ("image_size", siglip.image_size, "patch_size", siglip.patch_size),
        ("the VQ base channels", vq.base_channels, "GroupNorm's groups", 32),
    ]
    return [
        f"{where}: {name} {value} is not a multiple of {unit_name} {unit}; correct one of them"
        for name, value, unit_name, unit in checks
        if value % unit
    ]


def write_jax(config: JanusConfig, source: str, layer_dtypes: dict[str, list[str]]) -> str:
    """The config.json of a converted directory."""
    data = {
        "model_type": "corl_jax",
        "format_version": FORMAT_VERSION,
        "source_layout": source,
        "janus": dataclasses.asdict(config),
        "layer_dtypes": layer_dtypes,
    }
    return json.dumps(data, indent=2) + "\n"


def _parse_jax(data: dict[str, Any], file: Path) -> JanusConfig:
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version is {version!r}, expected {FORMAT_VERSION}; convert the "
            "PyTorch checkpoint again with this version"
        )
    problems: list[str] = []
    config = from_dict(JanusConfig, data.get("janus"), f"{file}: janus", problems)
    problems = problems or _inconsistent(config, str(file))
    if problems:
        raise InputError(problems)
    return config


def from_dict(kind: type, data: Any, where: str, problems: list[str]) -> Any:
    """A config dataclass from plain JSON: every field present, none unknown, types exact."""
    defaults = kind()
    if not isinstance(data, dict):
        problems.append(f"{where} is {data!r}, expected an object")
        return defaults
    fields = {field.name for field in dataclasses.fields(kind)}
    problems += [f"{where}.{name} is missing" for name in sorted(fields - data.keys())]
    problems += [f"{where}.{name} is unknown" for name in sorted(data.keys() - fields)]
    values = {}
    for name in fields & data.keys():
        usual, value = getattr(defaults, name), data[name]
        if dataclasses.is_dataclass(usual):
            values[name] = from_dict(type(usual), value, f"{where}.{name}", problems)
        elif isinstance(usual, tuple) and isinstance(value, list):
            values[name] = tuple(_like(name, usual[0], one) for one in value)
            if not value or None in values[name]:
                problems.append(f"{where}.{name} is {value!r}, expected like {list(usual)}")
                values[name] = usual
        else:
            values[name] = _like(name, usual, value)
            if values[name] is None:
                problems.append(f"{where}.{name} is {value!r}, expected like {usual!r}")
                values[name] = usual
    return dataclasses.replace(defaults, **values)


def _like(name: str, usual: Any, value: Any) -> Any:
    """The value in the type of `usual`; None for another type or a number out of bounds."""
    if isinstance(usual, float):
        # The mean of an image's channels may be 0; a width, an epsilon or a deviation may not.
        fits = type(value) in (int, float) and (
            0 < value < 1e12 or (value, name) == (0, "image_mean")
        )
        return float(value) if fits else None
    if type(value) is not type(usual):
        return None
    least = 0 if name.endswith("_token_id") else 1
    return value if isinstance(value, bool | str) or least <= value <= _limit(name) else None


def _limit(name: str) -> int:
    """What a size may be at most: those that count modules are walked through one by one."""
    if name.endswith("num_layers") or name == "num_res_blocks":
        return MAX_LAYERS
    return MAX_DEPTH if name.endswith("_depth") else MAX_SIZE
