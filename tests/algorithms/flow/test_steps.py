"""One denoising step against numbers computed in float64, and identities of its parts."""

from __future__ import annotations

import contextlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.flow.schedules import make_sigmas
from corl_jax.algorithms.flow.steps import (
    DYNAMICS,
    KL_KINDS,
    Sde,
    compute_guard_log_ratios,
    compute_kl,
    compute_logprobs,
    compute_weights,
    predict_mean,
    tabulate_transitions,
    take_transitions,
)

X = np.array([[0.5, -1, 2, 0.25]])
V = np.array([[1.5, 0.5, -0.75, -2]])
Z = np.array([[0.3, -0.2, 1.1, -0.9]])
OTHER = V + np.array([0.01, -0.02, 0.03, -0.04])
MIDDLE, FIRST, LAST = (1.0, 0.75, 0.5), (1.0, 0.9), (1.0, 0.25, 0.0)  # the last two are the step
FLOW, DANCE, CPS, ODE = (Sde(name) for name in DYNAMICS)
# UniRL's `simple` with eta is `flow` with a^2 = 2 eta, but for the first step.
SIMPLE = Sde("flow", 1.0)
# (sde, times) -> numbers of the step of X and V with the noise Z; `old` is V and `new` is OTHER
NUMBERS = {
    (ODE, MIDDLE): {"mean": [0.125, -1.125, 2.1875, 0.75], "std": 0.0},
    (FLOW, MIDDLE): {
        "mean": [-0.089375, -0.910625, 1.7434375, 0.81125], "std": 0.6062177826,
        "next": [0.09249033479, -1.031868557, 2.410277061, 0.2656539956],
        "logprob": -0.687172553, "other_logprob": -0.6970265643, "ratio": 0.9901943805,
        "gaussian": 9.88536352e-05, "gaussian_no_dt": 2.47134088e-05, "guard": 0.9941037018,
    },
    (DANCE, MIDDLE): {
        "mean": [0.111875, -1.111875, 2.1603125, 0.75375], "std": 0.15,
        "next": [0.156875, -1.141875, 2.3253125, 0.61875],
        "logprob": 0.7094314517, "other_logprob": 0.676216634, "ratio": 0.9673307375,
        "gaussian": 0.001073151042, "gaussian_no_dt": 0.0002682877604, "guard": 0.9951903536,
    },
    (SIMPLE, MIDDLE): {
        "mean": [-0.3125, -0.6875, 1.28125, 0.875], "std": 0.8660254038,
        "logprob": -1.043847497, "ratio": 0.9917367758,
    },
    (CPS, MIDDLE): {
        "mean": [-0.177305065, -0.822694935, 1.561296651, 0.8363728757], "std": 0.4755282581,
        "next": [-0.03464658752, -0.9178005867, 2.084377735, 0.4083974434],
        "logprob": -0.1215433293, "other_logprob": -0.127706472, "ratio": 0.9938558105,
    },
    (FLOW, FIRST): {
        "mean": [0.2275, -0.805, 1.585, 0.38875], "std": 0.7, "logprob": -0.8310135893,
        "ratio": 0.9972817623, "gaussian": 7.653061224e-06, "gaussian_no_dt": 7.653061224e-07,
    },
    (DANCE, FIRST): {
        "mean": [0.34775, -1.0455, 2.066, 0.448875], "std": 0.09486832981,
        "logprob": 1.167576818, "ratio": 0.9797631451,
    },
    (CPS, FIRST): {
        "mean": [0.03905764747, -0.4281152949, 0.8312305899, 0.2945288237], "std": 0.8559508647,
    },
    (FLOW, LAST): {
        "mean": [-0.007708333333, -1.073958333, 2.070104167, 0.8520833333], "std": 0.2020725942,
        "logprob": 0.4114397356, "ratio": 0.9702949753, "gaussian": 0.0008896827168,
    },
    (CPS, LAST): {"mean": [0.125, -1.125, 2.1875, 0.75], "std": 0.0},
}  # fmt: skip
IDS = [f"{sde.dynamics} {sde.level or ''} {times[-2:]}" for sde, times in NUMBERS]


def take_last(sde, sigmas):
    """Returns the last step of a schedule."""
    return take_transitions(tabulate_transitions(np.array(sigmas), sde), len(sigmas) - 2)


