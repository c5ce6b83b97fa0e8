"""Draws trajectories from noise to a picture, and reads their steps again.

A network is a function of latents [N, ...] and times [N] that returns velocities [N, ...]; see
`steps` for the convention. Guidance is part of that function, so that sampling and replay have the
same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from corl_jax.algorithms.flow.steps import (
    Sde,
    Transition,
    compute_logprobs,
    predict_mean,
    raise_precision,
    spread_over_elements,
    tabulate_transitions,
)

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
"""(latents [N, ...], times [N]) -> velocities [N, ...]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """All latents of N samples from noise to picture, and the choices of their noisy steps."""

    latents: Any  # [N, T + 1, ...]; the last one is the picture
    logprobs: Any  # [N, T] float32, 0 at steps without noise
    noisy: Any  # [N, T] bool, True at steps with noise
    means: Any = None  # [N, T, ...] float32, if they are kept; GRPO-Guard reads them


def draw_noise(keys: jax.Array, shape: tuple[int, ...], number: Any = 0) -> jax.Array:
    """Returns Gaussian noise [N, *shape] float32 of samples with keys [N].

    A sample's noise depends on its key and the number alone: 0 is the noise that a trajectory
    starts from, and k + 1 that of its step k.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)


def draw_trajectory(
    velocity: Velocity,
    start: jax.Array,
    keys: jax.Array,
    sigmas: Any,
    sde: Sde,
    noisy: jax.Array | None = None,
    *,
    keep_means: bool = False,
) -> Trajectory:
    """Draws a trajectory from each noise `start` [N, ...], with keys [N] and times [T + 1].

    The steps marked in `noisy` [N, T] follow the SDE, all others the ODE; None marks all. A row of
    the marks without a True is the greedy sample of its noise. Latents are stored in the dtype of
    `start`, and log-probs are those of the stored values.
    """
    num_steps = len(sigmas) - 1
    table, quiet = (tabulate_transitions(sigmas, choice) for choice in (sde, Sde("ode")))
    if noisy is None:
        noisy = jnp.ones((len(start), num_steps), bool)
    noisy = noisy & (jnp.asarray(table.std) > 0)

    def take_step(latents: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
        number, time, is_noisy, of_sde, of_ode = inputs
        step = _choose_transitions(is_noisy, of_sde, of_ode)
        mean = predict_mean(latents, velocity(latents, jnp.full(len(latents), time)), step)
        noise = draw_noise(keys, latents.shape[1:], number + 1)
        # Rounded before the log-prob is computed, because the next step reads the rounded value.
        moved = (mean + spread_over_elements(step.std, mean) * noise).astype(latents.dtype)
        # A std of 0 has no log-prob; 1 stands in its place.
        scored = dataclasses.replace(step, std=jnp.where(is_noisy, step.std, 1.0))
        logprobs = compute_logprobs(moved, mean, scored, sde.dynamics)
        kept_mean = mean if keep_means else None
        return moved, (moved, jnp.where(is_noisy, logprobs, 0.0), kept_mean)

    inputs = (jnp.arange(num_steps), jnp.asarray(sigmas)[:-1], noisy.T, table, quiet)
    _, (moved, logprobs, means) = lax.scan(take_step, start, inputs)
    latents = jnp.concatenate([start[None], moved])
    return Trajectory(
        latents=jnp.moveaxis(latents, 0, 1), logprobs=logprobs.T, noisy=noisy,
        means=None if means is None else jnp.moveaxis(means, 0, 1),
    )  # fmt: skip


def integrate_ode(velocity: Velocity, start: jax.Array, sigmas: Any) -> jax.Array:
    """Returns the pictures [N, ...] that the ODE makes of noise `start` [N, ...] without choices.

    They are those of a trajectory without noise, but only the last latents are kept.
    """
    table = tabulate_transitions(sigmas, Sde("ode"))

    def take_step(latents: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, None]:
        time, step = inputs
        mean = predict_mean(latents, velocity(latents, jnp.full(len(latents), time)), step)
        return mean.astype(latents.dtype), None

    return lax.scan(take_step, start, (jnp.asarray(sigmas)[:-1], table))[0]


def take_step_latents(latents: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the latents before and after steps [N, W], each [N * W, ...], of [N, T + 1, ...].

    Row n * W + k belongs to step `steps[n, k]` of sample n.
    """
    rows = jnp.arange(len(latents))[:, None]
    before, after = latents[rows, steps], latents[rows, steps + 1]
    shape = (-1, *latents.shape[2:])
    return before.reshape(shape), after.reshape(shape)


def guide_velocity(conditional: jax.Array, unconditional: jax.Array, scale: Any) -> jax.Array:
    """Returns u + w (c - u), the velocity with guidance w; 1 is no guidance.

    The gradient flows through both velocities.
    Source: classifier-free guidance (arXiv 2207.12598); JanusFlow (arXiv 2411.07975), where it is
    w c - (w - 1) u.
    """
    conditional, unconditional = raise_precision(conditional), raise_precision(unconditional)
    return unconditional + scale * (conditional - unconditional)


def guide_edit(
    conditional: jax.Array,
    reference: jax.Array,
    unconditional: jax.Array,
    text_scale: Any,
    reference_scale: Any,
) -> jax.Array:
    """Returns u + w_r (r - u) + w_t (c - r), the velocity of an edited picture.

    u has no condition, r the picture to edit, and c that picture and the text.
    Source: InstructPix2Pix (arXiv 2211.09800).
    """
    guided = guide_velocity(reference, unconditional, reference_scale)
    return guided + text_scale * (raise_precision(conditional) - raise_precision(reference))


def _choose_transitions(noisy: jax.Array, of_sde: Transition, of_ode: Transition) -> Transition:
    """Returns the numbers [N] of one step: those of the SDE where [N] is True, else the ODE's."""
    return jax.tree.map(lambda sde, ode: jnp.where(noisy, sde, ode), of_sde, of_ode)
