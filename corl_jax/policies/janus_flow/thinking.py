"""Samples and scores turns that think first: a text, the plan, and then an image by denoising.

The context is the prompt, the plan without its end token, and the tokens of the image, of which the
first is that of the time. It follows the plan's last token directly in positions, so an image
depends on its prompt, its plan and its key, and on no other length. Guidance's other branch is that
of a prompt as long as both: BOS, and hidden tokens that still count.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.models.attention import DecodeKernel
from corl_jax.policies.choices import Choice, completion_mask
from corl_jax.policies.chunked_logprobs import chunked_logprobs, repeat_rows
from corl_jax.policies.completions import (
    check_group_size,
    count_plan_tokens,
    fold_image_keys,
    make_text_draw,
    sample_until_ended,
)
from corl_jax.policies.decoding import Rows, read_prompts
from corl_jax.policies.denoising import draw_latents, score_latents, take_scored_inputs
from corl_jax.policies.family import Denoising, LogprobOptions, SamplingOptions, Scores
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.logprobs import add_guidance
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.policies.janus_flow.sampling import choose_kernel, make_cached_velocity, open_model
from corl_jax.tasks import TEXT
from corl_jax.types import EncodedPrompts, Params, Segment


@functools.partial(
    SamplerProgram,
    static_argnames=(
        "config", "special", "max_new_tokens", "top_k", "top_p", "greedy", "guided", "denoising",
        "dtype", "attention",
    ),
)  # fmt: skip
def think_program(
    config: JanusFlowConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    cfg_scale: jax.Array, temperature: jax.Array, *, special: Any, max_new_tokens: int, top_k: int,
    top_p: float, greedy: bool, guided: bool, denoising: Denoising, dtype: Any,
    attention: DecodeKernel,
) -> tuple[Segment, Segment]:  # fmt: skip
    model, group_size = open_model(config, params, dtype), check_group_size(prompts, keys)
    embeds = model.embed_text(prompts.input_ids)
    decoder, last = read_prompts(model.language_model, embeds, prompts.attention_mask, attention)
    draw = make_text_draw(model, Choice(temperature, greedy, top_k, top_p), keys, special.eos)
    # One token comes from the prefill.
    hidden, steps = Rows(group_size).fan_out(last), max_new_tokens - 1
    state = sample_until_ended(model, decoder, draw, hidden, steps, special.eos)
    plan, logprobs = (x[:, :max_new_tokens] for x in (state.tokens, state.logprobs))
    mask = completion_mask(plan, state.step, special.eos)
    # The plans are read once more, in one pass: so the image sees what its scoring will see, and
    # not what the kernels of single tokens have rounded. An image takes some thousands of tokens.
    lengths = count_plan_tokens(plan, special.eos)
    velocity = make_cached_velocity(
        model, model.make_plan_prefix(prompts, plan, lengths, special), special,
        cfg_scale if guided else None, attention,
    )  # fmt: skip
    image = draw_latents(
        velocity, fold_image_keys(keys), group_size, config.latent_shape, denoising
    )
    return Segment(TEXT, plan, mask, logprobs), image


def sample_thinking(
    sizes: JanusFlowConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples a plan and its image for each key; see `denoising.draw_latents`.

    A plan ends with EOS, or is cut after `max_new_tokens`. Tokens after its end are EOS and masked
    out. Guidance does not change plans; temperature, `top_k`, `top_p` and `greedy` are of plans
    alone.
    """
    guided = options.cfg_scale != 1.0
    program = think_program.choose_build(len(keys) * (1 + guided), params, prompts, keys)
    return program(
        sizes, params, prompts, keys, jnp.float32(options.cfg_scale),
        jnp.float32(options.temperature), special=options.special,
        max_new_tokens=options.max_new_tokens, top_k=options.top_k, top_p=options.top_p,
        greedy=options.greedy, guided=guided, denoising=options.denoising, dtype=options.dtype,
        attention=choose_kernel(sizes, options),
    )  # fmt: skip


def score_thinking(
    sizes: JanusFlowConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[Scores, ...]:  # fmt: skip
    """Scores the tokens of plans and the noisy steps of their images, in one pass.

    Each prompt is read once for its completions, and each plan once for all steps of its image.
    With guidance a second pass reads the images without them.
    """
    text, latents = segments
    model, special = network.bind(sizes, params), options.special
    lengths = count_plan_tokens(text.values, special.eos)
    prefix = model.make_plan_prefix(prompts, text.values, lengths, special)
    inputs = take_scored_inputs(latents, options.denoising)
    of_prompts, of_plans, velocities = model.read_images(
        *inputs, prefix, remat=options.remat, attention=options.attention
    )
    velocities = add_guidance(model, velocities, *inputs, prefix, options)
    # Tokens a, b after prompt p. Read: p, a, b; the states after p and a score a and b.
    last = repeat_rows(of_prompts[:, -1:], len(text.values) // len(of_prompts))
    states = jnp.concatenate([last, of_plans[:, : text.values.shape[1] - 1]], axis=1)
    return (
        chunked_logprobs(
            model.text_logits, states, text.values, options.temperature, options.chunk
        ),
        # They are the velocities of these inputs, read above together with the plans.
        score_latents(lambda *_: velocities, latents, options.denoising),
    )
