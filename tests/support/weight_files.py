"""Tiny checkpoints in both PyTorch layouts, built without the package's own key tables."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SPECIALS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "boi": "<begin_of_image>",
    "eoi": "<end_of_image>",
    "image": "<image_placeholder>",
}
ROLE_TOKENS = ("<|User|>", "<|Assistant|>")
SIZES = {  # no two alike, so that a transposed or swapped tensor cannot fit
    "vocab": 384,
    "hidden": 48,
    "ffn": 80,
    "layers": 3,
    "heads": 6,
    "kv_heads": 2,
    "vision": 40,
    "vision_ffn": 100,
    "vision_layers": 2,
    "vision_heads": 5,
    "codes": 56,
    "embed": 8,
    "z": 24,
    "base": 32,
}


def full_keys() -> dict[str, Any]:
    """Keys and shapes of Janus-Pro 1B and 7B in both layouts, and 1B's keys in pairs."""
    with gzip.open(FIXTURES / "janus_pro_keys.json.gz", "rt") as stream:
        return json.load(stream)


def hf_config_dict() -> dict[str, Any]:
    s = SIZES
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "dtype": "float32",
        "image_token_id": 5,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": s["vocab"],
            "hidden_size": s["hidden"],
            "intermediate_size": s["ffn"],
            "num_hidden_layers": s["layers"],
            "num_attention_heads": s["heads"],
            "num_key_value_heads": s["kv_heads"],
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": s["vision"],
            "num_hidden_layers": s["vision_layers"],
            "num_attention_heads": s["vision_heads"],
            "mlp_ratio": s["vision_ffn"] / s["vision"],
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": s["hidden"],
            "num_image_tokens": 16,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "num_embeddings": s["codes"],
            "embed_dim": s["embed"],
            "latent_channels": s["z"],
            "base_channels": s["base"],
            "channel_multiplier": [1, 1, 2, 3],
            "num_res_blocks": 1,
            "projection_dim": s["hidden"],
            "image_token_embed_dim": s["hidden"],
        },
    }


def original_config_dict() -> dict[str, Any]:
    """The same sizes as `hf_config_dict`, as the original layout states them."""
    s = SIZES
    projector = {"depth": 2, "n_embed": s["hidden"], "projector_type": "mlp_gelu"}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {**projector, "input_dim": s["vision"]},
        },
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {**projector, "input_dim": s["embed"]},
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {
                "image_token_embed": s["hidden"],
                "image_token_size": s["codes"],
                "n_embed": s["hidden"],
            },
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {
                "image_token_size": s["codes"],
                "n_embed": s["embed"],
                "ch": s["base"],
                "ch_mult": [1, 1, 2, 3],
                "num_res_blocks": 1,
                "z_channels": s["z"],
            },
        },
        "language_config": {
            "model_type": "llama",
            "vocab_size": s["vocab"],
            "hidden_size": s["hidden"],
            "intermediate_size": s["ffn"],
            "num_hidden_layers": s["layers"],
            "num_attention_heads": s["heads"],
            "num_key_value_heads": s["kv_heads"],
            "max_position_embeddings": 256,
            "rope_theta": 5000.0,
            "torch_dtype": "bfloat16",
        },
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": 32,
                "model_name": "siglip_large_patch16_384",
                "select_feature": "same",
                "select_layer": -1,
                "width": s["vision"],
                "layers": s["vision_layers"],
                "heads": s["vision_heads"],
                "patch_size": 8,
                "mlp_ratio": s["vision_ffn"] / s["vision"],
            },
        },
    }


