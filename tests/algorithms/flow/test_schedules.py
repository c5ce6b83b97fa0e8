"""Times of denoising steps against numbers computed in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from corl_jax.algorithms.flow.schedules import SCHEDULES, make_sigmas

NUMBERS = {
    ("linspace", 3.0, 4): [1, 0.9, 0.75, 0.5, 0],
    ("euler_discrete", 3.0, 4): [1, 0.8576923077, 0.6021505376, 0.008928571429, 0],
    ("euler_discrete", 1.0, 4): [1, 0.667, 0.334, 0.001, 0],
    ("euler_discrete", 3.0, 10): [
        1, 0.9601293103, 0.9133489461, 0.8576923077, 0.790368272, 0.707278481, 0.6021505376,
        0.4648760331, 0.2780487805, 0.008928571429, 0,
    ],
    ("uniform", None, 4): [1, 0.75, 0.5, 0.25, 0],
}  # fmt: skip


@pytest.mark.parametrize(("name", "shift", "num_steps"), NUMBERS)
def test_times_are_the_numbers(name, shift, num_steps):
    sigmas = make_sigmas(name, num_steps, shift)
    np.testing.assert_allclose(sigmas, NUMBERS[name, shift, num_steps], rtol=3e-10)
    assert sigmas.dtype == np.float64


@pytest.mark.parametrize(("num_tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825)])
def test_the_shift_of_dynamic_grows_with_the_picture(num_tokens, mu):
    u = np.array([1, 0.75, 0.5, 0.25])
    expected = [*(math.exp(mu) * u / (1 + (math.exp(mu) - 1) * u)), 0]
    found = make_sigmas("dynamic", 4, num_tokens=num_tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
def test_times_fall_from_noise_to_the_picture(name, num_steps):
    sigmas = make_sigmas(name, num_steps, num_tokens=576)
    assert sigmas.shape == (num_steps + 1,) and sigmas[0] == 1 and sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


def test_the_usual_shift_is_three():
    for name in ("euler_discrete", "linspace"):
        np.testing.assert_array_equal(make_sigmas(name, 5), make_sigmas(name, 5, 3.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", 4), "'euler': expected one of euler_discrete, linspace, dynamic, uniform"),
        (("uniform", 0), "num_steps 0: expected at least 1"),
        (("linspace", 4, 0.0), "shift 0.0: expected a positive number"),
        (("uniform", 4, 3.0), "'uniform' has no shift, found 3.0: leave shift at null"),
        (("dynamic", 4, 3.0, 576), "'dynamic' has no shift"),
        (("dynamic", 4), "'dynamic' needs num_tokens"),
        (("linspace", 4, 1e20), "shift 1e\\+20 have times that float32 cannot tell apart"),
        (("linspace", 4, 1e-300), "shift 1e-300 have times"),
        (("euler_discrete", 4, 1e-30), "shift 1e-30 have times"),
        (("uniform", 3 * 10**7), "30000000 steps of the schedule 'uniform' have times"),
    ],
)
def test_a_schedule_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sigmas(*arguments)
