"""Log-probs of given tokens from hidden states, a few tokens at a time.

Logits are made and reduced in pieces: of [rows, T, 102400] only [rows, chunk, 102400] ever
exists, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def repeat_rows(x: jax.Array, group_size: int) -> jax.Array:
    """Each prompt's entry repeated for its completions."""
    return jnp.repeat(x, group_size, axis=0)


def chunked_logprobs(
    logits_of: Callable[[Any], jax.Array],
    hidden: Any,
    tokens: jax.Array,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies), both [N, T] float32, of `tokens` [N, T].

    `hidden` is an array [N, T, D] or a tuple of such; `logits_of` maps a slice of it to logits.
    The softmax is taken in float32. Entropies carry no gradient.
    """
    rows, length = tokens.shape
    size = max(1, min(length, chunk // rows))
    pieces = -(-length // size)

    def split(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, pieces * size - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(rows, pieces, size, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def score(piece: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, targets = piece
        logits = logits_of(states).astype(jnp.float32) / temperature
        normalised = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        picked = jnp.take_along_axis(normalised, targets[..., None], axis=-1)[..., 0]
        entropy = -(jnp.exp(normalised) * normalised).sum(axis=-1)
        return picked, lax.stop_gradient(entropy)

    out = lax.map(score, (jax.tree.map(split, hidden), split(tokens)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :length], out)
