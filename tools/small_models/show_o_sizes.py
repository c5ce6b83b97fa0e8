"""Sizes of the two small Show-o models: `mini` and `nano`.

`nano` has 0.9 million parameters, for 32x32 images of 4x4 codes of 8 bits. `mini` has 3 million,
for 64x64 images of 8x8 codes of 9 bits. A norm of the tokenizer has 32 groups, so that 32 channels
are the fewest. The nano's tokenizer has the sizes of the nano Janus's, see `sign_tokenizer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from corl_jax.models.magvit import MagvitConfig
from corl_jax.models.phi import PhiConfig
from corl_jax.policies.show_o.network import NUM_NEW_TOKENS, ShowOConfig

MAX_POSITIONS = {"mini": 1024, "nano": 256}


def make_mini_config(text_tokens: int) -> ShowOConfig:
    """Returns a Show-o for 64x64 images: 8x8 codes of 9 bits."""
    return _make_config(
        text_tokens,
        PhiConfig(
            hidden_size=192,
            intermediate_size=576,
            num_layers=6,
            num_heads=6,
            num_kv_heads=6,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS["mini"],
        ),
        MagvitConfig(
            z_channels=9,
            base_channels=32,
            encoder_channels=(32, 32, 32, 64),
            encoder_blocks=(1, 1, 1, 1),
            decoder_channels=(32, 32, 32, 64),
            decoder_blocks=(2, 2, 2, 2),
        ),
        num_vq_tokens=64,
    )


def make_nano_config(text_tokens: int) -> ShowOConfig:
    """Returns a Show-o for 32x32 images: 4x4 codes of 8 bits."""
    return _make_config(
        text_tokens,
        PhiConfig(
            hidden_size=96,
            intermediate_size=288,
            num_layers=4,
            num_heads=3,
            num_kv_heads=3,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS["nano"],
        ),
        MagvitConfig(
            z_channels=8,
            base_channels=32,
            encoder_channels=(32, 32, 32, 32),
            encoder_blocks=(1, 1, 1, 1),
            decoder_channels=(32, 32, 32, 32),
            decoder_blocks=(2, 2, 2, 2),
        ),
        num_vq_tokens=16,
    )


def _make_config(
    text_tokens: int, phi: PhiConfig, magvit: MagvitConfig, num_vq_tokens: int
) -> ShowOConfig:
    # text, the control tokens, image codes, and the mask token
    vocab_size = text_tokens + NUM_NEW_TOKENS + magvit.num_codes + 1
    return ShowOConfig(
        phi=dataclasses.replace(phi, vocab_size=vocab_size),
        magvit=magvit,
        num_vq_tokens=num_vq_tokens,
        llm_vocab_size=text_tokens,
    )


CONFIGS: dict[str, Callable[[int], ShowOConfig]] = {
    "mini": make_mini_config,
    "nano": make_nano_config,
}
