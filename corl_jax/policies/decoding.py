"""Decodes with a language model, one token per step and many completions per prompt.

The prompt is read once, and its keys and values are kept once for all its completions. Each
completion has a buffer for the keys and values of its tokens. A step attends to both parts and
merges the results. For short prompts, each completion's buffer begins with a copy of the prompt
instead. The layers are unstacked and their matrices fused before the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from corl_jax.devices.mesh import constrain
from corl_jax.models import layers
from corl_jax.models.attention import DecodeKernel
from corl_jax.models.layers import apply_rope
from corl_jax.models.llama import Block, KVCache
from corl_jax.models.lora import LoraLinear
from corl_jax.policies.decode_attention import Step, attend_step

# For a short prompt one call of cuDNN over prompt and completion costs less than two calls.
SHORT_PROMPT = 128
"""Longest prompt, in tokens with padding, that is copied in front of its completions."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Maps between prompts, samples and rows of the network.

    With guidance a prompt has two rows, conditional and unconditional, and so has each sample.
    A prompt's rows are neighbours: first the conditional rows of its samples, then the others.
    """

    # Two prompts p, q with conditional c and unconditional u, G = 2:
    #   prompt rows [pc, pu, qc, qu], sample rows [pc, pc, pu, pu, qc, qc, qu, qu]
    # A mesh that divides the prompts has all rows of a sample on one device, so guidance needs no
    # communication.

    group_size: int
    guided: bool = False

    def interleave_prompts(self, conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
        """Interleaves conditional and unconditional [B, ...] to the rows of the prompts."""
        if not self.guided:
            return conditional
        pairs = jnp.stack([conditional, unconditional], axis=1)
        return pairs.reshape(-1, *conditional.shape[1:])

    def interleave_samples(self, conditional: jax.Array, unconditional: jax.Array) -> jax.Array:
        """Interleaves conditional and unconditional [N, ...] to the rows of the network."""
        groups = self._split_groups(conditional), self._split_groups(unconditional)
        return self.interleave_prompts(*groups).reshape(-1, *conditional.shape[1:])

    def fan_out(self, x: jax.Array) -> jax.Array:
        """Repeats the rows of the prompts for their completions."""
        return jnp.repeat(x, self.group_size, axis=0)

    def repeat_samples(self, x: jax.Array) -> jax.Array:
        """Repeats samples [N, ...] to rows of the network; both rows of a sample are equal."""
        # Guided, G = 2: [a, b, c, d] -> [a, b, a, b, c, d, c, d]
        return jnp.repeat(self._split_groups(x), 1 + self.guided, axis=0).reshape(-1, *x.shape[1:])

    def split(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Splits rows of the network into conditional and unconditional [N, ...].

        Without guidance both are the same.
        """
        # [rows, ...] -> [groups of rows, G, ...] -> [B, 1 or 2, G, ...]
        groups = self._split_groups(rows)
        pairs = groups.reshape(-1, 1 + self.guided, *groups.shape[1:])
        first, last = (pairs[:, i].reshape(-1, *rows.shape[1:]) for i in (0, -1))
        return first, last

    def _split_groups(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, self.group_size, *x.shape[1:])


