"""CLIP: images and texts as vectors in one space, where matching ones have the same direction.

Source: Radford et al. 2021 (arXiv 2103.00020). The default sizes are those of LAION's ViT-H/14
(arXiv 2212.07143), on which PickScore and HPS v2 were trained.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax.models import layers
from corl_jax.models.encoder import Activation, Block, make_layer_norm
from corl_jax.models.layers import initializer, make_linear


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of one of the two transformers."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_layers: int = 32
    num_heads: int = 16
    activation: Activation = "gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of both towers, and how pixels in [0, 1] are normalised."""

    vision: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig(
        hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16
    )
    image_size: int = 224
    patch_size: int = 14
    vocab_size: int = 49408
    context_length: int = 77
    eos_token_id: int = 49407
    projection_dim: int = 1024
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of a vision tower alone; the defaults are those of OpenAI's ViT-L/14 at 336 pixels."""

    vision: TowerConfig = TowerConfig(
        hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16,
        activation="quick_gelu",
    )  # fmt: skip
    image_size: int = 336
    patch_size: int = 14
    image_mean: tuple[float, ...] = ClipConfig.image_mean
    image_std: tuple[float, ...] = ClipConfig.image_std

    @property
    def num_patches(self) -> int:
        """The number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class VisionTower(nnx.Module):
    """pixel_values [N, S, S, 3] -> the class token's last state [N, hidden_size]."""

    def __init__(self, config: ClipConfig | ClipVisionConfig, *, rngs: nnx.Rngs):
        tower = config.vision
        patch = (config.patch_size, config.patch_size)
        self.patch_embedding = nnx.Conv(
            3, tower.hidden_size, patch, strides=patch, padding="VALID", use_bias=False, rngs=rngs
        )
        self.class_embedding = nnx.Param(initializer(rngs.params(), (tower.hidden_size,)))
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.position_embedding = layers.Embedding(tokens, tower.hidden_size, rngs=rngs)
        self.pre_layernorm = make_layer_norm(tower, rngs)
        self.layers = layers.stack(
            lambda rngs: Block(tower, tower.activation, rngs=rngs), tower.num_layers, rngs
        )
        self.post_layernorm = make_layer_norm(tower, rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        x = self._embed(pixel_values)
        x, _ = layers.scan_layers(self.layers, lambda block, x: (block(x), None), x)
        # Only the class token is used, so only it is normalised.
        return self.post_layernorm(x[:, 0])

    def compute_patches(self, pixel_values: jax.Array) -> jax.Array:
        """Computes the states [N, patches, hidden_size] of the patches before the last layer."""
        graphdef, state = nnx.split(self.layers)
        before = nnx.merge(graphdef, jax.tree.map(lambda x: x[:-1], state))
        x = self._embed(pixel_values)
        x, _ = layers.scan_layers(before, lambda block, x: (block(x), None), x)
        return x[:, 1:]

    def _embed(self, pixel_values: jax.Array) -> jax.Array:
        """Embeds class token and patches to [N, 1 + patches, hidden_size]."""
        x = self.patch_embedding(pixel_values.astype(self.patch_embedding.kernel.dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # [N, 16, 16, D] -> [N, 256, D] at 224 pixels
        first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding.embedding[...]
        return self.pre_layernorm(x)


class TextTower(nnx.Module):
    """ids [N, T] -> the state at each row's first end of text [N, hidden_size].

    Attention is causal, so tokens after the end of text have no effect.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        tower = config.text
        self.eos_token_id = config.eos_token_id
        self.token_embedding = layers.Embedding(config.vocab_size, tower.hidden_size, rngs=rngs)
        self.position_embedding = layers.Embedding(
            config.context_length, tower.hidden_size, rngs=rngs
        )
        self.layers = layers.stack(
            lambda rngs: Block(tower, tower.activation, rngs=rngs), tower.num_layers, rngs
        )
        self.final_layernorm = make_layer_norm(tower, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.position_embedding.embedding[...][:length]
        causal = jnp.tril(jnp.ones((1, length, length), bool))
        x, _ = layers.scan_layers(self.layers, lambda block, x: (block(x, causal), None), x)
        # argmax of booleans is the first True: rows are padded with the end token.
        end = jnp.argmax(ids == self.eos_token_id, axis=-1)
        return self.final_layernorm(x[jnp.arange(x.shape[0]), end])


class Clip(nnx.Module):
    """Both towers with their projections, and the logarithm of the factor on cosines."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.vision_model = VisionTower(config, rngs=rngs)
        self.text_model = TextTower(config, rngs=rngs)
        features = config.projection_dim
        self.visual_projection = make_linear(
            config.vision.hidden_size, features, bias=False, rngs=rngs
        )
        self.text_projection = make_linear(config.text.hidden_size, features, bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(1 / 0.07))  # CLIP's initial temperature of 0.07

    def image_features(self, pixel_values: jax.Array) -> jax.Array:
        """Computes features [N, projection_dim] of normalised pixels [N, S, S, 3]."""
        return self.visual_projection(self.vision_model(pixel_values))

    def text_features(self, ids: jax.Array) -> jax.Array:
        """Computes features [N, projection_dim] of ids [N, T]; each row has an end of text."""
        return self.text_projection(self.text_model(ids))

    def image_embeds(self, pixel_values: jax.Array) -> jax.Array:
        """Computes `image_features` of unit length, in float32."""
        return normalize_rows(self.image_features(pixel_values))

    def text_embeds(self, ids: jax.Array) -> jax.Array:
        """Computes `text_features` of unit length, in float32."""
        return normalize_rows(self.text_features(ids))


def normalize_rows(x: jax.Array) -> jax.Array:
    """Divides rows [N, features] by their norms, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
