"""Tiny reward networks as folders: random weights in our own layout, with a tokenizer.

Words are those of the tiny rows; nothing here needs PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from corl_jax.models import modules
from corl_jax.models.bert import BertConfig
from corl_jax.models.blip import BlipConfig, BlipTextConfig, BlipVisionConfig
from corl_jax.models.clip import ClipConfig, TowerConfig
from corl_jax.models.mask2former import Mask2FormerConfig
from corl_jax.models.swin import SwinConfig
from corl_jax.models.vgg import VggConfig
from corl_jax.params import flatten, map_with_path
from corl_jax.types import Params
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.kinds import NETWORK_TYPE
from corl_jax.weights.layouts import KINDS
from corl_jax.weights.own_config import FORMAT_VERSION

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "green", "circle"),
    *("square", "picture", "number", *(f"##{d}" for d in range(10)), *map(str, range(10))),
]
SEP = WORDS.index("[SEP]")
BERT = BertConfig(
    vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
BLIP = BlipConfig(
    BlipVisionConfig(
        image_size=16, patch_size=4, hidden_size=16, intermediate_size=24, num_layers=2,
        num_heads=2,
    ),
    BlipTextConfig(
        vocab_size=len(WORDS) + 2, hidden_size=16, intermediate_size=24, num_layers=2,
        num_heads=2, max_position_embeddings=64, bos_token_id=len(WORDS), sep_token_id=SEP,
        tie_word_embeddings=False,
    ),
)  # fmt: skip
VGG = VggConfig(channels=(4, 4, 4, 4, 4))
CLIP = ClipConfig(
    vision=TowerConfig(24, 32, 2, 3), text=TowerConfig(16, 28, 2, 2), image_size=16, patch_size=8,
    vocab_size=40, context_length=9, eos_token_id=39, projection_dim=12,
)  # fmt: skip
MASK2FORMER = Mask2FormerConfig(
    SwinConfig(width=8, depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 2), window_size=4),
    hidden_size=32, mask_size=16, encoder_intermediate_size=24, decoder_intermediate_size=24,
    encoder_num_layers=1, decoder_num_layers=3, num_heads=4, num_queries=6, shorter_side=40,
    longer_side=64,
)  # fmt: skip
PREPROCESSOR = {
    "do_normalize": True, "do_resize": True, "resample": 3, "size": {"height": 16, "width": 16},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
TINY = {"bert": BERT, "blip": BLIP, "vgg": VGG, "clip": CLIP, "mask2former": MASK2FORMER}


def random_network(kind: str, seed: int = 0) -> Params:
    """Float32 arrays, large enough for outputs to differ."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> np.ndarray:
        noise = np.asarray(rng.standard_normal(leaf.shape), np.float32)
        if path.endswith("/scale"):
            return np.asarray(1 + 0.1 * noise)
        return np.asarray(np.abs(noise) if path.startswith("heads") else 0.4 * noise)

    return map_with_path(draw, modules.make_abstract(KINDS[kind].module, TINY[kind]))


def load_network(path: Path, kind: str, dtype: Any = None) -> tuple[Any, Params]:
    """Returns the sizes and the parameters of a network's folder."""
    with open_checkpoint(path, KINDS[kind]) as opened:
        return opened.config, opened.load(dtype)


def network_dir(folder: Path, kind: str, seed: int = 0) -> Path:
    """A converted network's folder, as `convert_weights to-jax` leaves it."""
    folder.mkdir(parents=True)
    save_file(flatten(random_network(kind, seed)), folder / "model.safetensors")
    config = {
        "model_type": NETWORK_TYPE, "format_version": FORMAT_VERSION, "network": kind,
        "sizes": dataclasses.asdict(TINY[kind]),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if kind in ("bert", "blip"):
        (folder / "vocab.txt").write_text("\n".join(WORDS))
    if kind == "blip":
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder
