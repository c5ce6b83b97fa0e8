"""The states of decode loops, and the loop that samples texts.

A sample depends on its key and its prompt only; see `policies.choices`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.policies.choices import Choice, split_steps, token_logprobs
from corl_jax.policies.decoding import Decoder
from corl_jax.types import EncodedPrompts

# Step t of a text and of an image would draw the same random numbers. A key of its own, and not
# steps that count on, because the samples must not depend on the longest plan.
IMAGE_KEYS = 2**31 - 1
"""Folded into the keys that draw the image behind a plan; no plan has so many tokens."""


class TextModel(Protocol):
    """A network that reads and scores text tokens."""

    def embed_text(self, input_ids: jax.Array) -> jax.Array:
        """Embeds ids [..., T] to [..., T, D]."""
        ...

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """Computes logits [..., V] of hidden states [..., D]."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The values that one decode step passes to the next."""

    step: jax.Array  # scalar int32, number of tokens sampled so far
    token: jax.Array  # [N] int32, the newest token, which the network has not read
    done: jax.Array  # [N] bool, rows that sampled EOS
    tokens: jax.Array  # [N, T] int32
    logprobs: jax.Array  # [N, T] float32
    caches: Any  # keys and values, per layer


def check_group_size(prompts: EncodedPrompts, keys: jax.Array) -> int:
    """Returns the number of keys per prompt.

    Raises: ValueError, while tracing, if that is no whole number.
    """
    count = prompts.input_ids.shape[0]
    if keys.shape[0] % count or not keys.shape[0]:
        raise ValueError(f"{keys.shape[0]} keys for {count} prompts: expected a positive multiple")
    return keys.shape[0] // count


def fold_image_keys(keys: jax.Array) -> jax.Array:
    """Returns the keys [N] that draw the images behind plans of keys [N]."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, IMAGE_KEYS)


def count_plan_tokens(tokens: jax.Array, eos: int) -> jax.Array:
    """Returns how many tokens [N] of plans [N, T] the image is drawn after: all before EOS."""
    # [a, b, EOS, EOS] -> 2; [a, b, c, d], cut at max_new_tokens -> 4. Not from the mask: a loss
    # may mask out what the image was drawn after.
    return (jnp.cumsum(tokens == eos, axis=-1) == 0).sum(axis=-1, dtype=jnp.int32)


def start_state(
    token: jax.Array, logprob: jax.Array, done: jax.Array, length: int, fill: int, caches
) -> DecodeState:
    """Returns the state after the first token [N]; `fill` stands in the places of later ones."""
    rows = token.shape[0]
    return DecodeState(
        step=jnp.int32(1),
        token=token,
        done=done,
        tokens=jnp.full((rows, length), fill, jnp.int32).at[:, 0].set(token),
        logprobs=jnp.zeros((rows, length), jnp.float32).at[:, 0].set(logprob),
        caches=caches,
    )


TextDraw = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
"""(hidden states [N, D], step, rows that have ended) -> (tokens, log-probs, ended), each [N]."""


def make_text_draw(model: TextModel, choice: Choice, keys: jax.Array, eos: int) -> TextDraw:
    """Returns the function that draws a text token for each sample."""

    def draw(hidden: jax.Array, step: jax.Array, done: jax.Array):
        logits = model.text_logits(hidden).astype(jnp.float32) / choice.temperature
        token = choice.draw(keys, step, logits)
        # Without top-k and top-p, as the update scores it. Rows that have ended go on as EOS.
        logprob = jnp.where(done, 0.0, token_logprobs(logits, token))
        token = jnp.where(done, eos, token)
        return token, logprob, done | (token == eos)

    return draw


def sample_until_ended(
    model: TextModel, decoder: Decoder, draw: TextDraw, hidden: jax.Array, steps: int, eos: int
) -> DecodeState:
    """Samples texts from the prompts' last states [N, D]: a token, and at least `steps` more.

    Stops soon after all rows have ended.
    """
    token, logprob, done = draw(hidden, jnp.int32(0), jnp.zeros(len(hidden), bool))
    # The length may exceed what was asked for by a few steps, which the caller cuts off.
    rounds, stride = split_steps(steps)
    length = 1 + rounds * stride
    caches = decoder.new_caches(len(hidden), length)

    def step(state: DecodeState) -> DecodeState:
        # Rows that have ended stay in their places, but their keys are not read any more.
        hidden, caches = decoder(
            model.embed_text(state.token), state.step - 1, state.caches, state.done
        )
        token, logprob, done = draw(hidden, state.step, state.done)
        return advance(state, token, logprob, caches, done)

    return lax.while_loop(
        lambda state: (state.step < length) & ~state.done.all(),
        lambda state: lax.fori_loop(0, stride, lambda _, state: step(state), state),
        start_state(token, logprob, done, length, eos, caches),
    )


def advance(state: DecodeState, token, logprob, caches, done=None) -> DecodeState:
    """Returns the state after one more token [N] of each row."""
    return DecodeState(
        step=state.step + 1,
        token=token,
        done=state.done if done is None else done,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        logprobs=lax.dynamic_update_slice(state.logprobs, logprob[:, None], (0, state.step)),
        caches=caches,
    )
