"""Losses against hand-computed numbers and independent NumPy loops."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.algorithms.divergences import k3_kl
from corl_jax.algorithms.losses import (
    CLIPPED_POLICY_LOSS,
    LossConstants,
    LossInputs,
    find_clip_extremes,
    mask_truncated,
)
from corl_jax.algorithms.ratios import logprob_difference, measure_importance_ratio


def policy_loss(
    logprobs, old_logprobs, advantages, mask, ref_logprobs=None, entropy=None, **constants
):
    inputs = LossInputs(logprobs, mask, advantages, old_logprobs, ref_logprobs, entropy)
    return CLIPPED_POLICY_LOSS.compute(inputs, LossConstants(**constants))


def test_k3_by_hand():
    ref, policy = jnp.log(jnp.array([0.2, 0.5, 0.5])), jnp.log(jnp.array([0.4, 0.5, 0.25]))
    expected = [0.5 - math.log(0.5) - 1, 0, 2 - math.log(2) - 1]
    np.testing.assert_allclose(k3_kl(policy, ref), expected, atol=1e-6)
    assert np.isfinite(k3_kl(jnp.array([-1e4, 0.0]), jnp.array([0.0, -1e4]))).all()


def test_k3_is_unbiased_under_the_policy():
    policy, ref = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    estimate = k3_kl(jnp.log(policy), jnp.log(ref))
    kl = (policy * np.log(policy / ref)).sum()
    assert float((policy * np.asarray(estimate)).sum()) == pytest.approx(kl, rel=1e-5)


def test_mask_truncated_drops_whole_rows():
    mask = jnp.array([[1, 1, 0], [1, 1, 1]], bool)
    kept = mask_truncated(mask, jnp.array([True, False]))
    assert kept.dtype == bool
    np.testing.assert_array_equal(kept, [[1, 1, 0], [0, 0, 0]])


def test_policy_loss_by_hand():
    """Two rows of ratios, one clipped above (A > 0), one below (A < 0); kl by k3."""
    old = jnp.log(jnp.array([[0.2, 0.4, 0.5], [0.5, 0.5, 0.5]]))
    new = jnp.log(jnp.array([[0.3, 0.36, 0.5], [0.25, 0.5, 0.5]]))
    ref = jnp.log(jnp.array([[0.3, 0.36, 0.5], [0.5, 0.5, 0.5]]))
    mask = jnp.array([[1, 1, 0], [1, 1, 1]], bool)
    total, rows, metrics = policy_loss(
        new, old, jnp.array([2.0, -1.0]), mask, ref, kl_coef=0.1, clip_low=0.2, clip_high=0.3
    )
    # Row 1: ratios 1.5 -> 1.3 and 0.9: -(2.6 + 1.8) / 2. Row 2: 0.5 -> clip 0.8, and the
    # pessimistic min(-0.5, -0.8) = -0.8; then -1, -1; k3 of its first token: 2 - ln 2 - 1.
    k3 = 1 - math.log(2)
    assert float(total) == pytest.approx(-2.2 + (0.8 + 1 + 1 + 0.1 * k3) / 3, rel=1e-5)
    assert float(rows) == 2
    found = {name: (float(a), float(b)) for name, (a, b) in metrics.items()}
    assert found["clip_ratio/high_mean"] == (1, 5)
    assert found["clip_ratio/low_mean"] == (1, 5)
    assert found["clip_ratio/region_mean"] == (2, 5)
    assert found["kl"] == (pytest.approx(k3, rel=1e-5), 5)


def batch(seed=0, rows=8, tokens=6):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, tokens + 1, rows)
    lengths[3] = 0  # a truncated answer that was masked
    arrays = {
        "logprobs": -rng.exponential(size=(rows, tokens)),
        "old_logprobs": -rng.exponential(size=(rows, tokens)),
        "ref_logprobs": -rng.exponential(size=(rows, tokens)),
        "entropy": rng.exponential(size=(rows, tokens)),
        "advantages": rng.normal(size=rows),
    }
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}
    return arrays | {"mask": jnp.asarray(np.arange(tokens) < lengths[:, None])}


def loop_loss(b, kl_coef, low, high):
    """The loss with Python loops: (sum over rows, rows)."""
    total, rows = 0.0, 0
    arrays = {name: np.asarray(value, np.float64) for name, value in b.items()}
    for i, keep in enumerate(np.asarray(b["mask"])):
        terms = []
        for t in np.flatnonzero(keep):
            new, old, ref = (arrays[k][i, t] for k in ("logprobs", "old_logprobs", "ref_logprobs"))
            a, rho = arrays["advantages"][i], math.exp(new - old)
            gain = min(rho * a, min(max(rho, 1 - low), 1 + high) * a)
            terms.append(-(gain - kl_coef * (math.exp(ref - new) - (ref - new) - 1)))
        if terms:
            total, rows = total + sum(terms) / len(terms), rows + 1
    return total, rows


def test_policy_loss_equals_the_loop():
    b = batch()
    compute = functools.partial(policy_loss, kl_coef=0.0, clip_low=0.1, clip_high=0.3)
    total, rows, metrics = jax.jit(compute)(**b)
    expected, expected_rows = loop_loss(b, 0.0, 0.1, 0.3)
    assert float(total) == pytest.approx(expected, rel=1e-4) and float(rows) == expected_rows == 7
    total, _, _ = policy_loss(**b, kl_coef=0.5, clip_low=0.1, clip_high=0.3)
    assert float(total) == pytest.approx(loop_loss(b, 0.5, 0.1, 0.3)[0], rel=1e-4)
    kept = np.asarray(b["entropy"])[np.asarray(b["mask"])]
    assert float(metrics["entropy"][0]) == pytest.approx(kept.sum(), rel=1e-5)
    assert float(metrics["entropy"][1]) == kept.size


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batching_is_exact(parts):
    b = batch(1)
    names = list(b)

    def loss_sum(logprobs, piece):
        total, rows, metrics = policy_loss(**(piece | {"logprobs": logprobs}), kl_coef=0.1)
        return total, (rows, metrics)

    def run(piece):
        grad = jax.value_and_grad(loss_sum, has_aux=True)
        (total, (rows, metrics)), g = grad(piece["logprobs"], piece)
        return {"loss": (total, rows)} | metrics, g

    whole, whole_grad = run(b)
    step = 8 // parts
    pieces = [run({n: b[n][i : i + step] for n in names}) for i in range(0, 8, step)]
    for name, (total, count) in whole.items():
        assert sum(float(p[name][1]) for p, _ in pieces) == float(count)
        np.testing.assert_allclose(sum(p[name][0] for p, _ in pieces), total, rtol=1e-5)
    np.testing.assert_allclose(
        np.concatenate([g for _, g in pieces]), whole_grad, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("explicit", [True, False])
def test_the_gradient_at_one_update_is_reinforce(explicit):
    """d loss / d logits = -A (onehot - softmax) / length, row by row."""
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    tokens = rng.integers(0, 5, (3, 4))
    a = jnp.asarray([1.5, -0.5, 0.0])
    mask = jnp.asarray([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]], bool)

    def logprobs_of(x):
        return jnp.take_along_axis(jax.nn.log_softmax(x), jnp.asarray(tokens)[..., None], 2)[..., 0]

    old = logprobs_of(logits) if explicit else None
    found = jax.grad(lambda x: policy_loss(logprobs_of(x), old, a, mask)[0])(logits)
    onehot = np.eye(5)[tokens]
    scale = np.asarray(a)[:, None] * np.asarray(mask) / np.asarray(mask).sum(1, keepdims=True)
    expected = -scale[..., None] * (onehot - np.asarray(jax.nn.softmax(logits)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_on_policy_value_is_minus_the_mean_advantage():
    b = batch(3)
    b["old_logprobs"] = b["logprobs"]
    total, _, metrics = policy_loss(**b)
    kept = np.asarray(b["mask"]).any(axis=1)
    assert float(total) == pytest.approx(-float(np.asarray(b["advantages"])[kept].sum()), rel=1e-5)
    assert float(metrics["clip_ratio/region_mean"][0]) == 0


def test_the_clip_stops_the_gradient_only_where_it_should():
    old = jnp.zeros((4, 1))
    new = jnp.log(jnp.array([[1.5], [1.5], [0.5], [0.5]]))
    a = jnp.array([1.0, -1.0, 1.0, -1.0])
    mask = jnp.ones((4, 1), bool)
    grad = jax.grad(lambda x: policy_loss(x, old, a, mask)[0])(new)
    # Only moves that would go further in the rewarded direction are stopped.
    np.testing.assert_allclose(grad[:, 0], [0, 1.5, -0.5, 0], atol=1e-6)


def test_the_gradient_of_the_kl_term():
    new, ref = jnp.log(jnp.array([[0.4]])), jnp.log(jnp.array([[0.2]]))
    a, mask = jnp.zeros(1), jnp.ones((1, 1), bool)
    grad = jax.grad(lambda x: policy_loss(x, None, a, mask, ref, kl_coef=2.0)[0])(new)
    np.testing.assert_allclose(grad, [[2.0 * (1 - 0.5)]], rtol=1e-6)  # beta (1 - exp(d))


@pytest.mark.parametrize("garbage", [-np.inf, np.nan, 1e9])
def test_padding_never_reaches_the_loss_or_its_gradient(garbage):
    clean = batch(4)
    dirty = dict(clean)
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "entropy"):
        dirty[name] = jnp.where(clean["mask"], clean[name], garbage)

    def loss(logprobs, b):
        return policy_loss(**(b | {"logprobs": logprobs}), kl_coef=0.1)[0]

    expected, expected_grad = jax.value_and_grad(loss)(clean["logprobs"], clean)
    found, found_grad = jax.value_and_grad(loss)(dirty["logprobs"], dirty)
    assert float(found) == float(expected)
    np.testing.assert_array_equal(found_grad, expected_grad)
    assert np.array_equal(found_grad[3], np.zeros(6))


def test_a_huge_ratio_stays_finite_even_at_advantage_zero():
    new, old = jnp.zeros((3, 1)), jnp.full((3, 1), -500.0)
    total, _, _ = policy_loss(new, old, jnp.array([0.0, 1.0, -1.0]), jnp.ones((3, 1), bool))
    assert np.isfinite(float(total))


def test_kl_without_a_reference_is_refused():
    b = batch()
    with pytest.raises(ValueError, match=r"kl_coef 0.1 needs ref_logprobs"):
        policy_loss(b["logprobs"], None, b["advantages"], b["mask"], kl_coef=0.1)


def test_clip_extremes_are_of_single_completions():
    ratios = jnp.array([[0.5, 0.5, 1.0], [1.5, 0.5, 9.0], [1.0, 1.5, 1.0], [9.0, 9.0, 9.0]])
    logprobs, old = jnp.log(ratios), jnp.zeros((4, 3))
    mask = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
    advantages = jnp.array([-1.0, -1.0, 1.0, 1.0])
    # Clipped below: 2 of 3, 1 of 2, none, no token; above: none, none, 1 of 2, no token.
    largest, smallest = find_clip_extremes(
        LossInputs(logprobs, mask, advantages, old), LossConstants()
    )
    assert largest == {"clip_ratio/high_max": 0.5} and smallest == {"clip_ratio/low_min": 0.0}
    _, smallest = find_clip_extremes(
        LossInputs(logprobs[:2], mask[:2], advantages[:2], old[:2]), LossConstants()
    )
    assert smallest == {"clip_ratio/low_min": 0.5}


def test_importance_ratio():
    trainer = jnp.log(jnp.array([[0.2, 0.5, 0.6], [0.9, 0.1, 0.5]]))
    sampler = jnp.log(jnp.array([[0.2, 0.4, 0.2], [0.9, 0.5, 0.5]]))
    mask = jnp.array([[True, True, True], [False, True, False]])
    ratio = measure_importance_ratio(sampler, jnp.where(mask, trainer, jnp.nan), mask)
    total, tokens = ratio.mean
    assert tokens == 4 and total == pytest.approx(1 + 1.25 + 3 + 0.2, rel=1e-5)
    assert (ratio.smallest, ratio.largest) == (pytest.approx(0.2), pytest.approx(3.0))
    # Bins of 0.02 from 0.5 to 1.5; 0.2 and 3 are in the outer ones.
    bins, _ = ratio.shares
    assert bins.shape == (50,) and bins.sum() == 4
    assert [bins[i] for i in (0, 37, 49)] == [1, 1, 1] and bins[24:26].sum() == 1


def test_logprob_difference():
    sampler, trainer = jnp.array([[-1.0, -2.0, 9.0]]), jnp.array([[-1.5, -1.9, -np.inf]])
    total, count, highest = logprob_difference(sampler, trainer, jnp.array([[True, True, False]]))
    assert float(total) == pytest.approx(0.6, rel=1e-5) and float(count) == 2
    assert float(highest) == pytest.approx(0.5)
