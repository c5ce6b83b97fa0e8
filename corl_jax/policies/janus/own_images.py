"""Samples and scores two turns: an image, and the answer to a question about that image.

The second turn reads the image as any other one: codes become pixels of 8 bits, in the size and
with the normalisation of the processor, and go through the vision tower. Everything happens on the
devices, and each completion of a prompt has an image of its own. Neither answer nor question knows
the prompt. The 8 bits stop gradients, so an answer teaches the language model, not the image. With
`LogprobOptions.straight_through` gradients pass; see `soft_images`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.devices.mesh import constrain
from corl_jax.models import attention as attentions
from corl_jax.models.pillow_resize import resize_levels
from corl_jax.policies.causal_answers import score_text
from corl_jax.policies.chunked_logprobs import repeat_rows
from corl_jax.policies.completions import check_group_size
from corl_jax.policies.family import NOISE_KEYS, LogprobOptions, SamplingOptions
from corl_jax.policies.janus import images, network
from corl_jax.policies.janus.image_settings import ImageSettings
from corl_jax.policies.janus.logprobs import compute_code_states, score_code_states
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.sampling import (
    choose_kernel,
    image_program,
    text_program,
)
from corl_jax.policies.janus.soft_images import make_soft_pixels
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.soft_choices import choose_vectors
from corl_jax.tasks import CODES, TEXT
from corl_jax.types import EncodedPrompts, Params, Segment

ANSWER_KEYS = 2**31 - 1
"""Folded into the keys that draw the answers; the images keep the keys of image generation."""


def read_own_images(
    config: JanusConfig, params: Params, codes: jax.Array, settings: ImageSettings
) -> jax.Array:
    """Returns pixel values [N, S, S, 3] float32 of codes [N, T], as a processor makes them."""
    drawn = resize_levels(images.decode_images(config, params, codes), settings.size)
    return images.normalise_pixels(settings, drawn)


def make_questions(prompts: EncodedPrompts, pixels: jax.Array) -> EncodedPrompts:
    """Returns the question of each completion [N, P] with the pixels [N, S, S, 3] of its image.

    `prompts` are those of the second turn, B rows.
    """
    group_size = len(pixels) // len(prompts.input_ids)
    ids, mask = (
        constrain(repeat_rows(jnp.asarray(x), group_size), "batch", "length")
        for x in (prompts.input_ids, prompts.attention_mask)
    )
    return EncodedPrompts(ids, mask, constrain(pixels, "batch", None, None, None))


@functools.partial(
    SamplerProgram,
    static_argnames=(
        "config", "special", "image", "max_new_tokens", "top_k", "top_p", "guided",
        "image_logprobs", "greedy", "greedy_last", "window", "dtype", "attention",
    ),
)  # fmt: skip
def _own_image_program(
    config: JanusConfig,
    params: Params,
    prompts: EncodedPrompts,
    keys: jax.Array,
    cfg_scale: jax.Array,
    temperature: jax.Array,
    *,
    special: SpecialTokens,
    image: ImageSettings,
    max_new_tokens: int,
    top_k: int,
    top_p: float,
    guided: bool,
    image_logprobs: str,
    greedy: bool,
    greedy_last: int,
    window: int,
    dtype: Any,
    attention: attentions.DecodeKernel,
) -> tuple[jax.Array, ...]:
    shared: dict[str, Any] = {
        "special": special, "greedy": greedy, "greedy_last": greedy_last, "dtype": dtype,
        "attention": attention,
    }  # fmt: skip
    assert prompts.next is not None  # the loader encodes both turns
    codes, code_logprobs = image_program.default(
        config, params, dataclasses.replace(prompts, next=None), keys, cfg_scale, temperature,
        guided=guided, image_logprobs=image_logprobs, window=window, **shared,
    )  # fmt: skip
    questions = make_questions(prompts.next, read_own_images(config, params, codes, image))
    # Step t of an image and of its answer would draw the same random numbers.
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, ANSWER_KEYS)
    answer = text_program.default(
        config, params, questions, keys, temperature,
        max_new_tokens=max_new_tokens, top_k=top_k, top_p=top_p, **shared,
    )  # fmt: skip
    return codes, code_logprobs, *answer


def sample_own_answers(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples the codes of an image and the answer to the question about it, for each key.

    The codes are those that `sampling.sample_images` draws with the same keys. Answers are as in
    `sampling.sample_text`. A greedy completion has a greedy image and a greedy answer.
    """
    guided = options.cfg_scale != 1.0
    # A pass reads a window of codes in each row.
    rows = len(keys) * (1 + guided) * options.image_window
    program = _own_image_program.choose_build(rows, params, prompts, keys)
    codes, code_logprobs, answer, mask, logprobs = program(
        sizes, params, prompts, keys, jnp.float32(options.cfg_scale),
        jnp.float32(options.temperature), special=options.special, image=options.image,
        max_new_tokens=options.max_new_tokens, top_k=options.top_k, top_p=options.top_p,
        guided=guided, image_logprobs=options.image_logprobs, greedy=options.greedy,
        greedy_last=check_group_size(prompts, keys) if options.greedy_last else 0,
        window=options.image_window, dtype=options.dtype,
        attention=choose_kernel(sizes, options.attention, options.dtype),
    )  # fmt: skip
    return (
        Segment(CODES, codes, jnp.ones(codes.shape, bool), code_logprobs),
        Segment(TEXT, answer, mask, logprobs),
    )


def score_own_answers(
    sizes: JanusConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[tuple[jax.Array, jax.Array], ...]:  # fmt: skip
    """Computes (log-probs, entropies) of codes [N, K] and of answers [N, T]."""
    codes, text = segments
    assert prompts.next is not None  # the loader encodes both turns
    model = network.bind(sizes, params)
    conditional, unconditional = compute_code_states(model, prompts, codes.values, options)
    if options.straight_through is None:
        pixels = read_own_images(sizes, params, codes.values, options.image)
    else:
        keys = jax.random.wrap_key_data(codes.replay[NOISE_KEYS])
        vectors, chosen = choose_vectors(
            model.image_logits, model.vqmodel.codebook(), conditional, codes.values, keys, options
        )
        hard = read_own_images(sizes, params, chosen, options.image)
        pixels = make_soft_pixels(model, vectors, hard, options.image)
    questions = make_questions(prompts.next, pixels)
    return (
        score_code_states(model, conditional, unconditional, codes.values, options),
        score_text(model, questions, text.values, options),
    )
