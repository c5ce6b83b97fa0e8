"""How a token is chosen from logits, with random keys that belong to a sample and nothing else.

A sample depends on its own key and prompt only: not on the batch around it, its order or the
number of devices. Keys come from (seed, prompt index, sample index); step t folds t in.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 512
"""Tokens of the vocabulary that are drawn from together; see `Choice.draw`."""


STRIDE = 16
"""Steps between looks at whether all texts have ended: to look, the host waits for the device."""


def sample_keys(seed: int, prompt_index: Any, group_size: int, stream: int = 0) -> jax.Array:
    """Keys [N] of prompts' samples; `stream` tells tasks of the same prompt apart."""
    base = jax.random.fold_in(jax.random.key(seed), stream)
    index = jnp.asarray(prompt_index, jnp.uint32)
    fold = jax.random.fold_in
    grid = jax.vmap(
        lambda prompt: jax.vmap(lambda sample: fold(fold(base, prompt), sample))(
            jnp.arange(group_size)
        )
    )
    return grid(index).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a token is drawn from logits."""

    temperature: jax.Array | float
    greedy: bool
    top_k: int = 0
    top_p: float = 1.0

    def draw(self, keys: jax.Array, step: jax.Array, logits: jax.Array) -> jax.Array:
        """Token ids [N] of float32 logits [N, V], already divided by the temperature."""
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = keep_top_p(keep_top_k(logits, self.top_k), self.top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(_draw_token)(keys, split_in_blocks(logits))


def _draw_token(key: jax.Array, blocks: jax.Array) -> jax.Array:
    """A token id of logits [blocks, BLOCK]: first its block, then its place in there.

    A random number a token of a large vocabulary would cost more than its softmax.
    """
    block_key, place_key = jax.random.split(key)
    block = jax.random.categorical(block_key, jax.nn.logsumexp(blocks, axis=-1))
    place = jax.random.categorical(place_key, blocks[block])
    return (block * blocks.shape[-1] + place).astype(jnp.int32)


def split_in_blocks(logits: jax.Array) -> jax.Array:
    """[..., V] -> [..., blocks, BLOCK or fewer], the last block filled up with -inf."""
    size = min(BLOCK, logits.shape[-1])
    count = math.ceil(logits.shape[-1] / size)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, count * size - logits.shape[-1])]
    logits = jnp.pad(logits, padding, constant_values=-jnp.inf)
    return logits.reshape(*logits.shape[:-1], count, size)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """All but the k largest logits become -inf; 0 keeps all, ties with the k-th stay."""
    if not 0 < k < logits.shape[-1]:
        return logits
    threshold = lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Keeps the smallest set of most likely tokens whose probability reaches `top_p`.

    Never empty; tokens that tie with the least likely kept one stay.
    """
    if top_p >= 1.0:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p).at[..., 0].set(True)
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log-softmax of float32 logits [..., V] at tokens [...]."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # By blocks, as the token was drawn: XLA then reads the logits once for both.
    by_block = jax.nn.logsumexp(split_in_blocks(logits), axis=-1)
    return picked - jax.nn.logsumexp(by_block, axis=-1)


def guide(conditional: jax.Array, unconditional: jax.Array, cfg_scale: Any) -> jax.Array:
    """Classifier-free guidance on logits; scale 1 is the conditional distribution.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), as Janus applies it to image tokens.
    """
    return unconditional + cfg_scale * (conditional - unconditional)


def split_steps(steps: int) -> tuple[int, int]:
    """(count, steps of each) that make at least `steps`, none longer than STRIDE."""
    count = math.ceil(steps / STRIDE)
    return count, math.ceil(steps / max(count, 1))


def completion_mask(tokens: jax.Array, steps: Any, eos: int) -> jax.Array:
    """[N, T] bool: drawn tokens up to and including the first EOS."""
    ended = jnp.cumsum(tokens == eos, axis=-1) - (tokens == eos)
    return (ended == 0) & (jnp.arange(tokens.shape[-1]) < steps)