Axes = tuple[str | None, ...]
"""Names of an array's axes, as `constrain` knows them."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """Several matrices with the same input as one matrix, and their adapters as another."""

    # Adapters are not added to the kernels: a bfloat16 kernel plus a small update rounds back to
    # the kernel, and the sampler would use an older policy than the one that is trained.

    kernel: jax.Array  # [in, *out]
    adapters: tuple[jax.Array, jax.Array] | None  # [in, R], [R, *out], R the sum of the ranks
    scale: float  # factor on the product with the adapters

    @classmethod
    def join(cls, projections: Sequence[nnx.Linear], axes: Axes, *shapes: tuple[int, ...]) -> Fused:
        """Fuses projections, whose outputs have the given shapes, along the axis -2.

        `axes` are the names of the fused kernel's axes for `constrain`.
        """
        # With adapters A1 [in, r], A2 [in, r] of two projections, outputs of width a and b:
        #   down = [A1 A2]  [in, 2r]
        #   up   = [B1 0 ]  [2r, a + b]: zeros keep each adapter off the other's outputs
        #          [0  B2]
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
        """Multiplies [rows, in] to [rows, *out]."""
        out = jnp.einsum("nd,d...->n...", x, self.kernel)
        if self.adapters is None:
            return out
        down, up = self.adapters
        # Through the rank R, as LoraLinear does in training: the order decides the rounding.
        return out + jnp.einsum("nr,r...->n...", x @ down * self.scale, up)


@dataclasses.dataclass(frozen=True)
class FusedBlock:
    """A Llama block whose matrices with the same input are fused into one.

    On a mesh each matrix is split as the activations that it makes.
    """

    # Key heads and inner features have axes of their own, so that a mesh splits them without
    # moving data. Training also splits matrices over `fsdp`; these parts are gathered here, once
    # a rollout and not once a token.

    block: Block
    qkv: Fused  # outputs [kv_heads, queries of a key head + 2, head_dim]
    out: Fused
    gate_up: Fused  # outputs [2, F]
    down: Fused

    @classmethod
    def from_block(cls, block: Block) -> FusedBlock:
        """Fuses the matrices of a block."""
        attn, mlp = block.attn, block.mlp
        # Grouped queries, 4 heads and 2 key heads: [q0, q1, k0, v0] and [q2, q3, k1, v1], so each
        # key head lies with its queries.
        heads, size = attn.config.num_kv_heads, attn.config.head_dim
        queries, single = (heads, attn.config.num_heads // heads, size), (heads, 1, size)
        wide, inner = (attn.config.hidden_size,), (1, attn.config.intermediate_size)
        side = ("embed", "heads", None, None)
        return cls(
            block,
            qkv=Fused.join((attn.q_proj, attn.k_proj, attn.v_proj), side, queries, single, single),
            out=Fused.join((attn.o_proj,), ("heads", "embed"), wide),
            gate_up=Fused.join((mlp.gate_proj, mlp.up_proj), ("embed", None, "mlp"), inner, inner),
            down=Fused.join((mlp.down_proj,), ("mlp", "embed"), wide),
        )

    def __call__(
        self, x: jax.Array, prompt: KVCache | None, cache: KVCache, step: Step
    ) -> tuple[jax.Array, KVCache]:
        """Returns x [rows, D] after this block, and the cache with the token's key and value.

        `prompt` is None if the cache begins with a copy of the prompt.
        """
        attended, cache = self._attend(self.block.input_layernorm(x), prompt, cache, step)
        x = x + self.out(attended)
        # [rows, 2, F]: gate and up
        inner = self.gate_up(self.block.post_attention_layernorm(x))
        x = x + self.down(jax.nn.silu(inner[:, 0]) * inner[:, 1])
        return constrain(x, "batch", "embed"), cache

    def _attend(
        self, x: jax.Array, prompt: KVCache | None, cache: KVCache, step: Step
    ) -> tuple[jax.Array, KVCache]:
        rows, size = len(x), self.block.attn.config.head_dim
        # [rows, kv_heads, queries + 2, head_dim]; the last two are the key and the value
        fused = constrain(self.qkv(x), "batch", "heads", None, None)
        query = apply_rope(fused[:, :, :-2].reshape(rows, -1, size), step.rope)
        new = apply_rope(fused[:, :, -2], step.rope), fused[:, :, -1]
        return attend_step(query, new, prompt, cache, step)


class Network(Protocol):
    """The parts of a language model that decoding needs."""

    @property
    def layers(self) -> Any:
        """The stacked blocks."""
        ...

    def prefill(self, embeds: jax.Array, mask: jax.Array) -> tuple[jax.Array, KVCache]:
        """Returns hidden states [B, P, D], and all keys and values [L, B, P, ...]."""
        ...

    def rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the cosines and sines of positions."""
        ...

    @property
    def norm(self) -> Callable[[jax.Array], jax.Array]:
        """The final norm."""
        ...


