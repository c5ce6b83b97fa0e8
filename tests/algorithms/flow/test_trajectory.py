"""Trajectories: their noise, their record, their replay, and the pictures' distribution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.flow.schedules import make_sigmas
from corl_jax.algorithms.flow.steps import (
    Sde,
    compute_guard_log_ratios,
    compute_logprobs,
    predict_mean,
    tabulate_transitions,
    take_transitions,
)
from corl_jax.algorithms.flow.trajectory import (
    draw_noise,
    draw_trajectory,
    guide_edit,
    guide_velocity,
    integrate_ode,
    take_step_latents,
)
from corl_jax.algorithms.flow.windows import Window, list_steps, mark_steps

EULER = make_sigmas("euler_discrete", 6)
KEYS = jax.random.split(jax.random.key(3), 4)
START = draw_noise(KEYS, (3, 2))
MATRIX = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32) / 4


def predict_velocity(latents, times):
    """Returns the velocity of a small network of latents [N, 3, 2] and times [N]."""
    rows = jnp.asarray(latents, jnp.float32).reshape(len(latents), -1)
    hidden = jnp.tanh(rows @ MATRIX + times[:, None])
    return (hidden @ MATRIX.T - 0.3 * rows).reshape(latents.shape)


@functools.partial(jax.jit, static_argnames=("sde", "keep_means"))
def draw(start, keys, sde, noisy=None, keep_means=False):
    return draw_trajectory(predict_velocity, start, keys, EULER, sde, noisy, keep_means=keep_means)


# ---- the record


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_a_record_is_its_steps_by_hand(dynamics):
    sde = Sde(dynamics)
    found = draw(START, KEYS, sde, keep_means=True)
    np.testing.assert_array_equal(found.latents[:, 0], START)
    table = tabulate_transitions(EULER, sde)
    x = np.asarray(START)
    for number in range(6):
        step = take_transitions(table, number)
        mean = predict_mean(x, predict_velocity(x, jnp.full(4, EULER[number], jnp.float32)), step)
        np.testing.assert_allclose(found.means[:, number], mean, atol=2e-6)
        noise = np.stack([
            jax.random.normal(jax.random.fold_in(key, number + 1), (3, 2)) for key in KEYS
        ])  # fmt: skip
        x = np.asarray(mean + step.std * noise)
        np.testing.assert_allclose(found.latents[:, number + 1], x, atol=2e-6)
        if step.std > 0:
            logprobs = compute_logprobs(x, mean, step, dynamics)
            np.testing.assert_allclose(found.logprobs[:, number], logprobs, atol=2e-3)
    trained = 5 if dynamics == "cps" else 6
    np.testing.assert_array_equal(found.noisy, np.arange(6) < np.full((4, 1), trained))
    assert np.isfinite(found.logprobs).all() and not np.asarray(found.logprobs)[:, trained:].any()


def test_steps_outside_of_the_window_are_those_of_the_ode():
    window, starts = Window(2), np.array([1, 0, 3, 4])
    noisy = mark_steps(starts, window, 6)
    found = draw(START, KEYS, Sde("flow"), noisy)
    np.testing.assert_array_equal(found.noisy, noisy)
    assert (np.asarray(found.logprobs != 0) == np.asarray(noisy)).all()
    latents = np.asarray(found.latents)
    full = draw(START, KEYS, Sde("flow"))
    ode = tabulate_transitions(EULER, Sde("ode"))
    for row in range(4):
        for number in range(6):
            x, time = latents[row : row + 1, number], jnp.full(1, EULER[number], jnp.float32)
            step = take_transitions(ode, number)
            expected = predict_mean(x, predict_velocity(x, time), step)[0]
            is_ode = np.allclose(latents[row, number + 1], expected, atol=2e-6)
            assert is_ode != bool(noisy[row, number])
    # Where the window starts at once, its steps are those without a window.
    np.testing.assert_allclose(found.latents[1, :3], full.latents[1, :3], atol=1e-6)


def test_a_row_without_noise_is_the_greedy_sample():
    noisy = jnp.array([[True] * 6, [False] * 6, [True] * 6, [False] * 6])
    found = draw(START, KEYS, Sde("flow"), noisy)
    greedy = integrate_ode(predict_velocity, START, EULER)
    same = np.isclose(found.latents[:, -1], greedy, atol=1e-6).all(axis=(1, 2))
    np.testing.assert_array_equal(same, [False, True, False, True])
    ode = draw(START, KEYS, Sde("ode"))
    np.testing.assert_allclose(ode.latents[:, -1], greedy, atol=1e-6)
    assert not np.asarray(ode.noisy).any() and not np.asarray(ode.logprobs).any()


def test_a_sample_depends_on_its_key_alone():
    found = draw(START, KEYS, Sde("flow"))
    order = np.array([2, 0])
    np.testing.assert_array_equal(draw_noise(KEYS[order], (3, 2)), START[order])
    fewer = draw(START[order], KEYS[order], Sde("flow"))
    np.testing.assert_allclose(fewer.latents, found.latents[order], atol=1e-6)
    np.testing.assert_allclose(fewer.logprobs, found.logprobs[order], atol=1e-4)


def test_latents_in_bfloat16_are_rounded_before_their_log_prob():
    sde, start = Sde("flow"), START.astype(jnp.bfloat16)
    found = draw(start, KEYS, sde, keep_means=True)
    assert found.latents.dtype == jnp.bfloat16
    assert found.logprobs.dtype == found.means.dtype == jnp.float32
    step = take_transitions(tabulate_transitions(EULER, sde), 3)
    logprobs = compute_logprobs(found.latents[:, 4], found.means[:, 3], step, "flow")
    np.testing.assert_allclose(found.logprobs[:, 3], logprobs, atol=1e-6)


# ---- the replay


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
@pytest.mark.parametrize("micro_batch", [4, 12])
def test_ratios_of_a_replay_are_one(dynamics, micro_batch):
    """Whatever the size of a micro-batch; not to the bit."""
    sde, window, starts = Sde(dynamics), Window(3), np.array([1, 0, 2, 1])
    record = draw(START, KEYS, sde, mark_steps(starts, window, 6), keep_means=True)
    steps = list_steps(starts, window)
    before, after = take_step_latents(record.latents, steps)
    np.testing.assert_array_equal(before[7], record.latents[2, 3])  # row 2 * 3 + 1, step 2 + 1
    np.testing.assert_array_equal(after[7], record.latents[2, 4])
    numbers, table = steps.reshape(-1), tabulate_transitions(EULER, sde)
    old_means = record.means[np.arange(4)[:, None], steps].reshape(before.shape)
    logprobs, guards = [], []
    for first in range(0, len(before), micro_batch):
        rows = slice(first, first + micro_batch)
        times = jnp.asarray(EULER)[numbers[rows]]
        transition = take_transitions(table, numbers[rows])
        mean = predict_mean(before[rows], predict_velocity(before[rows], times), transition)
        logprobs.append(compute_logprobs(after[rows], mean, transition, dynamics))
        if dynamics != "cps":
            arguments = after[rows], mean, old_means[rows], transition, dynamics
            guards.append(compute_guard_log_ratios(*arguments))
    old = jnp.take_along_axis(record.logprobs, steps, axis=1)
    ratio = np.exp(np.concatenate(logprobs).reshape(4, 3) - old)
    np.testing.assert_allclose(ratio, 1, atol=1e-5)
    if guards:
        np.testing.assert_allclose(np.exp(np.concatenate(guards)), 1, atol=1e-5)


# ---- guidance


def test_guidance_of_two_branches_is_the_numbers():
    u, c = jnp.array([1, 0, -0.5, -1]), jnp.array([1.5, 0.5, -0.75, -2])
    np.testing.assert_allclose(guide_velocity(c, u, 3.5), [2.75, 1.75, -1.375, -4.5], rtol=1e-6)
    np.testing.assert_allclose(guide_velocity(c, u, 2.0), [2, 1, -1, -3], rtol=1e-6)
    np.testing.assert_array_equal(guide_velocity(c, u, 1.0), c)
    both = jax.grad(lambda c, u: guide_velocity(c, u, 3.5).sum(), argnums=(0, 1))(c, u)
    np.testing.assert_array_equal(both, [[3.5] * 4, [-2.5] * 4])


def test_guidance_of_three_branches_is_the_numbers():
    u, c = jnp.array([1, 0, -0.5, -1]), jnp.array([1.5, 0.5, -0.75, -2])
    r = jnp.array([1.2, 0.1, -0.6, -1.4])
    guided = guide_edit(c, r, u, text_scale=3.0, reference_scale=1.5)
    np.testing.assert_allclose(guided, [2.2, 1.35, -1.1, -3.4], rtol=1e-6)


# ---- the distribution of pictures: data N(0.5, 0.4^2) with its exact velocity

MEAN, STD = 0.5, 0.4
SAMPLERS = (Sde("ode"), Sde("flow"), Sde("dance"), Sde("cps"), Sde("cps", 0.5))
# (schedule, steps) -> std of the pictures of SAMPLERS, from 200,000 samples
STDS = {
    ("euler_discrete", 10): [0.268, 0.336, 0.294, 0.234, 0.255],
    ("uniform", 10): [0.339, 0.381, 0.352, 0.277, 0.315],
    ("euler_discrete", 40): [0.367, 0.382, 0.372, 0.293, 0.336],
    ("uniform", 40): [0.385, 0.396, 0.387, 0.308, 0.353],
    ("euler_discrete", 400): [0.397, 0.398, 0.398, 0.317, 0.364],
    ("uniform", 400): [0.399, 0.401, 0.399, 0.320, 0.366],
}  # fmt: skip


def find_slope(time):
    """Returns the factor a of the exact velocity a (x - (1 - t) m) - m."""
    return (time - (1 - time) * STD**2) / ((1 - time) ** 2 * STD**2 + time**2)


def predict_exactly(latents, times):
    slope, times = find_slope(times)[:, None], times[:, None]
    return slope * (latents - (1 - times) * MEAN) - MEAN


@pytest.mark.parametrize(("schedule", "num_steps"), STDS)
def test_the_spread_of_pictures_is_the_numbers(schedule, num_steps):
    """Each step is linear, so the mean and the variance of the pictures follow exactly."""
    sigmas = make_sigmas(schedule, num_steps)
    for sde, expected in zip(SAMPLERS, STDS[schedule, num_steps], strict=True):
        steps = tabulate_transitions(sigmas, sde)
        mean, variance = 0.0, 1.0
        for number, time in enumerate(sigmas[:-1]):
            slope, keep, drift = find_slope(time), steps.keep[number], steps.drift[number]
            shift = drift * (slope * (mean - (1 - time) * MEAN) - MEAN)
            mean = keep * mean + shift
            variance = (keep + drift * slope) ** 2 * variance + steps.std[number] ** 2
        # The table's three digits, and three errors of a std from 200,000 samples.
        assert np.sqrt(variance) == pytest.approx(expected, abs=5e-4 + 3 * expected / 632)
        assert mean == pytest.approx(MEAN, abs=5e-3)


@pytest.mark.parametrize("num_steps", [10, 40])
@pytest.mark.parametrize("sde", SAMPLERS, ids=str)
def test_drawn_pictures_have_that_spread(sde, num_steps):
    samples = 50_000
    keys = jax.random.split(jax.random.key(num_steps), samples)
    sigmas = make_sigmas("uniform", num_steps)

    @jax.jit
    def draw_pictures(keys):
        start = draw_noise(keys, (1,))
        return draw_trajectory(predict_exactly, start, keys, sigmas, sde).latents[:, -1]

    pictures = np.asarray(draw_pictures(keys))
    expected = STDS["uniform", num_steps][SAMPLERS.index(sde)]
    # The errors of both stds, and the table's three digits.
    error = expected * np.sqrt(0.5 / samples + 0.5 / 200_000)
    assert pictures.std() == pytest.approx(expected, abs=3 * error + 5e-4)
    assert pictures.mean() == pytest.approx(MEAN, abs=5e-3 + 3 * expected / np.sqrt(samples))
