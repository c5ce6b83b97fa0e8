"""Velocities of images as functions of latents and times, with guidance.

The sampler reads each prompt once and keeps its keys and values for all steps. Scoring reads each
prompt once for all its images and steps, in the pass of its gradient. Both have the same guidance:
the scale is an argument, and the branches are combined in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from corl_jax.models.attention import AttentionKernel
from corl_jax.models.layers import Remat
from corl_jax.policies.janus.tokens import SpecialTokens
from corl_jax.policies.janus_flow.network import JanusFlow, Prefix
from corl_jax.types import EncodedPrompts

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
"""(latents [N, h, w, C], times [N], 1 is noise) -> velocities noise - data [N, h, w, C] float32.

N is a multiple of the prompts, and rows of the same prompt are neighbours.
"""


def make_sampler_velocity(
    model: JanusFlow, prompts: EncodedPrompts, special: SpecialTokens, cfg_scale: Any,
    guided: bool, attention: AttentionKernel = "xla",
) -> Velocity:  # fmt: skip
    """Returns the velocity behind the keys and values of the prompts, which are computed here."""

    def make_branch(prefix: Prefix) -> Velocity:
        caches = model.prefill(prefix)
        return lambda latents, times: model.velocity_after(
            latents, times, prefix, caches, attention=attention
        )

    return _guide(model, prompts, special, cfg_scale, guided, make_branch)


def make_scored_velocity(
    model: JanusFlow, prompts: EncodedPrompts, special: SpecialTokens, cfg_scale: Any,
    guided: bool, remat: Remat = "full", attention: AttentionKernel = "xla",
) -> Velocity:  # fmt: skip
    """Returns the same velocity for gradients: each call reads the prompts."""

    def make_branch(prefix: Prefix) -> Velocity:
        return lambda latents, times: model.velocity(
            latents, times, prefix, remat=remat, attention=attention
        )

    return _guide(model, prompts, special, cfg_scale, guided, make_branch)


def _guide(
    model: JanusFlow, prompts: EncodedPrompts, special: SpecialTokens, cfg_scale: Any,
    guided: bool, make_branch: Callable[[Prefix], Velocity],
) -> Velocity:  # fmt: skip
    """Returns w c - (w - 1) u of both branches; without guidance the conditional one alone."""
    conditional = make_branch(model.make_prefix(prompts))
    if not guided:
        return conditional
    blank = make_branch(model.make_blank_prefix(jax.numpy.asarray(prompts.attention_mask), special))
    return lambda latents, times: (
        cfg_scale * conditional(latents, times) - (cfg_scale - 1) * blank(latents, times)
    )
