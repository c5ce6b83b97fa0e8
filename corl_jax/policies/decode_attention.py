"""Attends from the newest tokens of each row to its prompt and to its completion so far.

A step reads one token of each row, or a window of neighbouring tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.models.attention import (
    DecodeKernel,
    attend_to_prefix,
    attend_within,
    merge_all_parts,
    merge_parts,
)
from corl_jax.models.llama import KVCache


@dataclasses.dataclass(frozen=True)
class Step:
    """The values of a decode step that all its layers share."""

    # int32, number of the first completion token that is read: a scalar, or [rows] where rows have
    # read different numbers of tokens
    index: jax.Array
    positions: jax.Array  # [rows * window] int32, counted from the start of each token's prompt
    rope: tuple[jax.Array, jax.Array]  # cosines and sines of them, [rows * window, 1, head_dim]
    lengths: jax.Array  # [prompt rows] int32, real tokens of the prompts
    attention: DecodeKernel
    window: int = 1  # tokens of a row that are read together; more than 1 needs `index` [rows]
    # [rows] bool, rows that have ended, whose attention nobody uses; None: no row has
    done: jax.Array | None = None

    def limit_rows(self, counts: jax.Array) -> jax.Array:
        """Returns how many keys [rows] each row reads of `counts`: one if the row has ended."""
        # A prefix has at least one key. The kernels of GPUs do not read those behind it.
        return counts if self.done is None else jnp.where(self.done, 1, counts)

    def limit_prompts(self) -> jax.Array:
        """Returns how many keys [prompt rows] are read of each prompt: one if all its rows ended.

        Its rows are neighbours.
        """
        if self.done is None:
            return self.lengths
        return jnp.where(self.done.reshape(len(self.lengths), -1).all(axis=1), 1, self.lengths)


def attend_step(
    query: jax.Array, new: KVCache, prompt: KVCache | None, cache: KVCache, step: Step
) -> tuple[jax.Array, KVCache]:
    """Returns attention [rows, H * head_dim] of a token, and the cache with its key and value.

    `query` is [rows, H, head_dim], `new` are the token's key and value [rows, kv_heads, head_dim].
    `prompt` is None if the cache begins with a copy of the prompt. With a window the leading axis
    has all its tokens, those of a row side by side. The attention of rows that have ended is
    undefined, but finite.
    """
    if step.window > 1:
        return _attend_window(query, new, prompt, cache, step)
    rows = len(query)
    if prompt is None:
        # Prompts differ in length, so each row has another slot; the cache is dense up to it.
        cache = _write(cache, new, step.positions, 1)
        attended, _ = attend_to_prefix(
            query[:, None], *cache, step.limit_rows(step.positions + 1), step.attention
        )
        return attended.reshape(rows, -1), cache
    if step.index.ndim:
        cache = _write(cache, new, step.index, 1)
    else:
        # Without the prompt all rows write to the same slot: one slice, not a scatter per row.
        cache = jax.tree.map(
            lambda old, entry: lax.dynamic_update_slice_in_dim(
                old, entry[:, None], step.index, axis=1
            ),
            cache, new,
        )  # fmt: skip
    count = step.limit_rows(jnp.full(rows, step.index + 1, jnp.int32))
    by_completion = attend_to_prefix(query[:, None], *cache, count, step.attention)
    averages, denominators = _attend_to_prompt(query, prompt, step)
    return merge_parts((averages, denominators), by_completion).reshape(rows, -1), cache


def _attend_window(
    query: jax.Array, new: KVCache, prompt: KVCache | None, cache: KVCache, step: Step
) -> tuple[jax.Array, KVCache]:
    window = step.window
    first = step.index if prompt is not None else step.positions[::window]
    cache = _write(cache, new, first, window)
    query, keys, values = (x.reshape(-1, window, *x.shape[1:]) for x in (query, *new))
    # No kernel for all devices takes another number of keys for each query of a row. So the keys
    # before the window, which all its tokens see, are one part, and the window's own another.
    averages, denominators = attend_to_prefix(query, *cache, jnp.maximum(first, 1), step.attention)
    # A prefix has at least one key. At the start of a completion that key is the window's own.
    denominators = jnp.where(first[:, None, None] > 0, denominators, -jnp.inf)
    parts = [(averages, denominators), attend_within(query, keys, values)]
    if prompt is not None:
        parts.append(_attend_to_prompt(query, prompt, step))
    return merge_all_parts(parts).reshape(len(query) * window, -1), cache


def _attend_to_prompt(query: jax.Array, prompt: KVCache, step: Step) -> tuple[jax.Array, jax.Array]:
    """Returns attention to the prompts, [rows, tokens of a row, H, head_dim] and no head_dim."""
    # The completions of a prompt become its queries: its keys are read once for the group.
    # [rows, (window,) H, head_dim] -> [prompt rows, G * window, H, head_dim]
    heads = query.shape[-2:]
    by_prompt = query.reshape(len(step.lengths), -1, *heads)
    averages, denominators = attend_to_prefix(
        by_prompt, *prompt, step.limit_prompts(), step.attention
    )
    return (
        averages.reshape(len(query), -1, *heads),
        denominators.reshape(len(query), -1, heads[0]),
    )


def _write(cache: KVCache, new: KVCache, slots: jax.Array, window: int) -> KVCache:
    """Writes keys and values of tokens, [rows * window, ...], from the slot of each row on."""

    def put(row: jax.Array, entries: jax.Array, slot: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(row, entries, slot, 0)

    return jax.tree.map(
        lambda old, entries: jax.vmap(put)(
            old, entries.reshape(-1, window, *entries.shape[1:]), slots
        ),
        cache,
        new,
    )
