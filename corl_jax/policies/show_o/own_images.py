"""Samples and scores two turns: an image, and the answer to a question about that image.

The question reads the codes that were drawn. No pixel is made. With
`LogprobOptions.straight_through` the gradient of an answer flows into the hidden codes of its
image; see `policies.straight_through`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.devices.mesh import constrain
from corl_jax.policies.chunked_logprobs import repeat_rows
from corl_jax.policies.family import NOISE_KEYS, LogprobOptions, SamplingOptions
from corl_jax.policies.show_o import network
from corl_jax.policies.show_o.hiding import choose_hidden
from corl_jax.policies.show_o.logprobs import (
    compute_code_states,
    image_logprobs,
    score_code_states,
    text_logprobs,
)
from corl_jax.policies.show_o.network import ShowO, ShowOConfig
from corl_jax.policies.show_o.reading import place_codes
from corl_jax.policies.show_o.sampling import (
    Answering,
    Drawing,
    image_program,
    make_answering,
    make_code_segment,
    make_drawing,
    text_program,
)
from corl_jax.policies.show_o.tokens import SpecialTokens
from corl_jax.policies.straight_through import choose_vectors
from corl_jax.tasks import TEXT
from corl_jax.types import EncodedPrompts, Params, Segment

ANSWER_KEYS = 2**31 - 2
"""Folded into the keys that draw the answers; the images keep the keys of image generation."""


def make_questions(
    prompts: EncodedPrompts, codes: jax.Array, special: SpecialTokens
) -> EncodedPrompts:
    """Returns the question of each completion [N, P] with the codes [N, M] of its image.

    `prompts` are those of the second turn, B rows.
    """
    group_size = len(codes) // len(prompts.input_ids)
    ids, mask = (
        constrain(repeat_rows(jnp.asarray(x), group_size), "batch", "length")
        for x in (prompts.input_ids, prompts.attention_mask)
    )
    return EncodedPrompts(place_codes(ids, codes, special), mask)


def _run_own_image_program(
    config: ShowOConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    cfg_scale: jax.Array, temperature: jax.Array, *, drawing: Drawing, answering: Answering,
) -> tuple[Any, ...]:  # fmt: skip
    assert prompts.next is not None  # the loader encodes both turns
    drawn, logprobs, replay = image_program.default(
        config, params, dataclasses.replace(prompts, next=None), keys, cfg_scale, temperature,
        options=drawing,
    )  # fmt: skip
    questions = make_questions(prompts.next, drawn.codes, drawing.special)
    # Step t of an image and of its answer would draw the same random numbers.
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, ANSWER_KEYS)
    answer = text_program.default(config, params, questions, keys, temperature, options=answering)
    return (drawn.codes, logprobs, replay), answer


_own_image_program = SamplerProgram(
    _run_own_image_program, static_argnames=("config", "drawing", "answering")
)


def sample_own_answers(
    sizes: ShowOConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples the codes of an image and the answer to the question about it, for each key.

    The codes are those that `sampling.sample_codes` draws with the same keys.
    """
    drawing = make_drawing(sizes, options)
    rows = len(keys) * (1 + drawing.guided)
    program = _own_image_program.choose_build(rows, params, prompts, keys)
    image, (tokens, mask, logprobs) = program(
        sizes, params, prompts, keys, jnp.float32(options.cfg_scale),
        jnp.float32(options.temperature), drawing=drawing,
        answering=make_answering(sizes, options),
    )  # fmt: skip
    return make_code_segment(*image), Segment(TEXT, tokens, mask, logprobs)


def score_own_answers(
    sizes: ShowOConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
    """Computes (log-probs, entropies) of codes [N, M] and of answers [N, T]."""
    codes, text = segments
    assert prompts.next is not None  # the loader encodes both turns
    model = network.bind(sizes, params)
    if options.straight_through is None:
        questions = make_questions(prompts.next, codes.values, options.special)
        return (
            image_logprobs(model, prompts, codes, options),
            text_logprobs(model, questions, text.values, options),
        )
    # One pass hides some codes. It scores them, and only its logits of hidden codes were learned.
    hidden = choose_hidden(codes)
    states = compute_code_states(model, prompts, codes.values, ~hidden, options)
    vectors, chosen = choose_code_vectors(model, states, codes, hidden, options)
    questions = make_questions(prompts.next, chosen, options.special)
    return (
        score_code_states(model, states, codes.values, hidden, options),
        text_logprobs(model, questions, text.values, options, vectors),
    )


def choose_code_vectors(
    model: ShowO, states: tuple[jax.Array, ...], codes: Segment, hidden: jax.Array,
    options: LogprobOptions,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns embedded codes [N, M, D] with a gradient at hidden places, and these codes [N, M]."""
    first = options.special.first_code
    book = model.language_model.embed_tokens.embedding[...][first : first + model.config.num_codes]
    keys = jax.random.wrap_key_data(codes.replay[NOISE_KEYS])
    soft, chosen = choose_vectors(model.image_logits, book, states[0], codes.values, keys, options)
    chosen = jnp.where(hidden, chosen, codes.values)
    return jnp.where(hidden[..., None], soft, book[codes.values]), chosen
