"""Sizes of the two small JanusFlow models: `mini` and `nano`.

Language model and vision tower are those of the small Janus of the same name, so that images have
its grid. Both have the same VAE, so that the mini's can begin as the nano's: for each token it
makes 2x2 latents of 4 channels, of 4 pixels a side each.
"""

from __future__ import annotations

from collections.abc import Callable

from corl_jax.errors import InputError
from corl_jax.models.sd_vae import SdVaeConfig
from corl_jax.models.uvit import UvitConfig
from corl_jax.policies import Model
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.types import Params
from tools.small_models import janus_sizes

VAE = SdVaeConfig(block_channels=(16, 32, 32), num_res_blocks=1, norm_groups=8)


def make_mini_config(vocab_size: int) -> JanusFlowConfig:
    """Returns a JanusFlow for 64x64 images: 8x8 tokens, 16x16 latents."""
    janus = janus_sizes.make_mini_config(vocab_size)
    return JanusFlowConfig(
        llama=janus.llama,
        siglip=janus.siglip,
        uvit=UvitConfig(
            encoder_width=128, encoder_num_layers=1, decoder_width=128, decoder_num_layers=2
        ),
        vae=VAE,
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
        vae=VAE,
    )


CONFIGS: dict[str, Callable[[int], JanusFlowConfig]] = {
    "mini": make_mini_config,
    "nano": make_nano_config,
}


def take_vae(model: Model, config: JanusFlowConfig) -> Params:
    """Returns the VAE of a JanusFlow, for another one of these sizes.

    Raises: InputError for a model without such a VAE.
    """
    sizes = getattr(model.sizes, "vae", None)
    if sizes != config.vae:
        raise InputError(
            f"{model.folder}: its image tokenizer is {sizes}, expected {config.vae}; "
            "name a JanusFlow that this command made"
        )
    return model.params["vae"]
