"""Advantages and losses against hand-computed numbers and independent NumPy loops."""

from __future__ import annotations

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corl_jax.algorithms import grpo

NAN = math.nan


def advantages(rewards, group_size, **options):
    values, stats = grpo.group_advantages(jnp.array(rewards, jnp.float32), group_size, **options)
    return np.asarray(values), {name: float(value) for name, value in stats.items()}


def reference_advantages(rewards, group_size, eps=1e-4):
    """The definition in plain Python."""
    result = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        valid = [r for r in group if not math.isnan(r)]
        if len(valid) < 2 or max(valid) == min(valid):
            result += [0.0] * group_size
            continue
        mean, std = statistics.mean(valid), statistics.stdev(valid)
        result += [0.0 if math.isnan(r) else (r - mean) / (std + eps) for r in group]
    return result


def test_group_advantages_by_hand():
    # Group 1: mean 2, deviations -1 0 1, ddof-1 variance 2/2 = 1. Group 2: mean 4, var 4.
    values, stats = advantages([1, 2, 3, 2, 4, 6], 3)
    expected = [-1 / 1.0001, 0, 1 / 1.0001, -2 / 2.0001, 0, 2 / 2.0001]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    # The batch: mean 3, squared deviations 4 1 0 1 1 9, ddof-1 variance 16/5.
    assert stats == pytest.approx(
        {
            "reward": 3.0, "reward_std": math.sqrt(16 / 5), "reward_group_std": 1.5,
            "frac_reward_zero_std": 0.0, "not_applicable": 0.0,
        }
    )  # fmt: skip


def test_statistics_of_rewards_that_apply_to_nothing_are_absent():
    """A mean of 0 would be a reward."""
    values, stats = advantages([NAN] * 4, 2)
    assert np.array_equal(values, np.zeros(4))
    assert stats.pop("not_applicable") == 1.0
    assert all(math.isnan(value) for value in stats.values()), stats
    _, stats = advantages([NAN, 2.0, NAN, NAN], 2)
    assert (stats["reward"], stats["reward_std"], stats["not_applicable"]) == (2.0, 0.0, 0.75)
    assert math.isnan(stats["reward_group_std"])


