"""A tiny detector that is sure of what it sees, and a tiny CLIP that reads any text; as folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizerFast

from corl_jax.models import modules
from corl_jax.models.clip import Clip, ClipConfig, TowerConfig
from corl_jax.params import flatten, map_with_path
from corl_jax.types import Params
from corl_jax.weights.kinds import NETWORK_TYPE
from corl_jax.weights.own_config import FORMAT_VERSION
from tests.support.tiny_networks import MASK2FORMER, random_network

ALPHABET = sorted(ByteLevel.alphabet())
TOKENS = [*ALPHABET, *(f"{c}</w>" for c in ALPHABET), "<|startoftext|>", "<|endoftext|>"]
CLIP = ClipConfig(
    vision=TowerConfig(24, 32, 2, 3), text=TowerConfig(16, 28, 2, 2), image_size=16, patch_size=8,
    vocab_size=len(TOKENS), context_length=60, eos_token_id=len(TOKENS) - 1, projection_dim=12,
)  # fmt: skip


def detector_params() -> Params:
    """Random parameters whose queries differ, with classes of probabilities near 1."""
    params = random_network("mask2former", 3)
    params["class_head"]["kernel"] = 6 * params["class_head"]["kernel"]
    # Layers pull the queries together; here they pull less.
    for name in ("cross_attn", "self_attn"):
        for field, leaf in params["layers"][name]["out_proj"].items():
            params["layers"][name]["out_proj"][field] = 0.1 * leaf
    for name in ("query_features", "query_positions"):
        params[name]["embedding"] = 5 * params[name]["embedding"]
    # Without a mean over the image, a mask covers a part of it.
    params["pixel_decoder"]["output_norm"]["bias"] = np.zeros(32, np.float32)
    params["pixel_decoder"]["mask_conv"]["kernel"] -= params["pixel_decoder"]["mask_conv"][
        "kernel"
    ].mean(axis=2, keepdims=True)
    params["pixel_decoder"]["mask_conv"]["bias"] = np.zeros(16, np.float32)
    return params


def save_network(folder: Path, kind: str, config, params: Params) -> Path:
    """Writes a network in our own layout."""
    folder.mkdir(parents=True)
    save_file(flatten(params), folder / "model.safetensors")
    text = {
        "model_type": NETWORK_TYPE, "format_version": FORMAT_VERSION, "network": kind,
        "sizes": dataclasses.asdict(config),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def detector_dir(folder: Path) -> Path:
    return save_network(folder, "mask2former", MASK2FORMER, detector_params())


def clip_dir(folder: Path) -> Path:
    """A CLIP with a tokenizer of bytes."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = np.asarray(0.3 * rng.standard_normal(leaf.shape), np.float32)
        return noise + np.float32(1) if path.endswith("/scale") else noise

    params = map_with_path(draw, modules.make_abstract(Clip, CLIP))
    save_network(folder, "clip", CLIP, params)
    vocab = {token: number for number, token in enumerate(TOKENS)}
    CLIPTokenizerFast(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


def draw_images(count: int, sides: tuple[int, int] = (32, 32), seed: int = 0) -> np.ndarray:
    """Coloured rectangles on noise, uint8 [count, H, W, 3]."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 90, (count, *sides, 3), np.uint8)
    for image in images:
        top, left = rng.integers(0, [side // 2 for side in sides])
        image[top : top + sides[0] // 2, left : left + sides[1] // 3] = rng.integers(0, 256, 3)
    return images
