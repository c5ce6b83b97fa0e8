"""Imbalance of drawing and answering by hand, summaries of answers, and the judge's question."""

from __future__ import annotations

import math

import numpy as np
import pytest

from corl_jax.evaluation.answer_summary import measure_entropy, summarize_answers
from corl_jax.evaluation.imbalance import (
    MEAN,
    Interval,
    Trial,
    average_rates,
    collect_units,
    format_imbalance,
    measure_imbalance,
    subtract_rates,
)
from corl_jax.evaluation.intervals import Rate
from corl_jax.evaluation.same_answer import is_same, write_judge_prompt

# Ten images of "counting": six are right, of which two are answered wrongly. Of the foreign images
# five are answered right; the own images of two of these prompts are wrong.
COUNTING = [
    *(Trial(f"c{i}", "counting", True, i >= 2, i >= 3) for i in range(6)),
    *(Trial(f"c{i}", "counting", False, None, i >= 8) for i in range(6, 10)),
]
COLORS = [Trial(f"k{i}", "colors", i < 3, i < 3 or None, None) for i in range(4)]


def test_the_measures_of_a_category_by_hand():
    row = measure_imbalance(COUNTING)["counting"]
    assert row.drawing == Rate.of(6, 10) and row.answering == Rate.of(5, 10)
    assert row.wrong_answers == Rate.of(2, 6)
    assert row.wrong_drawings == Rate.of(2, 5)
    assert row.gap.mean == pytest.approx(0.1)
    assert row.mean_wrong.mean == pytest.approx((2 / 6 + 2 / 5) / 2)
    for interval in (row.gap, row.mean_wrong):
        assert 0 <= interval.low <= interval.mean <= interval.high <= 1


def test_without_foreign_images_answers_about_right_own_images_count():
    row = measure_imbalance(COLORS)["colors"]
    assert row.answering == Rate.of(3, 3) and row.wrong_answers == Rate.of(0, 3)
    assert math.isnan(row.wrong_drawings.mean) and row.mean_wrong.mean == 0.0
    assert row.gap.mean == pytest.approx(0.25)
    assert row.as_json()["wrong_drawings"] == {"mean": None, "low": 0.0, "high": 1.0, "n": 0}


def test_categories_weigh_the_same_in_the_mean():
    measured = measure_imbalance([*COUNTING, *COLORS])
    assert list(measured) == ["counting", "colors", MEAN]
    assert measured[MEAN].drawing.mean == pytest.approx((0.6 + 0.75) / 2)
    # Only one category has foreign images.
    assert measured[MEAN].wrong_drawings.mean == pytest.approx(0.4)
    assert measure_imbalance([]) == {}
    lines = format_imbalance(measured).splitlines()
    assert len(lines) == 4 and " - " in lines[2].replace("  ", " ")


def test_differences_have_newcombes_interval():
    # Newcombe 1998, table II: 56/70 and 48/80, method 10: 0.0524 to 0.3339.
    difference = subtract_rates(Rate.of(56, 70), Rate.of(48, 80))
    assert difference.mean == pytest.approx(0.2)
    assert (difference.low, difference.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    turned = subtract_rates(Rate.of(48, 80), Rate.of(56, 70))
    assert (turned.mean, turned.low) == pytest.approx((difference.mean, difference.low))
    around_zero = subtract_rates(Rate.of(5, 10), Rate.of(5, 10))
    assert around_zero.mean == around_zero.low == 0.0 < around_zero.high


def test_a_mean_of_rates_is_narrower_than_each():
    rate = Rate.of(30, 60)
    mean = average_rates([rate] * 4)
    assert mean.high - mean.low == pytest.approx((rate.high - rate.low) / 2)
    assert math.isnan(average_rates([Rate.of(0, 0)]).mean)
    assert average_rates([Interval(0.0, 0.0, 0.1)]) == Interval(0.0, 0.0, 0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    draws = rng.random((400, 80, 2)) < (0.7, 0.4)
    intervals = [subtract_rates(*(Rate.of(int(x.sum()), 80) for x in d.T)) for d in draws]
    assert 0.92 < np.mean([one.low <= 0.3 <= one.high for one in intervals]) < 0.98


def test_units_are_prompts_with_their_images():
    units = collect_units([*COLORS, Trial("k0", "colors", False)])
    assert [unit.name for unit in units] == ["k0", "k1", "k2", "k3"]
    assert units[0].values == {"drawn": 0.5, "answered": 1.0, "misread": 0.0}
    assert units[3].values == {"drawn": 0.0, "misread": 0.0}
    (unit,) = collect_units([Trial("p", "colors", True, False), Trial("p", "colors", False, False)])
    assert unit.values == {"drawn": 0.5, "answered": 0.0, "misread": 0.5}
    (unit,) = collect_units([Trial("p", "colors", None, True)])
    assert unit.values == {"answered": 1.0}


def test_answers_are_summarised_by_category():
    summaries = summarize_answers(
        ["two", "Two.", "", "<think>x</think><answer> .</answer>", "red"],
        ["counting", "counting", "counting", "counting", "colors"],
        [True, True, False, False, True],
        [2, 3, 1, 9, 2],
        [False, False, False, True, False],
    )
    counting = summaries["counting"]
    assert counting.accuracy == Rate.of(2, 4) and counting.mean_length == 15 / 4
    assert counting.empty == Rate.of(2, 4) and counting.cut == Rate.of(1, 4)
    # "two" and "Two." are one answer, and so are the two empty ones.
    assert counting.entropy == pytest.approx(math.log(2))
    assert summaries["colors"].entropy == 0.0 and list(summaries) == ["counting", "colors"]
    assert measure_entropy(["a", "b", "c", "d"]) == pytest.approx(math.log(4))


def test_the_judges_question_is_the_published_one():
    assert write_judge_prompt("What's it?", "There is a dog", 'a "cat"\n') == (
        'Please help to judge the two answers same or not.The question is ["What\'s it?"] One is '
        "the standard answer, another is model's output. The standard answer is There is a dog "
        "and the model's output is ['a \"cat\"\\n']. Please only use one word to answer me same "
        "or not same"
    )


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("same", True), ("Same", True), ("SAME", True), ("Same.", False), ("not same", False),
     (" same", False), ("same\n", False), ("", False)],
)  # fmt: skip
def test_only_the_word_itself_means_the_same(reply, expected):
    assert is_same(reply) is expected
