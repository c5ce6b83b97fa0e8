"""Advantages against hand-computed numbers and the definition in plain Python."""

from __future__ import annotations

import math
import statistics

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corl_jax.algorithms.advantages import (
    ADVANTAGE_MODES,
    combine_rewards,
    compute_joint_advantages,
    normalize_each,
    unify_rewards,
)
from corl_jax.algorithms.estimators import (
    compute_group_advantages,
    summarize_rewards,
    whiten_batch,
)

NAN = math.nan


def advantages(rewards, group_size, **options):
    rewards = jnp.array(rewards, jnp.float32)
    values = compute_group_advantages(rewards, group_size, **options)
    stats = summarize_rewards(rewards, group_size)
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
    values, _ = advantages([1, 2, 6], 3, scale="none")
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
    combined = combine_rewards(per_function, jnp.array([1.0, 10.0]), 2)
    np.testing.assert_array_equal(combined, [NAN, 32, 40, 50])


def test_combine_rewards():
    per_function = jnp.array([[1.0, NAN, NAN], [0.5, 0.25, NAN]])
    combined = combine_rewards(per_function, jnp.array([2.0, 4.0]))
    np.testing.assert_allclose(combined, [4.0, 1.0, NAN])


T2I = jnp.array([1.0, 2.0, 3.0, 5.0])
MM2T = jnp.array([0.0, 1.0, 1.0, 0.0])
BOTH = {"t2i": T2I, "mm2t": MM2T}
WEIGHTS = {"t2i": 1.0, "mm2t": 0.8}


def joint(rewards, mode, weights=WEIGHTS, **options):
    """Returns the advantages of both tasks."""
    options.setdefault("estimate", lambda r: compute_group_advantages(r, 2))
    result = compute_joint_advantages(rewards, weights, mode, group_size=2, **options)
    assert list(result) == list(rewards)
    return tuple(result.values())


