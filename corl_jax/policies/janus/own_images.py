"""Samples and scores two turns: an image, and the answer to a question about that image.

The second turn reads the image as any other one: codes become pixels of 8 bits, in the size and
with the normalisation of the processor, and go through the vision tower. Everything happens on the
devices, and each completion of a prompt has an image of its own. Neither answer nor question knows
the prompt. The 8 bits stop gradients, so an answer teaches the language model, not the image.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.devices.mesh import constrain
from corl_jax.models import attention as attentions
from corl_jax.policies.chunked_logprobs import repeat_rows
from corl_jax.policies.family import LogprobOptions, SamplingOptions
from corl_jax.policies.janus import images, network
from corl_jax.policies.janus.image_settings import ImageSettings
from corl_jax.policies.janus.logprobs import image_logprobs, text_logprobs
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.policies.janus.sampling import (
    check_group_size,
    choose_kernel,
    image_program,
    text_program,
)
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.tasks import CODES, TEXT
from corl_jax.types import EncodedPrompts, Params, Segment

ANSWER_KEYS = 2**31 - 1
"""Folded into the keys that draw the answers; the images keep the keys of image generation."""

# Pillow's fixed point for 8 bits: 32 bits less 8 of a level and 2 of a sum of coefficients.
RESIZE_BITS = 32 - 8 - 2
CUBIC = -0.5
"""The free coefficient of Pillow's bicubic kernel."""


def read_own_images(
    config: JanusConfig, params: Params, codes: jax.Array, settings: ImageSettings
) -> jax.Array:
    """Returns pixel values [N, S, S, 3] float32 of codes [N, T], as a processor makes them."""
    drawn = resize_levels(images.decode_images(config, params, codes), settings.size)
    return images.normalise_pixels(settings, drawn)


def resize_levels(levels: jax.Array, side: int) -> jax.Array:
    """Resizes squares uint8 [N, S, S, 3] to `side` pixels, to the bit as Pillow's bicubic filter.

    Source: Pillow's `Resample.c`: first along rows, then along columns, each rounded to 8 bits.
    """
    if levels.shape[1] == side:
        return levels
    weights = make_resize_weights(levels.shape[1], side) * (1 << RESIZE_BITS)
    table = jnp.asarray(np.trunc(weights + np.copysign(0.5, weights)), jnp.int32)

    def apply(equation: str, x: jax.Array) -> jax.Array:
        total = jnp.einsum(equation, table, x.astype(jnp.int32)) + (1 << (RESIZE_BITS - 1))
        return jnp.clip(total >> RESIZE_BITS, 0, 255)

    resized = apply("oy,nyxc->noxc", apply("ox,nyxc->nyoc", levels))
    return resized.astype(jnp.uint8)


def make_resize_weights(size: int, side: int) -> np.ndarray:
    """Returns Pillow's bicubic weights [side, size] float64 of the pixels of each new pixel."""
    # The kernel widens where an image shrinks: 8 -> 4 pixels: each new pixel is made of about 8.
    scale = max(size / side, 1.0)
    centers = (np.arange(side)[:, None] + 0.5) * size / side
    first = np.trunc(np.maximum(centers - 2 * scale + 0.5, 0))
    last = np.trunc(np.minimum(centers + 2 * scale + 0.5, size))
    places = np.arange(size)[None]
    x = np.abs(places - centers + 0.5) / scale
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights = np.where((places >= first) & (places < last), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def make_questions(
    config: JanusConfig, params: Params, prompts: EncodedPrompts, codes: jax.Array, settings: Any
) -> EncodedPrompts:
    """Returns the question of each completion [N, P] with the pixels of its own image.

    `prompts` are those of the second turn, B rows.
    """
    group_size = len(codes) // len(prompts.input_ids)
    ids, mask = (
        constrain(repeat_rows(jnp.asarray(x), group_size), "batch", "length")
        for x in (prompts.input_ids, prompts.attention_mask)
    )
    pixels = read_own_images(config, params, codes, settings)
    return EncodedPrompts(ids, mask, constrain(pixels, "batch", None, None, None))


@functools.partial(
    SamplerProgram,
    static_argnames=(
        "config", "special", "image", "max_new_tokens", "top_k", "top_p", "guided",
        "image_logprobs", "greedy", "greedy_last", "dtype", "attention",
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
        guided=guided, image_logprobs=image_logprobs, **shared,
    )  # fmt: skip
    questions = make_questions(config, params, prompts.next, codes, image)
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
    program = _own_image_program.choose_build(len(keys) * (1 + guided), params, prompts, keys)
    codes, code_logprobs, answer, mask, logprobs = program(
        sizes, params, prompts, keys, jnp.float32(options.cfg_scale),
        jnp.float32(options.temperature), special=options.special, image=options.image,
        max_new_tokens=options.max_new_tokens, top_k=options.top_k, top_p=options.top_p,
        guided=guided, image_logprobs=options.image_logprobs, greedy=options.greedy,
        greedy_last=check_group_size(prompts, keys) if options.greedy_last else 0,
        dtype=options.dtype, attention=choose_kernel(sizes, options.attention, options.dtype),
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
    questions = make_questions(sizes, params, prompts.next, codes.values, options.image)
    return (
        image_logprobs(model, prompts, codes.values, options),
        text_logprobs(model, questions, text.values, options),
    )
