"""Tiny VAEs of Stable Diffusion as files, built without the package's own key tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from corl_jax.models import modules
from corl_jax.models.sd_vae import SdVae, SdVaeConfig
from corl_jax.params import map_with_path
from corl_jax.types import Params

WIDTHS = (8, 16, 24, 24)  # a shortcut in the second and third level, none in the first and last
CONFIG = SdVaeConfig(latent_channels=3, block_channels=WIDTHS, num_res_blocks=1, norm_groups=4)
SAFE = "diffusion_pytorch_model.safetensors"
OLD_NAMES = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), (r"to_out\.0", "proj_attn"))


def make_config(config: SdVaeConfig = CONFIG, **settings: Any) -> dict[str, Any]:
    """diffusers' config.json of these sizes, and some settings that no size depends on."""
    levels = len(config.block_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.18.0.dev0",
        "_name_or_path": "../sdxl-vae/",
        "act_fn": "silu",
        "block_out_channels": list(config.block_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "sample_size": 64,
        "scaling_factor": config.scaling_factor,
        **settings,
    }


def list_shapes(config: SdVaeConfig = CONFIG) -> dict[str, tuple[int, ...]]:
    """diffusers' name and shape of every tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    widths, latents = list(config.block_channels), config.latent_channels

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def add_block(name: str, inputs: int, outputs: int) -> None:
        add(f"{name}.norm1", inputs)
        add(f"{name}.conv1", outputs, inputs, 3, 3)
        add(f"{name}.norm2", outputs)
        add(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            add(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    def add_half(half: str, levels: list[int], blocks: int, names: tuple[str, str]) -> None:
        level_name, resample = names
        inputs = levels[0]
        for level, width in enumerate(levels):
            place = f"{half}.{level_name}.{level}"
            for block in range(blocks):
                add_block(f"{place}.resnets.{block}", inputs, width)
                inputs = width
            if level < len(levels) - 1:
                add(f"{place}.{resample}.0.conv", width, width, 3, 3)
        add(f"{half}.mid_block.attentions.0.group_norm", widths[-1])
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            add(f"{half}.mid_block.attentions.0.{name}", widths[-1], widths[-1])
        for block in range(2):
            add_block(f"{half}.mid_block.resnets.{block}", widths[-1], widths[-1])
        add(f"{half}.conv_norm_out", levels[-1])

    add("encoder.conv_in", widths[0], 3, 3, 3)
    add_half("encoder", widths, config.num_res_blocks, ("down_blocks", "downsamplers"))
    add("encoder.conv_out", 2 * latents, widths[-1], 3, 3)
    add("quant_conv", 2 * latents, 2 * latents, 1, 1)
    add("post_quant_conv", latents, latents, 1, 1)
    add("decoder.conv_in", widths[-1], latents, 3, 3)
    add_half("decoder", widths[::-1], config.num_res_blocks + 1, ("up_blocks", "upsamplers"))
    add("decoder.conv_out", 3, widths[0], 3, 3)
    return shapes


def make_state(
    config: SdVaeConfig = CONFIG, seed: int = 0, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """A random value for every tensor of a VAE, by diffusers' names."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        size = 0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        noise = rng.standard_normal(shape) * size
        return np.asarray(noise + ("norm" in name and name.endswith("weight")), dtype)

    return {name: draw(name, shape) for name, shape in list_shapes(config).items()}


def make_params(config: SdVaeConfig = CONFIG, seed: int = 0) -> Params:
    """Random parameters; outputs are about as large as inputs."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> np.ndarray:
        size = 0.3 if leaf.ndim == 1 else np.prod(leaf.shape[:-1]) ** -0.5
        noise = rng.standard_normal(leaf.shape) * size
        return np.asarray(noise + path.endswith("/scale"), np.float32)

    return map_with_path(draw, modules.make_abstract(SdVae, config))


def to_old_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names that diffusers wrote until version 0.14."""
    return {_rename(name, OLD_NAMES): value for name, value in state.items()}


def to_ldm_names(state: dict[str, np.ndarray], levels: int = 4) -> dict[str, np.ndarray]:
    """The names of latent diffusion, in whose attention all layers are convolutions."""
    names = (
        (r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}"),
        ("down_blocks", "down"),
        (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("resnets", "block"),
        ("conv_shortcut", "nin_shortcut"),
        (r"(down|up)samplers\.0", r"\1sample"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        (r"to_([qkv])", r"\1"),
        (r"to_out\.0", "proj_out"),
    )
    return {
        _rename(name, names): value[..., None, None]
        if ".to_" in name and value.ndim == 2
        else value
        for name, value in state.items()
    }


def _rename(name: str, pairs: Any) -> str:
    for pattern, new in pairs:
        name = re.sub(pattern, new, name)
    return name


def write_vae(folder: Path, state: dict[str, np.ndarray], **settings: Any) -> Path:
    """Writes a folder as diffusers does; `settings` replace those of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / SAFE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(make_config(**settings), indent=2) + "\n")
    return folder