def test_unified_reward_is_normalised_once():
    a_t2i, a_mm2t = joint(BOTH, "unified_reward")
    # Sums 1, 2.8 | 3.8, 5: half differences 0.9, 0.6; std 0.9 sqrt 2, 0.6 sqrt 2.
    first, second = 0.9 / (0.9 * math.sqrt(2) + 1e-4), 0.6 / (0.6 * math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(a_t2i, [-first, first, -second, second], rtol=1e-5)
    np.testing.assert_array_equal(a_t2i, a_mm2t)


def test_unified_advantage_adds_the_advantages():
    a_t2i, a_mm2t = joint(BOTH, "unified_advantage")
    t2i = reference_advantages([1, 2, 3, 5], 2)
    mm2t = reference_advantages([0, 1, 1, 0], 2)
    expected = [a + 0.8 * b for a, b in zip(t2i, mm2t, strict=True)]
    np.testing.assert_allclose(a_t2i, expected, rtol=1e-5)
    np.testing.assert_array_equal(a_t2i, a_mm2t)


def test_separate_keeps_them_apart_whatever_the_weight():
    a_t2i, a_mm2t = joint(BOTH, "separate", WEIGHTS | {"mm2t": 9.0})
    np.testing.assert_allclose(a_t2i, reference_advantages([1, 2, 3, 5], 2), rtol=1e-5)
    np.testing.assert_allclose(a_mm2t, reference_advantages([0, 1, 1, 0], 2), rtol=1e-5)


@pytest.mark.parametrize("mode", ADVANTAGE_MODES)
def test_a_single_task_stands_alone(mode):
    (a_t2i,) = joint({"t2i": T2I}, mode)
    np.testing.assert_allclose(a_t2i, reference_advantages([1, 2, 3, 5], 2), rtol=1e-5)
    (a_mm2t,) = joint({"mm2t": MM2T}, mode)
    np.testing.assert_allclose(a_mm2t, reference_advantages([0, 1, 1, 0], 2), rtol=1e-5)


def test_rewards_normalised_one_by_one_by_hand():
    """Two rewards of very different scale say the opposite: GRPO hears one, GDPO none."""
    nan = np.nan
    rewards = jnp.array([[0.0, 1.0, nan, nan], [100.0, 0.0, 3.0, 5.0]], jnp.float32)
    weights = jnp.array([1.0, 1.0])
    summed = compute_group_advantages(combine_rewards(rewards, weights, 2), 2)
    assert summed[0] > 0.7 > -0.7 > summed[1]
    half = np.sqrt(0.5)  # two values: +-1/2 over a std of 1/sqrt(2)
    compared = normalize_each(rewards, weights, 2, eps=0.0)
    np.testing.assert_allclose(compared, [0.0, 0.0, -half, half], atol=1e-6)
    doubled = normalize_each(rewards, jnp.array([1.0, 2.0]), 2, eps=0.0)
    np.testing.assert_allclose(doubled, [half, -half, -2 * half, 2 * half], atol=1e-6)
    centred = normalize_each(rewards, weights, 2, scale="none")
    np.testing.assert_allclose(centred, [49.5, -49.5, -1.0, 1.0])


def test_a_row_without_one_of_its_groups_rewards_stays_out_when_normalised():
    rewards = jnp.array([[1.0, np.nan, 0.0], [0.0, 3.0, 6.0]], jnp.float32)
    found = np.asarray(normalize_each(rewards, jnp.ones(2), 3, eps=0.0))
    assert np.isnan(found[1]) and not np.isnan(found[[0, 2]]).any()


def test_the_sum_of_normalised_rewards_is_normalised_over_the_batch():
    totals = jnp.array([1.0, 2.0, 3.0, np.nan, 6.0], jnp.float32)
    values = np.array([1.0, 2.0, 3.0, 6.0])
    expected = (values - 3.0) / values.std(ddof=1)
    found = np.asarray(whiten_batch(totals, eps=0.0))
    np.testing.assert_allclose(found[[0, 1, 2, 4]], expected, rtol=1e-6)
    assert found[3] == 0
    np.testing.assert_array_equal(whiten_batch(jnp.full(4, 0.3)), np.zeros(4))
    rewards = {"t2i": jnp.array([1.0, -1.0]), "mm2t": jnp.array([1.0, 3.0])}
    options = {"weights": {"t2i": 1.0, "mm2t": 0.5}, "estimate": lambda r: whiten_batch(r, 0.0)}
    one, other = joint(rewards, "unified_reward", **options)
    np.testing.assert_allclose(one, np.array([0.5, -0.5]) / np.sqrt(0.5), rtol=1e-6)
    np.testing.assert_array_equal(one, other)  # of 1.5 and 0.5
    (alone,) = joint({"mm2t": rewards["mm2t"]}, "unified_reward", **options)
    np.testing.assert_allclose(alone, [-np.sqrt(0.5), np.sqrt(0.5)], rtol=1e-6)


def test_joint_advantages_refuses_nonsense():
    with pytest.raises(ValueError, match="unified_reward, unified_advantage, separate"):
        joint(BOTH, "joint")
    with pytest.raises(ValueError, match="at least one task"):
        compute_joint_advantages({}, WEIGHTS, group_size=2, estimate=whiten_batch)


def test_a_missing_part_of_a_unified_reward():
    t2i = jnp.array([1.0, 2.0, 4.0, NAN, NAN, NAN, NAN, NAN, NAN])
    mm2t = jnp.array([NAN, NAN, NAN, 1.0, 0.0, NAN, NAN, NAN, NAN])
    total = unify_rewards({"t2i": t2i, "mm2t": mm2t}, WEIGHTS, 3)
    np.testing.assert_allclose(total, [1, 2, 4, 0.8, 0, NAN, NAN, NAN, NAN], rtol=1e-6)
    # A row without its text reward does not look worse than its neighbours: it is left out.
    rewards = {"t2i": jnp.array([1.0, 1.0]), "mm2t": jnp.array([1.0, NAN])}
    total = unify_rewards(rewards, WEIGHTS, 2)
    np.testing.assert_allclose(total, [1.8, NAN], rtol=1e-6)
