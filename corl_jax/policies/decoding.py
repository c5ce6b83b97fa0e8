"""One token at a time through a Llama, many completions a prompt.

A prompt is read once, whatever the number of its completions, and its keys and values are kept
once: each completion adds only those of its own tokens, all at the same slot, and a step attends
to both parts. Where a short prompt costs less to read again than to attend to apart, each
completion's buffer begins with a copy of it. The layers are unstacked and their matrices fused
before the loop, because XLA does not hoist the slices of a stacked layer out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from corl_jax.devices.mesh import constrain
from corl_jax.models import layers
from corl_jax.models.attention import DecodeKernel, attend_to_prefix, merge_parts
from corl_jax.models.layers import apply_rope
from corl_jax.models.llama import Block, KVCache, Llama
from corl_jax.models.lora import LoraLinear

SHORT_PROMPT = 128
"""Tokens, padding included, up to which cuDNN attends to a prompt and a completion in one call."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """How prompts, samples and rows of the network relate.

    A guided prompt takes two rows, conditional first, and so do its samples: the conditional
    rows of all its samples, then the unconditional ones. On a mesh that divides the prompts
    guidance needs no communication.
    """

    group_size: int
    guided: bool = False

    def of_prompts(self, conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
        """[B, ...] twice -> the prompts' rows."""
        if not self.guided:
            return conditional
        pairs = jnp.stack([conditional, unconditional], axis=1)
        return pairs.reshape(-1, *conditional.shape[1:])

    def fan_out(self, x: jax.Array) -> jax.Array:
        """The prompts' rows, each repeated for its completions."""
        return jnp.repeat(x, self.group_size, axis=0)

    def of_samples(self, x: jax.Array) -> jax.Array:
        """[N, ...] -> rows of the network, the same for the two rows of a guided sample."""
        return jnp.repeat(self._groups(x), 1 + self.guided, axis=0).reshape(-1, *x.shape[1:])

    def split(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows of the network -> conditional and unconditional [N, ...], the same if unguided."""
        groups = self._groups(rows)
        pairs = groups.reshape(-1, 1 + self.guided, *groups.shape[1:])
        first, last = (pairs[:, i].reshape(-1, *rows.shape[1:]) for i in (0, -1))
        return first, last

    def _groups(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, self.group_size, *x.shape[1:])


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a decode step stands: shared by all layers of that step."""

    index: jax.Array  # scalar int32, the completion token being read
    positions: jax.Array  # [rows] int32, its place behind the prompt
    rope: tuple[jax.Array, jax.Array]  # of its position, [rows, 1, head_dim]
    lengths: jax.Array  # [prompt rows] int32, real tokens of the prompts
    attention: DecodeKernel


Axes = tuple[str | None, ...]
"""Names of an array's axes, as `constrain` knows them."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """Matrices with the same input as one, and what their adapters add to the product.

    Adapters stay beside the kernels: a bfloat16 kernel plus a small update rounds back to the
    kernel, and the samples would be those of a policy that training has already left.
    """

    kernel: jax.Array  # [in, *out]
    adapters: tuple[jax.Array, jax.Array] | None  # [in, R], [R, *out], R the sum of the ranks
    scale: float  # of what the adapters add

    @classmethod
    def of(cls, projections: Sequence[nnx.Linear], axes: Axes, *shapes: tuple[int, ...]) -> Fused:
        """`shapes`: of each projection's outputs; several are laid side by side on the axis -2.

        `axes` names the fused kernel's axes for `constrain`.
        """
        kernels = [p.kernel[...].reshape(-1, *s) for p, s in zip(projections, shapes, strict=True)]
        down, up, before, scale = [], [], 0, 1.0
        after = sum(kernel.shape[-2] for kernel in kernels)
        for linear, shape, kernel in zip(projections, shapes, kernels, strict=True):
            after -= kernel.shape[-2]
            if isinstance(linear, LoraLinear):
                beside = [(0, 0)] * kernel.ndim
                beside[-2] = (before, after)
                down.append(linear.lora_a[...])
                up.append(jnp.pad(linear.lora_b[...].reshape(-1, *shape), beside))
                scale = linear.scale
            before += kernel.shape[-2]
        kernel, adapters = constrain(jnp.concatenate(kernels, axis=-2), *axes), None
        if down:
            first = constrain(jnp.concatenate(down, axis=1), axes[0], None)
            adapters = first, constrain(jnp.concatenate(up), None, *axes[1:])
        return cls(kernel, adapters, scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[rows, in] -> [rows, *out]."""
        out = jnp.einsum("nd,d...->n...", x, self.kernel)
        if self.adapters is None:
            return out
        down, up = self.adapters
        return out + jnp.einsum("nr,r...->n...", x @ down * self.scale, up)


@dataclasses.dataclass(frozen=True)
class FusedBlock:
    """A block whose matrices with the same input are one, read in one matrix product.

    The fused axes keep their key heads and inner features apart, so that a mesh splits them
    without moving anything. Each matrix is split as its product's activations are: what training
    splits over `fsdp` besides is gathered here, once a rollout and not once a token.
    """

    block: Block
    qkv: Fused  # outputs [kv_heads, queries of a key head + 2, head_dim]
    out: Fused
    gate_up: Fused  # outputs [2, F]
    down: Fused

    @classmethod
    def of(cls, block: Block) -> FusedBlock:
        attn, mlp = block.attn, block.mlp
        heads, size = attn.config.num_kv_heads, attn.config.head_dim
        queries, one = (heads, attn.config.num_heads // heads, size), (heads, 1, size)
        wide, inner = (attn.config.hidden_size,), (1, attn.config.intermediate_size)
        side = ("embed", "heads", None, None)
        return cls(
            block,
            qkv=Fused.of((attn.q_proj, attn.k_proj, attn.v_proj), side, queries, one, one),
            out=Fused.of((attn.o_proj,), ("heads", "embed"), wide),
            gate_up=Fused.of((mlp.gate_proj, mlp.up_proj), ("embed", None, "mlp"), inner, inner),
            down=Fused.of((mlp.down_proj,), ("mlp", "embed"), wide),
        )

    def __call__(
        self, x: jax.Array, prompt: KVCache | None, cache: KVCache, step: Step
    ) -> tuple[jax.Array, KVCache]:
        """x [rows, D] after this block, and its cache with the token's key and value.

        `prompt` is None where the cache begins with it.
        """
        attended, cache = self._attend(self.block.input_layernorm(x), prompt, cache, step)
        x = x + self.out(attended)
        inner = self.gate_up(self.block.post_attention_layernorm(x))
        x = x + self.down(jax.nn.silu(inner[:, 0]) * inner[:, 1])
        return constrain(x, "batch", "embed"), cache

    def _attend(
        self, x: jax.Array, prompt: KVCache | None, cache: KVCache, step: Step
    ) -> tuple[jax.Array, KVCache]:
        rows, size = len(x), self.block.attn.config.head_dim
        fused = constrain(self.qkv(x), "batch", "heads", None, None)
        query = apply_rope(fused[:, :, :-2].reshape(rows, -1, size), step.rope)
        new = apply_rope(fused[:, :, -2], step.rope), fused[:, :, -1]
        if prompt is None:
            cache = write(cache, new, step.positions)
            own, _ = attend_to_prefix(query[:, None], *cache, step.positions + 1, step.attention)
            return own.reshape(rows, -1), cache
        cache = jax.tree.map(
            lambda old, entry: lax.dynamic_update_slice_in_dim(
                old, entry[:, None], step.index, axis=1
            ),
            cache, new,
        )  # fmt: skip
        count = jnp.full(rows, step.index + 1, jnp.int32)
        own = attend_to_prefix(query[:, None], *cache, count, step.attention)
        by_prompt = query.reshape(len(step.lengths), -1, *query.shape[1:])
        shared = attend_to_prefix(by_prompt, *prompt, step.lengths, step.attention)
        averages, denominators = (x.reshape(rows, 1, *x.shape[2:]) for x in shared)
        return merge_parts((averages, denominators), own).reshape(rows, -1), cache


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The fused layers, and the prompts: shared by all rows of a group, or copied for each."""

    llama: Llama
    blocks: list[FusedBlock]
    prompts: list[KVCache]  # per layer, [prompt rows, P, kv_heads, head_dim], padded behind
    lengths: jax.Array  # [prompt rows] int32
    attention: DecodeKernel
    copied: bool  # buffers of `new_caches` begin with the prompt

    def __call__(
        self, embeds: jax.Array, index: jax.Array, caches: list[KVCache]
    ) -> tuple[jax.Array, list[KVCache]]:
        """Hidden states [rows, D] after reading completion token `index` (embeds [rows, D]).

        The rows of one prompt row lie side by side.
        """
        positions = jnp.repeat(self.lengths, len(embeds) // len(self.lengths)) + index
        rope = self.llama.rope(positions)
        step = Step(index, positions, rope, self.lengths, self.attention)
        x, new = constrain(embeds, "batch", "embed"), []
        for block, prompt, cache in zip(self.blocks, self.prompts, caches, strict=True):
            x, cache = block(x, None if self.copied else prompt, cache, step)
            new.append(cache)
        return self.llama.norm(x), new

    def new_caches(self, rows: int, length: int) -> list[KVCache]:
        """Per-layer buffers [rows, S, kv_heads, head_dim] for completions of `length` tokens.

        S is `length`, or with copied prompts P + `length`; a completion's tokens then follow its
        prompt's real ones.
        """

        def buffer(prompt: jax.Array) -> jax.Array:
            zeros = jnp.zeros((rows, length, *prompt.shape[2:]), prompt.dtype)
            if self.copied:
                zeros = jnp.concatenate([jnp.repeat(prompt, rows // len(prompt), 0), zeros], axis=1)
            return constrain(zeros, "batch", "length", "heads", None)

        return [(buffer(keys), buffer(values)) for keys, values in self.prompts]


def write(cache: KVCache, new: KVCache, slots: jax.Array) -> KVCache:
    """Keys and values [rows, S, ...] with those of one token, [rows, ...], at each row's slot."""
    put = jax.vmap(lambda row, entry, slot: lax.dynamic_update_index_in_dim(row, entry, slot, 0))
    return jax.tree.map(lambda old, entry: put(old, entry, slots), cache, new)


def copies_prompts(attention: DecodeKernel, length: int) -> bool:
    """Whether prompts of `length` tokens are copied in front of each of their completions."""
    return attention == "cudnn" and length <= SHORT_PROMPT


def read_prompts(
    llama: Llama, embeds: jax.Array, mask: jax.Array, attention: DecodeKernel
) -> tuple[Decoder, jax.Array]:
    """A decoder for completions of left-padded prompts [B, P, D], and their last states [B, D]."""
    lengths = mask.sum(axis=-1, dtype=jnp.int32)
    # Padding goes behind, so that a length tells which keys are real.
    places = jnp.arange(mask.shape[1])
    source = (places + mask.shape[1] - lengths[:, None]) % mask.shape[1]
    embeds = jnp.take_along_axis(embeds, source[..., None], axis=1)
    hidden, (keys, values) = llama.prefill(embeds, places < lengths[:, None])
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    blocks = layers.unstack(llama.layers, len(keys))
    names = "batch", "length", "heads", None
    prompts = [(constrain(keys[i], *names), constrain(values[i], *names)) for i in range(len(keys))]
    fused = [FusedBlock.of(block) for block in blocks]
    copied = copies_prompts(attention, mask.shape[1])
    return Decoder(llama, fused, prompts, lengths, attention, copied), last
