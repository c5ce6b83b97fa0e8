"""The sizes of an LPIPS network, which its files tell only by the tensors' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from corl_jax.models.vgg import VggConfig
from corl_jax.weights.foreign_config import wrong_count
from corl_jax.weights.table import Shape
from corl_jax.weights.tables.vgg import PLACES, head_key, trunk_key


def check(config: VggConfig, where: str) -> list[str]:
    """Sizes with which the network cannot be built."""
    return wrong_count(where, "channels", config.channels, len(PLACES))


def parse(folder: Path, layout: str, shapes: Mapping[str, Shape], problems: list[str]) -> VggConfig:
    """The widths of the stages; a problem says which of the two files is absent."""
    trunk = [f"{trunk_key(layout, stage, 0)}.weight" for stage in range(len(PLACES))]
    heads = [head_key(stage) for stage in range(len(PLACES))]
    parts = (
        (trunk, "VGG16's convolutions", "torchvision's vgg16-397923af.pth"),
        (heads, "the heads of LPIPS", "vgg.pth of lpips (weights/v0.1) or of torchmetrics"),
    )
    for keys, what, file in parts:
        if not any(key in shapes for key in keys):
            problems.append(
                f"{folder}: {what} are missing ({keys[0]} and others); put {file} there as well"
            )
    usual = VggConfig().channels
    found = [shapes[key][0] if shapes.get(key) else usual[i] for i, key in enumerate(trunk)]
    return VggConfig(channels=tuple(found))
