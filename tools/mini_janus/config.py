"""The sizes of the mini Janus: 3.8 million parameters, 7.6 MB in bfloat16.

Chosen so that an export stays under 8 MB. The language model has more than half of it; the image
tokenizer's width is the least that its 32-group norms allow.
"""

from __future__ import annotations

from corl_jax.models.janus import JanusConfig
from corl_jax.models.llama import LlamaConfig
from corl_jax.models.siglip import SiglipConfig
from corl_jax.models.vq import VQConfig

IMAGE_SIZE = 64
MAX_POSITIONS = 1024


def mini_config(vocab_size: int) -> JanusConfig:
    """A Janus for 64x64 pictures: 8x8 tokens an image, read and drawn, as both grids must agree."""
    return JanusConfig(
        llama=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=352,
            num_layers=6,
            num_heads=6,
            num_kv_heads=6,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS,
        ),
        siglip=SiglipConfig(
            image_size=IMAGE_SIZE,
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
            base_channels=32,
            channel_multiplier=(1, 1, 1, 2),
            num_res_blocks=1,
        ),
        image_token_embed=192,
    )
