"""Reads and checks the sizes in a config.json of the two PyTorch layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.errors import Problems
from corl_jax.models.siglip import SiglipConfig
from corl_jax.policies.janus.checkpoint import original as original_layout
from corl_jax.policies.janus.checkpoint import transformers as transformers_layout
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.weights.foreign_config import Fields
from corl_jax.weights.kinds import OwnFormat
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import Shape

MODEL_TYPES = {"multi_modality": "original", "janus": "transformers"}
OWN_FORMAT = OwnFormat("corl_jax", "janus")


def parse(
    folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems
) -> JanusConfig:
    """Reads the sizes of a folder's config.json; adds its problems to `problems`."""
    file = folder / "config.json"
    parser = original_layout if layout == "original" else transformers_layout
    return parser.parse(read_json(file), str(file), problems)


def check(config: JanusConfig, where: str) -> list[str]:
    """Lists sizes that are no multiples of the sizes that the network divides them by."""
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


def parse_vision(data: dict[str, Any], file: Path) -> SiglipConfig | None:
    """Reads the sizes of the vision tower alone; returns None if the file has none.

    The file may lack all other sections.

    Raises: InputError listing every field that is malformed or not supported.
    """
    problems = Problems()
    top = Fields(str(file), data, problems)
    vision = top.section("vision_config")
    stated = data.get("model_type")
    layout = MODEL_TYPES.get(stated) if isinstance(stated, str) else None
    if stated == OWN_FORMAT.model_type or OWN_FORMAT.sizes in data:
        stored = top.section(OWN_FORMAT.sizes).section("siglip")
        usual = SiglipConfig()
        siglip = dataclasses.replace(
            usual,
            image_size=stored.size("image_size", usual.image_size),
            patch_size=stored.size("patch_size", usual.patch_size),
        )
    elif layout == "original" or "params" in vision.data:
        siglip = original_layout.parse_siglip(vision)
    elif layout == "transformers" or vision.data:
        siglip = transformers_layout.parse_siglip(vision)
    else:
        siglip = None
    problems.raise_any()
    return siglip
