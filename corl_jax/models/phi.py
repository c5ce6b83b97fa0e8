"""Phi-1.5 with q/k LayerNorm: attention by a mask, or by two parts of a sequence.

Attention and feed-forward read the same LayerNorm and are added to the stream together. Queries
and keys are normalised per head before their first dimensions are rotated.

A sequence of a model that fills in masked tokens has two parts. The first part does not see the
second one, so its keys and values can be computed once and used again.

Source: Li et al. 2023 (Phi-1.5, arXiv 2309.05463); transformers `models/phi`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax.devices.mesh import constrain
from corl_jax.models import layers
from corl_jax.models.attention import AttentionKernel, attend_causally, attend_to_first
from corl_jax.models.layers import Remat, apply_rope, merge_heads, split_heads
from corl_jax.models.lora import Lora, make_projection

Order = Literal["causal", "full"]
"""Whether a token of a part sees the earlier tokens of its part, or all of them."""
KVCache = tuple[jax.Array, jax.Array]
"""Keys and values, each [B, S, kv_heads, head_dim]; of all layers [layers, B, S, ...]."""
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(queries, keys, values) [B, T, heads, head_dim] -> attended [B, T, heads, head_dim]."""
Rope = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class PhiConfig:
    """Sizes of the decoder; the defaults are those of every released Show-o."""

    vocab_size: int = 58498
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 24
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 64
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048

    # A class variable, so that two configs of equal sizes are equal; see AdaptedPhiConfig.
    lora: ClassVar[Lora | None] = None

    @property
    def rotary_dim(self) -> int:
        """The first dimensions of each head, which are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


@dataclasses.dataclass(frozen=True)
class AdaptedPhiConfig(PhiConfig):
    """A decoder whose layers have low-rank adapters."""

    lora: Lora | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


def make_layer_norm(features: int, config: PhiConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Makes a LayerNorm with weight and bias."""
    # flax's fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    return nnx.LayerNorm(
        features, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
    )


