"""Draws and scores images that are made by denoising, for every family that does so.

A family gives the velocity of its network; see `algorithms.flow.trajectory`. A segment of such an
image holds its latents from the noise to the image, and its choices are the noisy steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms.flow.schedules import make_sigmas
from corl_jax.algorithms.flow.steps import (
    Transition,
    average_elements,
    compute_guard_log_ratios,
    compute_kl,
    compute_logprobs,
    predict_mean,
    tabulate_transitions,
    take_transitions,
)
from corl_jax.algorithms.flow.trajectory import (
    Velocity,
    draw_noise,
    draw_trajectory,
    integrate_ode,
    take_step_latents,
)
from corl_jax.algorithms.flow.windows import draw_starts, fit_window, list_steps, mark_steps
from corl_jax.policies.family import NOISE_KEYS, Denoising, LatentScores, LogprobOptions
from corl_jax.tasks import LATENTS
from corl_jax.types import DTYPES, Segment

STEPS = "steps"
"""Key of `Segment.replay`: the numbers [N, T] of the scored steps in the schedule."""
MEANS = "means"
"""Key of `Segment.replay`: the means [N, T, ...] that the sampler had at the scored steps."""
WINDOW_KEYS = 2**31 - 1
"""Folded into the keys that draw an image; no schedule has so many steps."""
TIME_NUMBER = 1
"""Number of the noise that decides the time of a given image; its own noise has number 0."""


def draw_latents(
    velocity: Velocity, keys: jax.Array, group_size: int, shape: tuple[int, ...],
    denoising: Denoising,
) -> Segment:  # fmt: skip
    """Draws images with keys [N]: a segment of latents [N, steps + 1, *shape], the image last.

    Without noise in the steps, the segment has the image alone, [N, 1, *shape], and no log-probs.
    """
    sigmas = tabulate_sigmas(denoising)
    sde = denoising.sde
    # float32 in any compute dtype: rounding to bfloat16 would move a log-prob by many clip ranges
    # where a step has little noise.
    firsts = jnp.repeat(keys[::group_size], group_size) if denoising.same_noise else keys
    start = draw_noise(firsts, shape).astype(DTYPES[sde.latent_dtype])
    if denoising.is_greedy:
        images = integrate_ode(velocity, start, sigmas)
        return Segment(LATENTS, images[:, None], jnp.ones((len(keys), len(sigmas) - 1), bool))

    window = fit_window(denoising.window, sigmas, sde)
    # All images of a prompt have noise at the same steps: otherwise they would not compare.
    of_prompts = jax.vmap(lambda key: jax.random.fold_in(key, WINDOW_KEYS))(keys[::group_size])
    starts = draw_starts(of_prompts, window, group_size)
    noisy = mark_steps(starts, window, len(sigmas) - 1)
    drawn = draw_trajectory(
        velocity, start, keys, sigmas, sde, noisy, keep_means=sde.is_guarded
    )  # fmt: skip
    steps = list_steps(starts, window)
    logprobs = jnp.take_along_axis(drawn.logprobs, steps, axis=1)
    replay = {STEPS: steps}
    if sde.is_guarded:
        # The guard's log-ratio stands for the log-prob, and that of the sampler to itself is 0.
        logprobs = jnp.zeros_like(logprobs)
        replay[MEANS] = drawn.means[jnp.arange(len(keys))[:, None], steps]
    return Segment(
        LATENTS, drawn.latents, jnp.ones(steps.shape, bool), logprobs, replay,
        weigh_steps(steps, denoising) if sde.guard == "ratio_per_dt" else None,
    )  # fmt: skip


def score_latents(velocity: Velocity, segment: Segment, denoising: Denoising) -> LatentScores:
    """Computes log-probs [N, T] and velocities [N, T, ...] of the scored steps.

    `velocity` is called once, with N * T rows: those of a sample are neighbours. With a guard the
    log-probs are GRPO-Guard's log-ratios to the sampler, whose differences are those of two
    policies.
    """
    steps = segment.replay[STEPS]
    _, after = take_step_latents(segment.values, steps)
    transitions = take_step_transitions(steps, denoising)
    before, times = take_scored_inputs(segment, denoising)
    # One call for all steps, so that each prompt is read once for all of its images and steps.
    velocities = velocity(before, times)
    mean = predict_mean(before, velocities, transitions)
    shape, dynamics = steps.shape, denoising.sde.dynamics
    if denoising.sde.is_guarded:
        old_mean = segment.replay[MEANS].reshape(mean.shape)
        logprobs = compute_guard_log_ratios(after, mean, old_mean, transitions, dynamics)
    else:
        logprobs = compute_logprobs(after, mean, transitions, dynamics)
    return logprobs.reshape(shape), None, velocities.reshape(*shape, *velocities.shape[1:])


def take_scored_inputs(segment: Segment, denoising: Denoising) -> tuple[jax.Array, jax.Array]:
    """Returns the latents [N * T, ...] and the times [N * T] of the scored steps."""
    steps = segment.replay[STEPS]
    before, _ = take_step_latents(segment.values, steps)
    return before, jnp.asarray(tabulate_sigmas(denoising), jnp.float32)[steps.reshape(-1)]


def score_given(velocity: Velocity, segment: Segment) -> tuple[jax.Array, None, jax.Array]:
    """Scores images of data: minus the squared error of the velocity at one time of each.

    `segment.values` [N, 1, ...] are their latents. Time and noise come from NOISE_KEYS; the time is
    the logistic function of a normal number. Returns minus the mean error [N, 1] and the velocities
    [N, 1, ...], so that the loss of given completions is that of rectified flow.
    Source: JanusFlow (arXiv 2411.07975) eq. 4; Stable Diffusion 3 (arXiv 2403.03206).
    """
    images = segment.values[:, 0].astype(jnp.float32)
    latents, times, noise = add_drawn_noise(segment)
    velocities = velocity(latents, times)
    errors = average_elements((velocities - (noise - images)) ** 2)[:, None]
    return -errors, None, velocities[:, None]


def add_drawn_noise(segment: Segment) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns noisy latents of given images, their times [N] and the noise, all of NOISE_KEYS."""
    images = segment.values[:, 0].astype(jnp.float32)
    keys = jax.random.wrap_key_data(segment.replay[NOISE_KEYS])
    times = jax.nn.sigmoid(draw_noise(keys, (), TIME_NUMBER))
    noise = draw_noise(keys, images.shape[1:])
    shares = times.reshape(-1, *(1,) * (images.ndim - 1))
    return (1 - shares) * images + shares * noise, times, noise


