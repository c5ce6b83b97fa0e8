"""Tiny random Janus models of transformers, and their weights as our parameters.

The mapping goes by torch module type and a handful of renames. It shares nothing with the
conversion tables, so that a mistake there cannot hide here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from transformers import JanusConfig as TorchConfig
from transformers import JanusForConditionalGeneration, LlamaConfig
from transformers.models.janus import JanusVisionConfig, JanusVQVAEConfig

from corl_jax.models import llama, siglip, vq
from corl_jax.policies.janus.network import JanusConfig

torch.set_num_threads(1)

IMAGE_TOKEN, PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, BOI_TOKEN = 90, 0, 1, 2, 91

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": PAD_TOKEN,
    "bos_token_id": BOS_TOKEN, "eos_token_id": EOS_TOKEN,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "mlp_ratio": 2.0, "projection_dim": 32, "num_image_tokens": 16,
}  # fmt: skip
VQ = {
    "embed_dim": 8, "num_embeddings": 48, "latent_channels": 16, "base_channels": 32,
    "channel_multiplier": [1, 1, 2], "num_res_blocks": 2, "projection_dim": 32,
    "image_token_embed_dim": 32,
}  # fmt: skip

Renames = tuple[tuple[str, str], ...]
RENAMES: Renames = (
    (r"^model\.", ""),
    (r"\.self_attn\.", ".attn."),
    (r"^vision_model\.(embeddings|encoder)\.", "vision_model."),
    (r"^(vision_model\..*)projection_layer", r"\1out_proj"),
    (r"^vqmodel\.quantize\.embedding", "vqmodel.quantize"),
)


def tiny_model(
    *,
    seed: int = 0,
    rope_theta: float = 10000.0,
    llama: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    vq: dict[str, Any] | None = None,
) -> JanusForConditionalGeneration:
    """A float32 model in evaluation mode; arguments override the sizes above."""
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    config = TorchConfig(
        text_config=LlamaConfig(**LLAMA | {"rope_parameters": rope} | (llama or {})),
        vision_config=JanusVisionConfig(**VISION | (vision or {})),
        vq_config=JanusVQVAEConfig(**VQ | (vq or {})),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config).float().eval()
    generator = randomise(model, seed)
    # Rows of very different length, so that leaving out the normalisation changes the codes.
    codebook = model.model.vqmodel.quantize.embedding.weight
    codebook.data *= torch.exp(torch.randn(codebook.shape[0], 1, generator=generator))
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> torch.Generator:
    """Weights that keep activations near 1 and give every scale and bias a value of its own.

    Returns what they were drawn from.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif parameter.ndim == 1:  # the scale of a norm
            parameter.copy_(1 + 0.3 * noise)
        elif "embed" in name and "patch" not in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return generator


def jax_config(config: TorchConfig) -> JanusConfig:
    """Our sizes of a transformers configuration."""
    text, vision, drawn = config.text_config, config.vision_config, config.vq_config
    return JanusConfig(
        llama=llama.LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            rope_theta=text.rope_parameters["rope_theta"],
            rms_norm_eps=text.rms_norm_eps,
            max_position_embeddings=text.max_position_embeddings,
        ),
        siglip=siglip.SiglipConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_size=vision.hidden_size,
            intermediate_size=int(vision.hidden_size * vision.mlp_ratio),
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            layer_norm_eps=vision.layer_norm_eps,
        ),
        vq=vq.VQConfig(
            num_embeddings=drawn.num_embeddings,
            embed_dim=drawn.embed_dim,
            z_channels=drawn.latent_channels,
            base_channels=drawn.base_channels,
            channel_multiplier=tuple(drawn.channel_multiplier),
            num_res_blocks=drawn.num_res_blocks,
        ),
        aligner_depth=vision.depth,
        generation_aligner_depth=drawn.num_hidden_layers,
        image_token_embed=drawn.projection_dim,
    )


def params_of(model: torch.nn.Module, renames: Renames = RENAMES) -> dict:
    """The model's weights as our nested dict of float32 NumPy arrays."""
    return _nested(model, lambda parameter: parameter, renames)


def gradients_of(model: torch.nn.Module, renames: Renames = RENAMES) -> dict:
    """The model's gradients, laid out like its weights; zeros where torch has none."""
    return _nested(model, lambda p: torch.zeros_like(p) if p.grad is None else p.grad, renames)


def _nested(model: torch.nn.Module, value: Callable, renames: Renames = RENAMES) -> dict:
    flat: dict[str, Any] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            array = value(parameter).detach().numpy().copy()
            path, layer = _path(name, renames)
            kind, array = _leaf(module, leaf, array)
            if layer is None:
                flat[f"{path}/{kind}"] = array
            else:
                flat.setdefault(f"{path}/{kind}", {})[layer] = array
    return _nest(
        (path, np.stack([x[i] for i in range(len(x))]) if isinstance(x, dict) else x)
        for path, x in flat.items()
    )


def _path(name: str, renames: Renames) -> tuple[str, int | None]:
    """Path without the leaf, and the layer if the path is one of a stack."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    if found := re.fullmatch(r"((?:language|vision)_model\.layers)\.(\d+)\.(.*)", name):
        return f"{found[1]}.{found[3]}".replace(".", "/"), int(found[2])
    return name.replace(".", "/"), None


def _leaf(module: torch.nn.Module, leaf: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    if leaf == "bias":
        return "bias", array
    if isinstance(module, torch.nn.Embedding):
        return "embedding", array
    if isinstance(module, torch.nn.Linear):
        return "kernel", array.T
    if isinstance(module, torch.nn.Conv2d):
        return "kernel", array.transpose(2, 3, 1, 0)
    assert array.ndim == 1, f"{type(module).__name__}.{leaf} {array.shape}"
    return "scale", array


def _nest(items: Iterable[tuple[str, np.ndarray]]) -> dict:
    tree: dict = {}
    for path, value in items:
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
