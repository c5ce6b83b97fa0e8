"""Chooses tokens from logits, with a random key for each sample.

A sample depends on its key and its prompt only. The batch, its order and the number of devices do
not change it. A key comes from (seed, stream, prompt index, sample index); step t folds t in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 512
"""Number of neighbouring tokens in one block of the vocabulary; see `_draw_token`."""

# To test whether all texts have ended, the host waits for the device. At most 15 steps are wasted.
STRIDE = 16
"""Steps between two tests of whether all texts have ended."""


def sample_keys(
    seed: int,
    prompt_index: Any,
    group_size: int,
    stream: int = 0,
    *,
    first: Any = 0,
    step: int | None = None,
) -> jax.Array:
    """Returns the keys [N] of samples `first` to `first + group_size - 1` of prompts [B].

    `first` is a number for all prompts, or one for each [B].

    `stream` is the number of the task. `step` makes other keys at each step of a run.
    """
    # Without the stream, image i and text i of a prompt would draw the same random numbers.
    base = jax.random.fold_in(jax.random.key(seed), stream)
    index = jnp.asarray(prompt_index, jnp.uint32)
    keys = _make_grid(base, index, jnp.asarray(first, jnp.int32), group_size)
    return keys if step is None else jax.vmap(jax.random.fold_in, (0, None))(keys, step)


# One program: a call for each operation would take milliseconds.
@functools.partial(jax.jit, static_argnames="group_size")
def _make_grid(base: jax.Array, index: jax.Array, first: jax.Array, group_size: int) -> jax.Array:
    fold = jax.random.fold_in
    # [B] x [G] -> keys [B, G] -> [N], prompt-major
    grid = jax.vmap(
        lambda prompt, first: jax.vmap(lambda sample: fold(fold(base, prompt), sample))(
            first + jnp.arange(group_size)
        )
    )
    return grid(index, jnp.broadcast_to(first, index.shape)).reshape(-1)


@functools.partial(jax.jit, static_argnames="stream")
def row_keys(seeds: Any, prompts: Any, samples: Any, stream: int) -> jax.Array:
    """Returns the key of each row [N]: sample `samples[i]` of prompt `prompts[i]` under its seed.

    Each is the key that `sample_keys` makes of these numbers. All are uint32 [N].
    """
    fold = jax.random.fold_in
    return jax.vmap(
        lambda seed, prompt, sample: fold(fold(fold(jax.random.key(seed), stream), prompt), sample)
    )(*(jnp.asarray(x, jnp.uint32) for x in (seeds, prompts, samples)))


@dataclasses.dataclass(frozen=True)
class Choice:
    """The rule by which a token is drawn from logits."""

    temperature: jax.Array | float
    greedy: bool
    top_k: int = 0
    top_p: float = 1.0
    # Of each so many neighbouring rows the last one takes the most likely token; 0: no row.
    greedy_last: int = 0

    def draw(self, keys: jax.Array, step: jax.Array, logits: jax.Array) -> jax.Array:
        """Draws token ids [N] from float32 logits [N, V], already divided by the temperature.

        `step` is a number for all rows, or one for each [N].
        """
        whole = logits
        if self.greedy:
            return _find_most_likely(whole)
        logits = keep_top_p(keep_top_k(logits, self.top_k), self.top_p)
        # The key of step t depends on t alone, not on the random numbers of the steps before.
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))
        drawn = jax.vmap(_draw_token)(keys, split_in_blocks(logits))
        if not self.greedy_last:
            return drawn
        is_greedy = mark_last_rows(len(drawn), self.greedy_last)
        return jnp.where(is_greedy, _find_most_likely(whole), drawn)


def _find_most_likely(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def mark_last_rows(num_rows: int, group_size: int) -> jax.Array:
    """Returns [num_rows] bool, True for the last row of each group."""
    # 4 rows, groups of 2: [F, T, F, T]
    return jnp.arange(num_rows) % group_size == group_size - 1


def _draw_token(key: jax.Array, blocks: jax.Array) -> jax.Array:
    """Draws a token id from logits [blocks, BLOCK]: first a block, then a place in the block."""
    # categorical() makes a random number for each logit. For a large vocabulary that costs more
    # than its softmax. Here it makes blocks + BLOCK numbers: 200 + 512 for a vocabulary of 102400.
    # p(block) p(place | block) is the softmax over the whole vocabulary.
    block_key, place_key = jax.random.split(key)
    block = jax.random.categorical(block_key, jax.nn.logsumexp(blocks, axis=-1))
    place = jax.random.categorical(place_key, blocks[block])
    return (block * blocks.shape[-1] + place).astype(jnp.int32)


def split_in_blocks(logits: jax.Array) -> jax.Array:
    """Reshapes [..., V] to [..., blocks, BLOCK or fewer]; -inf fills the last block up."""
    # V = 1200 -> [3, 512], the last 336 of them -inf: probability 0 in every softmax
    size = min(BLOCK, logits.shape[-1])
    count = math.ceil(logits.shape[-1] / size)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, count * size - logits.shape[-1])]
    logits = jnp.pad(logits, padding, constant_values=-jnp.inf)
    return logits.reshape(*logits.shape[:-1], count, size)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Sets all but the k largest logits to -inf; k = 0 keeps all, ties with the k-th stay."""
    if not 0 < k < logits.shape[-1]:
        return logits
    threshold = lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Keeps the most likely tokens with total probability `top_p`; sets other logits to -inf.

    At least one token stays, and so do ties with the least likely token that stays.
    """
    if top_p >= 1.0:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # [0.5, 0.3, 0.2], top_p = 0.6: before = [0, 0.5, 0.8], is_likely = [True, True, False]
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    is_likely = (before < top_p).at[..., 0].set(True)
    # A threshold on logits needs no gather back to the unsorted order.
    threshold = jnp.min(jnp.where(is_likely, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Computes the log-softmax of float32 logits [..., V] at tokens [...]."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # By blocks, as in `_draw_token`: XLA then reads the logits once for both.
    by_block = jax.nn.logsumexp(split_in_blocks(logits), axis=-1)
    return picked - jax.nn.logsumexp(by_block, axis=-1)


def guide(conditional: jax.Array, unconditional: jax.Array, cfg_scale: Any) -> jax.Array:
    """Mixes logits by classifier-free guidance; scale 1 gives the conditional ones.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), as Janus applies it to image tokens.
    """
    return unconditional + cfg_scale * (conditional - unconditional)


def split_steps(steps: int) -> tuple[int, int]:
    """Returns (rounds, steps a round) for at least `steps` steps, at most STRIDE a round."""
    # 511 steps -> 32 rounds of 16, one step more than needed; 20 -> 2 rounds of 10, none more
    count = math.ceil(steps / STRIDE)
    return count, math.ceil(steps / max(count, 1))


def completion_mask(tokens: jax.Array, steps: Any, eos: int) -> jax.Array:
    """Returns a mask [N, T], True on sampled tokens up to and including the first EOS."""
    # tokens [a, EOS, EOS]: cumsum [0, 1, 2] minus itself [0, 1, 1] -> ended [0, 0, 1]. Places from
    # `steps` on were never sampled: the loop stops before them if all rows have ended.
    ended = jnp.cumsum(tokens == eos, axis=-1) - (tokens == eos)
    return (ended == 0) & (jnp.arange(tokens.shape[-1]) < steps)
