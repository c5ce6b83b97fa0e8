"""Makes the times of denoising steps, from 1 (noise) to 0 (the picture).

Times are computed in float64 on the host. T steps have T + 1 times, called sigmas in the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

DEFAULT_SHIFT = 3.0
"""Shift of Flow-GRPO (SD3), UniRL and DanceGRPO."""
TRAINING_TIMES = 1000  # diffusers' times are thousandths; the smallest is 1/1000
# mu of `dynamic` is a line through these two points: (latent tokens, mu).
FEW_TOKENS, MANY_TOKENS = (256, 0.5), (4096, 1.15)


def make_sigmas(
    name: str, num_steps: int, shift: float | None = None, num_tokens: int | None = None
) -> np.ndarray:
    """Returns the times [T + 1] of a schedule, float64, strictly falling from 1 to 0.

    `shift` is read by `euler_discrete` and `linspace`, where null is 3. `num_tokens`, the number of
    latent tokens of a picture, is read by `dynamic`.

    Raises:
        ValueError: the schedule is unknown, the number of steps or the shift is not positive, a
            shift is given to a schedule without one, `dynamic` has no number of tokens, or times
            are equal in float32, in which steps are computed.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r}: expected one of {', '.join(SCHEDULES)}")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps}: expected at least 1")
    if shift is not None and shift <= 0:
        raise ValueError(f"shift {shift}: expected a positive number")
    with np.errstate(all="ignore"):  # the check below finds what is not finite
        sigmas = SCHEDULES[name](num_steps, shift, num_tokens)
    if not (np.diff(sigmas.astype(np.float32)) < 0).all():
        raise ValueError(
            f"{num_steps} steps of the schedule {name!r}"
            f"{'' if shift is None else f' with shift {shift:g}'} have times that float32 cannot "
            "tell apart: take fewer steps, or a shift that is closer to 1"
        )
    return sigmas


def shift_times(times: Any, shift: float) -> Any:
    """Moves times in [0, 1] towards the noise: s u / (1 + (s - 1) u).

    Source: Stable Diffusion 3 (arXiv 2403.03206).
    """
    return shift * times / (1 + (shift - 1) * times)


def make_euler_discrete(num_steps: int, shift: float | None, num_tokens: int | None) -> np.ndarray:
    """Returns the times [T + 1] of diffusers' `FlowMatchEulerDiscreteScheduler`."""
    shift = DEFAULT_SHIFT if shift is None else shift
    # The smallest training time is shifted here, and once more with all others below. So the last
    # step is short: from 0.0089 for a shift of 3.
    smallest = shift_times(1 / TRAINING_TIMES, shift)
    return np.append(shift_times(np.linspace(1, smallest, num_steps), shift), 0.0)


def make_linspace(num_steps: int, shift: float | None, num_tokens: int | None) -> np.ndarray:
    """Returns equally spaced times [T + 1], shifted. Source: DanceGRPO (arXiv 2505.07818)."""
    times = 1 - np.arange(num_steps + 1) / num_steps
    return shift_times(times, DEFAULT_SHIFT if shift is None else shift)


def make_dynamic(num_steps: int, shift: float | None, num_tokens: int | None) -> np.ndarray:
    """Returns equally spaced times [T + 1], shifted by exp(mu), which grows with the picture.

    mu is linear in the number of latent tokens: 0.5 at 256, 1.15 at 4096. Source: FLUX.
    """
    _refuse_shift("dynamic", shift)
    if num_tokens is None:
        raise ValueError("schedule 'dynamic' needs num_tokens, the latent tokens of a picture")
    slope = (MANY_TOKENS[1] - FEW_TOKENS[1]) / (MANY_TOKENS[0] - FEW_TOKENS[0])
    mu = FEW_TOKENS[1] + slope * (num_tokens - FEW_TOKENS[0])
    return make_linspace(num_steps, math.exp(mu), None)


def make_uniform(num_steps: int, shift: float | None, num_tokens: int | None) -> np.ndarray:
    """Returns equally spaced times [T + 1]. Source: JanusFlow (arXiv 2411.07975)."""
    _refuse_shift("uniform", shift)
    return make_linspace(num_steps, 1.0, None)


def _refuse_shift(name: str, shift: float | None) -> None:
    if shift is not None:
        raise ValueError(f"schedule {name!r} has no shift, found {shift}: leave shift at null")


SCHEDULES: dict[str, Callable[[int, float | None, int | None], np.ndarray]] = {
    "euler_discrete": make_euler_discrete,
    "linspace": make_linspace,
    "dynamic": make_dynamic,
    "uniform": make_uniform,
}
"""Name -> function of (number of steps, shift, latent tokens)."""
