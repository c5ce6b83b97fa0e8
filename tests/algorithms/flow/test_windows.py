"""Which steps have noise and are trained."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from corl_jax.algorithms.flow.schedules import make_sigmas
from corl_jax.algorithms.flow.steps import Sde
from corl_jax.algorithms.flow.windows import (
    Window,
    draw_starts,
    fit_window,
    list_steps,
    mark_steps,
)

UNIFORM, EULER = make_sigmas("uniform", 10), make_sigmas("euler_discrete", 10)
FLOW, CPS, ROUNDED = Sde("flow"), Sde("cps"), Sde("flow", latent_dtype="bfloat16")


@pytest.mark.parametrize("length", [None, 0])
def test_without_a_length_all_steps_with_noise_are_trained(length):
    """The last step of cps has none."""
    assert fit_window(Window(length), UNIFORM, FLOW) == Window(10)
    assert fit_window(Window(length), UNIFORM, Sde("dance")) == Window(10)
    assert fit_window(Window(length), UNIFORM, CPS) == Window(9)


def test_the_steps_of_a_window():
    window = Window(3, (1, 4))
    starts = np.array([1, 4, 2])
    steps = list_steps(starts, window)
    np.testing.assert_array_equal(steps, [[1, 2, 3], [4, 5, 6], [2, 3, 4]])
    noisy = np.asarray(mark_steps(starts, window, 10))
    np.testing.assert_array_equal([np.flatnonzero(row) for row in noisy], steps)


def test_samples_of_a_prompt_share_a_window_and_prompts_do_not():
    window = Window(2, (2, 5))
    keys = jax.random.split(jax.random.key(0), 400)
    starts = np.asarray(draw_starts(keys, window, 3))
    groups = starts.reshape(400, 3)
    assert (groups == groups[:, :1]).all()
    counts = np.bincount(starts[::3], minlength=6)
    assert counts[:2].sum() == 0 and len(counts) == 6  # from 2 to 5, both included
    assert (np.abs(counts[2:] - 100) < 4 * np.sqrt(75)).all()
    # A prompt has the same window in every batch.
    np.testing.assert_array_equal(draw_starts(keys[7:9], window, 1), groups[7:9, 0])
    np.testing.assert_array_equal(draw_starts(keys[:3], Window(10), 2), np.zeros(6))


@pytest.mark.parametrize(
    ("window", "sde", "message"),
    [
        (Window(4, (0, 7)), FLOW, "only steps 0 to 9 of 10 .* the largest start can be 6"),
        (Window(2, (0, 8)), CPS, "only steps 0 to 8 of 10 .* 'cps'; the largest start can be 7"),
        (Window(-1), FLOW, "length -1"),
        (Window(2, (3, 1)), FLOW, r"starts \(3, 1\)"),
        (Window(2, (-1, 1)), FLOW, r"starts \(-1, 1\)"),
        (Window(None, (1, 3)), FLOW, "need a window length"),
        (Window(), Sde("ode"), "'ode' with 10 steps have no step with noise"),
    ],
)
def test_a_window_that_reaches_no_noise_is_refused(window, sde, message):
    with pytest.raises(ValueError, match=message):
        fit_window(window, UNIFORM, sde)


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (Sde("flow", 1e30), "noise level 1e\\+30 of the dynamics 'flow' makes steps whose numbers"),
        (Sde("dance", 1e300), "too large for float32: lower it, usual is 0.3"),
        (Sde("dance", 1e-30), "step 0 of 10 has std 3.2e-31, .* raise the noise level"),
        (Sde("flow", 1e-7), "step 0 of 10 has std 1e-07, below 1.5e-06, .* in float32"),
    ],
)
def test_noise_that_float32_does_not_hold_is_refused(sde, message):
    with pytest.raises(ValueError, match=message):
        fit_window(Window(), UNIFORM, sde)
    assert fit_window(Window(), UNIFORM, Sde("flow", 1e-4)) == Window(10)


def test_a_short_step_is_refused_in_bfloat16():
    """The last step of euler_discrete has std 0.0063, that of uniform 0.074."""
    with pytest.raises(ValueError, match=r"step 9 of 10 has std 0.0063, .* latents in float32"):
        fit_window(Window(), EULER, ROUNDED)
    assert fit_window(Window(), EULER, FLOW) == Window(10)
    assert fit_window(Window(), UNIFORM, ROUNDED) == Window(10)
    for allowed in (Window(9), Window(2, (0, 7))):
        assert fit_window(allowed, EULER, ROUNDED) == allowed
    with pytest.raises(ValueError, match="step 9"):
        fit_window(Window(2, (0, 8)), EULER, ROUNDED)
