"""BLIP's captioner: a vision transformer, and a text decoder that attends to what it saw.

The image tower has SigLIP's layers, with a class token in front of the patches; the decoder
reads all of its features.

Source: Li et al. 2022 (arXiv 2201.12086); transformers 5.23 `models/blip`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax.models import layers
from corl_jax.models.blip_text import BlipTextConfig, TextDecoder
from corl_jax.models.encoder import Block, layer_norm
from corl_jax.models.siglip import SiglipConfig


@dataclasses.dataclass(frozen=True)
class BlipVisionConfig(SiglipConfig):
    """Sizes of the image tower; the defaults are a ViT-B/16's at 384 pixels."""

    image_size: int = 384
    patch_size: int = 16
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    layer_norm_eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        """The patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """Sizes of both parts; the defaults are those of blip-image-captioning-base."""

    vision: BlipVisionConfig = dataclasses.field(default_factory=BlipVisionConfig)
    text: BlipTextConfig = dataclasses.field(default_factory=BlipTextConfig)


class VisionTower(nnx.Module):
    """pixel_values [B, S, S, 3] -> features [B, 1 + (S / patch)^2, D], the class token first."""

    def __init__(self, config: BlipVisionConfig, *, rngs: nnx.Rngs):
        width, patch = config.hidden_size, (config.patch_size, config.patch_size)
        self.patch_embedding = nnx.Conv(3, width, patch, strides=patch, padding="VALID", rngs=rngs)
        self.class_embedding = layers.Embedding(1, width, rngs=rngs)
        self.position_embedding = layers.Embedding(config.num_tokens, width, rngs=rngs)
        self.layers = layers.stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.post_layernorm = layer_norm(config, rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        x = self.patch_embedding(pixel_values.astype(self.patch_embedding.kernel.dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_embedding.embedding[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding.embedding[...]
        x, _ = layers.scan_layers(self.layers, lambda block, x: (block(x), None), x)
        return self.post_layernorm(x)


class Blip(nnx.Module):
    """Both parts; captions are decoded elsewhere."""

    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.vision_model = VisionTower(config.vision, rngs=rngs)
        self.text_decoder = TextDecoder(config.text, config.vision.hidden_size, rngs=rngs)

    def __call__(self, pixel_values: jax.Array, ids: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the tokens that follow ids [B, T], for normalised pixels."""
        return self.text_decoder(ids, self.vision_model(pixel_values))
