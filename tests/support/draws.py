"""How far drawn tokens were from being others: what lies near a tie, rounding decides.

Equal tokens from two programs are a sound test only where the best choice is ahead of the next by
more than rounding. Random numbers are the same bits on every machine, so that a margin is too, but
for rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.policies.janus import network
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.types import EncodedPrompts, Segment
from tests.support.tolerances import LOGPROBS

SAFE = LOGPROBS
"""A margin above it is no matter of rounding."""


@functools.partial(jax.jit, static_argnames=("config", "image_token"))
def full_logits(config, params, prompts, tokens, image_token: int) -> jax.Array:
    """Teacher-forced logits [N, T, .] of the distributions that `tokens` [N, T] came from."""
    group = tokens.shape[0] // prompts.input_ids.shape[0]
    model, read = network.bind(config, params), tokens[:, :-1]
    if prompts.pixel_values is None:
        prompt, read = model.embed_text(prompts.input_ids), model.embed_image_tokens(read)
    else:
        features = model.image_features(prompts.pixel_values)
        prompt = model.prompt_embeds(prompts.input_ids, image_token, features)
        read = model.embed_text(read)
    embeds = jnp.concatenate([jnp.repeat(prompt, group, axis=0), read], axis=1)
    mask = jnp.repeat(prompts.attention_mask, group, axis=0)
    mask = jnp.concatenate([mask, jnp.ones(read.shape[:2], bool)], axis=1)
    hidden = model.language_model(embeds, mask)[:, prompts.input_ids.shape[1] - 1 :]
    return (model.image_logits if prompts.pixel_values is None else model.text_logits)(hidden)


def margins(
    logits: Any, segment: Segment, keys: jax.Array | None = None, temperature: float = 1.0
) -> np.ndarray:
    """By how much each kept token was ahead of the next, of logits [N, T, V] that were drawn from.

    Without keys they were the largest logits. Vocabularies of one block only: see
    `choices.Choice.draw`.
    """
    _, length, size = logits.shape

    def noise(key: jax.Array, step: jax.Array) -> jax.Array:
        _, place = jax.random.split(jax.random.fold_in(key, step))
        return jax.random.gumbel(place, (size,))

    scores = np.array(logits) / temperature
    if keys is not None:
        drawn = jax.vmap(jax.vmap(noise, (None, 0)), (0, None))(keys, jnp.arange(length))
        scores += np.asarray(drawn)
    kept = np.asarray(segment.mask)
    chosen = np.take_along_axis(scores, np.asarray(segment.values)[..., None], -1)[..., 0]
    np.put_along_axis(scores, np.asarray(segment.values)[..., None], -np.inf, -1)
    return (chosen - scores.max(-1))[kept]


def without_prompt(prompts: EncodedPrompts, special: SpecialTokens) -> EncodedPrompts:
    """The guidance rows: all but BOS and BOI is padding."""
    ids = np.asarray(prompts.input_ids)
    kept = (ids == special.bos) | (ids == special.boi)
    return EncodedPrompts(np.where(kept, ids, special.pad), prompts.attention_mask)
