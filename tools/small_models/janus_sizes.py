"""Sizes of the two Janus models in the package: `mini` and `nano`.

`mini` has 3.8 million parameters, 7.6 MB in bfloat16, for the full drawn world. `nano` has less
than one million, 1.9 MB, for the small one. The language model is the largest part of each.
"""

from __future__ import annotations

from collections.abc import Callable

from corl_jax.models.llama import LlamaConfig
from corl_jax.models.siglip import SiglipConfig
from corl_jax.models.vq import VQConfig
from corl_jax.policies.janus.network import JanusConfig

MAX_POSITIONS = {"mini": 1024, "nano": 256}


def make_mini_config(vocab_size: int) -> JanusConfig:
    """Returns a Janus for 64x64 images: 8x8 tokens, for the images that it reads and generates."""
    return JanusConfig(
        llama=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=352,
            num_layers=6,
            num_heads=6,
            num_kv_heads=6,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS["mini"],
        ),
        siglip=SiglipConfig(
            image_size=64,
            patch_size=8,
            hidden_size=96,
            intermediate_size=288,
            num_layers=3,
            num_heads=3,
        ),
        vq=VQConfig(
            num_embeddings=512,
            embed_dim=8,
            z_channels=64,
            base_channels=32,  # the smallest width for group norms of 32 groups
            channel_multiplier=(1, 1, 1, 2),
            num_res_blocks=1,
        ),
        image_token_embed=192,
    )


def make_nano_config(vocab_size: int) -> JanusConfig:
    """Returns a Janus for 32x32 images: 4x4 tokens."""
    return JanusConfig(
        llama=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=96,
            intermediate_size=256,
            num_layers=3,
            num_heads=3,
            num_kv_heads=3,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS["nano"],
        ),
        siglip=SiglipConfig(
            image_size=32,
            patch_size=8,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=2,
        ),
        vq=VQConfig(
            num_embeddings=256,
            embed_dim=8,
            z_channels=32,
            base_channels=32,
            channel_multiplier=(1, 1, 1, 1),
            num_res_blocks=1,
        ),
        image_token_embed=96,
    )


CONFIGS: dict[str, Callable[[int], JanusConfig]] = {
    "mini": make_mini_config,
    "nano": make_nano_config,
}
