"""Reads the original layout's config.json, and writes it if there is none to copy.

The file names presets instead of sizes; explicit `params` override them. Sizes that
`language_config` leaves out have the defaults of transformers' LlamaConfig.
"""

from __future__ import annotations

from typing import Any

from corl_jax.errors import Problems
from corl_jax.models.siglip import SiglipConfig
from corl_jax.models.vq import VQConfig
from corl_jax.policies.janus.checkpoint.llama_sizes import parse_llama, write_llama
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.weights.foreign_config import Fields

SIGLIP_PRESETS = {"siglip_large_patch16_384": SiglipConfig()}
VQ_PRESETS = {"VQ-16": VQConfig()}
_SIGLIP_SIZES = ("width", "layers", "heads", "patch_size", "mlp_ratio", "image_size")


def parse(data: dict[str, Any], where: str, problems: Problems) -> JanusConfig:
    """Reads the sizes of an original config.json; adds its problems to `problems`."""
    top = Fields(where, data, problems)
    llama = parse_llama(top.section("language_config"))
    siglip = parse_siglip(top.section("vision_config"))
    vq = _parse_vq(top.section("gen_vision_config"))
    aligner = top.section("aligner_config").section("params")
    gen_aligner = top.section("gen_aligner_config").section("params")
    head = top.section("gen_head_config").section("params")
    for fields, width in ((aligner, siglip.hidden_size), (gen_aligner, vq.embed_dim)):
        fields.expect("projector_type", ("mlp_gelu",), "the only one that Janus ships with")
        fields.equal("input_dim", width)
        fields.equal("n_embed", llama.hidden_size)
    head.equal("n_embed", llama.hidden_size)
    head.equal("image_token_size", vq.num_embeddings)
    return JanusConfig(
        llama=llama,
        siglip=siglip,
        vq=vq,
        aligner_depth=aligner.size("depth", 2, limit=8),
        generation_aligner_depth=gen_aligner.size("depth", 2, limit=8),
        image_token_embed=head.size("image_token_embed", llama.hidden_size),
    )


def parse_siglip(section: Fields) -> SiglipConfig:
    """Reads the sizes of a `vision_config` of the original layout."""
    params = section.section("params")
    name = params.data.get("model_name", "siglip_large_patch16_384")
    preset = SIGLIP_PRESETS.get(name) if isinstance(name, str) else None
    explicit = [size for size in _SIGLIP_SIZES if params.has(size)]
    if preset is None and len(explicit) < len(_SIGLIP_SIZES):
        missing = ", ".join(size for size in _SIGLIP_SIZES if size not in explicit)
        section.problems.add(
            f"{params.where}: model_name is {name!r}, expected one of {', '.join(SIGLIP_PRESETS)}, "
            f"or all sizes stated; {missing} are not"
        )
    # With a problem above the result is not used, but the other fields are still checked.
    preset = preset or SiglipConfig()
    params.expect("select_layer", (-1,), "Janus uses all layers")
    statistics = ("pixel_mean", "pixel_std")
    # With both, the original normalises twice; one alone it does not use.
    if all(map(params.has, statistics)):
        for statistic in statistics:
            params.expect(statistic, (None,), "remove it: preprocessor_config.json has it")
    width = params.size("width", preset.hidden_size)
    ratio = params.number("mlp_ratio", preset.intermediate_size / preset.hidden_size)
    return SiglipConfig(
        image_size=params.size("image_size", preset.image_size),
        patch_size=params.size("patch_size", preset.patch_size),
        hidden_size=width,
        intermediate_size=int(width * ratio),
        num_layers=params.size("layers", preset.num_layers, limit=10_000),
        num_heads=params.size("heads", preset.num_heads),
        layer_norm_eps=preset.layer_norm_eps,
    )


def _parse_vq(section: Fields) -> VQConfig:
    section.expect("cls", tuple(VQ_PRESETS), "the tokenizer that Janus ships with")
    preset = VQ_PRESETS["VQ-16"]
    params = section.section("params")
    return VQConfig(
        num_embeddings=params.size("image_token_size", preset.num_embeddings),
        embed_dim=params.size("n_embed", preset.embed_dim),
        z_channels=params.size("z_channels", preset.z_channels),
        base_channels=params.size("ch", preset.base_channels),
        channel_multiplier=params.sizes("ch_mult", preset.channel_multiplier),
        num_res_blocks=params.size("num_res_blocks", preset.num_res_blocks, limit=1000),
    )


def write(config: JanusConfig, dtype: str) -> dict[str, Any]:
    """Returns the JSON of a config.json, without nulls, for the original package and `parse`."""
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "aligner_config": _write_projector(
            "aligner", config.aligner_depth, config.siglip.hidden_size, config
        ),
        "gen_aligner_config": _write_projector(
            "gen_aligner", config.generation_aligner_depth, config.vq.embed_dim, config
        ),
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {
                "image_token_embed": config.image_token_embed,
                "image_token_size": config.vq.num_embeddings,
                "n_embed": config.llama.hidden_size,
            },
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": _write_vq(config.vq),
        },
        "language_config": {
            **write_llama(config.llama),
            "torch_dtype": dtype,
            "_attn_implementation": "eager",
        },
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": write_siglip(config.siglip),
        },
    }


def _write_projector(name: str, depth: int, width: int, config: JanusConfig) -> dict[str, Any]:
    return {
        "cls": "MlpProjector",
        "model_type": name,
        "params": {
            "depth": depth,
            "input_dim": width,
            "n_embed": config.llama.hidden_size,
            "projector_type": "mlp_gelu",
        },
    }


def _write_vq(vq: VQConfig) -> dict[str, Any]:
    preset = VQ_PRESETS["VQ-16"]
    params = {"image_token_size": vq.num_embeddings, "n_embed": vq.embed_dim}
    explicit = {
        "ch": (vq.base_channels, preset.base_channels),
        "ch_mult": (list(vq.channel_multiplier), list(preset.channel_multiplier)),
        "num_res_blocks": (vq.num_res_blocks, preset.num_res_blocks),
        "z_channels": (vq.z_channels, preset.z_channels),
    }
    return params | {name: value for name, (value, usual) in explicit.items() if value != usual}


def write_siglip(siglip: SiglipConfig) -> dict[str, Any]:
    """Returns the preset's name, and the sizes in which this tower differs from it."""
    preset = SIGLIP_PRESETS["siglip_large_patch16_384"]
    params: dict[str, Any] = {
        "image_size": siglip.image_size,
        "model_name": "siglip_large_patch16_384",
        "select_feature": "same",
        "select_layer": -1,
    }
    explicit = {
        "width": (siglip.hidden_size, preset.hidden_size),
        "layers": (siglip.num_layers, preset.num_layers),
        "heads": (siglip.num_heads, preset.num_heads),
        "patch_size": (siglip.patch_size, preset.patch_size),
        "mlp_ratio": (find_mlp_ratio(siglip), find_mlp_ratio(preset)),
    }
    return params | {name: value for name, (value, usual) in explicit.items() if value != usual}


def find_mlp_ratio(siglip: SiglipConfig) -> float:
    """Returns a ratio whose product with the width, truncated, is exactly the inner width."""
    # Readers compute int(width * ratio), and the product can round to just below a whole number.
    ratio = siglip.intermediate_size / siglip.hidden_size
    return ratio if int(siglip.hidden_size * ratio) == siglip.intermediate_size else ratio + 1e-9
