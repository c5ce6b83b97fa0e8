"""Denoising steps as choices: where a step goes, and how probable the place is where it went.

The convention of every module here: t = 1 is noise and t = 0 the picture, x_t = (1 - t) x0 + t eps,
and a network predicts the velocity v = eps - x0. A step goes from t to t' < t, dt = t' - t.

Axes: N samples, T steps. Latents are [N, ...]; their axes after the first are *elements*. Numbers
of a step are scalars or [N], so a batch may hold samples at different steps. Everything is
computed in float32 at least.

Every step here is x' = keep x + drift v + std z with Gaussian noise z and three numbers of the
step. They explain log-probs, divergences and gradients, see `compute_weights`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Times:
    """The times of steps; three arrays of one shape."""

    now: Any  # t
    next: Any  # t'
    is_first: Any  # bool, True at step 0 of a trajectory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transition:
    """The numbers of steps x' = keep x + drift v + std z; arrays of one shape."""

    keep: Any
    drift: Any  # b of the sources, negative
    std: Any  # 0 where a step has no noise
    dt: Any  # t' - t, negative


# The functions below use operators alone, so that they compute in float64 on numpy arrays.


def follow_ode(times: Times, level: float) -> Transition:
    """Returns Euler's step of the ODE: x' = x + v dt."""
    dt = times.next - times.now
    return Transition(keep=1 + 0 * dt, drift=dt, std=0 * dt, dt=dt)


def follow_flow(times: Times, level: float) -> Transition:
    """Returns the step of Flow-GRPO's SDE, g = a sqrt(t / (1 - t)) with the noise level a.

    The first step, where 1 - t is 0, has 1 - t' in its place. Its std is a exactly.
    Source: Flow-GRPO (arXiv 2505.05470).
    """
    # Which step is the first one is known by its number. A time can miss 1 by rounding.
    first = times.is_first
    rest = 1 - times.now * (1 - first) - times.next * first
    return _diffuse(times, level * (times.now / rest) ** 0.5)


def follow_dance(times: Times, level: float) -> Transition:
    """Returns the step of DanceGRPO's SDE, whose g is the noise level eta at all times.

    Source: DanceGRPO (arXiv 2505.07818).
    """
    return _diffuse(times, level + 0 * times.now)


def follow_cps(times: Times, level: float) -> Transition:
    """Returns the step of coefficients-preserving sampling, std = t' sin(a pi / 2).

    mean = (1 - t') x0 + sqrt(t'^2 - std^2) x1 with x0 and x1 as x and v predict them. The last step
    has std 0. This step does not keep the marginals of the ODE: pictures have less spread.
    Source: CPS (arXiv 2509.05952).
    """
    angle = level * math.pi / 2
    noise = times.next * math.cos(angle)  # sqrt(t'^2 - std^2)
    # x0 = x - t v, x1 = x + (1 - t) v
    return Transition(
        keep=1 - times.next + noise,
        drift=noise * (1 - times.now) - times.now * (1 - times.next),
        std=times.next * math.sin(angle),
        dt=times.next - times.now,
    )