def compute_numbers(sde, times):
    """Returns all numbers of a step by the names of NUMBERS."""
    step = take_last(sde, times)
    x, v, other, z = (jnp.asarray(values) for values in (X, V, OTHER, Z))
    mean, other_mean = predict_mean(x, v, step), predict_mean(x, other, step)
    moved = mean + step.std * z
    logprob, other_logprob = (
        compute_logprobs(moved, m, step, sde.dynamics)[0] for m in (mean, other_mean)
    )
    numbers = {
        "mean": mean[0], "std": step.std, "next": moved[0], "logprob": logprob,
        "other_logprob": other_logprob, "ratio": jnp.exp(other_logprob - logprob),
        **{kind: compute_kl(other, v, step, kind)[0] for kind in KL_KINDS},
    }  # fmt: skip
    if DYNAMICS[sde.dynamics].is_diffusion:
        guard = compute_guard_log_ratios(moved, other_mean, mean, step, sde.dynamics)
        numbers["guard"] = jnp.exp(guard[0])
    return numbers


# ---- numbers


@pytest.mark.parametrize(("precision", "rtol"), [("float64", 3e-10), ("float32", 2e-6)])
@pytest.mark.parametrize(("sde", "times"), NUMBERS, ids=IDS)
def test_steps_are_the_numbers(sde, times, precision, rtol):
    with jax.enable_x64(True) if precision == "float64" else contextlib.nullcontext():
        numbers = compute_numbers(sde, times)
        for name, expected in NUMBERS[sde, times].items():
            assert numbers[name].dtype == precision
            # A divergence is made of differences of velocities, here of 1 per cent.
            loose = 10 if name.startswith("gaussian") else 1
            np.testing.assert_allclose(
                numbers[name], expected, rtol=rtol * loose, atol=rtol, err_msg=name
            )
        assert float(numbers["velocity_mse"]) == pytest.approx(0.00075, rel=20 * rtol)
        shift = predict_mean(jnp.asarray(X), jnp.asarray(OTHER), take_last(sde, times))
        squares = np.square(shift - numbers["mean"])
        assert float(numbers["latent_mse"]) == pytest.approx(squares.mean(), rel=1e-3)


WEIGHTS = {
    ("euler_discrete", 10, FLOW): (
        [0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487, 1.771],
        [0.7, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063],
    ),
    ("uniform", 10, FLOW): (
        [0.143, 0.1875, 0.281, 0.368, 0.459, 0.562, 0.689, 0.859, 1.125, 1.687],
        [0.7, 0.664, 0.443, 0.338, 0.271, 0.221, 0.181, 0.145, 0.111, 0.074],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "num_steps", "sde"), WEIGHTS)
def test_weights_and_stds_are_the_numbers(name, num_steps, sde):
    steps = tabulate_transitions(make_sigmas(name, num_steps), sde)
    weights, stds = WEIGHTS[name, num_steps, sde]
    np.testing.assert_allclose(compute_weights(steps), weights, atol=5.1e-4)
    np.testing.assert_allclose(steps.std, stds, atol=5.1e-4)


def test_weights_of_dance_are_the_numbers():
    weights = compute_weights(tabulate_transitions(make_sigmas("linspace", 16), DANCE))
    expected = [0.49, 0.51, 0.54, 1.17, 1.35, 1.67]
    np.testing.assert_allclose(weights[[0, 1, 2, -3, -2, -1]], expected, atol=5.1e-3)


def test_gradients_of_cps_are_the_numbers():
    """d log p / dv = 2 std drift z / D: the early steps learn most."""
    steps = tabulate_transitions(make_sigmas("uniform", 10), CPS)
    expected = [0.17, 0.24, 0.26, 0.26, 0.23, 0.18, 0.13, 0.07, 0.03, 0]
    np.testing.assert_allclose(2 * steps.std * abs(steps.drift), expected, atol=5.1e-3)


# ---- identities


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("schedule", ["euler_discrete", "linspace", "uniform"])
@pytest.mark.parametrize("level", [0.1, 0.7, 1.2])
def test_the_first_step_of_flow_has_the_noise_level_as_its_std(schedule, level):
    steps = tabulate_transitions(make_sigmas(schedule, 12), Sde("flow", level))
    assert steps.std[0] == pytest.approx(level, rel=1e-14)
    assert steps.keep[0] == pytest.approx(1 - level**2 / 2, rel=1e-14)
    assert steps.drift[0] == pytest.approx(steps.dt[0], rel=1e-14)
    np.testing.assert_allclose(steps.drift[1:] / steps.dt[1:], 1 + level**2 / 2, rtol=1e-13)


