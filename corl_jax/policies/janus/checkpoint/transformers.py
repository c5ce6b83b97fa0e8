"""Reads and writes transformers' config.json, and writes its generation_config.json.

Source: transformers 5.23 `models/janus`.
"""

from __future__ import annotations

from typing import Any

from corl_jax.errors import InputError, Problems
from corl_jax.models.siglip import SiglipConfig
from corl_jax.models.vq import VQConfig
from corl_jax.policies.janus.checkpoint.llama_sizes import parse_llama, write_llama
from corl_jax.policies.janus.checkpoint.original import find_mlp_ratio
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.weights.foreign_config import Fields


def parse(data: dict[str, Any], where: str, problems: Problems) -> JanusConfig:
    """Reads the sizes of transformers' config.json; adds its problems to `problems`."""
    top = Fields(where, data, problems)
    llama = parse_llama(top.section("text_config"))
    vision, vq = top.section("vision_config"), top.section("vq_config")
    siglip = parse_siglip(vision)
    vision.equal("num_image_tokens", siglip.num_tokens)
    for fields, name in ((vision, "projection_dim"), (vq, "projection_dim")):
        if fields.size(name, 2048) != llama.hidden_size:
            problems.add(
                f"{fields.where}: {name} is {fields.size(name, 2048)}, expected "
                f"{llama.hidden_size}, the text model's hidden_size"
            )
    vq.expect("hidden_act", ("gelu",), "the only activation implemented")
    return JanusConfig(
        llama=llama,
        siglip=siglip,
        vq=_parse_vq(vq),
        aligner_depth=vision.size("depth", 2, limit=8),
        generation_aligner_depth=vq.size("num_hidden_layers", 2, limit=8),
        image_token_embed=vq.size("projection_dim", 2048),
    )


def parse_siglip(fields: Fields) -> SiglipConfig:
    """Reads the sizes of a `vision_config` of transformers."""
    fields.expect("hidden_act", ("gelu",), "the only activation implemented")
    fields.expect("attention_bias", (True,), "SigLIP has biases")
    fields.expect("use_qk_norm", (False,), "not implemented")
    fields.expect("num_channels", (3,), "images are RGB")
    width = fields.size("hidden_size", 1024)
    return SiglipConfig(
        image_size=fields.size("image_size", 384),
        patch_size=fields.size("patch_size", 16),
        hidden_size=width,
        intermediate_size=int(width * fields.number("mlp_ratio", 4.0)),
        num_layers=fields.size("num_hidden_layers", 24, limit=10_000),
        num_heads=fields.size("num_attention_heads", 16),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-6),
    )


def _parse_vq(fields: Fields) -> VQConfig:
    fields.expect("double_latent", (False,), "not implemented")
    fields.expect("in_channels", (3,), "images are RGB")
    fields.expect("out_channels", (3,), "images are RGB")
    return VQConfig(
        num_embeddings=fields.size("num_embeddings", 16384),
        embed_dim=fields.size("embed_dim", 8),
        z_channels=fields.size("latent_channels", 256),
        base_channels=fields.size("base_channels", 128),
        channel_multiplier=fields.sizes("channel_multiplier", (1, 1, 2, 2, 4)),
        num_res_blocks=fields.size("num_res_blocks", 2, limit=1000),
    )


def check_expressible(config: JanusConfig) -> None:
    """Checks that transformers' class can express the sizes. Raises: InputError if not."""
    # The class uses `projection_dim`, which is hidden_size, for the inner width of the image head.
    width = config.llama.hidden_size
    if config.image_token_embed != width:
        raise InputError(
            f"image_token_embed is {config.image_token_embed}; transformers' Janus needs it equal "
            f"to hidden_size {width}; write the original layout instead"
        )


def write(config: JanusConfig, dtype: str, special: SpecialTokens) -> dict[str, Any]:
    """Returns the JSON of transformers' config.json, with every size stated.

    Raises: InputError for sizes that transformers' class cannot express.
    """
    check_expressible(config)
    llama = config.llama
    ids = {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
    }
    rope = {"rope_type": "default", "rope_theta": llama.rope_theta}
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "dtype": dtype,
        "image_token_id": special.image,
        # transformers' class default is true, which would tie lm_head to embed_tokens.
        "tie_word_embeddings": False,
        "text_config": {**write_llama(llama), "rope_parameters": rope, "dtype": dtype, **ids},
        "vision_config": _write_siglip(config),
        "vq_config": _write_vq(config),
    }


def _write_siglip(config: JanusConfig) -> dict[str, Any]:
    siglip = config.siglip
    return {
        "model_type": "janus_vision_model",
        "hidden_size": siglip.hidden_size,
        "num_hidden_layers": siglip.num_layers,
        "num_attention_heads": siglip.num_heads,
        "num_channels": 3,
        "image_size": siglip.image_size,
        "patch_size": siglip.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": siglip.layer_norm_eps,
        "mlp_ratio": find_mlp_ratio(siglip),
        "attention_bias": True,
        "use_qk_norm": False,
        "projection_dim": config.llama.hidden_size,
        "depth": config.aligner_depth,
        "num_image_tokens": siglip.num_tokens,
    }


def _write_vq(config: JanusConfig) -> dict[str, Any]:
    vq = config.vq
    return {
        "model_type": "janus_vqgan",
        "embed_dim": vq.embed_dim,
        "num_embeddings": vq.num_embeddings,
        "double_latent": False,
        "latent_channels": vq.z_channels,
        "in_channels": 3,
        "out_channels": 3,
        "base_channels": vq.base_channels,
        "channel_multiplier": list(vq.channel_multiplier),
        "num_res_blocks": vq.num_res_blocks,
        "num_patches": config.siglip.image_size // config.siglip.patch_size,
        "hidden_act": "gelu",
        "projection_dim": config.llama.hidden_size,
        "num_hidden_layers": config.generation_aligner_depth,
        "image_token_embed_dim": config.llama.hidden_size,
    }


def write_generation(special: SpecialTokens) -> dict[str, Any]:
    """Returns a generation_config.json with which `generate(generation_mode="image")` works."""
    # Janus samples from the full softmax. transformers' default is top_k 50, and greedy decoding
    # without do_sample. It reads the BOI id from `generation_kwargs`.
    return {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
        "do_sample": True,
        "top_k": 0,
        "guidance_scale": 5,
        "generation_kwargs": {"boi_token_id": special.boi},
    }
