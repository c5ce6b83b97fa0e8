"""Computes log-probs of given completions under the policy.

Codes were drawn in any order, so their joint probability is not a product over places. What is
scored instead is chosen by `LogprobOptions.unmasking`; see `hiding`. Answers are scored by one pass
over the question, whose image sees itself in both directions, and the causal answers behind it.
"""

from __future__ import annotations

import functools

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
    FRONT,
    IMAGE_ORDERS,
    compute_image_logits,
    embed_features,
    fill_codes,
    frame_codes,
    move_padding_last,
    prepare_texts,
    split_image_states,
)
from corl_jax.types import EncodedPrompts, Params, Segment


def image_logprobs(
    model: ShowO, prompts: EncodedPrompts, segment: Segment, options: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    """Computes (log-probs, entropies) [N, M] of image codes given B prompts; 0 at other places.

    With `options.released` also those of soi and eoi, [N, M + 2].
    """
    states, scored = compute_code_states(model, prompts, segment, options)
    return score_code_states(model, states, scored, segment.values, options)


def compute_code_states(
    model: ShowO, prompts: EncodedPrompts, segment: Segment, options: LogprobOptions
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Computes the states [N, M, D] that score codes, and which codes they score, [N, M] bool.

    The states are those of `reading.split_image_states`, of the pass that scores a code.
    """
    known, scored = list_passes(segment, options.unmasking)
    if len(known) == 1:
        states = _read_pass(model, prompts, segment.values, known[0], options)
        framed = jnp.pad(scored[0], ((0, 0), (1, 1)), constant_values=True)
        return states, framed if options.released else scored[0]

    # Without checkpoint the backward pass would keep the activations of every pass.
    @jax.checkpoint
    def read(known: jax.Array) -> tuple[jax.Array, ...]:
        return _read_pass(model, prompts, segment.values, known, options)

    def add(states: tuple, of_pass: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        known, scored = of_pass
        # A code is scored in one pass alone.
        select = functools.partial(jnp.where, scored[..., None])
        return jax.tree.map(select, read(known), states), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(read, known[0]))
    return lax.scan(add, zeros, (known, scored))[0], scored.any(axis=0)


def _read_pass(
    model: ShowO, prompts: EncodedPrompts, codes: jax.Array, known: jax.Array,
    options: LogprobOptions,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Computes the states of all codes while known ones [N, M] are read."""
    special = options.special
    rows = Rows(len(codes) // len(prompts.input_ids), options.image_logprobs == "guided")
    ids, lengths = prepare_texts(prompts, rows, special)
    shown = jnp.where(known, codes, model.config.num_codes)
    images = rows.repeat_samples(model.embed_text(frame_codes(shown, special)))
    _, hidden = model.language_model.read_parts(
        model.embed_text(ids), lengths, images, IMAGE_ORDERS,
        remat=options.remat, attention=options.attention,
    )  # fmt: skip
    return split_image_states(hidden, rows, framed=options.released)


def score_code_states(
    model: ShowO, states: tuple[jax.Array, ...], scored: jax.Array, codes: jax.Array,
    options: LogprobOptions,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes (log-probs, entropies) [N, M] of codes from the results of `compute_code_states`."""
    image_logits = model.take_image_head()

    def logits_of(states: tuple[jax.Array, ...]) -> jax.Array:
        if options.is_given:
            return model.text_logits(states[0])
        return compute_image_logits(image_logits, states, options.cfg_scale)[1]

    ids = frame_codes(codes, options.special)
    target_ids = ids if options.released else ids[:, 1:-1]
    targets = target_ids if options.is_given else codes
    scores = chunked_logprobs(logits_of, states, targets, options.temperature, options.chunk)
    logprobs, entropies = (jnp.where(scored, x, 0.0) for x in scores)
    return logprobs, entropies


def text_logprobs(
    model: ShowO, prompts: EncodedPrompts, tokens: jax.Array, options: LogprobOptions,
    vectors: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Computes (log-probs, entropies) [N, T] of answers `tokens` [N, T] given B prompts.

    `vectors` [B, M, D] are read in the place of the embeddings of the images' codes. With
    `options.released` also those of the Q places of the questions, [N, Q + T]. A prompt of one
    token is the start of a text without an image.
    """
    if prompts.input_ids.shape[1] == 1:
        return _score_plain_text(model, prompts, tokens, options)
    if model.config.clip is not None:
        return _score_behind_features(model, prompts, tokens, options)
    ids, lengths = move_padding_last(fill_codes(model, prompts, options.special), options.special)
    group_size, count = len(tokens) // len(ids), tokens.shape[1]
    image = model.config.num_image_tokens + FRONT  # equally many in all rows
    questions = model.embed_text(ids)
    if vectors is not None:  # between mmu, soi and eoi
        questions = questions.at[:, 2 : image - 1].set(vectors.astype(questions.dtype))
    # A question is read once for all of its answers, whose own last tokens are not read.
    before, hidden = model.language_model.read_parts(
        questions, lengths, model.embed_text(tokens[:, : max(count - 1, 1)]), ("causal", "causal"),
        front=image, remat=options.remat, attention=options.attention,
    )  # fmt: skip
    # The state of the question's last token scores the first token of the answer.
    last = jnp.take_along_axis(before, (lengths - 1)[:, None, None], axis=1)
    states = [repeat_rows(last, group_size), hidden[:, : count - 1]]
    if options.released:
        # That of eoi scores the first token of the question.
        states = [repeat_rows(before[:, image - 1 : -1], group_size), *states]
        tokens = jnp.concatenate([repeat_rows(ids[:, image:], group_size), tokens], axis=1)
    states = jnp.concatenate(states, axis=1)
    return chunked_logprobs(model.text_logits, states, tokens, options.temperature, options.chunk)


def _score_behind_features(
    model: ShowO, prompts: EncodedPrompts, tokens: jax.Array, options: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    """Computes (log-probs, entropies) [N, T] of answers behind questions about CLIP's features."""
    ids, lengths = move_padding_last(jnp.asarray(prompts.input_ids), options.special)
    embeds = embed_features(model, ids, prompts.pixel_values, options.special)
    before, behind = model.language_model.read_parts(
        embeds, lengths, model.embed_text(tokens), ("causal", "causal"),
        is_seen=ids == options.special.mask, remat=options.remat, attention=options.attention,
    )  # fmt: skip
    # The state of the question's last token scores the first token of the answer.
    last = jnp.take_along_axis(before, (lengths - 1)[:, None, None], axis=1)
    last = repeat_rows(last, len(tokens) // len(ids))
    states = jnp.concatenate([last, behind[:, :-1]], axis=1)
    return chunked_logprobs(model.text_logits, states, tokens, options.temperature, options.chunk)


def _score_plain_text(
    model: ShowO, prompts: EncodedPrompts, tokens: jax.Array, options: LogprobOptions
) -> tuple[jax.Array, jax.Array]:
    start = jnp.asarray(prompts.input_ids)
    hidden = model.language_model.read_parts(
        model.embed_text(start), jnp.ones(len(start), jnp.int32), model.embed_text(tokens[:, :-1]),
        ("causal", "causal"), remat=options.remat, attention=options.attention,
    )  # fmt: skip
    # The state of the start scores the first token: start s, tokens [a, b] -> states of [s, a].
    first = repeat_rows(hidden[0], len(tokens) // len(start))
    states = jnp.concatenate([first, hidden[1]], axis=1)
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