class Attention(nnx.Module):
    """Projections of self-attention; the caller computes the attention between them."""

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))

        def project(name: str, inputs: int, outputs: int) -> nnx.Linear:
            return make_projection(name, inputs, outputs, config.lora, bias=True, rngs=rngs)

        self.q_proj = project("q_proj", width, queries)
        self.k_proj = project("k_proj", width, keys)
        self.v_proj = project("v_proj", width, keys)
        self.dense = project("dense", queries, width)
        # One scale and one bias for all heads of a layer.
        self.q_layernorm = make_layer_norm(config.head_dim, config, rngs)
        self.k_layernorm = make_layer_norm(config.head_dim, config, rngs)

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes normalised, rotated queries and keys, and values, [B, T, heads, head_dim]."""
        query = self.q_layernorm(split_heads(self.q_proj(x), self.config.num_heads))
        key = self.k_layernorm(split_heads(self.k_proj(x), self.config.num_kv_heads))
        value = split_heads(self.v_proj(x), self.config.num_kv_heads)
        return apply_partial_rope(query, rope), apply_partial_rope(key, rope), value


class MLP(nnx.Module):
    """Two dense layers with the tanh form of GELU between them (`gelu_new`)."""

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs):
        width, inner, lora = config.hidden_size, config.intermediate_size, config.lora
        self.fc1 = make_projection("fc1", width, inner, lora, bias=True, rngs=rngs)
        self.fc2 = make_projection("fc2", inner, width, lora, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class Block(nnx.Module):
    """One LayerNorm, and attention and feed-forward side by side behind it."""

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = make_layer_norm(config.hidden_size, config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, KVCache]:
        """Computes x [B, T, D] after this block, and its keys and values."""
        normed = self.input_layernorm(x)
        query, key, value = self.attn.project(normed, rope)
        attended = self.attn.dense(merge_heads(attend(query, key, value)))
        return constrain(x + attended + self.mlp(normed), "batch", "length", "embed"), (key, value)


class Phi(nnx.Module):
    """Embeddings, stacked blocks and the final norm, without a head."""

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = layers.Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = layers.stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.norm = make_layer_norm(config.hidden_size, config, rngs)

    def rope(self, positions: jax.Array) -> Rope:
        """Computes cosines and sines [..., T, 1, rotary_dim] for positions [..., T]."""
        return layers.rope_angles(positions, self.config.rotary_dim, self.config.rope_theta)

    # ---- a sequence under a mask

    def __call__(
        self,
        embeds: jax.Array,
        mask: jax.Array,
        positions: jax.Array | None = None,
        *,
        remat: Remat = "none",
    ) -> jax.Array:
        """Computes final hidden states [B, L, D] of embeds [B, L, D].

        `mask` [B, L, L] is True where row i sees column j; every row must see a column. `positions`
        [B, L] are 0 to L - 1 by default: padding is counted.
        """
        return self._forward(embeds, mask, positions, remat, keep_cache=False)[0]

    def prefill(
        self, embeds: jax.Array, mask: jax.Array, positions: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Computes hidden states as `__call__`, and all keys and values [layers, B, L, ...]."""
        return self._forward(embeds, mask, positions, "none", keep_cache=True)

    def _forward(
        self, embeds: jax.Array, mask: jax.Array, positions: Any, remat: Remat, keep_cache: bool
    ) -> tuple[jax.Array, Any]:
        rope = self.rope(jnp.arange(embeds.shape[1]) if positions is None else positions)

        def step(block: Block, x: jax.Array):
            x, cache = block(x, rope, lambda q, k, v: layers.attend(q, k, v, mask))
            return x, (cache if keep_cache else None)

        embeds = constrain(embeds, "batch", "length", "embed")
        x, caches = layers.scan_layers(self.layers, step, embeds, remat)
        return self.norm(x), caches

    # ---- a sequence in two parts: text and image, or image and text

    def read_first(
        self,
        embeds: jax.Array,
        lengths: jax.Array,
        order: Order,
        *,
        attention: AttentionKernel = "xla",
    ) -> tuple[jax.Array, KVCache]:
        """Computes hidden states, keys and values [layers, B, P, ...] of first parts [B, P, D].

        `lengths` [B] says how many tokens are real; padding stands behind them.
        """
        first = _First(embeds.shape[1], lengths, order, attention)
        rope = self.rope(jnp.arange(first.size))
        embeds = constrain(embeds, "batch", "length", "embed")

        def step(block: Block, x: jax.Array):
            return block(x, rope, first.attend)

        x, caches = layers.scan_layers(self.layers, step, embeds)
        return self.norm(x), caches

    def read_second(
        self,
        embeds: jax.Array,
        caches: KVCache,
        lengths: jax.Array,
        order: Order,
        *,
        attention: AttentionKernel = "xla",
    ) -> jax.Array:
        """Computes hidden states of second parts [N, T, D] behind the keys and values of B firsts.

        N is a multiple of B, and the second parts of a first part are neighbours. `lengths` [B] are
        those of the first parts; positions of a second part continue there.
        """
        first = _First(caches[0].shape[2], lengths, "causal", attention)
        rope = self.rope(first.place_second(*embeds.shape[:2]))
        embeds = constrain(embeds, "batch", "length", "embed")
        graphdef, state = nnx.split(self.layers)

        def step(x: jax.Array, layer: tuple[Any, KVCache]):
            block, (keys, values) = nnx.merge(graphdef, layer[0]), layer[1]
            return block(x, rope, first.make_attend_behind(keys, values, order))[0], None

        return self.norm(jax.lax.scan(step, embeds, (state, caches))[0])

    def read_parts(
        self,
        first: jax.Array,
        lengths: jax.Array,
        second: jax.Array,
        orders: tuple[Order, Order],
        *,
        front: int = 0,
        is_seen: jax.Array | None = None,
        remat: Remat = "none",
        attention: AttentionKernel = "xla",
    ) -> tuple[jax.Array, jax.Array]:
        """Computes hidden states of first parts [B, P, D] and of their second parts [N, T, D].

        They equal those of `read_first` and `read_second`, but that some tokens of a causal first
        part see each other: the first `front`, or those that `is_seen` [B, P] marks, which all
        others see. A first part is computed once for all of its second parts, and its keys and
        values exist for one layer at a time.
        """
        parts, num_tokens = (first, second), (first.shape[1], second.shape[1])
        # cuDNN differentiates even lengths only. Padding behind the parts changes nothing in them,
        # but a full second part must be even: its last token would see the padding.
        if attention == "cudnn":
            odd = (num_tokens[0] % 2, num_tokens[1] % 2 if orders[1] == "causal" else 0)
            pads = [((0, 0), (0, n), (0, 0)) for n in odd]
            parts = tuple(jnp.pad(x, pad) for x, pad in zip(parts, pads, strict=True))
            is_seen = None if is_seen is None else jnp.pad(is_seen, ((0, 0), (0, odd[0])))
        read = _First(parts[0].shape[1], lengths, orders[0], attention, front, is_seen)
        rope = self.rope(jnp.arange(read.size))
        rope_behind = self.rope(read.place_second(*parts[1].shape[:2]))

        def step(block: Block, x: tuple[jax.Array, jax.Array]):
            before, cache = block(x[0], rope, read.attend)
            behind, _ = block(x[1], rope_behind, read.make_attend_behind(*cache, orders[1]))
            return (before, behind), None

        parts = jax.tree.map(lambda x: constrain(x, "batch", "length", "embed"), parts)
        x, _ = layers.scan_layers(self.layers, step, parts, remat)
        states = jax.tree.map(self.norm, x)
        return states[0][:, : num_tokens[0]], states[1][:, : num_tokens[1]]