def test_the_std_is_unbiased():
    values, _ = advantages([0, 1], 2, eps=0.0)
    np.testing.assert_allclose(values, [-math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-6)


def test_scale_off_only_centres():
    values, _ = advantages([1, 2, 6], 3, scale=False)
    np.testing.assert_allclose(values, [-2, -1, 3], atol=1e-6)


def test_nan_rewards_are_left_out_of_their_group():
    values, stats = advantages([1, NAN, 3, 5, NAN, NAN, NAN, NAN, NAN], 3)
    half = 1 / (math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(values, [-half, 0, half, 0, 0, 0, 0, 0, 0], rtol=1e-6)
    assert stats["reward"] == pytest.approx(3.0)  # of 1, 3 and 5
    assert stats["frac_reward_zero_std"] == pytest.approx(0.5)  # the group without any is no group
    assert stats["reward_group_std"] == pytest.approx(math.sqrt(2))
    assert stats["reward_std"] == pytest.approx(2.0)  # of 1, 3 and 5
    assert stats["not_applicable"] == pytest.approx(6 / 9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.9, 1e6, -0.7])
@pytest.mark.parametrize("group_size", [1, 3, 7, 8])
def test_equal_rewards_teach_exactly_nothing(value, group_size):
    values, stats = advantages([value] * group_size, group_size)
    assert np.array_equal(values, np.zeros(group_size))
    assert stats["frac_reward_zero_std"] == 1.0 and stats["reward_std"] == 0.0


def test_rewards_that_differ_by_rounding_are_equal():
    values, _ = advantages([1.9, np.nextafter(np.float32(1.9), 2, dtype=np.float32)], 2, eps=0.0)
    assert np.array_equal(values, [0, 0])
    values, _ = advantages([1.9, 1.901], 2, eps=0.0)
    assert values[1] > 0.7


def test_a_ragged_batch_is_refused():
    with pytest.raises(ValueError, match="multiple of group_size 4"):
        advantages([1, 2, 3], 4)


REWARD = st.one_of(st.just(NAN), st.sampled_from([0.0, 0.125, 0.5, 1.0, 1.9, -3.0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(REWARD, min_size=4, max_size=4), min_size=3, max_size=3))
def test_advantages_equal_the_definition(groups):
    rewards = [r for group in groups for r in group]
    values, _ = advantages(rewards, 4)
    np.testing.assert_allclose(values, reference_advantages(rewards, 4), atol=2e-5, rtol=1e-4)
    # What one group gets depends on no other group, and sums to 0.
    alone, _ = advantages(groups[1], 4)
    np.testing.assert_allclose(values[4:8], alone, atol=1e-6)
    np.testing.assert_allclose(values.reshape(-1, 4).sum(axis=1), 0, atol=1e-5)


def test_a_row_that_lacks_what_its_group_has_is_left_out():
    per_function = jnp.array([[1.0, 2.0, NAN, NAN], [NAN, 3.0, 4.0, 5.0]])
    combined = grpo.combine_rewards(per_function, jnp.array([1.0, 10.0]), 2)
    np.testing.assert_array_equal(combined, [NAN, 32, 40, 50])


def test_combine_rewards():
    per_function = jnp.array([[1.0, NAN, NAN], [0.5, 0.25, NAN]])
    combined = grpo.combine_rewards(per_function, jnp.array([2.0, 4.0]))
    np.testing.assert_allclose(combined, [4.0, 1.0, NAN])


T2I = jnp.array([1.0, 2.0, 3.0, 5.0])
MM2T = jnp.array([0.0, 1.0, 1.0, 0.0])


def test_unified_reward_is_normalised_once():
    a_t2i, a_mm2t = grpo.joint_advantages(T2I, MM2T, "unified_reward", group_size=2)
    # Sums 1, 2.8 | 3.8, 5: half differences 0.9, 0.6; std 0.9 sqrt 2, 0.6 sqrt 2.
    first, second = 0.9 / (0.9 * math.sqrt(2) + 1e-4), 0.6 / (0.6 * math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(a_t2i, [-first, first, -second, second], rtol=1e-5)
    np.testing.assert_array_equal(a_t2i, a_mm2t)


def test_unified_advantage_adds_the_advantages():
    a_t2i, a_mm2t = grpo.joint_advantages(T2I, MM2T, "unified_advantage", group_size=2)
    t2i = reference_advantages([1, 2, 3, 5], 2)
    mm2t = reference_advantages([0, 1, 1, 0], 2)
    expected = [a + 0.8 * b for a, b in zip(t2i, mm2t, strict=True)]
    np.testing.assert_allclose(a_t2i, expected, rtol=1e-5)
    np.testing.assert_array_equal(a_t2i, a_mm2t)


def test_separate_keeps_them_apart_whatever_the_weight():
    a_t2i, a_mm2t = grpo.joint_advantages(T2I, MM2T, "separate", group_size=2, mm2t_weight=9.0)
    np.testing.assert_allclose(a_t2i, reference_advantages([1, 2, 3, 5], 2), rtol=1e-5)
    np.testing.assert_allclose(a_mm2t, reference_advantages([0, 1, 1, 0], 2), rtol=1e-5)


@pytest.mark.parametrize("mode", grpo.ADVANTAGE_MODES)
def test_a_single_task_stands_alone(mode):
    a_t2i, none = grpo.joint_advantages(T2I, None, mode, group_size=2)
    assert none is None
    np.testing.assert_allclose(a_t2i, reference_advantages([1, 2, 3, 5], 2), rtol=1e-5)
    none, a_mm2t = grpo.joint_advantages(None, MM2T, mode, group_size=2)
    assert none is None
    np.testing.assert_allclose(a_mm2t, reference_advantages([0, 1, 1, 0], 2), rtol=1e-5)


def test_rewards_normalised_one_by_one_by_hand():
    """Two rewards of very different scale say the opposite: GRPO hears one, GDPO none."""
    nan = np.nan
    rewards = jnp.array([[0.0, 1.0, nan, nan], [100.0, 0.0, 3.0, 5.0]], jnp.float32)
    weights = jnp.array([1.0, 1.0])
    summed = grpo.group_advantages(grpo.combine_rewards(rewards, weights, 2), 2)[0]
    assert summed[0] > 0.7 > -0.7 > summed[1]
    half = np.sqrt(0.5)  # two values: +-1/2 over a std of 1/sqrt(2)
    compared = grpo.normalize_each(rewards, weights, 2, eps=0.0)
    np.testing.assert_allclose(compared, [0.0, 0.0, -half, half], atol=1e-6)
    doubled = grpo.normalize_each(rewards, jnp.array([1.0, 2.0]), 2, eps=0.0)
    np.testing.assert_allclose(doubled, [half, -half, -2 * half, 2 * half], atol=1e-6)
    centred = grpo.normalize_each(rewards, weights, 2, scale=False)
    np.testing.assert_allclose(centred, [49.5, -49.5, -1.0, 1.0])


def test_a_row_without_one_of_its_groups_rewards_stays_out_when_normalised():
    rewards = jnp.array([[1.0, np.nan, 0.0], [0.0, 3.0, 6.0]], jnp.float32)
    found = np.asarray(grpo.normalize_each(rewards, jnp.ones(2), 3, eps=0.0))
    assert np.isnan(found[1]) and not np.isnan(found[[0, 2]]).any()


def test_the_sum_of_normalised_rewards_is_normalised_over_the_batch():
    totals = jnp.array([1.0, 2.0, 3.0, np.nan, 6.0], jnp.float32)
    values = np.array([1.0, 2.0, 3.0, 6.0])
    expected = (values - 3.0) / values.std(ddof=1)
    found = np.asarray(grpo.normalize_batch(totals, eps=0.0))
    np.testing.assert_allclose(found[[0, 1, 2, 4]], expected, rtol=1e-6)
    assert found[3] == 0
    np.testing.assert_array_equal(grpo.normalize_batch(jnp.full(4, 0.3)), np.zeros(4))
    t2i, mm2t = jnp.array([1.0, -1.0]), jnp.array([1.0, 3.0])
    options = {"group_size": 2, "mm2t_weight": 0.5, "eps": 0.0, "compared": True}
    one, other = grpo.joint_advantages(t2i, mm2t, "unified_reward", **options)
    np.testing.assert_allclose(one, np.array([0.5, -0.5]) / np.sqrt(0.5), rtol=1e-6)
    np.testing.assert_array_equal(one, other)  # of 1.5 and 0.5
    _, alone = grpo.joint_advantages(None, mm2t, "unified_reward", **options)
    np.testing.assert_allclose(alone, [-np.sqrt(0.5), np.sqrt(0.5)], rtol=1e-6)


def test_joint_advantages_refuses_nonsense():
    with pytest.raises(ValueError, match="unified_reward, unified_advantage, separate"):
        grpo.joint_advantages(T2I, MM2T, "joint", group_size=2)
    with pytest.raises(ValueError, match="at least one task"):
        grpo.joint_advantages(None, None, group_size=2)


def test_a_missing_part_of_a_unified_reward():
    t2i = jnp.array([1.0, 2.0, 4.0, NAN, NAN, NAN, NAN, NAN, NAN])
    mm2t = jnp.array([NAN, NAN, NAN, 1.0, 0.0, NAN, NAN, NAN, NAN])
    total = grpo.unified_reward(t2i, mm2t, 0.8, 3)
    np.testing.assert_allclose(total, [1, 2, 4, 0.8, 0, NAN, NAN, NAN, NAN], rtol=1e-6)
    # A row without its text reward does not look worse than its neighbours: it is left out.
    total = grpo.unified_reward(jnp.array([1.0, 1.0]), jnp.array([1.0, NAN]), 0.8, 2)
    np.testing.assert_allclose(total, [1.8, NAN], rtol=1e-6)


def test_k3_by_hand():
    ref, policy = jnp.log(jnp.array([0.2, 0.5, 0.5])), jnp.log(jnp.array([0.4, 0.5, 0.25]))
    expected = [0.5 - math.log(0.5) - 1, 0, 2 - math.log(2) - 1]
    np.testing.assert_allclose(grpo.k3_kl(policy, ref), expected, atol=1e-6)
    assert np.isfinite(grpo.k3_kl(jnp.array([-1e4, 0.0]), jnp.array([0.0, -1e4]))).all()


def test_k3_is_unbiased_under_the_policy():
    policy, ref = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    estimate = grpo.k3_kl(jnp.log(policy), jnp.log(ref))
    kl = (policy * np.log(policy / ref)).sum()
    assert float((policy * np.asarray(estimate)).sum()) == pytest.approx(kl, rel=1e-5)


def test_mask_truncated_drops_whole_rows():
    mask = jnp.array([[1, 1, 0], [1, 1, 1]], bool)
    kept = grpo.mask_truncated(mask, jnp.array([True, False]))
    assert kept.dtype == bool
    np.testing.assert_array_equal(kept, [[1, 1, 0], [0, 0, 0]])


def test_policy_loss_by_hand():
    """Two rows of ratios, one clipped above (A > 0), one below (A < 0); kl by k3."""
    old = jnp.log(jnp.array([[0.2, 0.4, 0.5], [0.5, 0.5, 0.5]]))
    new = jnp.log(jnp.array([[0.3, 0.36, 0.5], [0.25, 0.5, 0.5]]))
    ref = jnp.log(jnp.array([[0.3, 0.36, 0.5], [0.5, 0.5, 0.5]]))
    mask = jnp.array([[1, 1, 0], [1, 1, 1]], bool)
    total, rows, metrics = grpo.policy_loss(
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
    total, rows, metrics = jax.jit(grpo.policy_loss)(**b, kl_coef=0.0, clip_low=0.1, clip_high=0.3)
    expected, expected_rows = loop_loss(b, 0.0, 0.1, 0.3)
    assert float(total) == pytest.approx(expected, rel=1e-4) and float(rows) == expected_rows == 7
    total, _, _ = grpo.policy_loss(**b, kl_coef=0.5, clip_low=0.1, clip_high=0.3)
    assert float(total) == pytest.approx(loop_loss(b, 0.5, 0.1, 0.3)[0], rel=1e-4)
    kept = np.asarray(b["entropy"])[np.asarray(b["mask"])]
    assert float(metrics["entropy"][0]) == pytest.approx(kept.sum(), rel=1e-5)
    assert float(metrics["entropy"][1]) == kept.size


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batching_is_exact(parts):
    b = batch(1)
    names = list(b)

    def loss_sum(logprobs, piece):
        total, rows, metrics = grpo.policy_loss(**(piece | {"logprobs": logprobs}), kl_coef=0.1)
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
    found = jax.grad(lambda x: grpo.policy_loss(logprobs_of(x), old, a, mask)[0])(logits)
    onehot = np.eye(5)[tokens]
    scale = np.asarray(a)[:, None] * np.asarray(mask) / np.asarray(mask).sum(1, keepdims=True)
    expected = -scale[..., None] * (onehot - np.asarray(jax.nn.softmax(logits)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_on_policy_value_is_minus_the_mean_advantage():
    b = batch(3)
    b["old_logprobs"] = b["logprobs"]
    total, _, metrics = grpo.policy_loss(**b)
    kept = np.asarray(b["mask"]).any(axis=1)
    assert float(total) == pytest.approx(-float(np.asarray(b["advantages"])[kept].sum()), rel=1e-5)
    assert float(metrics["clip_ratio/region_mean"][0]) == 0


def test_the_clip_stops_the_gradient_only_where_it_should():
    old = jnp.zeros((4, 1))
    new = jnp.log(jnp.array([[1.5], [1.5], [0.5], [0.5]]))
    a = jnp.array([1.0, -1.0, 1.0, -1.0])
    mask = jnp.ones((4, 1), bool)
    grad = jax.grad(lambda x: grpo.policy_loss(x, old, a, mask)[0])(new)
    # Only moves that would go further in the rewarded direction are stopped.
    np.testing.assert_allclose(grad[:, 0], [0, 1.5, -0.5, 0], atol=1e-6)


def test_the_gradient_of_the_kl_term():
    new, ref = jnp.log(jnp.array([[0.4]])), jnp.log(jnp.array([[0.2]]))
    a, mask = jnp.zeros(1), jnp.ones((1, 1), bool)
    grad = jax.grad(lambda x: grpo.policy_loss(x, None, a, mask, ref, kl_coef=2.0)[0])(new)
    np.testing.assert_allclose(grad, [[2.0 * (1 - 0.5)]], rtol=1e-6)  # beta (1 - exp(d))


@pytest.mark.parametrize("garbage", [-np.inf, np.nan, 1e9])
def test_padding_never_reaches_the_loss_or_its_gradient(garbage):
    clean = batch(4)
    dirty = dict(clean)
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "entropy"):
        dirty[name] = jnp.where(clean["mask"], clean[name], garbage)

    def loss(logprobs, b):
        return grpo.policy_loss(**(b | {"logprobs": logprobs}), kl_coef=0.1)[0]

    expected, expected_grad = jax.value_and_grad(loss)(clean["logprobs"], clean)
    found, found_grad = jax.value_and_grad(loss)(dirty["logprobs"], dirty)
    assert float(found) == float(expected)
    np.testing.assert_array_equal(found_grad, expected_grad)
    assert np.array_equal(found_grad[3], np.zeros(6))


def test_a_huge_ratio_stays_finite_even_at_advantage_zero():
    new, old = jnp.zeros((3, 1)), jnp.full((3, 1), -500.0)
    total, _, _ = grpo.policy_loss(new, old, jnp.array([0.0, 1.0, -1.0]), jnp.ones((3, 1), bool))
    assert np.isfinite(float(total))


def test_kl_without_a_reference_is_refused():
    b = batch()
    with pytest.raises(ValueError, match=r"kl_coef 0.1 needs ref_logprobs"):
        grpo.policy_loss(b["logprobs"], None, b["advantages"], b["mask"], kl_coef=0.1)


def test_logprob_difference():
    sampler, trainer = jnp.array([[-1.0, -2.0, 9.0]]), jnp.array([[-1.5, -1.9, -np.inf]])
    total, count, highest = grpo.logprob_difference(
        sampler, trainer, jnp.array([[True, True, False]])
    )
    assert float(total) == pytest.approx(0.6, rel=1e-5) and float(count) == 2
    assert float(highest) == pytest.approx(0.5)