def hf_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of transformers' own class at these sizes, on the meta device."""
    import torch
    from transformers import JanusConfig, JanusForConditionalGeneration

    config = JanusConfig.from_dict(hf_config_dict())
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def random_state(
    shapes: dict[str, tuple[int, ...]], *, mixed: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Noise for every key; bfloat16, or one of three types by its name when `mixed`.

    Layers then differ in type; q, k and v do not, since the original layout joins them.
    """
    rng = np.random.default_rng(seed)
    state = {}
    for key, shape in sorted(shapes.items()):
        values = rng.standard_normal(shape).astype(np.float32) * 0.05
        joined = re.sub(r"\b[qkv]_proj\b", "qkv", key)
        number = zlib.crc32(joined.encode()) % 3 if mixed else 0
        state[key] = values.astype((BFLOAT16, np.float32, np.float16)[number])
    return state


def to_original(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers' names back to the original's, by plain replacement; fuses qkv."""
    out: dict[str, np.ndarray] = {}
    for key, value in state.items():
        if ".vision_model." in key and ".self_attn." in key:
            if ".q_proj." not in key and "projection_layer" not in key:
                continue
            if ".q_proj." in key:
                parts = [state[key.replace("q_proj", f"{n}_proj")] for n in "qkv"]
                value = np.concatenate(parts)
        if "position_embedding" in key:
            value = value[None]
        out[original_name(key)] = value
    return out


def original_name(key: str) -> str:
    if key == "lm_head.weight":
        return "language_model.lm_head.weight"
    key = key.removeprefix("model.")
    if key.startswith("language_model."):
        return key.replace("language_model.", "language_model.model.", 1)
    replacements = {
        "vision_model.": [
            ("vision_model.", "vision_model.vision_tower."),
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("embeddings.position_embedding.weight", "pos_embed"),
            ("encoder.layers", "blocks"),
            ("post_layernorm", "norm"),
            ("layer_norm1", "norm1"),
            ("layer_norm2", "norm2"),
            ("self_attn.q_proj", "attn.qkv"),
            ("self_attn.projection_layer", "attn.proj"),
        ],
        "aligner.": [("fc1", "layers.0"), ("hidden_layers.0", "layers.2")],
        "generation_aligner.": [
            ("generation_aligner", "gen_aligner"),
            ("fc1", "layers.0"),
            ("hidden_layers.0", "layers.2"),
        ],
        "generation_embeddings.": [("generation_embeddings", "gen_embed")],
        "generation_head.": [("generation_head", "gen_head"), ("proj_out", "output_mlp_projector")],
        "vqmodel.": [
            ("vqmodel", "gen_vision_model"),
            ("mid.block_1", "mid.0"),
            ("mid.attn_1", "mid.1"),
            ("mid.block_2", "mid.2"),
            (".block.", ".res."),
            ("encoder.down", "encoder.conv_blocks"),
            ("decoder.up", "decoder.conv_blocks"),
        ],
    }  # fmt: skip
    for prefix, pairs in replacements.items():
        if key.startswith(prefix):
            for old, new in pairs:
                key = key.replace(old, new)
            return key
    raise AssertionError(key)


def carried_state(dtype: np.dtype = BFLOAT16) -> dict[str, np.ndarray]:
    """The tensors that only the original layout has."""
    rng, width = np.random.default_rng(7), SIZES["vision"]
    pool = "vision_model.vision_tower.attn_pool."
    shapes = {
        f"{pool}latent": (1, 1, width),
        f"{pool}q.weight": (width, width),
        f"{pool}kv.weight": (2 * width, width),
        f"{pool}proj.bias": (width,),
    }
    state = {key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}
    return state | {"gen_vision_model.quantize.codebook_used": np.zeros(64, np.float32)}


def write_tokenizer(folder: Path, layout: str, *, roles: bool = True, image: bool = True) -> None:
    """A byte-level BPE with Janus's special strings, and the layout's tokenizer files.

    Without `roles` and `image` it is one as Janus-1.3B's, which lists no such special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [*SPECIALS.values(), *(ROLE_TOKENS if roles else ())]
    names = [name for name in names if image or name != SPECIALS["image"]]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {f"{name}_token": SPECIALS[name] for name in ("bos", "eos", "pad")}
    config["model_max_length"] = 16384
    if layout == "original":
        config |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
        specials = {f"{name}_token": SPECIALS[name] for name in ("bos", "eos", "pad")}
        (folder / "special_tokens_map.json").write_text(json.dumps(specials))
        processor = {"processor_class": "VLChatProcessor", "num_image_tokens": 16}
        if not roles:
            processor["sft_format"] = "deepseek_old"
        pixels = {"image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_size": 14}
    else:
        named = {f"{name}_token": SPECIALS[name] for name in ("image", "boi", "eoi")}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **named}
        processor = {"processor_class": "JanusProcessor", "num_image_tokens": 16}
        size = {"height": 32, "width": 32}
        pixels = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        pixels["image_processor_type"] = "JanusImageProcessor"
    for name, data in (
        ("tokenizer_config.json", config),
        ("processor_config.json", processor),
        ("preprocessor_config.json", pixels),
    ):
        (folder / name).write_text(json.dumps(data))


def write_checkpoint(
    folder: Path, state: dict[str, np.ndarray], layout: str, *, tokenizer: bool = True
) -> Path:
    """One model.safetensors with config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {key: np.ascontiguousarray(value) for key, value in state.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    config = original_config_dict() if layout == "original" else hf_config_dict()
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(folder, layout)
    return folder


def read_state(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, by safetensors' own reader."""
    from safetensors.numpy import load_file

    state: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return state


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert found[key].tobytes() == np.ascontiguousarray(value).tobytes(), key
