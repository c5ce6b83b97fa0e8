"""Means over seeds and paired differences, against numbers computed by hand."""

from __future__ import annotations

import pytest

from corl_jax.study.seed_statistics import SeedMean, mean_over_seeds, paired_difference

T_2 = 4.302652729911275  # 97.5% quantile of Student's t with 2 degrees of freedom, from a table


def test_mean_by_hand():
    # 1, 2, 6: mean 3, squared deviations 4 + 1 + 9, s = sqrt(14 / 2) = sqrt(7), over sqrt(3).
    value = mean_over_seeds([1.0, 2.0, 6.0])
    assert (value.mean, value.num_seeds) == (3.0, 3)
    assert value.half_width == pytest.approx(T_2 * (7 / 3) ** 0.5)
    assert (value.low, value.high) == pytest.approx((3 - value.half_width, 3 + value.half_width))


def test_one_seed_has_no_interval():
    assert mean_over_seeds([0.5]) == SeedMean(0.5, None, 1)


def test_what_a_seed_changes_in_both_cancels_out():
    baseline = {0: 0.2, 1: 0.5, 2: 0.9}
    value = paired_difference({seed: x + 0.1 for seed, x in baseline.items()}, baseline)
    assert value.mean == pytest.approx(0.1) and value.half_width == pytest.approx(0.0, abs=1e-12)


def test_only_seeds_that_both_have_are_compared():
    # 3 - 1 = 2 and 7 - 4 = 3: mean 2.5, s = sqrt(0.5), quantile 12.7062 with 1 degree of freedom.
    value = paired_difference({1: 3.0, 2: 7.0, 3: 99.0}, {0: 50.0, 1: 1.0, 2: 4.0})
    assert (value.mean, value.num_seeds) == (2.5, 2)
    assert value.half_width == pytest.approx(12.706204736 * 0.5)
    assert paired_difference({1: 3.0}, {2: 1.0}) is None
