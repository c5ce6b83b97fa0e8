"""Parts of the BERTs and ViTs: attention with biases, a two-layer MLP, the pre-norm block.

SigLIP, BLIP's vision tower and CLIP are stacks of `Block`. BERT and BLIP's decoder have their norms
after the residuals and build their own blocks from the same parts.
"""

from __future__ import annotations

from typing import Literal, Protocol

import jax
from flax import nnx

from corl_jax.models.layers import attend, make_linear, merge_heads, split_heads

Activation = Literal["gelu", "quick_gelu"]
"""The exact GELU, or OpenAI's approximation of it by a sigmoid."""

KVCache = tuple[jax.Array, jax.Array]
"""One layer's keys and values, each [B, S, heads, head_dim]."""


class Sizes(Protocol):
    """The sizes that a network's config must have for its layers."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...


class Attention(nnx.Module):
    """Attention of queries of width D to keys and values from `source` features (D if None)."""

    def __init__(self, config: Sizes, source: int | None = None, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        width = config.hidden_size
        self.q_proj = make_linear(width, width, bias=True, rngs=rngs)
        self.k_proj = make_linear(source or width, width, bias=True, rngs=rngs)
        self.v_proj = make_linear(source or width, width, bias=True, rngs=rngs)
        self.out_proj = make_linear(width, width, bias=True, rngs=rngs)

    def project_keys_values(self, x: jax.Array) -> KVCache:
        """Computes keys and values of features [B, S, source]."""
        key, value = (split_heads(proj(x), self.num_heads) for proj in (self.k_proj, self.v_proj))
        return key, value

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, seen: KVCache | None = None
    ) -> jax.Array:
        """Computes x [B, T, D] after attention to `seen` (default: x itself).

        `mask` [B or 1, T or 1, S] is True where a key is seen.
        """
        query = split_heads(self.q_proj(x), self.num_heads)
        key, value = self.project_keys_values(x) if seen is None else seen
        return self.out_proj(merge_heads(attend(query, key, value, mask)))


class MLP(nnx.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: Sizes, activation: Activation = "gelu", *, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = make_linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.fc2 = make_linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.fc1(x)
        # OpenAI's CLIP was trained with this approximation; the exact GELU gives other vectors.
        if self.activation == "quick_gelu":
            return self.fc2(x * jax.nn.sigmoid(1.702 * x))
        return self.fc2(jax.nn.gelu(x, approximate=False))


class Block(nnx.Module):
    """Pre-norm layer: each norm stands before its sublayer, inside the residual."""

    def __init__(self, config: Sizes, activation: Activation = "gelu", *, rngs: nnx.Rngs):
        self.layer_norm1 = make_layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.layer_norm2 = make_layer_norm(config, rngs)
        self.mlp = MLP(config, activation, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = x + self.attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


def make_layer_norm(config: Sizes, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Makes a LayerNorm with the sizes of a config."""
    # flax's fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
    )
