"""Samples images by denoising, and answers token by token.

An image's tokens are read anew in each step. The prompt in front of them is read once: none of its
tokens sees the image, so its keys and values are the same at all times.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.algorithms.flow.trajectory import Velocity, guide_velocity
from corl_jax.devices.compiling import SamplerProgram
from corl_jax.devices.mesh import gather_over_fsdp
from corl_jax.models import attention as attentions
from corl_jax.models.attention import AttentionKernel
from corl_jax.policies.causal_answers import make_text_program
from corl_jax.policies.completions import check_group_size
from corl_jax.policies.denoising import draw_latents
from corl_jax.policies.family import Denoising, SamplingOptions
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.layout import RULES
from corl_jax.policies.janus_flow.network import JanusFlow, JanusFlowConfig, Prefix
from corl_jax.tasks import TEXT
from corl_jax.types import EncodedPrompts, Params, Segment


def open_model(config: JanusFlowConfig, params: Params, dtype: Any) -> JanusFlow:
    """Returns the network of a sampling program, which computes in `dtype`."""
    return network.bind(config, gather_over_fsdp(network.cast(params, dtype), RULES))


def make_cached_velocity(
    model: JanusFlow, prefix: Prefix, special: Any, cfg_scale: jax.Array | None,
    attention: AttentionKernel,
) -> Velocity:  # fmt: skip
    """Returns the velocity of images behind prompts or plans, which are read now, once.

    Without a `cfg_scale` there is no guidance.
    """

    def read(prefix: Prefix) -> Velocity:
        caches = model.prefill(prefix)
        return lambda latents, times: model.velocity_after(
            latents, times, prefix, caches, attention=attention
        )

    conditional = read(prefix)
    if cfg_scale is None:
        return conditional
    # A pass for each branch: the hundreds of tokens of each image fill a device already.
    other = read(model.make_blank_prefix(prefix.first, special))
    return lambda latents, times: guide_velocity(
        conditional(latents, times), other(latents, times), cfg_scale
    )


@functools.partial(
    SamplerProgram,
    static_argnames=("config", "special", "guided", "denoising", "dtype", "attention"),
)
def image_program(
    config: JanusFlowConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    cfg_scale: jax.Array, *, special: Any, guided: bool, denoising: Denoising, dtype: Any,
    attention: AttentionKernel,
) -> Segment:  # fmt: skip
    model = open_model(config, params, dtype)
    prefix = model.make_prefix(prompts, special)
    velocity = make_cached_velocity(
        model, prefix, special, cfg_scale if guided else None, attention
    )
    return draw_latents(
        velocity, keys, check_group_size(prompts, keys), config.latent_shape, denoising
    )


text_program = make_text_program(open_model)


def choose_kernel(sizes: JanusFlowConfig, options: SamplingOptions) -> attentions.DecodeKernel:
    """Returns the attention kernel of sampling."""
    if options.attention != "auto":
        return options.attention
    return attentions.choose_decode_kernel(options.dtype, sizes.llama.head_dim)


def sample_latents(
    sizes: JanusFlowConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples `len(keys) / B` images per prompt; see `denoising.draw_latents`."""
    # The scale is traced, so that another value compiles nothing; whether there is guidance
    # decides the program.
    guided = options.cfg_scale != 1.0
    program = image_program.choose_build(len(keys) * (1 + guided), params, prompts, keys)
    return (
        program(
            sizes, params, prompts, keys, jnp.float32(options.cfg_scale), special=options.special,
            guided=guided, denoising=options.denoising, dtype=options.dtype,
            attention=choose_kernel(sizes, options),
        ),
    )  # fmt: skip


def sample_answers(
    sizes: JanusFlowConfig, params: Params, prompts: EncodedPrompts, keys: jax.Array,
    options: SamplingOptions,
) -> tuple[Segment, ...]:  # fmt: skip
    """Samples `len(keys) / B` answers per question; stops soon after all rows have ended.

    Tokens after the end of a row are EOS and masked out.
    """
    program = text_program.choose_build(len(keys), params, prompts, keys)
    tokens, mask, logprobs = program(
        sizes, params, prompts, keys, jnp.float32(options.temperature), special=options.special,
        max_new_tokens=options.max_new_tokens, top_k=options.top_k, top_p=options.top_p,
        greedy=options.greedy, dtype=options.dtype, attention=choose_kernel(sizes, options),
        greedy_last=check_group_size(prompts, keys) if options.greedy_last else 0,
    )  # fmt: skip
    return (Segment(TEXT, tokens, mask, logprobs),)
