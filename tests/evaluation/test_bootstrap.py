"""Bootstrap of units within strata: intervals by hand, pairs, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from corl_jax.errors import InputError
from corl_jax.evaluation import bootstrap
from corl_jax.evaluation.bootstrap import (
    average_strata,
    average_units,
    bootstrap_interval,
    paired_bootstrap,
)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval([values])
    half = 1.96 * values.std() / 20  # the root of 400
    assert low == pytest.approx(values.mean() - half, abs=0.006)
    assert high == pytest.approx(values.mean() + half, abs=0.006)


def test_units_are_drawn_within_their_strata():
    # A stratum without variance stays as it is: only the other one moves the mean, by half.
    noisy = np.tile([0.0, 1.0], 50)
    alone = bootstrap_interval([noisy], seed=3)
    both = bootstrap_interval([noisy, np.ones(7)], seed=3)
    assert np.diff(both) == pytest.approx(np.diff(alone) / 2, rel=0.1)
    assert bootstrap_interval([np.ones(3), np.zeros(5)]) == (0.5, 0.5)
    assert bootstrap_interval([np.ones(3), np.zeros(5)], average_units) == (0.375, 0.375)


def test_the_number_of_draws_at_once_does_not_matter(monkeypatch):
    values = [np.arange(10.0), np.arange(4.0)]
    whole = bootstrap_interval(values, draws=50)
    assert whole == bootstrap_interval(values, draws=50)
    monkeypatch.setattr(bootstrap, "CHUNK_SIZE", 40)
    sizes = []

    def record(strata):
        sizes.append(sum(x.size for x in strata))
        return average_strata(strata)

    low, high = bootstrap_interval(values, record, draws=50)
    assert max(sizes) <= 40 and sum(sizes) == 50 * 14
    assert 0 < low < high < 9


def test_a_statistic_may_read_several_numbers_of_a_unit():
    # A ratio of sums, as F1 is: every unit has 1 hit in 2 tries.
    def divide(strata):
        return strata[0][..., 0].sum(axis=1) / strata[0][..., 1].sum(axis=1)

    assert bootstrap_interval([np.tile([1.0, 2.0], (9, 1))], divide) == (0.5, 0.5)


def test_pairs_are_drawn_together():
    first = np.random.default_rng(0).normal(size=200) * 10
    result = paired_bootstrap([first], [first + 0.25])
    # The units differ widely, their difference does not.
    assert result.difference == pytest.approx(0.25)
    assert result.low == pytest.approx(0.25) and result.high == pytest.approx(0.25)
    assert result.second - result.first == pytest.approx(0.25)
    assert result.p_value == pytest.approx(2 / 10_001)
    back = paired_bootstrap([first + 0.25], [first])
    assert back.difference == -result.difference and back.p_value == result.p_value


def test_equal_evaluations_have_a_p_value_of_one():
    result = paired_bootstrap([np.arange(5.0)], [np.arange(5.0)])
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)


def test_the_p_value_is_that_of_a_sign_test_by_hand():
    # 3 units with differences 1, 1, -1: the mean of 3 draws is at most 0 with probability
    # P(two or three of three are the -1) = 3 (1/3)^2 (2/3) + (1/3)^3 = 7/27.
    result = paired_bootstrap([np.zeros(3)], [np.array([1.0, 1.0, -1.0])], draws=40_000)
    assert result.p_value == pytest.approx(2 * 7 / 27, abs=0.01)


@pytest.mark.parametrize(
    ("strata", "part"),
    [([], "no strata"), ([np.ones(2), np.ones(0)], "stratum 1 is empty"),
     ([np.array([1.0, np.nan])], "not finite")],
)  # fmt: skip
def test_what_has_no_interval_is_refused(strata, part):
    with pytest.raises(InputError, match=part):
        bootstrap_interval(strata)


def test_other_units_are_refused():
    with pytest.raises(InputError, match="expected the same units"):
        paired_bootstrap([np.ones(3)], [np.ones(4)])