def measure_kl(
    segment: Segment, velocities: jax.Array, reference: jax.Array, options: LogprobOptions
) -> jax.Array:
    """Computes the divergences [N, T] of scored steps from the reference, of `Denoising.kl`.

    `velocities` [N, T, ...] are those of policy and reference.
    """
    steps, denoising = segment.replay[STEPS], options.denoising
    transitions = take_step_transitions(steps, denoising)
    shape = (-1, *velocities.shape[2:])
    velocities, reference = velocities.reshape(shape), reference.reshape(shape)
    return compute_kl(velocities, reference, transitions, denoising.kl).reshape(steps.shape)


def weigh_steps(steps: jax.Array, denoising: Denoising) -> jax.Array:
    """Returns the factors [N, T] of the losses of steps: one over the length of each.

    Source: GRPO-Guard (arXiv 2510.22319), released code.
    """
    return -1 / take_step_transitions(steps, denoising).dt.reshape(steps.shape)


def tabulate_sigmas(denoising: Denoising) -> np.ndarray:
    """Returns the times [steps + 1] of the schedule."""
    return make_sigmas(denoising.schedule, denoising.steps, denoising.shift, denoising.num_tokens)


def take_step_transitions(steps: jax.Array, denoising: Denoising) -> Transition:
    """Returns the numbers [N * T] of steps [N, T], row by row."""
    table = tabulate_transitions(tabulate_sigmas(denoising), denoising.sde)
    return take_transitions(table, steps.reshape(-1))