def test_the_first_step_is_known_by_its_number():
    """The time of a first step in bfloat16 or after a conversion is not exactly 1."""
    sigmas = make_sigmas("linspace", 4)
    exact = tabulate_transitions(sigmas, FLOW)
    shaken = tabulate_transitions(np.append(1 - 1e-7, sigmas[1:]), FLOW)
    for name in ("keep", "drift", "std"):
        np.testing.assert_allclose(getattr(shaken, name), getattr(exact, name), rtol=1e-6)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_times_may_be_inputs_of_a_program(dynamics):
    sigmas = make_sigmas("euler_discrete", 6)
    program = jax.jit(lambda sigmas: tabulate_transitions(sigmas, Sde(dynamics)))
    found, expected = program(sigmas), tabulate_transitions(sigmas, Sde(dynamics))
    for name in ("keep", "drift", "std", "dt"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6
        )


def test_the_step_of_dance_is_euler_with_the_score():
    """mean = x + v dt - eta^2 / 2 score dt with score = -(x - (1 - t) x0) / t^2."""
    sigmas = make_sigmas("linspace", 16)
    steps = tabulate_transitions(sigmas, DANCE)
    for number, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        dt, picture = t_next - t, X - t * V
        score = -(X - (1 - t) * picture) / t**2
        expected = X + V * dt - 0.3**2 / 2 * score * dt
        found = steps.keep[number] * X + steps.drift[number] * V
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_step_without_noise_is_that_of_the_ode():
    sigmas = make_sigmas("euler_discrete", 10)
    ode = tabulate_transitions(sigmas, ODE)
    for name in ("flow", "dance", "cps"):
        steps = tabulate_transitions(sigmas, Sde(name, 1e-9))
        np.testing.assert_allclose(steps.keep, ode.keep, rtol=1e-12)
        np.testing.assert_allclose(steps.drift, ode.drift, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("sde", [FLOW, DANCE, CPS], ids=lambda sde: sde.dynamics)
def test_a_batch_of_different_steps_is_its_steps_alone(sde):
    table = tabulate_transitions(make_sigmas("euler_discrete", 6), sde)
    x, v, moved = (draw((5, 3, 2, 4), seed) for seed in range(3))
    steps = np.array([0, 4, 2, 2, 1])
    batch = take_transitions(table, steps)
    mean = predict_mean(x, v, batch)
    logprobs = compute_logprobs(moved, mean, batch, sde.dynamics)
    kl = compute_kl(v, x, batch)
    for row, number in enumerate(steps):
        one = take_transitions(table, number)
        rows = slice(row, row + 1)
        alone = predict_mean(x[rows], v[rows], one)
        np.testing.assert_allclose(mean[rows], alone, rtol=1e-6)
        expected = compute_logprobs(moved[rows], alone, one, sde.dynamics)
        np.testing.assert_allclose(logprobs[rows], expected, rtol=1e-6)
        np.testing.assert_allclose(kl[rows], compute_kl(v[rows], x[rows], one), rtol=1e-6)


@pytest.mark.parametrize("sde", [FLOW, DANCE], ids=lambda sde: sde.dynamics)
def test_one_weight_explains_log_ratio_divergence_and_gradient(sde):
    step = take_transitions(tabulate_transitions(make_sigmas("uniform", 10), sde), 6)
    weight = float(compute_weights(step))
    x, v, z = (jnp.asarray(draw((3, 4, 5), seed)) for seed in range(3))
    change = jnp.asarray(draw(v.shape, 3)) * 1e-2
    moved = predict_mean(x, v, step) + step.std * z

    def compute_logprob(velocity):
        return compute_logprobs(moved, predict_mean(x, velocity, step), step, sde.dynamics)

    squares = np.mean(np.square(change), axis=(1, 2))
    ratio = -weight * np.mean(z * change, axis=(1, 2)) - weight**2 / 2 * squares
    found = compute_logprob(v + change) - compute_logprob(v)
    np.testing.assert_allclose(found, ratio, rtol=1e-3, atol=1e-6)
    kl = compute_kl(v + change, v, step)
    np.testing.assert_allclose(kl, weight**2 / 2 * squares, rtol=1e-4)
    gradient = jax.grad(lambda velocity: compute_logprob(velocity).sum())(v)
    np.testing.assert_allclose(gradient, -weight * z / 20, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sde", [FLOW, DANCE], ids=lambda sde: sde.dynamics)
def test_the_log_ratio_of_the_guard(sde):
    """It is std (log rho + mean(dmean^2) / (2 std^2)) = drift mean(z dv), whose mean is 0."""
    step = take_transitions(tabulate_transitions(make_sigmas("uniform", 10), sde), 7)
    samples = 20_000
    x, v, z = (jnp.asarray(draw((samples, 4), seed)) for seed in range(3))
    change = jnp.asarray(draw((4,), 3))
    old_mean, mean = predict_mean(x, v, step), predict_mean(x, v + change, step)
    moved = old_mean + step.std * z
    guarded = compute_guard_log_ratios(moved, mean, old_mean, step, sde.dynamics)
    new, old = (compute_logprobs(moved, m, step, sde.dynamics) for m in (mean, old_mean))
    bias = np.mean(np.square(mean - old_mean), axis=1) / (2 * step.std**2)
    np.testing.assert_allclose(guarded, step.std * (new - old + bias), atol=3e-5)
    np.testing.assert_allclose(guarded, step.drift * np.mean(z * change, axis=1), atol=1e-5)
    error = float(guarded.std()) / math.sqrt(samples)
    assert abs(float(guarded.mean())) < 3 * error
    assert float((new - old).mean()) < -100 * error  # the plain log-ratio is far below 0
    # At the old policy the gradient is std times that of the log-prob.
    by_guard, by_logprob = (
        jax.grad(lambda m, f=f: f(m).sum())(old_mean)
        for f in (
            lambda m: compute_guard_log_ratios(moved, m, old_mean, step, sde.dynamics),
            lambda m: step.std * compute_logprobs(moved, m, step, sde.dynamics),
        )
    )
    np.testing.assert_allclose(by_guard, by_logprob, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_the_reference_is_stopped_and_the_policy_is_not(kind):
    step = take_last(FLOW, MIDDLE)
    of_policy, of_reference = jax.grad(
        lambda v, ref: compute_kl(v, ref, step, kind).sum(), argnums=(0, 1)
    )(jnp.asarray(V, jnp.float32), jnp.asarray(OTHER, jnp.float32))
    assert (np.asarray(of_policy) != 0).all() and not np.asarray(of_reference).any()


def test_the_place_where_a_step_went_is_data():
    step = take_last(FLOW, MIDDLE)
    gradient = jax.grad(lambda x: compute_logprobs(x, jnp.asarray(V), step, "flow").sum())
    assert not np.asarray(gradient(jnp.asarray(X, jnp.float32))).any()
    x, mean, old = (jnp.asarray(values, jnp.float32) for values in (X, V, OTHER))
    of_guard = jax.grad(
        lambda *rows: compute_guard_log_ratios(*rows, step, "flow").sum(), argnums=(0, 1, 2)
    )(x, mean, old)
    assert [bool(np.asarray(part).any()) for part in of_guard] == [False, True, False]


def test_velocities_in_bfloat16_are_computed_in_float32():
    step = take_last(FLOW, MIDDLE)
    x, v = jnp.asarray(X, jnp.bfloat16), jnp.asarray(V, jnp.bfloat16)
    mean = predict_mean(x, v, step)
    assert mean.dtype == jnp.float32
    np.testing.assert_allclose(mean[0], NUMBERS[FLOW, MIDDLE]["mean"], rtol=1e-6)  # X, V are exact


# ---- refusals


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (Sde("sde"), "dynamics 'sde': expected one of flow, dance, cps, ode"),
        (Sde("flow", -0.1), "noise level -0.1 of the dynamics 'flow': expected a positive number"),
        (Sde("dance", 0.0), "'ode' has no noise"),
        (Sde("cps", 1.5), "at most 1.0"),
        (Sde("ode", 0.7), "noise level 0.7 of the dynamics 'ode'"),
    ],
)
def test_dynamics_that_do_not_exist_are_refused(sde, message):
    with pytest.raises(ValueError, match=message):
        tabulate_transitions(make_sigmas("uniform", 4), sde)


@pytest.mark.parametrize("dynamics", ["cps", "ode"])
def test_the_guard_is_refused_without_a_variance(dynamics):
    step = take_last(Sde(dynamics), MIDDLE)
    with pytest.raises(ValueError, match="choose one of flow, dance, or leave the guard off"):
        compute_guard_log_ratios(*[jnp.asarray(X)] * 3, step, dynamics)


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="kl 'k3': expected one of gaussian, gaussian_no_dt"):
        compute_kl(*[jnp.asarray(V)] * 2, take_last(FLOW, MIDDLE), "k3")
