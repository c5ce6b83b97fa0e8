"""Computes log-probs of given completions: the noisy steps of an image, and the tokens of a text.

All steps of an image are read in one pass, each at its own time and with the latents that the
sampler had there.
"""

from __future__ import annotations

import dataclasses

import jax

from corl_jax.algorithms.flow.alignment import measure_alignment
from corl_jax.algorithms.flow.trajectory import Velocity, guide_velocity
from corl_jax.policies.causal_answers import score_text
from corl_jax.policies.denoising import add_drawn_noise, score_given, score_latents
from corl_jax.policies.family import PIXELS, LatentScores, LogprobOptions, Scores
from corl_jax.policies.janus_flow import network
from corl_jax.policies.janus_flow.network import JanusFlow, JanusFlowConfig, Prefix
from corl_jax.policies.packing import PACKED
from corl_jax.types import EncodedPrompts, Params, Segment


def make_velocity(model: JanusFlow, prompts: EncodedPrompts, options: LogprobOptions) -> Velocity:
    """Returns the velocity of images behind prompts, with the guidance of the sampler.

    Gradients flow through both of its branches.
    """

    prefix = model.make_prefix(prompts, options.special)

    def compute(latents: jax.Array, times: jax.Array) -> jax.Array:
        conditional = model.velocity(
            latents, times, prefix, remat=options.remat, attention=options.attention
        )
        return add_guidance(model, conditional, latents, times, prefix, options)

    return compute


def add_guidance(
    model: JanusFlow, conditional: jax.Array, latents: jax.Array, times: jax.Array, prefix: Prefix,
    options: LogprobOptions,
) -> jax.Array:  # fmt: skip
    """Returns the velocities [N, h, w, C] behind a prefix with the guidance of the sampler."""
    if options.cfg_scale == 1.0:
        return conditional
    blank = model.make_blank_prefix(prefix.first, options.special)
    other = model.velocity(latents, times, blank, remat=options.remat, attention=options.attention)
    return guide_velocity(conditional, other, options.cfg_scale)


def score_steps(
    sizes: JanusFlowConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[Scores, ...]:  # fmt: skip
    """Scores the noisy steps of images, or given images; see `policies.denoising`."""
    (latents,) = segments
    model = network.bind(sizes, params)
    if options.is_given:
        # Each branch learns by itself: blanked prompts train the one without a prompt.
        plain = dataclasses.replace(options, cfg_scale=1.0)
        if options.aligned:
            return (score_aligned(model, prompts, latents, plain, sizes.aligned_layer),)
        return (score_given(make_velocity(model, prompts, plain), latents),)
    return (score_latents(make_velocity(model, prompts, options), latents, options.denoising),)


def score_aligned(
    model: JanusFlow, prompts: EncodedPrompts, images: Segment, options: LogprobOptions, layer: int
) -> LatentScores:
    """Scores given images, and how their states of a layer agree with the image encoder's features.

    Source: JanusFlow (arXiv 2411.07975) eq. 6.
    """
    latents, times, _ = add_drawn_noise(images)
    velocities, states = model.project_images(
        latents, times, model.make_prefix(prompts, options.special), layer,
        remat=options.remat, attention=options.attention,
    )  # fmt: skip
    # They are the velocities of these inputs, read above together with the states.
    scores, _, velocities = score_given(lambda *_: velocities, images)
    features = model.vision_model(images.replay[PIXELS])
    return scores, None, velocities, measure_alignment(states, features)[:, None]


def score_answers(
    sizes: JanusFlowConfig, params: Params, prompts: EncodedPrompts, segments: tuple[Segment, ...],
    options: LogprobOptions,
) -> tuple[Scores, ...]:  # fmt: skip
    """Scores the text of a turn; see `causal_answers.score_text`."""
    (text,) = segments
    model, packed = network.bind(sizes, params), text.replay.get(PACKED)
    return (score_text(model, prompts, text.values, options, packed),)
