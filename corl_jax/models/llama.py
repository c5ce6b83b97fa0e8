"""The Llama decoder of Janus: the full forward pass, and the prefill of a cache.

Source: Touvron et al. 2023 (arXiv 2302.13971); transformers `models/llama`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax.devices.mesh import constrain, context_batch_shards
from corl_jax.models import layers
from corl_jax.models.attention import AttentionKernel, attend_causally
from corl_jax.models.layers import Remat, apply_rope, merge_heads, split_heads
from corl_jax.models.lora import Lora, make_projection


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder; the defaults are Janus-Pro-1B's."""

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int = 16
    head_dim: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 16384

    # A class variable, so that two configs of equal sizes are equal; see AdaptedLlamaConfig.
    lora: ClassVar[Lora | None] = None


@dataclasses.dataclass(frozen=True)
class AdaptedLlamaConfig(LlamaConfig):
    """A decoder whose layers have low-rank adapters."""

    lora: Lora | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


KVCache = tuple[jax.Array, jax.Array]
"""One layer's keys and values, each [N, S, kv_heads, head_dim]."""


class PackedRows(NamedTuple):
    """Says which completions stand in rows [N, T] that hold several of one prompt each.

    No completion sees another one of its row. A row's prompt is one of those on its device.
    """

    owners: jax.Array  # [N] int32, number of the row's prompt among those of its shard of the batch
    parts: jax.Array  # [N, T] int32, equal for the tokens of a completion, and different otherwise
    offsets: jax.Array  # [N, T] int32, places of the tokens in their completions

    def pad_even(self) -> PackedRows:
        """Returns the rows with padding behind an odd number of tokens."""
        more = ((0, 0), (0, self.parts.shape[1] % 2))
        parts = jnp.pad(self.parts, more, constant_values=-1)
        return PackedRows(self.owners, parts, jnp.pad(self.offsets, more))

    def take(self, prompts: jax.Array) -> jax.Array:
        """Returns the entries [N, ...] of prompts [B, ...] that each row belongs to.

        It asks for the shards of the batch, so that no row is sent to another device: an axis name
        could not say that a row's prompt is on its own shard.
        """
        # 2 shards with 2 prompts each, owners [0, 0, 1 | 1, 0, 0]: [p0, p0, p1 | p3, p2, p2]
        shards = context_batch_shards()
        by_shard = prompts.reshape(shards, -1, *prompts.shape[1:])
        owners = self.owners.reshape(shards, -1)
        if jnp.issubdtype(prompts.dtype, jnp.floating):
            # The gradient of a gather would be a scatter, whose sums GPUs add in any order.
            # Products with 0 and 1 are exact at the highest precision.
            chosen = jax.nn.one_hot(owners, by_shard.shape[1], dtype=prompts.dtype)
            taken = jnp.einsum("srb,sb...->sr...", chosen, by_shard, precision="highest")
        else:
            taken = jax.vmap(lambda x, owner: x[owner])(by_shard, owners)
        return taken.reshape(-1, *prompts.shape[1:])


