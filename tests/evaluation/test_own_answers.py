"""The suite that asks a model about its own images: verdicts by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from corl_jax.data.self_questions.records import QUESTIONS
from corl_jax.evaluation import own_answers
from corl_jax.evaluation.answer_summary import summarize_answers
from corl_jax.evaluation.intervals import Rate
from tests.support import metrics_page

FOREIGN_ENDS = ["eval/foreign/KIND_low", "eval/foreign/KIND_high"]
CIRCLE = [{"class": "circle", "count": 2, "plural": "circles"}]


def test_rates_are_of_all_rows_and_of_each_tag():
    # tag, image right, own, blank and foreign answer right
    verdicts = np.array(
        [[2, 1, 1, 1, 1], [2, 0, 1, 0, 1], [3, 1, 0, 0, -1], [3, 1, 1, 0, -1]], np.int32
    )
    rates = own_answers.compute_rates(verdicts)
    assert rates["draw/accuracy"] == Rate.of(3, 4) and rates["own/accuracy"] == Rate.of(3, 4)
    assert rates["blank/accuracy"] == Rate.of(1, 4) and rates["foreign/accuracy"] == Rate.of(2, 2)
    assert rates["own/counting"] == Rate.of(2, 2) and rates["own/colors"] == Rate.of(1, 2)
    assert rates["foreign/colors"].n == 0 and rates["draw/position"].n == 0
    without = own_answers.compute_rates(np.where(np.arange(5) == 1, -1, verdicts))
    assert not any(name.startswith("draw") for name in without)


def test_the_hacking_gap_and_the_imbalance_are_reported():
    verdicts = np.array([[2, 0, 1, 0, -1], [2, 0, 1, 0, -1], [3, 1, 0, 0, -1]], np.int32)
    summary = {
        name: value
        for tags in (["mean"] * 3, ["counting", "counting", "colors"])
        for name, value in summarize_answers(
            ["two", "two", "red"], tags, [True, True, False], [2, 2, 3], [False, False, True]
        ).items()
    }
    images = np.zeros((3, 16, 16, 3), np.uint8)
    report = own_answers.OwnAnswersReport(
        own_answers.compute_rates(verdicts), own_answers._measure_imbalance(verdicts),
        summary, images, ["two circles"] * 3, ["two"] * 3, [True, True, False],
        [False, False, True],
    )  # fmt: skip
    metrics = report.metrics()
    assert metrics["eval/hacking_gap"] == pytest.approx(1 / 3)
    assert metrics["eval/imbalance/colors"] == 1.0  # drawn, and the answer is wrong
    assert metrics["eval/imbalance/wrong_answers"] == 1.0
    assert "eval/imbalance/counting" not in metrics  # no right image was asked about
    assert metrics["eval/own/tokens"] == pytest.approx(7 / 3)
    assert metrics["eval/own/tokens/colors"] == 3 and metrics["eval/own/cut/colors"] == 1
    assert metrics["eval/own/entropy"] > metrics["eval/own/entropy/counting"] == 0
    assert not metrics_page.missing(metrics)
    unseen = metrics_page.never(["Evaluations of own images"], metrics)
    assert unseen == ["eval/foreign/accuracy", "eval/foreign/KIND", *FOREIGN_ENDS]
    assert "eval/blank/accuracy" not in report.scores() and "eval/own/accuracy" in report.scores()
    page = report.draw("step 1")
    assert page.title == "step 1: 66.7% of 3 answers about own images are right"
    assert [tile.passed for tile in page.tiles] == [True, True, False]
    assert report.draw().title == ""


def test_rows_that_cannot_be_judged_are_named():
    columns = {
        "qa_problem": [QUESTIONS["counting"], "How many?", QUESTIONS["counting"]],
        "tag": ["counting", "counting", "count"],
        "include": [json.dumps(CIRCLE)] * 3,
        "prompt": ["two circles"] * 3,
    }
    problems = own_answers.find_row_problems(columns, ["row 0", "row 1", "row 2"])
    assert len(problems) == 2
    assert problems[0].startswith("row 1: qa_problem is 'How many?', but its tag counting asks")
    assert problems[1].startswith("row 2: tag: found 'count'")