@dataclasses.dataclass(frozen=True)
class _First:
    """The first parts of B sequences: what their tokens and those behind them see."""

    size: int  # P, tokens with padding
    lengths: jax.Array  # [B] real tokens
    order: Order
    attention: AttentionKernel
    front: int = 0  # tokens of a causal part that see each other
    # [B, P] bool, tokens that all others see, at any places; only `xla` computes it
    is_seen: jax.Array | None = None

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Computes attention of the first parts to themselves."""
        if self.is_seen is not None:
            places = jnp.arange(self.size)
            mask = (places <= places[:, None]) | self.is_seen[:, None]
            return layers.attend(query, key, value, mask)
        if self.order == "full":
            return attend_to_first(query, key, value, self.lengths, self.attention)
        return attend_causally(query, key, value, self._mark_real(), self.attention, self.front)

    def place_second(self, rows: int, length: int) -> jax.Array:
        """Returns the positions [N, T] of second parts."""
        return self._repeat(self.lengths, rows)[:, None] + jnp.arange(length)

    def make_attend_behind(self, keys: jax.Array, values: jax.Array, order: Order) -> Attend:
        """Returns the attention of second parts to these keys and values and to themselves."""

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            rows, length = query.shape[:2]
            before_keys, before_values = self._repeat(keys, rows), self._repeat(values, rows)
            if order == "full":
                # The order of keys means nothing here: with the padding last, a length marks it.
                # image [i, j], text [a, b, x], length 2 -> [i, j, a, b, x], the first 4
                key, value = _join(key, before_keys), _join(value, before_values)
                seen = self._repeat(self.lengths, rows) + length
                return attend_to_first(query, key, value, seen, self.attention)
            key, value = _join(before_keys, key), _join(before_values, value)
            real = self._repeat(self._mark_real(), rows)
            # True behind the second parts' ends too: later keys change nothing before them.
            mask = jnp.pad(real, ((0, 0), (0, length)), constant_values=True)
            return attend_causally(query, key, value, mask, self.attention)

        return attend

    def _mark_real(self) -> jax.Array:
        return jnp.arange(self.size) < self.lengths[:, None]

    def _repeat(self, x: jax.Array, rows: int) -> jax.Array:
        return jnp.repeat(x, rows // len(x), axis=0)


def _join(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.concatenate([first, second], axis=1)


def apply_partial_rope(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the first dimensions of the heads of x [..., heads, head_dim], as many as angles."""
    size = rope[0].shape[-1]
    return jnp.concatenate([apply_rope(x[..., :size], rope), x[..., size:]], axis=-1)


def take_head(head: nnx.Linear, first: int, count: int) -> Callable[[jax.Array], jax.Array]:
    """Returns hidden [..., D] -> float32 logits [..., count] of the tokens from id `first` on.

    Of `count` 8192 instead of 58,498 tokens this costs a seventh of the whole head.
    """
    assert head.bias is not None
    # Here and not in each call: a loop over pieces of the states would otherwise add up a gradient
    # of the size of the whole head in each piece.
    kernel, bias = (x[..., first : first + count] for x in (head.kernel[...], head.bias[...]))

    def compute_logits(hidden: jax.Array) -> jax.Array:
        logits = jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)
        return logits + bias.astype(jnp.float32)

    return compute_logits


def compute_some_logits(head: nnx.Linear, hidden: jax.Array, first: int, count: int) -> jax.Array:
    """Computes float32 logits [..., count] of the tokens from id `first` on; see `take_head`."""
    return take_head(head, first, count)(hidden)
