"""BLIP's text decoder: a causal BERT whose every layer also attends to image features.

Norms come after the residuals, positions are learned, GELU is exact, no token types.

Source: Li et al. 2022 (arXiv 2201.12086); transformers 5.23 `models/blip/modeling_blip_text`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.models import layers
from corl_jax.models.encoder import MLP, Attention, KVCache, layer_norm
from corl_jax.models.layers import linear


@dataclasses.dataclass(frozen=True)
class BlipTextConfig:
    """Sizes of the decoder; the defaults are those of blip-image-captioning-base.

    BERT's vocabulary has 30522 tokens; BLIP adds the one that starts a caption, and one that
    the captioner does not use.
    """

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    bos_token_id: int = 30522  # starts a caption
    sep_token_id: int = 102  # ends it
    tie_word_embeddings: bool = True  # False: the head has a kernel of its own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """What a decode step reads of the steps before it, per layer."""

    written: list[KVCache]  # of the tokens read so far, the rest zeros
    seen: list[KVCache]  # of the image, the same in every step


class Block(nnx.Module):
    """Self-attention, attention to the image and feed-forward, each with a post-norm."""

    def __init__(self, config: BlipTextConfig, vision_width: int, *, rngs: nnx.Rngs):
        self.attn = Attention(config, rngs=rngs)
        self.attn_layernorm = layer_norm(config, rngs)
        self.cross_attn = Attention(config, vision_width, rngs=rngs)
        self.cross_attn_layernorm = layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.mlp_layernorm = layer_norm(config, rngs)

    def __call__(self, x: jax.Array, written: KVCache, mask: jax.Array, seen: KVCache) -> jax.Array:
        """x [B, T, D], `mask` [B or 1, T or 1, S] True where a written key is attended to."""
        x = self.attn_layernorm(x + self.attn(x, mask, written))
        x = self.cross_attn_layernorm(x + self.cross_attn(x, seen=seen))
        return constrain(self.mlp_layernorm(x + self.mlp(x)), "batch", "length", "embed")


class Head(nnx.Module):
    """Hidden states [..., D] -> logits [..., V]; a tied head has no kernel of its own."""

    def __init__(self, config: BlipTextConfig, *, rngs: nnx.Rngs):
        width, rows = config.hidden_size, config.vocab_size
        self.tied = config.tie_word_embeddings
        self.dense = linear(width, width, bias=True, rngs=rngs)
        self.layernorm = layer_norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros(rows))
        if not self.tied:
            self.kernel = nnx.Param(layers.initializer(rngs.params(), (width, rows)))

    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        """`embedding` [V, D] are the word embeddings."""
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
        self.embed_layernorm = layer_norm(config, rngs)
        self.layers = layers.stack(
            lambda rngs: Block(config, vision_width, rngs=rngs), config.num_layers, rngs
        )
        self.head = Head(config, rngs=rngs)

    def __call__(self, ids: jax.Array, features: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the tokens that follow ids [B, T], for features [B, S, D]."""
        length = ids.shape[1]
        mask = jnp.tril(jnp.ones((1, length, length), bool))

        def step(block: Block, x: jax.Array):
            written, seen = block.attn.keys_values(x), block.cross_attn.keys_values(features)
            return block(x, written, mask, seen), None

        x, _ = layers.scan_layers(self.layers, step, self._embed(ids, jnp.arange(length)))
        return self._logits(x)

    def start(self, features: jax.Array, length: int) -> tuple[list[Block], DecoderCache]:
        """The single layers, and a cache for `length` tokens about features [N, S, D]."""
        config = self.config
        blocks = layers.unstack(self.layers, config.num_layers)
        heads = config.num_heads, config.hidden_size // config.num_heads
        empty = jnp.zeros((features.shape[0], length, *heads), features.dtype)
        empty = constrain(empty, "batch", "length", "heads", None)
        return blocks, DecoderCache(
            written=[(empty, empty)] * config.num_layers,
            seen=[block.cross_attn.keys_values(features) for block in blocks],
        )

    def decode(
        self, blocks: list[Block], token: jax.Array, step: jax.Array, cache: DecoderCache
    ) -> tuple[jax.Array, DecoderCache]:
        """Logits [N, V] after reading token [N] at position `step`, and the cache with it."""
        x, written = self._embed(token[:, None], step), []
        mask = (jnp.arange(cache.written[0][0].shape[1]) <= step)[None, None]
        for block, old, seen in zip(blocks, cache.written, cache.seen, strict=True):
            new = [
                lax.dynamic_update_slice_in_dim(buffer, entry, step, axis=1)
                for buffer, entry in zip(old, block.attn.keys_values(x), strict=True)
            ]
            x = block(x, (new[0], new[1]), mask, seen)
            written.append((new[0], new[1]))
        return self._logits(x)[:, 0], dataclasses.replace(cache, written=written)

    def _embed(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        return constrain(self.embed_layernorm(x), "batch", "length", "embed")

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.head(x, self.word_embeddings.embedding[...])
