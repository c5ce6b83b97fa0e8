"""Log-probs of given completions under the policy, by one teacher-forced pass a task.

Logits are made and reduced a few tokens at a time: of [rows, T, 102400] only
[rows, chunk, 102400] ever exists, forward and backward.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from corl_jax.policies.choices import guide
from corl_jax.policies.chunked_logprobs import chunked_logprobs, repeat_rows
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import network
from corl_jax.policies.janus.network import Janus, JanusConfig
from corl_jax.policies.janus.sampling import unconditional_ids
from corl_jax.types import EncodedPrompts, Params, Segment


def _completion_states(
    model: Janus, embeds: jax.Array, mask: jax.Array, completion: jax.Array, options: LogprobOptions
) -> jax.Array:
    """Hidden states [N, T, D] that score each completion token.

    `embeds` [B, P, D] and `mask` [B, P] of the prompts, `completion` [N, T, D] embedded tokens.
    The state that scores token j has read the tokens before it; the last token is not read.
    Each prompt is read once, not once per completion.
    """
    length = completion.shape[1]
    read = completion if options.unshifted else completion[:, : length - 1]
    group_size = len(completion) // len(embeds)
    if not read.shape[1]:
        hidden = model.language_model(embeds, mask, remat=options.remat)
        return repeat_rows(hidden[:, -1:], group_size)
    prompts, states = model.language_model.after_prompts(
        embeds, mask, read.astype(embeds.dtype), remat=options.remat, attention=options.attention
    )
    if options.unshifted:
        return states
    return jnp.concatenate([repeat_rows(prompts[:, -1:], group_size), states], axis=1)


def image_logprobs(
    model: Janus, prompts: EncodedPrompts, tokens: jax.Array, options: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) [N, T] of image codes `tokens` [N, T] given B prompts."""
    drawn = model.embed_image_tokens(tokens)

    def states(input_ids: jax.Array) -> jax.Array:
        embeds = model.embed_text(input_ids)
        return _completion_states(model, embeds, prompts.attention_mask, drawn, options)

    def guided_logits(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        with_prompt, without = (model.image_logits(x).astype(jnp.float32) for x in pair)
        return guide(with_prompt, without, options.cfg_scale)

    conditional = states(prompts.input_ids)
    if options.image_logprobs == "conditional":
        logits_of, hidden = model.image_logits, conditional
    else:
        hidden = (conditional, states(unconditional_ids(prompts.input_ids, options.special)))
        logits_of = guided_logits

    return chunked_logprobs(logits_of, hidden, tokens, options.temperature, options.chunk)


def text_logprobs(
    model: Janus, prompts: EncodedPrompts, tokens: jax.Array, options: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) [N, T] of answers `tokens` [N, T] given B prompts."""
    features = None
    if prompts.pixel_values is not None:
        features = model.image_features(prompts.pixel_values, remat=options.remat)
    embeds = model.prompt_embeds(prompts.input_ids, options.special.image, features)
    options = dataclasses.replace(options, unshifted=False)
    answers = model.embed_text(tokens)
    hidden = _completion_states(model, embeds, prompts.attention_mask, answers, options)
    return chunked_logprobs(model.text_logits, hidden, tokens, options.temperature, options.chunk)


def score_codes(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
    """Scores the segment of a turn that made an image; see `image_logprobs`."""
    (codes,) = segments
    return (image_logprobs(network.bind(sizes, params), prompts, codes.values, options),)


def score_answers(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
    """Scores the segment of a turn that made a text; see `text_logprobs`."""
    (text,) = segments
    return (text_logprobs(network.bind(sizes, params), prompts, text.values, options),)