DecodeBlock = Callable[[jax.Array, KVCache | None, KVCache, Step], tuple[jax.Array, KVCache]]
"""A block for one token of each row, as `FusedBlock.__call__`."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The fused layers, and the keys and values of the prompts."""

    network: Network
    blocks: list[DecodeBlock]
    prompts: list[KVCache]  # per layer, [prompt rows, P, kv_heads, head_dim], padded on the right
    lengths: jax.Array  # [prompt rows] int32
    attention: DecodeKernel
    copied: bool  # the buffers of `new_caches` begin with a copy of the prompt

    def __call__(
        self, embeds: jax.Array, index: jax.Array, caches: list[KVCache],
        done: jax.Array | None = None,
    ) -> tuple[jax.Array, list[KVCache]]:  # fmt: skip
        """Returns hidden states [rows, D] after completion token `index`, and the new caches.

        `embeds` [rows, D] are the tokens' embeddings. Rows of the same prompt row are neighbours.
        `index` is a scalar, or [rows] where rows have read different numbers of tokens. The states
        of rows that are `done` [rows] are undefined, but finite: their keys are not read.
        """
        positions = jnp.repeat(self.lengths, len(embeds) // len(self.lengths)) + index
        return self._read(embeds, index, positions, 1, caches, done)

    def read_window(
        self, embeds: jax.Array, index: jax.Array, caches: list[KVCache]
    ) -> tuple[jax.Array, list[KVCache]]:
        """Returns hidden states [rows, W, D] after W neighbouring tokens, and the new caches.

        `index` [rows] are the numbers of the windows' first completion tokens. Caches need room
        for whole windows; what they have from `index` on is written over.
        """
        rows, window, width = embeds.shape
        first = jnp.repeat(self.lengths, rows // len(self.lengths)) + index
        positions = (first[:, None] + jnp.arange(window)).reshape(-1)
        tokens = embeds.reshape(-1, width)
        hidden, caches = self._read(tokens, index, positions, window, caches)
        return hidden.reshape(rows, window, width), caches

    def _read(
        self, embeds: jax.Array, index: jax.Array, positions: jax.Array, window: int,
        caches: list[KVCache], done: jax.Array | None = None,
    ) -> tuple[jax.Array, list[KVCache]]:  # fmt: skip
        rope = self.network.rope(positions)
        step = Step(index, positions, rope, self.lengths, self.attention, window, done)
        x, new = constrain(embeds, "batch", "embed"), []
        for block, prompt, cache in zip(self.blocks, self.prompts, caches, strict=True):
            x, cache = block(x, None if self.copied else prompt, cache, step)
            new.append(cache)
        return self.network.norm(x), new

    def new_caches(self, rows: int, length: int) -> list[KVCache]:
        """Makes buffers [rows, S, kv_heads, head_dim] per layer for `length` completion tokens.

        S is `length`, or P + `length` if prompts are copied.
        """

        # A copied prompt of 3 tokens, P = 5: [a, b, c, x, x | 0, 0, ..]. The first completion token
        # overwrites the padding x behind c, so that no gap remains.
        def make_buffer(prompt: jax.Array) -> jax.Array:
            zeros = jnp.zeros((rows, length, *prompt.shape[2:]), prompt.dtype)
            if self.copied:
                zeros = jnp.concatenate([jnp.repeat(prompt, rows // len(prompt), 0), zeros], axis=1)
            return constrain(zeros, "batch", "length", "heads", None)

        return [(make_buffer(keys), make_buffer(values)) for keys, values in self.prompts]

    def make_room(self, caches: list[KVCache], length: int, more: int) -> list[KVCache]:
        """Returns caches with the first `length` completion tokens, and room for `more`."""
        places = length + (self.prompts[0][0].shape[1] if self.copied else 0)

        def resize(cache: jax.Array) -> jax.Array:
            resized = jnp.pad(cache[:, :places], ((0, 0), (0, more), (0, 0), (0, 0)))
            return constrain(resized, "batch", "length", "heads", None)

        return jax.tree.map(resize, caches)

    def add_unconditional(
        self, rows: Rows, caches: list[KVCache], padded: list[KVCache]
    ) -> tuple[Decoder, list[KVCache]]:
        """Adds the rows of guidance behind completions of any lengths, of which they read padding.

        `padded` are keys and values of the unconditional prompts with padding behind them, as
        `prefill` returns them: for each completion token the padding that the other row reads.
        """
        size = self.prompts[0][0].shape[1]
        # A buffer begins behind its prompt's end, a copied prompt at its own beginning.
        start = jnp.zeros_like(self.lengths) if self.copied else self.lengths
        places = start[:, None] + jnp.arange(caches[0][0].shape[1])
        names = "batch", "length", "heads", None

        def join_prompts(first: jax.Array, other: jax.Array) -> jax.Array:
            return constrain(rows.interleave_prompts(first, other[:, :size]), *names)

        def join_buffers(first: jax.Array, other: jax.Array) -> jax.Array:
            # Room for later tokens has places beyond the padding: anything may stand there.
            other = jnp.take_along_axis(other, places[..., None, None], axis=1, mode="clip")
            return constrain(rows.interleave_samples(first, rows.fan_out(other)), *names)

        prompts = jax.tree.map(join_prompts, self.prompts, padded)
        caches = jax.tree.map(join_buffers, caches, padded)
        lengths = rows.interleave_prompts(self.lengths, self.lengths)
        return dataclasses.replace(self, prompts=prompts, lengths=lengths), caches


def copies_prompts(attention: DecodeKernel, length: int) -> bool:
    """Returns whether prompts of `length` tokens are copied in front of their completions."""
    return attention == "cudnn" and length <= SHORT_PROMPT


def prefill(
    network: Network, embeds: jax.Array, mask: jax.Array
) -> tuple[list[KVCache], jax.Array, jax.Array]:
    """Reads left-padded prompts [B, P, D]; returns their caches, lengths and last states [B, D].

    The caches [B, P, kv_heads, head_dim] of the layers are padded on the right.
    """
    lengths = mask.sum(axis=-1, dtype=jnp.int32)
    # Padding moves to the right, so that a length says which keys are real:
    # P = 4, length 3: [x, a, b, c], source = (0..3 + 1) % 4 = [1, 2, 3, 0] -> [a, b, c, x]
    places = jnp.arange(mask.shape[1])
    source = (places + mask.shape[1] - lengths[:, None]) % mask.shape[1]
    embeds = jnp.take_along_axis(embeds, source[..., None], axis=1)
    hidden, (keys, values) = network.prefill(embeds, places < lengths[:, None])
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    names = "batch", "length", "heads", None
    prompts = [(constrain(keys[i], *names), constrain(values[i], *names)) for i in range(len(keys))]
    return prompts, lengths, last


def read_prompts(
    network: Network,
    embeds: jax.Array,
    mask: jax.Array,
    attention: DecodeKernel,
    fuse: Callable[[Any], DecodeBlock] = FusedBlock.from_block,
) -> tuple[Decoder, jax.Array]:
    """Reads left-padded prompts [B, P, D]; returns a decoder and their last states [B, D].

    `fuse` makes the block of a decode step from a block of the network.
    """
    prompts, lengths, last = prefill(network, embeds, mask)
    # XLA does not move the slices of a stacked layer out of a loop: each step would copy them.
    fused = [fuse(block) for block in layers.unstack(network.layers, len(prompts))]
    copied = copies_prompts(attention, mask.shape[1])
    return Decoder(network, fused, prompts, lengths, attention, copied), last
