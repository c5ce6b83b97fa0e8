"""A tiny JanusFlow with a tokenizer and a VAE, whose answers end early or never."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from corl_jax.models.llama import LlamaConfig
from corl_jax.models.sd_vae import SdVaeConfig
from corl_jax.models.siglip import SiglipConfig
from corl_jax.models.uvit import UvitConfig
from corl_jax.params import map_with_path
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.checkpoint import KIND
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.policies.janus_flow.prompts import Processor
from corl_jax.types import EncodedPrompts
from corl_jax.weights.export import save_checkpoint
from tests.support import tiny_vae
from tests.support.tiny_models import tiny_tokenizer_dir

SPECIAL = SpecialTokens(bos=1, eos=2, pad=0, boi=91, eoi=92, image=90)
SIDE = 16
CONFIG = JanusFlowConfig(
    llama=LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=8, max_position_embeddings=512,
    ),
    siglip=SiglipConfig(
        image_size=SIDE, patch_size=4, hidden_size=24, intermediate_size=48, num_layers=2,
        num_heads=2,
    ),
    uvit=UvitConfig(
        encoder_width=20, encoder_num_layers=1, decoder_width=12, decoder_num_layers=2
    ),
    # A patch of 2 latents has 4 pixels a side, as a patch in a prompt.
    vae=SdVaeConfig(block_channels=(8, 16), num_res_blocks=1, norm_groups=4),
)  # fmt: skip


def make_params(config: JanusFlowConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    """Random float32 arrays; outputs of layers are about as large as inputs."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> np.ndarray:
        fan_in = np.prod(leaf.shape[-2:-1] if "layers" in path else leaf.shape[:-1])
        size = 0.5 if path.endswith(("embedding", "bias")) else max(fan_in, 1) ** -0.5
        noise = size * rng.standard_normal(leaf.shape)
        is_scale = path.endswith("/scale") and "response_norm" not in path
        return np.asarray(noise * (not is_scale) + is_scale, np.float32)

    abstract = network.abstract(config)
    return map_with_path(draw, abstract) | {"vae": tiny_vae.make_params(config.vae)}


def pad_left(rows: Any, length: int) -> EncodedPrompts:
    """Encodes lists of ids as prompts, padded to a length."""
    ids = np.full((len(rows), length), SPECIAL.pad, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, True
    return EncodedPrompts(ids, mask)


def model_dir(folder: Path, layout: str = "jax") -> Path:
    """Writes a checkpoint with its tokenizer."""
    llama = dataclasses.replace(CONFIG.llama, vocab_size=400)
    config = dataclasses.replace(CONFIG, llama=llama)
    words = tiny_tokenizer_dir(
        folder.parent / "words", image_size=SIDE, patch_size=4, role_tokens=False
    )
    params = make_params(config)
    params["lm_head"]["kernel"][:, Processor.from_dir(words).special.eos] *= 6
    save_checkpoint(folder, KIND, config, params, layout=layout)
    shutil.copytree(words, folder, dirs_exist_ok=True)
    return folder