class Branch(NamedTuple):
    """Tokens [N, T, D] that continue the rows of other tokens, M neighbouring rows the same one."""

    embeds: jax.Array
    # [N, T] bool, True on real tokens, which have no padding in front. None: all, and what stands
    # behind their end; no token before it sees it.
    mask: jax.Array | None = None
    # [M] int32 positions of the first tokens, M a divisor of N. None: they follow the real tokens
    # before them.
    first: jax.Array | None = None
    packed: PackedRows | None = None  # of rows with several completions, which have no mask

    def make_even(self) -> Branch:
        """Returns the branch with a token of padding behind an odd number of tokens."""
        missing = self.embeds.shape[1] % 2
        if not missing:
            return self
        # cuDNN attends over even lengths only. A padding token after the last one changes nothing
        # before it, and the mask hides it from the branches behind this one.
        embeds = jnp.pad(self.embeds, ((0, 0), (0, missing), (0, 0)))
        mask = jnp.ones(self.embeds.shape[:2], bool) if self.mask is None else self.mask
        mask = jnp.pad(mask, ((0, 0), (0, missing)))
        return Branch(embeds, mask, self.first, self.packed and self.packed.pad_even())

    def join_mask(self, before: jax.Array) -> jax.Array:
        """Returns the mask [N, P + T] of this branch behind tokens with the mask [B, P].

        Of packed rows it is [N, T, P + T], for each token its own.
        """
        rows, length = self.embeds.shape[:2]
        if self.packed is not None:
            # Two completions a, b in a row, behind a prompt without padding: token b0 of
            # [a0, a1, b0, b1] sees [prompt | 0, 0, 1, 1], of which later ones are left out as ever.
            parts = self.packed.parts
            prompt = self.packed.take(before)[:, None]
            prompt = jnp.broadcast_to(prompt, (rows, length, prompt.shape[-1]))
            return jnp.concatenate([prompt, parts[:, :, None] == parts[:, None]], axis=-1)
        repeated = jnp.repeat(before, rows // len(before), axis=0)
        mask = jnp.ones((rows, length), bool) if self.mask is None else self.mask
        return jnp.concatenate([repeated, mask], axis=1)


class Place(NamedTuple):
    """The values that all layers share of a branch [N, T, D] behind tokens [B, P, D]."""

    rope: tuple[jax.Array, jax.Array]  # cosines and sines of its positions
    mask: jax.Array  # [N, P + T] bool, True on real tokens; of packed rows [N, T, P + T]
    packed: PackedRows | None


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        width, lora = config.hidden_size, config.lora
        self.q_proj = make_projection("q_proj", width, queries, lora, rngs=rngs)
        self.k_proj = make_projection("k_proj", width, keys, lora, rngs=rngs)
        self.v_proj = make_projection("v_proj", width, keys, lora, rngs=rngs)
        self.o_proj = make_projection("o_proj", queries, width, lora, rngs=rngs)

    def project(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]):
        """Computes rotated queries and keys, and values, each [B, T, heads, head_dim]."""
        query = split_heads(self.q_proj(x), self.config.num_heads)
        key = split_heads(self.k_proj(x), self.config.num_kv_heads)
        value = split_heads(self.v_proj(x), self.config.num_kv_heads)
        return apply_rope(query, rope), apply_rope(key, rope), value

    def __call__(
        self, x: jax.Array, rope, mask: jax.Array, attention: AttentionKernel = "xla"
    ) -> tuple[jax.Array, KVCache]:
        query, key, value = self.project(x, rope)
        attended = attend_causally(query, key, value, mask, attention)
        return self.o_proj(merge_heads(attended)), (key, value)

    def after(
        self, x: jax.Array, prompt: KVCache, place: Place, attention: AttentionKernel
    ) -> tuple[jax.Array, KVCache]:
        """Computes attention of completions x [N, T, D] to their prompts and to themselves.

        `prompt` are the keys and values [B, P, kv_heads, head_dim] of the prompts. The result has
        the keys and values [N, P + T, ...] of both.
        """
        query, key, value = self.project(x, place.rope)

        # [B, P, ..] -> [N, P, ..]
        def repeat(shared: jax.Array) -> jax.Array:
            if place.packed is None:
                return jnp.repeat(shared, len(x) // len(shared), axis=0)
            return constrain(place.packed.take(shared), "batch", "length", "heads", None)

        # The completion's part behind it: [N, P + T, ..]
        keys, values = (
            jnp.concatenate([repeat(shared), added], axis=1)
            for shared, added in zip(prompt, (key, value), strict=True)
        )
        attended = attend_causally(query, keys, values, place.mask, attention)
        return self.o_proj(merge_heads(attended)), (keys, values)


class MLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, inner, lora = config.hidden_size, config.intermediate_size, config.lora
        self.gate_proj = make_projection("gate_proj", width, inner, lora, rngs=rngs)
        self.up_proj = make_projection("up_proj", width, inner, lora, rngs=rngs)
        self.down_proj = make_projection("down_proj", inner, width, lora, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        def norm():
            return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)

        self.input_layernorm = norm()
        self.attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, rngs=rngs)

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        return constrain(x + self.mlp(self.post_attention_layernorm(x)), "batch", "length", "embed")

    def __call__(
        self, x: jax.Array, rope, mask: jax.Array, attention: AttentionKernel = "xla"
    ) -> tuple[jax.Array, KVCache]:
        attended, cache = self.attn(self.input_layernorm(x), rope, mask, attention)
        return self._feed_forward(x + attended), cache

    def after(
        self, x: jax.Array, prompt: KVCache, place: Place, attention: AttentionKernel
    ) -> tuple[jax.Array, KVCache]:
        """Computes the block for completions x [N, T, D] behind their prompts."""
        attended, cache = self.attn.after(self.input_layernorm(x), prompt, place, attention)
        return self._feed_forward(x + attended), cache


