"""BERT: token ids in, one feature vector per token out; a post-norm encoder.

It has no pooler and no heads of pre-training, unlike the checkpoints.

Source: Devlin et al. 2018 (arXiv 1810.04805); transformers `models/bert`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax.models import layers
from corl_jax.models.encoder import MLP, Attention, make_layer_norm


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of the encoder; the defaults are those of bert-base-uncased."""

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class Embeddings(nnx.Module):
    """Sum of word, position and token type, normalised; every token is of type 0."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.word_embeddings = layers.Embedding(config.vocab_size, width, rngs=rngs)
        self.position_embeddings = layers.Embedding(
            config.max_position_embeddings, width, rngs=rngs
        )
        self.token_type_embeddings = layers.Embedding(config.type_vocab_size, width, rngs=rngs)
        self.layernorm = make_layer_norm(config, rngs)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        positions = self.position_embeddings(jnp.arange(input_ids.shape[1]))
        kind = self.token_type_embeddings.embedding[0]
        return self.layernorm(self.word_embeddings(input_ids) + kind + positions)


class Block(nnx.Module):
    """Post-norm encoder layer: each norm follows the residual sum."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.attn = Attention(config, rngs=rngs)
        self.attn_layernorm = make_layer_norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.mlp_layernorm = make_layer_norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attn_layernorm(x + self.attn(x, mask))
        return self.mlp_layernorm(x + self.mlp(x))


class Bert(nnx.Module):
    """input_ids [B, T] -> hidden states [B, T, hidden_size]; T up to max_position_embeddings."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.num_layers = config.num_layers
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = layers.stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, layer: int = -1
    ) -> jax.Array:
        """Computes hidden states [B, T, hidden_size] after `layer` layers; later layers do not run.

        `attention_mask` [B, T] is True on real tokens; states of padding are undefined. Layer 0 is
        the embeddings, as in transformers' `hidden_states`. -1 is the last layer.

        Raises: IndexError if there is no such layer.
        """
        # 12 layers: range(13)[-1] = 12, range(13)[-2] = 11; IndexError for others
        count = range(self.num_layers + 1)[layer]
        graphdef, state = nnx.split(self.layers)
        first = nnx.merge(graphdef, jax.tree.map(lambda x: x[:count], state))
        mask = attention_mask[:, None]  # the same keys for every query
        x = self.embeddings(input_ids)
        x, _ = layers.scan_layers(first, lambda block, x: (block(x, mask), None), x)
        return x
