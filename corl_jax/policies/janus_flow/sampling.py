"""Draws latents of images: one prefill per prompt, then all its images follow the flow together.

The sampler is one XLA program per padded shape and number of steps. A sample depends on its key and
its prompt only.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.devices.compiling import SamplerProgram
from corl_jax.devices.mesh import constrain, gather_over_fsdp
from corl_jax.models import attention as attentions
from corl_jax.policies.completions import check_group_size
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.layout import RULES
from corl_jax.policies.janus_flow.network import JanusFlowConfig
from corl_jax.policies.janus_flow.velocities import Velocity, make_sampler_velocity
from corl_jax.types import EncodedPrompts, Params

Attention = Literal["auto", "xla", "cudnn"]
"""The attention kernel of a step; "auto": the fastest for the device and the dtype."""

NUM_STEPS, CFG_SCALE = 30, 2.0
"""Of the released model: Euler steps of equal length, and the scale of guidance."""


def integrate(velocity: Velocity, noise: jax.Array, num_steps: int) -> jax.Array:
    """Follows the flow from noise [N, h, w, C] to latents in Euler steps of equal length."""

    # Times as fractions of integers: 1/30, added up 30 times, is not 1.
    def step(latents: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        time = (num_steps - number).astype(jnp.float32) / num_steps
        slope = velocity(latents, jnp.full(len(latents), time))
        return constrain(latents - slope / num_steps, "batch", None, None, None), None

    return lax.scan(step, noise, jnp.arange(num_steps))[0]


def draw_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws the noise [N, *shape] float32 from which samples with keys [N] start."""
    # Number 0 of each key; a sampler that adds noise at step k draws number k + 1.
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


@functools.partial(
    SamplerProgram,
    static_argnames=("config", "special", "num_steps", "guided", "dtype", "attention"),
)
def latents_program(
    config: JanusFlowConfig,
    params: Params,
    prompts: EncodedPrompts,
    keys: jax.Array,
    cfg_scale: jax.Array,
    *,
    special: SpecialTokens,
    num_steps: int,
    guided: bool,
    dtype: Any,
    attention: attentions.DecodeKernel,
) -> jax.Array:
    check_group_size(prompts, keys)
    model = network.bind(config, gather_over_fsdp(network.cast(params, dtype), RULES))
    velocity = make_sampler_velocity(model, prompts, special, cfg_scale, guided, attention)
    noise = constrain(draw_noise(keys, config.latent_shape), "batch", None, None, None)
    return integrate(velocity, noise, num_steps)


def sample_latents(
    config: JanusFlowConfig,
    params: Params,
    prompts: EncodedPrompts,
    keys: jax.Array,
    *,
    special: SpecialTokens,
    num_steps: int = NUM_STEPS,
    cfg_scale: float = CFG_SCALE,
    dtype: Any = jnp.bfloat16,
    attention: Attention = "auto",
) -> jax.Array:
    """Draws the latents [N, h, w, C] float32 of `len(keys) / B` images per prompt.

    They are scaled as the network knows them; the image tokenizer's own are larger. `cfg_scale` 1
    has no unconditional branch.
    """
    # The scale is traced, so that another value compiles nothing; whether there is guidance decides
    # the program.
    guided = cfg_scale != 1.0
    kernel = (
        attentions.choose_decode_kernel(dtype, config.llama.head_dim)
        if attention == "auto"
        else attention
    )
    program = latents_program.choose_build(len(keys), params, prompts, keys)
    return program(
        config, params, prompts, keys, jnp.float32(cfg_scale), special=special,
        num_steps=num_steps, guided=guided, dtype=dtype, attention=kernel,
    )  # fmt: skip
