"""BLIP's captioner: a vision transformer, and a causal BERT whose layers attend to its features.

The image tower has SigLIP's layers, with a class token in front of the patches. The decoder attends
to the class token and to all patches.

Source: Li et al. 2022 (arXiv 2201.12086); transformers 5.23 `models/blip`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.models import layers
from corl_jax.models.encoder import MLP, Attention, Block, KVCache, make_layer_norm
from corl_jax.models.layers import make_linear
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
class BlipTextConfig:
    """Sizes of the decoder; the defaults are those of blip-image-captioning-base."""

    # BERT's 30522 tokens, a token that starts a caption, and a token that captions do not use.
    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    bos_token_id: int = 30522  # starts a caption
    sep_token_id: int = 102  # ends it
    tie_word_embeddings: bool = True  # False: the head has another kernel


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
        self.post_layernorm = make_layer_norm(config, rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        x = self.patch_embedding(pixel_values.astype(self.patch_embedding.kernel.dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, S/16, S/16, D] -> [B, patches, D]
        first = jnp.broadcast_to(self.class_embedding.embedding[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding.embedding[...]
        x, _ = layers.scan_layers(self.layers, lambda block, x: (block(x), None), x)
        return self.post_layernorm(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """Keys and values that a decode step reads, per layer."""

    text: list[KVCache]  # of the tokens read so far, the rest zeros
    image: list[KVCache]  # the same in every step


class DecoderBlock(nnx.Module):
    """Self-attention, attention to the image and feed-forward, each with a post-norm."""

    def __init__(self, config: BlipTextConfig, vision_width: int, *, rngs: nnx.Rngs):
        self.attn = Attention(config, rngs=rngs)
        self.attn_layernorm = make_layer_norm(config, rngs)
        self.cross_attn = Attention(config, vision_width, rngs=rngs)
        self.cross_attn_layernorm = make_layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.mlp_layernorm = make_layer_norm(config, rngs)

    def __call__(self, x: jax.Array, text: KVCache, mask: jax.Array, image: KVCache) -> jax.Array:
        """Computes x [B, T, D]; `mask` [B or 1, T or 1, S] is True where a text key is seen."""
        x = self.attn_layernorm(x + self.attn(x, mask, text))
        x = self.cross_attn_layernorm(x + self.cross_attn(x, seen=image))
        return constrain(self.mlp_layernorm(x + self.mlp(x)), "batch", "length", "embed")


class Head(nnx.Module):
    """Hidden states [..., D] -> logits [..., V]; a tied head uses the word embeddings."""

    def __init__(self, config: BlipTextConfig, *, rngs: nnx.Rngs):
        width, rows = config.hidden_size, config.vocab_size
        self.tied = config.tie_word_embeddings
        self.dense = make_linear(width, width, bias=True, rngs=rngs)
        self.layernorm = make_layer_norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros(rows))
        if not self.tied:
            self.kernel = nnx.Param(layers.initializer(rngs.params(), (width, rows)))

    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """Computes the logits; `embedding` [V, D] are the word embeddings."""
        x = self.layernorm(jax.nn.gelu(self.dense(x), approximate=False))
        return x @ (embedding.T if self.tied else self.kernel[...]) + self.bias[...]


class TextDecoder(nnx.Module):
    """Embeddings, stacked blocks and the head: over a whole text, or token by token."""

    def __init__(self, config: BlipTextConfig, vision_width: int, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.config = config
        self.word_embeddings = layers.Embedding(config.vocab_size, width, rngs=rngs)
        self.position_embeddings = layers.Embedding(
            config.max_position_embeddings, width, rngs=rngs
        )
        self.embed_layernorm = make_layer_norm(config, rngs)
        self.layers = layers.stack(
            lambda rngs: DecoderBlock(config, vision_width, rngs=rngs), config.num_layers, rngs
        )
        self.head = Head(config, rngs=rngs)

    def __call__(self, ids: jax.Array, features: jax.Array) -> jax.Array:
        """Computes logits [B, T, V] of the tokens after ids [B, T], for features [B, S, D]."""
        length = ids.shape[1]
        mask = jnp.tril(jnp.ones((1, length, length), bool))

        def step(block: DecoderBlock, x: jax.Array):
            text, image = (
                block.attn.project_keys_values(x),
                block.cross_attn.project_keys_values(features),
            )
            return block(x, text, mask, image), None

        x, _ = layers.scan_layers(self.layers, step, self._embed(ids, jnp.arange(length)))
        return self._logits(x)

    def start(self, features: jax.Array, length: int) -> tuple[list[DecoderBlock], DecoderCache]:
        """Returns the single layers, and a cache for `length` tokens, given features [N, S, D]."""
        # Unstacked, because a decode loop would copy the slices of a stack in each step. The keys
        # and values of the image do not change, so they are computed once.
        config = self.config
        blocks = layers.unstack(self.layers, config.num_layers)
        heads = config.num_heads, config.hidden_size // config.num_heads
        empty = jnp.zeros((features.shape[0], length, *heads), features.dtype)
        empty = constrain(empty, "batch", "length", "heads", None)
        return blocks, DecoderCache(
            text=[(empty, empty)] * config.num_layers,
            image=[block.cross_attn.project_keys_values(features) for block in blocks],
        )

    def decode(
        self, blocks: list[DecoderBlock], token: jax.Array, step: jax.Array, cache: DecoderCache
    ) -> tuple[jax.Array, DecoderCache]:
        """Computes logits [N, V] after token [N] at position `step`; returns them and the cache."""
        x, caches = self._embed(token[:, None], step), []
        # Positions behind `step` are zeros that were never written.
        mask = (jnp.arange(cache.text[0][0].shape[1]) <= step)[None, None]
        for block, old, image in zip(blocks, cache.text, cache.image, strict=True):
            new = [
                lax.dynamic_update_slice_in_dim(buffer, entry, step, axis=1)
                for buffer, entry in zip(old, block.attn.project_keys_values(x), strict=True)
            ]
            x = block(x, (new[0], new[1]), mask, image)
            caches.append((new[0], new[1]))
        return self._logits(x)[:, 0], dataclasses.replace(cache, text=caches)

    def _embed(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        return constrain(self.embed_layernorm(x), "batch", "length", "embed")

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.head(x, self.word_embeddings.embedding[...])


class Blip(nnx.Module):
    """Both parts; `rewards.captions` decodes the captions."""

    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        self.vision_model = VisionTower(config.vision, rngs=rngs)
        self.text_decoder = TextDecoder(config.text, config.vision.hidden_size, rngs=rngs)

    def __call__(self, pixel_values: jax.Array, ids: jax.Array) -> jax.Array:
        """Computes logits [B, T, V] of the tokens after ids [B, T], for normalised pixels."""
        return self.text_decoder(ids, self.vision_model(pixel_values))