def _diffuse(times: Times, diffusion: Any) -> Transition:
    """Returns the step of the SDE with diffusion g(t): it has the marginals of the ODE.

    Source: Flow-GRPO (arXiv 2505.05470), for any g.
    """
    dt = times.next - times.now
    half = diffusion**2 / (2 * times.now)
    return Transition(
        keep=1 + half * dt, drift=(1 + half * (1 - times.now)) * dt,
        std=diffusion * (-dt) ** 0.5, dt=dt,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Dynamics:
    """One row of `DYNAMICS`."""

    transition: Callable[[Times, float], Transition]  # of the noise level
    default_level: float
    max_level: float = math.inf
    is_diffusion: bool = True  # std = g sqrt(-dt), and log-probs are those of the Gaussian


DYNAMICS: dict[str, Dynamics] = {
    "flow": Dynamics(follow_flow, 0.7),
    "dance": Dynamics(follow_dance, 0.3),
    "cps": Dynamics(follow_cps, 0.8, max_level=1.0, is_diffusion=False),
    "ode": Dynamics(follow_ode, 0.0, max_level=0.0, is_diffusion=False),
}
"""Name -> how noise enters a step."""


@dataclasses.dataclass(frozen=True)
class Sde:
    """How noisy steps are drawn and scored; hashable, as jit takes it as a static argument."""

    dynamics: str = "flow"
    level: float | None = None  # a or eta of the sources; None: the default of the dynamics
    # GRPO-Guard's ratio in the place of that of the probabilities. per_dt: and the loss of a step
    # is divided by its length.
    guard: Literal["none", "ratio", "ratio_per_dt"] = "none"
    latent_dtype: str = "float32"  # in which latents are stored, and read by the next step

    @property
    def is_guarded(self) -> bool:
        """True if steps are scored by GRPO-Guard's log-ratio; see `compute_guard_log_ratios`."""
        return self.guard != "none"


def tabulate_transitions(sigmas: Any, sde: Sde) -> Transition:
    """Returns the numbers of all steps of a schedule as arrays [T].

    They are float64 of numpy if `sigmas` [T + 1] is.

    Raises:
        ValueError: the dynamics are unknown, or the noise level is out of their range.
    """
    if sde.dynamics not in DYNAMICS:
        raise ValueError(f"dynamics {sde.dynamics!r}: expected one of {', '.join(DYNAMICS)}")
    row = DYNAMICS[sde.dynamics]
    level = row.default_level if sde.level is None else sde.level
    if not 0 <= level <= row.max_level or (level == 0 < row.max_level):
        raise ValueError(
            f"noise level {level} of the dynamics {sde.dynamics!r}: expected a positive number, "
            f"at most {row.max_level}; dynamics 'ode' has no noise"
        )
    is_first = np.arange(len(sigmas) - 1) == 0
    return row.transition(Times(sigmas[:-1], sigmas[1:], is_first), level)


def tabulate_checked(sigmas: np.ndarray, sde: Sde) -> Transition:
    """Returns `tabulate_transitions` of times on the host, whose squares fit into float32.

    Raises:
        ValueError: as `tabulate_transitions`; or the noise level is too high.
    """
    with np.errstate(all="ignore"):  # the check finds what is not finite
        transitions = tabulate_transitions(np.asarray(sigmas, np.float64), sde)
        squares = [np.float32(numbers) ** 2 for numbers in jax.tree.leaves(transitions)]
    if not all(np.isfinite(numbers).all() for numbers in squares):
        usual = DYNAMICS[sde.dynamics].default_level
        raise ValueError(
            f"noise level {sde.level} of the dynamics {sde.dynamics!r} makes steps whose numbers "
            f"are too large for float32: lower it, usual is {usual:g}"
        )
    return transitions


def take_transitions(transitions: Transition, steps: Any) -> Transition:
    """Returns the numbers of the given steps; `steps` is an index or indices [N] into [T]."""
    return jax.tree.map(lambda values: jnp.asarray(values)[steps], transitions)


def predict_mean(latents: jax.Array, velocity: jax.Array, transition: Transition) -> jax.Array:
    """Returns the mean [N, ...] of x' given x and v [N, ...]."""
    latents, velocity = raise_precision(latents), raise_precision(velocity)
    keep, drift = (
        spread_over_elements(values, latents) for values in (transition.keep, transition.drift)
    )
    return keep * latents + drift * velocity


def compute_logprobs(
    next_latents: jax.Array, mean: jax.Array, transition: Transition, dynamics: str
) -> jax.Array:
    """Returns the log-prob [N] of x' [N, ...]: the **mean** over its elements, not the sum.

    log p = mean[-(x' - mean)^2 / (2 std^2)] - log std - log(2 pi) / 2. Without a diffusion (cps) it
    is mean[-(x' - mean)^2]. x' is data: it has no gradient. Infinite or NaN where the std of a
    diffusion is 0.
    Source: Flow-GRPO (arXiv 2505.05470), released code; CPS (arXiv 2509.05952).
    """
    # With the mean, ratios are 1 +- 1e-4 and do not depend on the size of the picture. Flow-GRPO's
    # author found the sum with a larger clip range unstable (flow_grpo issue 143).
    errors = jax.lax.stop_gradient(raise_precision(next_latents)) - raise_precision(mean)
    squares = average_elements(errors**2)
    if not DYNAMICS[dynamics].is_diffusion:
        return -squares
    std = transition.std
    return -squares / (2 * std**2) - jnp.log(std) - 0.5 * math.log(2 * math.pi)


def compute_weights(transition: Transition) -> Any:
    """Returns w = |drift| / std of each step: how strongly a step learns.

    With dv = v_new - v_old and x' = mean_old + std z, the log-ratio of a step is
    sign(drift) w mean(z dv) - w^2 / 2 mean(dv^2). The gradient of its log-prob in the velocity is
    sign(drift) w z / D for D elements. The true KL is w^2 / 2 mean(dv^2).
    """
    return abs(transition.drift) / transition.std


KL_KINDS: Mapping[str, Callable[[Transition], Any]] = {
    # the true divergence per element: Flow-GRPO's paper, UniRL, PromptRL
    "gaussian": lambda step: step.drift**2 / (2 * step.std**2),
    # flow_grpo's released scripts divide by 2 g^2 = 2 std^2 / (-dt): about T times less
    "gaussian_no_dt": lambda step: -step.dt * step.drift**2 / (2 * step.std**2),
    # Flow-Factory's `x-based`
    "latent_mse": lambda step: step.drift**2,
    # Flow-Factory's `v-based`, UniGRPO (arXiv 2603.23500)
    "velocity_mse": lambda step: 1.0 + 0 * step.dt,
}
"""Name of a divergence -> its factor of mean((v - v_ref)^2) in a step."""


def compute_kl(
    velocity: jax.Array, ref_velocity: jax.Array, transition: Transition, kind: str = "gaussian"
) -> jax.Array:
    """Returns the divergence [N] of a step from that of the reference, mean over elements.

    Both velocities [N, ...] are of the same x, so the means of x' differ by drift (v - v_ref). The
    reference has no gradient, the policy has. See `KL_KINDS`. A coefficient belongs to one kind:
    that of `gaussian_no_dt` is about T times that of `gaussian`.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KL_KINDS:
        raise ValueError(f"kl {kind!r}: expected one of {', '.join(KL_KINDS)}")
    reference = jax.lax.stop_gradient(raise_precision(ref_velocity))
    squares = average_elements((raise_precision(velocity) - reference) ** 2)
    return KL_KINDS[kind](transition) * squares


def compute_guard_log_ratios(
    next_latents: jax.Array,
    mean: jax.Array,
    old_mean: jax.Array,
    transition: Transition,
    dynamics: str,
) -> jax.Array:
    """Returns GRPO-Guard's log-ratio [N]: std (log rho + mean[(mean - old_mean)^2] / (2 std^2)).

    rho is the ratio of the probabilities of x' [N, ...] under both means. With x' = old_mean +
    std z this is drift mean(z dv): its average over z is 0, and it has no 1 / std.

    Raises:
        ValueError: the dynamics are no diffusion; the log-probs of cps have no variance.

    Source: GRPO-Guard (arXiv 2510.22319).
    """
    check_guard(dynamics)
    old_mean = jax.lax.stop_gradient(raise_precision(old_mean))
    noise = jax.lax.stop_gradient(raise_precision(next_latents)) - old_mean
    # The same number as above without the difference of two log-probs.
    return average_elements(noise * (raise_precision(mean) - old_mean)) / transition.std


def check_guard(dynamics: str) -> None:
    """Refuses GRPO-Guard's ratio for dynamics whose log-probs are not those of a Gaussian.

    Raises:
        ValueError: the dynamics are no diffusion.
    """
    allowed = [name for name, row in DYNAMICS.items() if row.is_diffusion]
    if dynamics not in allowed:
        raise ValueError(
            f"GRPO-Guard's ratio needs dynamics with a variance in the log-prob, found "
            f"{dynamics!r}: choose one of {', '.join(allowed)}, or leave the guard off"
        )


def raise_precision(values: Any) -> jax.Array:
    """Returns values in float32, or in float64 if they are."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def spread_over_elements(values: Any, latents: jax.Array) -> jax.Array:
    """Returns numbers of steps, scalars or [N], in a shape that multiplies latents [N, ...]."""
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (latents.ndim - values.ndim) * (values.ndim > 0))


def average_elements(values: jax.Array) -> jax.Array:
    """Returns the mean [N] over all axes of [N, ...] but the first."""
    return values.mean(axis=tuple(range(1, values.ndim)))
