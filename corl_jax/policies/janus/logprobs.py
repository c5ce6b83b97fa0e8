"""Computes log-probs of given completions under the policy, by one forward pass per task.

The logits of all tokens never exist at the same time; see `policies.chunked_logprobs`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from corl_jax.policies.causal_answers import compute_scoring_states, score_text
from corl_jax.policies.choices import guide
from corl_jax.policies.chunked_logprobs import chunked_logprobs
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.janus import network
from corl_jax.policies.janus.network import Janus, JanusConfig
from corl_jax.policies.janus.sampling import unconditional_ids
from corl_jax.policies.packing import PACKED
from corl_jax.types import EncodedPrompts, Params, Segment


def image_logprobs(
    model: Janus, prompts: EncodedPrompts, tokens: jax.Array, options: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    """Computes (log-probs, entropies) [N, T] of image codes `tokens` [N, T] given B prompts."""
    states = compute_code_states(model, prompts, tokens, options)
    return score_code_states(model, *states, tokens, options)


def compute_code_states(
    model: Janus, prompts: EncodedPrompts, tokens: jax.Array, options: LogprobOptions
) -> tuple[jax.Array, jax.Array | None]:
    """Computes the states [N, T, D] that score codes, of the prompts and without them.

    The second ones are None unless the log-probs are those of guidance.
    """
    completion = model.embed_image_tokens(tokens)

    def compute_states(input_ids: jax.Array) -> jax.Array:
        embeds = model.embed_text(input_ids)
        return compute_scoring_states(
            model.language_model, embeds, prompts.attention_mask, completion, options
        )

    conditional = compute_states(prompts.input_ids)
    unconditional = None
    if options.image_logprobs == "guided":
        unconditional = compute_states(unconditional_ids(prompts.input_ids, options.special))
    return conditional, unconditional


def score_code_states(
    model: Janus, conditional: jax.Array, unconditional: jax.Array | None, tokens: jax.Array,
    options: LogprobOptions,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes (log-probs, entropies) [N, T] of codes from the states [N, T, D] that score them.

    With unconditional states they are those of guidance. Without, they are those of the prompt, as
    in the released code, though it samples guided.
    """

    def guide_logits(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        # float32 before the guidance: a scale of 5 enlarges the rounding of bfloat16 (Q39).
        with_prompt, without = (model.image_logits(x).astype(jnp.float32) for x in pair)
        return guide(with_prompt, without, options.cfg_scale)

    if unconditional is None:
        logits_of, hidden = model.image_logits, conditional
    else:
        logits_of, hidden = guide_logits, (conditional, unconditional)
    return chunked_logprobs(logits_of, hidden, tokens, options.temperature, options.chunk)


def score_codes(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
    """Scores the image codes of a turn; see `image_logprobs`."""
    (codes,) = segments
    return (image_logprobs(network.bind(sizes, params), prompts, codes.values, options),)


def score_answers(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
    """Scores the text of a turn; see `score_text`."""
    (text,) = segments
    model, packed = network.bind(sizes, params), text.replay.get(PACKED)
    return (score_text(model, prompts, text.values, options, packed),)
