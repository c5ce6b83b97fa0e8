"""Computes log-probs of given completions under the policy.

Codes were drawn in any order, so their joint probability is not a product over places. What is
scored instead is chosen by `LogprobOptions.unmasking`; see `hiding`. Answers are scored by one pass
over the image, which reads itself in both directions, and the causal text behind it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.policies.chunked_logprobs import chunked_logprobs, repeat_rows
from corl_jax.policies.decoding import Rows
from corl_jax.policies.family import LogprobOptions
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.hiding import list_passes
from corl_jax.policies.show_o.network import ShowO, ShowOConfig
from corl_jax.policies.show_o.reading import (
    IMAGE_ORDERS,
    compute_image_logits,
    embed_images,
    fill_codes,
    move_padding_last,
    prepare_texts,
    split_image_states,
)
from corl_jax.types import EncodedPrompts, Params, Segment

QUESTION_ORDERS = "full", "causal"
"""An image sees all of itself, and the text behind it is causal; see `models.phi.Order`."""


def image_logprobs(
    model: ShowO, prompts: EncodedPrompts, segment: Segment, options: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    """Computes (log-probs, entropies) [N, M] of image codes given B prompts; 0 at other places."""
    passes = list_passes(segment, options.unmasking)
    if len(passes[0]) == 1:
        known, scored = passes
        return score_pass(model, prompts, segment.values, known[0], scored[0], options)

    # Without checkpoint the backward pass would keep the states of every pass.
    @jax.checkpoint
    def add(total: tuple, of_pass: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        scores = score_pass(model, prompts, segment.values, *of_pass, options)
        # A code is scored in one pass, so the sum takes each as it is.
        return jax.tree.map(jnp.add, total, scores), None

    zeros = jnp.zeros(segment.values.shape, jnp.float32)
    return lax.scan(add, (zeros, zeros), passes)[0]


def score_pass(
    model: ShowO, prompts: EncodedPrompts, codes: jax.Array, known: jax.Array, scored: jax.Array,
    options: LogprobOptions,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes (log-probs, entropies) [N, M] of scored codes while known ones are read."""
    states = compute_code_states(model, prompts, codes, known, options)
    return score_code_states(model, states, codes, scored, options)


def compute_code_states(
    model: ShowO, prompts: EncodedPrompts, codes: jax.Array, known: jax.Array,
    options: LogprobOptions,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Computes the states [N, M, D] of all codes while known ones are read.

    There are two of them, with and without the prompt, if the log-probs are those of guidance.
    """
    special = options.special
    rows = Rows(len(codes) // len(prompts.input_ids), options.image_logprobs == "guided")
    ids, lengths = prepare_texts(prompts, rows, special)
    shown = jnp.where(known, codes, model.config.num_codes)
    _, hidden = model.language_model.read_parts(
        model.embed_text(ids), lengths, rows.repeat_samples(embed_images(model, shown, special)),
        IMAGE_ORDERS, remat=options.remat, attention=options.attention,
    )  # fmt: skip

    return split_image_states(hidden, rows)


def score_code_states(
    model: ShowO, states: tuple[jax.Array, ...], codes: jax.Array, scored: jax.Array,
    options: LogprobOptions,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes (log-probs, entropies) [N, M] of scored codes from states; 0 at other places."""

    def logits_of(states: tuple[jax.Array, ...]) -> jax.Array:
        return compute_image_logits(model, states, options.cfg_scale)[1]

    scores = chunked_logprobs(logits_of, states, codes, options.temperature, options.chunk)
    logprobs, entropies = (jnp.where(scored, x, 0.0) for x in scores)
    return logprobs, entropies


def text_logprobs(
    model: ShowO, prompts: EncodedPrompts, tokens: jax.Array, options: LogprobOptions,
    vectors: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes (log-probs, entropies) [N, T] of answers `tokens` [N, T] given B prompts.

    `vectors` [B, M, D] are read in the place of the embedded codes.
    """
    ids, lengths = move_padding_last(fill_codes(model, prompts, options.special), options.special)
    group_size, count = len(tokens) // len(ids), tokens.shape[1]
    # mmu, soi, the codes and eoi: equally many in all rows
    image = model.config.num_image_tokens + 3
    # Each completion reads the question again, which is short beside the image. The answer follows
    # its last real token, and its own last token is not read:
    # question [a, b, x], answer [c, d, e] -> places [0, 1, 3, 4, ..] of [a, b, x, c, d]
    source = jnp.concatenate([repeat_rows(ids[:, image:], group_size), tokens[:, :-1]], axis=1)
    questions = repeat_rows(lengths - image, group_size)[:, None]
    places = jnp.arange(source.shape[1])
    places = jnp.where(places < questions, places, places + ids.shape[1] - image - questions)
    text = jnp.take_along_axis(source, places, axis=1, mode="clip")
    front = model.embed_text(ids[:, :image])
    if vectors is not None:  # behind mmu and soi
        front = front.at[:, 2:-1].set(vectors.astype(front.dtype))
    _, hidden = model.language_model.read_parts(
        front, jnp.full(len(ids), image), model.embed_text(text),
        QUESTION_ORDERS, remat=options.remat, attention=options.attention,
    )  # fmt: skip
    # The state of the question's last token scores the first token of the answer.
    before = (questions - 1 + jnp.arange(count))[..., None]
    states = jnp.take_along_axis(hidden, before, axis=1)
    return chunked_logprobs(model.text_logits, states, tokens, options.temperature, options.chunk)


def score_codes(
    sizes: ShowOConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
    """Scores the image codes of a turn; see `image_logprobs`."""
    (codes,) = segments
    return (image_logprobs(network.bind(sizes, params), prompts, codes, options),)


def score_answers(
    sizes: ShowOConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
    """Scores the text of a turn; see `text_logprobs`."""
    (text,) = segments
    return (text_logprobs(network.bind(sizes, params), prompts, text.values, options),)
