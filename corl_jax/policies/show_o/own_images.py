"""Samples and scores two turns: an image, and the answer to a question about that image.

The question reads the codes that were drawn. No pixel is made. An answer then teaches the language
model, not the image. With `LogprobOptions.straight_through` its gradient also flows through the
embeddings of the codes into the logits that score them; see `soft_choices`.
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
from corl_jax.policies.show_o.logprobs import (
    compute_code_states,
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
from corl_jax.policies.soft_choices import choose_vectors
from corl_jax.tasks import TEXT
from corl_jax.types import EncodedPrompts, Params, Segment

ANSWER_KEYS = 2**31 - 2
"""Folded into the keys that draw the answers; the images keep the keys of image generation."""
RELAXED_KEYS = 2**31 - 2
"""Folded into NOISE_KEYS: the noise of relaxed codes."""


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
    states, scored = compute_code_states(model, prompts, codes, options)
    vectors = None
    if options.straight_through is not None:
        vectors = choose_code_vectors(model, states, scored, codes, options)
    questions = make_questions(prompts.next, codes.values, options.special)
    return (
        score_code_states(model, states, scored, codes.values, options),
        text_logprobs(model, questions, text.values, options, vectors),
    )


def choose_code_vectors(
    model: ShowO, states: tuple[jax.Array, ...], scored: jax.Array, codes: Segment,
    options: LogprobOptions,
) -> jax.Array:  # fmt: skip
    """Returns the vectors [N, M, D] that questions read, relaxed where a code is scored.

    The other codes were in sight of the network, which was never trained to predict such codes:
    they have no relaxed gradient. The relaxed ones are those of the prompt, without guidance.
    """
    keys = jax.random.wrap_key_data(codes.replay[NOISE_KEYS])
    # Apart from the keys that choose the scored places.
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, RELAXED_KEYS)
    book = model.embed_image_tokens(jnp.arange(model.config.num_codes))
    vectors, _ = choose_vectors(
        model.image_logits, book, states[0], codes.values, keys, options, scored
    )
    return constrain(vectors, "batch", "length", None)
