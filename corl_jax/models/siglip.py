"""The SigLIP image tower: an image in, one feature vector per patch out.

It has all layers, the final LayerNorm, exact GELU and no class token. The attention-pool head of
the original checkpoints is left out, because Janus does not use it.

Source: Zhai et al. 2023 (arXiv 2303.15343); timm `siglip_large_patch16_384` as Janus loads it.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from corl_jax.models import layers
from corl_jax.models.encoder import Block, make_layer_norm
from corl_jax.models.layers import Remat


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower; the defaults are those of every released Janus."""

    image_size: int = 384
    patch_size: int = 16
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    layer_norm_eps: float = 1e-6

    @property
    def num_tokens(self) -> int:
        """The number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class Siglip(nnx.Module):
    """pixel_values [B, S, S, 3] -> features [B, (S / patch)^2, hidden_size]."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        self.patch_embedding = nnx.Conv(
            3, config.hidden_size, patch, strides=patch, padding="VALID", rngs=rngs
        )
        self.position_embedding = layers.Embedding(config.num_tokens, config.hidden_size, rngs=rngs)
        self.layers = layers.stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.post_layernorm = make_layer_norm(config, rngs)

    def __call__(self, pixel_values: jax.Array, *, remat: Remat = "none") -> jax.Array:
        kernel_dtype = self.patch_embedding.kernel.dtype
        x = self.patch_embedding(pixel_values.astype(kernel_dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, 24, 24, D] -> [B, 576, D], row by row
        x = x + self.position_embedding.embedding[...]
        x, _ = layers.scan_layers(self.layers, lambda block, x: (block(x), None), x, remat)
        return self.post_layernorm(x)
