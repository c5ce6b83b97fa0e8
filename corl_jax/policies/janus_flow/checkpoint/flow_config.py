"""Reads the original layout's config.json of a JanusFlow, and writes it if there is none to copy.

The sizes of the generation encoder and decoder are read from `params` and never assumed: the
defaults in the original code are not those of the published model. Sizes that `language_config`
leaves out have the defaults of transformers' LlamaConfig.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.models.sd_vae import SdVaeConfig
from corl_jax.models.siglip import SiglipConfig
from corl_jax.models.uvit import UvitConfig
from corl_jax.policies.janus.checkpoint.llama_sizes import parse_llama, write_llama
from corl_jax.policies.janus.checkpoint.original import parse_siglip, write_siglip
from corl_jax.policies.janus_flow.checkpoint.vae_files import (
    find_problems_of_folder,
    find_vae_problems,
    read_vae,
)
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.weights.foreign_config import Fields, check_divisible
from corl_jax.weights.layouts.sd_vae import check as check_vae
from corl_jax.weights.storage import read_json
from corl_jax.weights.table import Shape

PATCH = 2
"""The side of a patch in latents: the decoder of the original code enlarges by 2."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of config.json: its class in the original code, and the settings it has to state."""

    cls: str
    params: tuple[str, ...]


UNDERSTANDING, ENCODER, DECODER = (
    "vision_und_enc_config", "vision_gen_enc_config", "vision_gen_dec_config",
)  # fmt: skip
SECTIONS = {
    UNDERSTANDING: Section(
        "CLIPVisionTower", ("image_size", "model_name", "select_feature", "select_layer")
    ),
    ENCODER: Section(
        "ShallowUViTEncoder",
        (
            "input_channels", "stride", "kernel_size", "padding", "block_out_channels",
            "layers_in_middle", "hidden_size",
        ),
    ),
    DECODER: Section(
        "ShallowUViTDecoder",
        ("in_channels", "out_channels", "block_out_channels", "upsamples", "layers_in_middle"),
    ),
}  # fmt: skip


def parse(
    folder: Path, layout: str, shapes: Mapping[str, Shape], problems: Problems
) -> JanusFlowConfig:
    """Reads the sizes of a folder's config.json; adds its problems to `problems`."""
    file = folder / "config.json"
    top = Fields(str(file), read_json(file), problems)
    llama = parse_llama(top.section("language_config"))
    siglip = parse_vision_section(top)
    uvit, vae = _parse_uvit(top, llama.hidden_size), problems.attempt(read_vae, folder, problems)
    config = JanusFlowConfig(llama=llama, siglip=siglip, uvit=uvit, vae=vae or SdVaeConfig())
    if not problems:  # here, because `check` does not know the VAE's own file
        problems.add(find_problems_of_folder(config, folder))
    return config


def parse_vision(data: dict[str, Any], file: Path) -> SiglipConfig | None:
    """Reads the sizes of the vision tower alone; returns None if the file has none.

    Raises: InputError listing every field that is malformed or not supported.
    """
    problems = Problems()
    top = Fields(str(file), data, problems)
    siglip = None
    if UNDERSTANDING in data:
        siglip = parse_vision_section(top)
    elif "sizes" in data:  # our own config.json
        usual, stored = SiglipConfig(), top.section("sizes").section("siglip")
        siglip = dataclasses.replace(
            usual,
            image_size=stored.size("image_size", usual.image_size),
            patch_size=stored.size("patch_size", usual.patch_size),
        )
    problems.raise_any()
    return siglip


def parse_vision_section(top: Fields) -> SiglipConfig:
    """Reads the sizes of the vision tower from a config.json of the original layout."""
    params = _open_params(top, UNDERSTANDING)
    params.expect("select_feature", ("same",), "JanusFlow uses the features of all patches")
    return parse_siglip(top.section(UNDERSTANDING))


