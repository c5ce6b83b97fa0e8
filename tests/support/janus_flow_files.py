"""The original files of a tiny JanusFlow, and its tensors by the specification's key table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from corl_jax.weights.dtypes import BFLOAT16
from tests.parity import torch_janus_flow
from tests.parity.torch_janus import LLAMA
from tests.parity.torch_janus_flow import SIZES, VAE, VISION, Flow
from tests.support import tiny_vae
from tests.support.tiny_models import tiny_tokenizer_dir

VAE_CONFIG = tiny_vae.make_config(VAE)
TOWER = "vision_und_enc_model.vision_tower"
_TOWER_NAMES = (
    # Versions of transformers differ in this part.
    ("vision_und_enc_model.vision_model.", "vision_und_enc_model."),
    ("vision_und_enc_model.", f"{TOWER}."),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("encoder.layers", "blocks"),
    ("post_layernorm", "norm"),
    ("layer_norm", "norm"),
    ("self_attn.q_proj", "attn.qkv"),
    ("self_attn.out_proj", "attn.proj"),
)


def make_config() -> dict[str, Any]:
    """The config.json of `torch_janus_flow.tiny_flow`; one class has a dotted path."""
    width, common = LLAMA["hidden_size"], {"block_out_channels": [SIZES["encoder"]]}
    flags = {"elementwise_affine": True, "use_bias": True, "norm_eps": 1e-6, "use_mid_block": True}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "float32",
        "language_config": {
            "model_type": "llama", "vocab_size": 400, "hidden_size": width,
            "intermediate_size": LLAMA["intermediate_size"], "torch_dtype": "float32",
            "num_hidden_layers": LLAMA["num_hidden_layers"],
            "num_attention_heads": LLAMA["num_attention_heads"],
            "max_position_embeddings": LLAMA["max_position_embeddings"],
        },
        "vision_und_enc_config": {
            "cls": "CLIPVisionTower", "model_type": "vision_und_enc",
            "params": {
                "image_size": VISION["image_size"], "model_name": "siglip_large_patch16_384",
                "select_feature": "same", "select_layer": -1, "width": VISION["hidden_size"],
                "layers": VISION["num_hidden_layers"], "heads": VISION["num_attention_heads"],
                "patch_size": VISION["patch_size"], "mlp_ratio": 2.0,
            },
        },
        "vision_gen_enc_config": {
            "cls": "janus.janusflow.models.uvit.ShallowUViTEncoder",
            "params": {
                **common, **flags, "input_channels": SIZES["channels"], "stride": 2,
                "kernel_size": 2, "padding": 0, "layers_in_middle": SIZES["blocks"],
                "hidden_size": width, "dropout": 0.0,
            },
        },
        "vision_gen_dec_config": {
            "cls": "ShallowUViTDecoder",
            "params": {
                **common, **flags, "in_channels": SIZES["decoder"], "upsamples": 1,
                "out_channels": SIZES["channels"], "layers_in_middle": SIZES["last_blocks"],
                "hidden_size": width, "dropout": 0.0,
            },
        },
    }  # fmt: skip


def original_state(model: Flow) -> dict[str, torch.Tensor]:
    """The tensors under the original's names, with an attention pool that nothing reads."""
    state, out = model.state_dict(), {}
    for key, tensor in state.items():
        if not key.startswith("vision_und_enc_model."):
            out[key] = tensor
            continue
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            tensor = torch.cat([state[key.replace("q_proj", f"{n}_proj")] for n in "qkv"])
        if "position_embedding" in key:
            tensor = tensor[None]
        for old, new in _TOWER_NAMES:
            key = key.replace(old, new)
        out[key] = tensor
    generator, width = torch.Generator().manual_seed(9), VISION["hidden_size"]
    for name, shape in {"latent": (1, 1, width), "q.weight": (width, width)}.items():
        out[f"{TOWER}.attn_pool.{name}"] = torch.randn(shape, generator=generator)
    return out


def vae_state() -> dict[str, np.ndarray]:
    """The tensors of the VAE, by diffusers' names."""
    return tiny_vae.make_state(VAE)


def make_model(seed: int = 0) -> Flow:
    """A tiny network whose vocabulary has room for the tiny tokenizer."""
    return torch_janus_flow.tiny_flow(seed, vocab_size=400)


def write_small_files(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """Writes tokenizer, processor files and config.json."""
    tiny_tokenizer_dir(
        folder, image_size=VISION["image_size"], patch_size=VISION["patch_size"], role_tokens=False
    )
    (folder / "config.json").write_text(json.dumps(config or make_config()))
    return folder


def save_state(folder: Path, state: dict[str, torch.Tensor], form: str = "safetensors") -> None:
    """Saves tensors as `safetensors`, `bin`, or in two files with an index: `sharded`."""
    whole = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    if form == "safetensors":
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(whole, folder / "pytorch_model.bin")
    else:
        places = {}
        for number, keys in enumerate((list(whole)[::2], list(whole)[1::2]), start=1):
            name = f"model-{number:05d}-of-00002.safetensors"
            save_file({key: whole[key] for key in keys}, folder / name, metadata={"format": "pt"})
            places |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def original_folder(folder: Path, *, form: str = "safetensors", dtype: Any = torch.float32) -> Path:
    """Writes a whole tiny JanusFlow in the original layout, with its VAE in float32."""
    write_small_files(folder)
    tiny_vae.write_vae(folder / "vae", vae_state(), **VAE_CONFIG)
    state = {key: tensor.to(dtype) for key, tensor in original_state(make_model()).items()}
    save_state(folder, state, form)
    return folder


def to_numpy(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The tensors as NumPy arrays of the same bits."""
    return {
        key: tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
        if tensor.dtype == torch.bfloat16
        else tensor.contiguous().numpy()
        for key, tensor in state.items()
    }
