"""Sizes of the two small JanusFlow models: `mini` and `nano`.

Language model and vision tower are those of the small Janus of the same name, so that images have
its grid. The VAE makes 2x2 latents of 4 channels for each token, of 4 pixels a side each.
"""

from __future__ import annotations

from collections.abc import Callable

from corl_jax.models.sd_vae import SdVaeConfig
from corl_jax.models.uvit import UvitConfig
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from tools.small_models import janus_sizes


def make_mini_config(vocab_size: int) -> JanusFlowConfig:
    """Returns a JanusFlow for 64x64 images: 8x8 tokens, 16x16 latents."""
    janus = janus_sizes.make_mini_config(vocab_size)
    return JanusFlowConfig(
        llama=janus.llama,
        siglip=janus.siglip,
        uvit=UvitConfig(
            encoder_width=128, encoder_num_layers=1, decoder_width=128, decoder_num_layers=2
        ),
        vae=SdVaeConfig(block_channels=(32, 64, 64), num_res_blocks=1, norm_groups=8),
    )


def make_nano_config(vocab_size: int) -> JanusFlowConfig:
    """Returns a JanusFlow for 32x32 images: 4x4 tokens, 8x8 latents."""
    janus = janus_sizes.make_nano_config(vocab_size)
    return JanusFlowConfig(
        llama=janus.llama,
        siglip=janus.siglip,
        uvit=UvitConfig(
            encoder_width=64, encoder_num_layers=1, decoder_width=64, decoder_num_layers=1
        ),
        vae=SdVaeConfig(block_channels=(16, 32, 32), num_res_blocks=1, norm_groups=8),
    )


CONFIGS: dict[str, Callable[[int], JanusFlowConfig]] = {
    "mini": make_mini_config,
    "nano": make_nano_config,
}