def _parse_uvit(top: Fields, width: int) -> UvitConfig:
    encoder, decoder = _open_params(top, ENCODER), _open_params(top, DECODER)
    usual = UvitConfig()
    for fields in (encoder, decoder):
        for name in ("elementwise_affine", "use_bias", "use_mid_block"):
            fields.expect(name, (True,), "a network without it is not implemented")
        fields.equal("hidden_size", width)
    encoder.expect("kernel_size", (PATCH,), "only patches of this size are implemented")
    encoder.expect("stride", (PATCH,), "patches that do not overlap")
    encoder.expect("padding", (0,), "patches that do not overlap")
    decoder.expect("upsamples", (1,), "the decoder restores the encoder's patches")
    channels = encoder.size("input_channels", usual.latent_channels)
    decoder.equal("out_channels", channels)
    encoder_width = _read_width(encoder, usual.encoder_width)
    if _read_width(decoder, encoder_width) != encoder_width:
        decoder.problems.add(
            f"{decoder.where}: block_out_channels is {decoder.data['block_out_channels']!r}, "
            f"expected {[encoder_width]}, as in {ENCODER}"
        )
    norm_eps = encoder.number("norm_eps", usual.norm_eps)
    # Each has its own default in the original code.
    if (decoder_eps := decoder.number("norm_eps", usual.norm_eps)) != norm_eps:
        decoder.problems.add(
            f"{decoder.where}: norm_eps is {decoder_eps}, expected {norm_eps}, as in {ENCODER}"
        )
    return UvitConfig(
        latent_channels=channels,
        patch_size=PATCH,
        encoder_width=encoder_width,
        encoder_num_layers=encoder.size("layers_in_middle", usual.encoder_num_layers, limit=1000),
        decoder_width=decoder.size("in_channels", usual.decoder_width),
        decoder_num_layers=decoder.size("layers_in_middle", usual.decoder_num_layers, limit=1000),
        norm_eps=norm_eps,
    )


def _open_params(top: Fields, name: str) -> Fields:
    """Returns the `params` of a section; adds a problem if its class or settings are not stated."""
    section, expected = top.section(name), SECTIONS[name]
    params = section.section("params")
    cls = section.data.get("cls")
    # As the original: the class may have the names of its modules before it.
    if not isinstance(cls, str) or expected.cls not in cls:
        top.problems.add(f"{section.where}: cls is {cls!r}, expected {expected.cls!r}")
    if missing := [key for key in expected.params if not params.has(key)]:
        top.problems.add(
            f"{params.where} does not state {', '.join(missing)}; these are not assumed, because "
            "the defaults of the original code are not those of the published model: put the "
            "config.json there that came with the weights"
        )
    return params


def _read_width(fields: Fields, default: int) -> int:
    widths = fields.sizes("block_out_channels", (default,))
    if len(widths) != 1:
        fields.problems.add(
            f"{fields.where}: block_out_channels is {list(widths)}, expected one number: the "
            "encoder has one resolution"
        )
    return widths[0]


def check(config: JanusFlowConfig, where: str) -> list[str]:
    """Lists sizes with which the network cannot be built."""
    llama, siglip = config.llama, config.siglip
    problems = check_vae(config.vae, f"{where}.vae") or find_vae_problems(config, f"{where}.vae")
    return problems + check_divisible(
        where,
        ("llama.num_heads", llama.num_heads, "llama.num_kv_heads", llama.num_kv_heads),
        ("siglip.hidden_size", siglip.hidden_size, "siglip.num_heads", siglip.num_heads),
        ("siglip.image_size", siglip.image_size, "siglip.patch_size", siglip.patch_size),
        # Half of the features of a time are cosines.
        ("uvit.encoder_width", config.uvit.encoder_width, "the halves of a time's features", 2),
    )


def check_expressible(layout: str, config: JanusFlowConfig) -> None:
    """Checks that the original layout can express the sizes. Raises: InputError if not."""
    if config.uvit.patch_size != PATCH:
        raise InputError(
            f"uvit.patch_size is {config.uvit.patch_size}; the original code has {PATCH} only: "
            "write the layout jax"
        )


def write_config(
    layout: str, config: JanusFlowConfig, dtype: str, tokenizer: Path | None
) -> dict[str, Any]:
    """Returns the JSON of a config.json for the original package and `parse`."""
    uvit, width = config.uvit, config.llama.hidden_size
    common = {
        "block_out_channels": [uvit.encoder_width],
        "dropout": 0.0,
        "elementwise_affine": True,
        "hidden_size": width,
        "norm_eps": uvit.norm_eps,
        "use_bias": True,
        "use_mid_block": True,
    }
    encoder = {
        **common,
        "input_channels": uvit.latent_channels,
        "kernel_size": PATCH,
        "layers_in_middle": uvit.encoder_num_layers,
        "padding": 0,
        "stride": PATCH,
    }
    decoder = {
        **common,
        "in_channels": uvit.decoder_width,
        "layers_in_middle": uvit.decoder_num_layers,
        "out_channels": uvit.latent_channels,
        "upsamples": 1,
    }
    sections = {UNDERSTANDING: write_siglip(config.siglip), ENCODER: encoder, DECODER: decoder}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "language_config": {**write_llama(config.llama), "torch_dtype": dtype},
        **{
            name: {
                "cls": SECTIONS[name].cls,
                "model_type": name.removesuffix("_config"),
                "params": params,
            }
            for name, params in sections.items()
        },
    }