class Llama(nnx.Module):
    """Embeddings, stacked blocks and the final norm, without heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = layers.Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = layers.stack(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)

    def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes the cosines and sines that rotate queries and keys at `positions`."""
        return layers.rope_angles(positions, self.config.head_dim, self.config.rope_theta)

    def __call__(self, embeds: jax.Array, mask: jax.Array, *, remat: Remat = "none") -> jax.Array:
        """Computes final hidden states [B, T, D] of embeds [B, T, D] with mask [B, T]."""
        return self._forward(embeds, mask, remat, keep_cache=False)[0]

    def prefill(self, embeds: jax.Array, mask: jax.Array) -> tuple[jax.Array, KVCache]:
        """Computes hidden states, and all keys and values [L, B, T, kv_heads, head_dim]."""
        return self._forward(embeds, mask, "none", keep_cache=True)

    def after_prompts(
        self,
        prompts: jax.Array,
        mask: jax.Array,
        completions: jax.Array,
        *,
        first: jax.Array | None = None,
        packed: PackedRows | None = None,
        remat: Remat = "none",
        attention: AttentionKernel = "xla",
    ) -> tuple[jax.Array, jax.Array]:
        """Computes hidden states of left-padded prompts [B, P, D] and their completions [N, T, D].

        `mask` [B, P] is that of the prompts. Completions are prompt-major and have no padding in
        front. The results equal those of `__call__` on each prompt followed by each completion.
        `first` are the positions of the completions' first tokens, `packed` says where rows have
        several completions; see `Branch`.
        """
        branches = (Branch(completions, first=first, packed=packed),)
        states = self.read_branches(prompts, mask, branches, remat=remat, attention=attention)
        return states[0], states[1]

    def read_branches(
        self,
        prompts: jax.Array,
        mask: jax.Array,
        branches: Sequence[Branch],
        *,
        inner: int | None = None,
        remat: Remat = "none",
        attention: AttentionKernel = "xla",
    ) -> list[jax.Array]:
        """Computes hidden states of left-padded prompts [B, P, D], and those of each branch.

        The first branch continues the prompts, and each later one continues the branch before it.
        With `inner` the last entry of the results are the states of the last branch behind so many
        layers, without the norm.
        """
        # Each prompt is read once, not once per completion. With 8 completions of 256 tokens and
        # prompts of 676 that is 2,724 tokens a group instead of 7,456.
        more = prompts.shape[1] % 2 if attention == "cudnn" else 0
        prompts, mask = _pad_front(prompts, more, axis=1), _pad_front(mask, more, axis=1)
        prompts = constrain(prompts, "batch", "length", "embed")
        prompt_rope, seen, places = self.rope(compute_positions(mask)), mask, []
        padded = [branch.make_even() if attention == "cudnn" else branch for branch in branches]
        for branch in padded:
            places.append(self._place(branch, seen))
            seen = places[-1].mask

        # All go through the layers in one scan, so that a layer's keys and values live only as long
        # as that layer.
        def step(block: Block, x: list[jax.Array]):
            state, cache = block(x[0], prompt_rope, mask, attention)
            states = [state]
            for state, place in zip(x[1:], places, strict=True):
                state, cache = block.after(state, cache, place, attention)
                states.append(state)
            return states, None

        embeds = (constrain(branch.embeds, "batch", "length", "embed") for branch in padded)
        x, lengths = [prompts, *embeds], [prompts.shape[1]]
        lengths += [branch.embeds.shape[1] for branch in branches]
        tapped = []
        if inner is None:
            x, _ = layers.scan_layers(self.layers, step, x, remat)
        else:
            x, _ = layers.scan_layers(self.layers, step, x, remat, part=slice(inner))
            tapped = [x[-1][:, : lengths[-1]]]
            x, _ = layers.scan_layers(self.layers, step, x, remat, part=slice(inner, None))
        states = [self.norm(state) for state in x]
        states = [state[:, :end] for state, end in zip(states, lengths, strict=True)]
        return [states[0][:, more:], *states[1:], *tapped]

    def after_caches(
        self, caches: KVCache, mask: jax.Array, branch: Branch, *,
        attention: AttentionKernel = "xla",
    ) -> jax.Array:  # fmt: skip
        """Computes hidden states of a branch [N, T, D] behind tokens that have been read.

        They equal those of `read_branches`. `caches` are [L, B, P, kv_heads, head_dim], as
        `prefill` and `extend_caches` return them; `mask` [B, P] is that of their tokens.
        """
        padded = branch.make_even() if attention == "cudnn" else branch
        more = mask.shape[1] % 2 if attention == "cudnn" else 0
        caches = jax.tree.map(lambda x: _pad_front(x, more, axis=2), caches)
        mask = _pad_front(mask, more, axis=1)
        states, _ = self._scan_caches(caches, mask, padded, attention, keep_cache=False)
        return self.norm(states[:, : branch.embeds.shape[1]])

    def extend_caches(self, caches: KVCache, mask: jax.Array, branch: Branch) -> KVCache:
        """Computes the keys and values [L, N, P + T, ...] of a branch with those before it."""
        return self._scan_caches(caches, mask, branch, "xla", keep_cache=True)[1]

    def _scan_caches(
        self, caches: KVCache, mask: jax.Array, branch: Branch, attention: AttentionKernel,
        keep_cache: bool,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        place = self._place(branch, mask)
        graphdef, state = nnx.split(self.layers)

        def step(x: jax.Array, layer: tuple[Any, KVCache]):
            block = nnx.merge(graphdef, layer[0])
            x, cache = block.after(x, layer[1], place, attention)
            return x, (cache if keep_cache else None)

        embeds = constrain(branch.embeds, "batch", "length", "embed")
        return jax.lax.scan(step, embeds, (state, caches))

    def _place(self, branch: Branch, mask: jax.Array) -> Place:
        """Returns positions and mask of a branch behind tokens with the mask [B, P]."""
        first, packed = branch.first, branch.packed
        if first is None:
            first = mask.sum(axis=-1)  # 3 tokens -> 3, 4, ..
        rows, length = branch.embeds.shape[:2]
        if packed is not None:
            starts, offsets = packed.take(first), packed.offsets
        else:
            starts, offsets = jnp.repeat(first, rows // len(first)), jnp.arange(length)
        rope = self.rope(starts[:, None] + offsets)
        return Place(rope, branch.join_mask(mask), packed)

    def _forward(self, embeds, mask, remat: Remat, keep_cache: bool) -> tuple[jax.Array, Any]:
        embeds = constrain(embeds, "batch", "length", "embed")
        rope = self.rope(compute_positions(mask))

        def step(block: Block, x: jax.Array):
            x, cache = block(x, rope, mask)
            return x, (cache if keep_cache else None)

        x, caches = layers.scan_layers(self.layers, step, embeds, remat)
        return self.norm(x), caches


def _pad_front(x: jax.Array, count: int, axis: int) -> jax.Array:
    """Returns an array with `count` zeros in front: padding, which a mask leaves out."""
    if not count:
        return x
    return jnp.pad(x, [(count if place == axis else 0, 0) for place in range(x.ndim)])


def compute_positions(mask: jax.Array) -> jax.Array:
    """Returns positions [B, T] that count real tokens only."""
    # Left padding: mask [0, 0, 1, 1] -> cumsum - 1 = [-1, -1, 0, 1] -> [0, 0, 0, 1]
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
