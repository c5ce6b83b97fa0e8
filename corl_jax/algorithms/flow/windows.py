"""Chooses the steps of a trajectory that have noise, and so are trained: the SDE window.

The steps outside of the window are those of the ODE. An update reads the network at the steps of
the window alone, so its length decides how long an update takes.
Source: MixGRPO (arXiv 2507.21802); Flow-GRPO-Fast, released with Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms.flow.steps import Sde, tabulate_checked

SMALLEST_STDS = {"bfloat16": 0.05, "float32": 0.05 / 2**15}
"""dtype of the latents -> the std below which a step is not trained.

Rounding x' to bfloat16 moves its log-prob by 4e-5 at std 0.2 and by 0.035 at std 0.006, where the
clip range is 1e-4. The spacing of float32 is that of bfloat16 over 2^16, and rounding errors of its
arithmetic add up.
"""


@dataclasses.dataclass(frozen=True)
class Window:
    """The noisy steps of a trajectory; hashable, because jit takes it as a static argument."""

    length: int | None = None  # None or 0: all steps with a std
    starts: tuple[int, int] = (0, 0)  # smallest and largest first step; both are possible


class SmallStdError(ValueError):
    """A window reaches a step whose std is too small for the dtype of the latents."""


def fit_window(window: Window, sigmas: np.ndarray, sde: Sde) -> Window:
    """Returns the window with its length in steps. Every step in reach has a std above 0.

    `sigmas` [T + 1]. The last step of cps has no noise and is never trained.

    Raises:
        ValueError: no step has noise, a window reaches a step that is not there or has none, starts
            are given without a length, or the noise level is too high.
        SmallStdError: a step's std is too small for the latents' dtype.
    """
    stds = np.asarray(tabulate_checked(sigmas, sde).std)
    num_noisy = int((stds > 0).sum())  # steps 0 to num_noisy - 1
    if not num_noisy:
        raise ValueError(
            f"dynamics {sde.dynamics!r} with {len(stds)} steps have no step with noise, so nothing "
            "would be trained: choose other dynamics or more steps"
        )
    first, last = window.starts
    if not window.length and (first, last) != (0, 0):
        raise ValueError(f"window starts {window.starts} need a window length, found none")
    length = window.length or num_noisy
    if length < 0 or not 0 <= first <= last:
        raise ValueError(
            f"window of length {length} with starts {window.starts}: expected a length of at least "
            "0 and starts (smallest, largest) of at least 0"
        )
    if last + length > num_noisy:
        raise ValueError(
            f"window of length {length} that starts at step {last}: only steps 0 to "
            f"{num_noisy - 1} of {len(stds)} have noise with dynamics {sde.dynamics!r}; the "
            f"largest start can be {num_noisy - length}"
        )
    fitted = Window(length, window.starts)
    _check_stds(fitted, stds, sde.latent_dtype)
    return fitted


def _check_stds(window: Window, stds: np.ndarray, dtype: str) -> None:
    """Refuses a window that reaches a step whose std is too small for latents of a dtype."""
    assert window.length is not None
    reached = range(window.starts[0], window.starts[1] + window.length)
    small = [step for step in reached if stds[step] < SMALLEST_STDS[dtype]]
    if small:
        remedy = "raise the noise level" if dtype == "float32" else "store latents in float32"
        raise SmallStdError(
            f"step {small[0]} of {len(stds)} has std {stds[small[0]]:.2g}, below "
            f"{SMALLEST_STDS[dtype]:.2g}, and latents are stored in {dtype}, whose rounding moves "
            f"its log-prob: {remedy}, or end the window before that step"
        )


def draw_starts(keys: jax.Array, window: Window, group_size: int) -> jax.Array:
    """Draws the first noisy step of each sample [N] int32, from a key for each prompt [B].

    All samples of a prompt have the same one. A start depends on its prompt's key alone.
    """
    low, high = window.starts
    starts = jax.vmap(lambda key: jax.random.randint(key, (), low, high + 1))(keys)
    # G = 2: [s0, s1] -> [s0, s0, s1, s1]
    return jnp.repeat(starts, group_size)


def list_steps(starts: jax.Array, window: Window) -> jax.Array:
    """Returns the numbers of the trained steps [N, W] int32 of windows that start at [N]."""
    assert window.length is not None, "fit_window sets the length"
    return (starts[:, None] + jnp.arange(window.length)).astype(jnp.int32)


def mark_steps(starts: jax.Array, window: Window, num_steps: int) -> jax.Array:
    """Returns [N, T] bool, True at the noisy steps of windows that start at [N]."""
    assert window.length is not None, "fit_window sets the length"
    offsets = jnp.arange(num_steps) - starts[:, None]
    return (offsets >= 0) & (offsets < window.length)
