"""Computes log-probs of given tokens from hidden states, a few tokens at a time.

Logits are made and reduced in pieces. With Janus's vocabulary [rows, T, 102400] never exists,
neither forward nor backward, but only [rows, size of a piece, 102400].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def repeat_rows(x: jax.Array, group_size: int) -> jax.Array:
    """Repeats the row of each prompt for its completions."""
    # G = 2: [p0, p1] -> [p0, p0, p1, p1]
    return jnp.repeat(x, group_size, axis=0)


def chunked_logprobs(
    logits_of: Callable[[Any], jax.Array],
    hidden: Any,
    tokens: jax.Array,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns (log-probs, entropies), both [N, T] float32, of `tokens` [N, T].

    `hidden` is an array [N, T, D] or a tuple of such arrays. `logits_of` maps a slice of it to
    logits. `chunk` is the number of tokens of a piece, over all rows. Entropies have no gradient.
    """

    def score(piece: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, targets = piece
        # bfloat16 has 8 bits: log-probs of some -10 would be off by up to 0.03.
        logits = logits_of(states).astype(jnp.float32) / temperature
        normalised = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        picked = jnp.take_along_axis(normalised, targets[..., None], axis=-1)[..., 0]
        entropy = -(jnp.exp(normalised) * normalised).sum(axis=-1)
        return picked, lax.stop_gradient(entropy)

    return map_chunks(score, (hidden, tokens), chunk)


def map_chunks(compute: Callable[[Any], Any], inputs: Any, chunk: int) -> Any:
    """Applies `compute` to pieces of a few tokens; inputs and results are trees of [N, T, ...].

    `chunk` is the number of tokens of a piece, over all rows. The backward pass computes each piece
    again.
    """
    # N = 64, chunk = 1024: pieces of 16 tokens of each row
    rows, length = jax.tree.leaves(inputs)[0].shape[:2]
    size = max(1, min(length, chunk // rows))
    pieces = -(-length // size)

    def split(x: jax.Array) -> jax.Array:
        # [N, T, ...] -> [pieces, N, size, ...]; lax.map runs over the first axis
        padding = [(0, 0), (0, pieces * size - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(rows, pieces, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        # [pieces, N, size, ...] -> [N, T, ...]; the padding of the last piece is cut off
        return x.swapaxes(0, 1).reshape(rows, -1, *x.shape[3:])[:, :length]

    # Without checkpoint the backward pass would keep the logits of every piece.
    out = lax.map(jax.checkpoint(compute), jax.tree.map(split, inputs))
    return jax.tree.map(join, out)
