"""Ratings by hand: each data set's numbers from a few answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from corl_jax.evaluation.tsv import rate_choices, rate_judged, rate_yes_no
from corl_jax.evaluation.tsv.kinds import KINDS
from corl_jax.evaluation.tsv.rating import RatingOptions

OPTIONS = {"A": "a red car", "B": "a blue bus", "C": "a green bicycle", "D": "none of these"}
DEFAULT = RatingOptions()


def rate(kind, rows, options=DEFAULT):
    return KINDS[kind].rate(rows, options)


def ask(index, answer, prediction, **more):
    return {"index": index, **OPTIONS, "answer": answer, "prediction": prediction, **more}


# ---- choices


def test_choices_are_rated_for_each_split_ability_and_category():
    rows = [
        ask(1, "A", "A", split="dev", category="x", **{"l2-category": "logic_reasoning"}),
        ask(2, "A", "B", split="dev", category="x", **{"l2-category": "logic_reasoning"}),
        ask(3, "B", "a blue bus", split="test", category="y", **{"l2-category": "z"}),
        ask(4, "B", "who knows", split="test", category=None, **{"l2-category": "z"}),
    ]
    rating = rate("choice", rows)
    assert rating.table[0] == pytest.approx(
        {"split": "dev", "Overall": 0.5, "LR": 0.5, "z": math.nan, "x": 0.5, "y": math.nan},
        nan_ok=True,
    )
    assert rating.table[1] == pytest.approx(
        {"split": "test", "Overall": 0.5, "LR": math.nan, "z": 0.5, "x": math.nan, "y": 1.0},
        nan_ok=True,
    )
    assert rating.rates["dev/Overall"].n == 2 and rating.rates["test/y"].mean == 1.0
    assert rating.unread == [4]
    assert [unit.values["accuracy"] for unit in rating.units] == [1, 0, 1, 0]
    assert [unit.category for unit in rating.units] == ["x", "x", "y", "test"]


def test_the_version_of_the_matcher_changes_a_rating():
    rows = [ask(1, "B", "The answer is a blue bus.")]
    accuracies = {
        name: rate("choice", rows, RatingOptions(name)).table[0]["Overall"]
        for name in ("2025-05", "2026-05", "2026-08")
    }
    assert accuracies == {"2025-05": 1.0, "2026-05": 1.0, "2026-08": 0.0}


def test_a_row_without_an_answer_is_wrong_and_noted():
    rating = rate("choice", [ask(1, None, "nobody knows"), ask(2, "A", "A")])
    assert rating.table == [{"split": "none", "Overall": 0.5}]
    assert rating.notes == ["1 of 2 rows state no answer and count as wrong"]


def test_a_circular_question_is_right_if_all_its_rotations_are():
    million = rate_choices.ROTATION
    rows = [
        ask(1, "A", "A", category="x"),
        ask(1 + million, "B", "B", category="x"),
        ask(2, "A", "A", category="y"),
        ask(2 + million, "B", "A", category="y"),
        ask(2 + 3 * million, "B", "B", category="y"),
        ask(3, "C", "C", category="y"),
        ask(7 + million, "C", "C", category="y"),
    ]
    rating = rate("mmbench", rows)
    assert rating.table == [{"split": "none", "Overall": 2 / 3, "x": 1.0, "y": 0.5}]
    assert rating.rates["none/Overall"].n == 3
    assert [(unit.name, unit.values["accuracy"]) for unit in rating.units] == [
        ("1", 1), ("2", 0), ("3", 1),
    ]  # fmt: skip
    assert len(rating.verdicts) == 7 and "1 rows are rotations" in rating.notes[1]
    # A column may name the question instead.
    named = [{**row, "g_index": row["index"]} for row in rows[:2]]
    assert rate("mmbench", named).rates["none/Overall"].n == 2


def ask_open(index, answer, prediction, split="validation"):
    row = ask(index, answer, prediction, split=split)
    return {**row, **dict.fromkeys("ABCD")}


def test_mmmu_makes_choices_of_open_questions():
    rows = [
        ask("1", "B", "B", split="validation"),
        ask_open("2", "42", "It is 42"),
        ask_open("3", "42", "Other Answers"),
        ask_open("4", "['5', 'five']", "five"),
        ask_open("5", "C", "C"),  # a letter as the answer stays the truth, of options A and B
        ask("6", "A", "no idea at all", split="dev"),
    ]
    rating = rate("mmmu", rows)
    assert [verdict.correct for verdict in rating.verdicts] == [True, True, False] + [False] * 3
    assert [v.extracted for v in rating.verdicts] == ["B", "A", "B", None, "A", None]
    assert [(row["split"], row["Overall"]) for row in rating.table] == [
        ("dev", 0.0), ("validation", 0.4),
    ]  # fmt: skip
    # MMMU's own rules take any of several answers, and compare numbers.
    assert rating.rates["mmmu-parser/validation"].mean == pytest.approx(4 / 5)
    assert rating.rates["mmmu-parser/dev"].mean == 0.0
    assert "1 answers without a letter count as wrong" in rating.notes[-1]


def test_mmmus_guesses_have_a_fixed_seed():
    rows = [ask(str(i), "A", "?", split="dev") for i in range(40)]
    guessed = RatingOptions(guess_seed=42)
    results = [rate("mmmu", rows, guessed).rates["mmmu-parser/dev"].mean for _ in range(2)]
    assert results[0] == results[1] and 0 < results[0] < 0.6
    assert rate("mmmu", rows).rates["mmmu-parser/dev"].mean == 0.0


# ---- yes or no


def say(index, answer, prediction, **more):
    return {"index": index, "answer": answer, "prediction": prediction, **more}


def test_yes_and_no_are_rated_in_per_cent():
    rows = [say(1, "Yes", "yes", category="x"), say(2, "No", "dunno", category="y")]
    rating = rate("yes_no", rows)
    assert rating.table == [{"Overall": 50.0, "x": 100.0, "y": 0.0}]
    assert rating.unread == [2]


def test_popes_overall_is_f1_over_rows_of_each_category():
    rows = [
        say(1, "Yes", "Yes", category="adversarial,popular,random"),
        say(2, "Yes", "No", category="adversarial"),
        say(3, "No", "Yes", category="popular"),
        say(4, "No", "no", category="random"),
        say(5, "No", "hm", category="random"),  # unknown: no for F1, and wrong for accuracy
    ]
    table = {row["split"]: row for row in rate("pope", rows).table}
    # Seven rows: three right yes, one missed yes, one wrong yes.
    assert table["Overall"] == pytest.approx(
        {"split": "Overall", "Overall": 75.0, "acc": 400 / 7, "precision": 75.0, "recall": 75.0}
    )
    assert table["adversarial"]["Overall"] == pytest.approx(200 / 3)
    assert table["adversarial"]["precision"] == 100 and table["adversarial"]["recall"] == 50
    assert table["random"] == pytest.approx(
        {"split": "random", "Overall": 100.0, "acc": 200 / 3, "precision": 100.0, "recall": 100.0}
    )
    rating = rate("pope", rows)
    score = rating.scores["Overall/F1"]
    assert score.low <= score.value == 75.0 <= score.high and score.n == 5
    assert rating.scores["Overall/acc"].value == pytest.approx(400 / 7)
    assert rating.rates["random/acc"].n == 3 and len(rating.units) == 5


def test_f1_of_nothing_is_zero():
    assert rate_yes_no.compute_f1(np.zeros((1, 3))).tolist() == [[0.0], [0.0], [0.0]]
    rows = [say(1, "No", "No", category=None)]
    assert rate("pope", rows).table[0]["Overall"] == 0.0


def ask_mme(category, right):
    """Two questions for each image; `right` has how many of them are answered right."""
    return [
        say(f"{category}{image}{n}", answer, answer if n < count else "hm", category=category,
            image_path=f"{category}/{image}")
        for image, count in enumerate(right)
        for n, answer in enumerate(("Yes", "No"))
    ]  # fmt: skip


def test_mme_adds_accuracy_and_accuracy_plus():
    rows = ask_mme("OCR", [2, 1, 0, 1])  # 50 % of answers, 25 % of images
    rating = rate("mme", rows)
    assert rating.table == [{"OCR": 75.0}]
    assert rating.scores["OCR"].n == 4 and rating.scores["OCR"].low < 75 < rating.scores["OCR"].high
    assert "perception: not summed, without categories artwork" in rating.notes[0]
    assert rating.units[0].values == {"accuracy": 1.0, "accuracy_plus": 1.0}
    for category in (*rate_yes_no.PERCEPTION[1:], *rate_yes_no.REASONING):
        rows += ask_mme(category, [2])
    line = rate("mme", rows).table[0]
    assert (line["perception"], line["reasoning"], line["color"]) == (1875.0, 800.0, 200.0)


def test_an_image_of_mme_needs_two_questions():
    problems = rate_yes_no.find_mme_problems(ask_mme("OCR", [2, 2])[:3])
    assert problems == [
        "MME: image OCR/1 of category OCR has one question; expected two for each image; evaluate "
        "all rows"
    ]


def test_hallusionbench_counts_answers_figures_and_questions():
    # index: .._set_figure_question; figure 0 has both answers right, question 0 too.
    right = {"0_0_0": True, "0_0_1": True, "0_1_0": True, "0_1_1": False}
    rows = [
        say(f"VD_chart_easy_{place}", "Yes", "Yes" if hit else "No", category="VD",
            **{"l2-category": "chart"})
        for place, hit in right.items()
    ]  # fmt: skip
    rows.append(say("VS_map_easy_0_0_0", "No", "No", category="VS", **{"l2-category": "map"}))
    table = {row["split"]: row for row in rate("hallusionbench", rows).table}
    assert table["Overall"] == pytest.approx(
        {"split": "Overall", "aAcc": 80.0, "fAcc": 200 / 3, "qAcc": 200 / 3}
    )
    assert table["VD"] == {"split": "VD", "aAcc": 75.0, "fAcc": 50.0, "qAcc": 50.0}
    assert table["map"]["qAcc"] == 100.0
    assert (
        "index x_1 has too few parts"
        in rate_yes_no.find_hallusion_problems([say("x_1", "", "")])[0]
    )


# ---- with a judge


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("<Thought process>: <<A is wrong>> <Answer>: <<B>>", "B"),
        ("Answer: (B)", None),
        ("Answer\n C.", "C"),
        ("The Answer is B", None),
        ("I", None),
        ("", None),
        ("Answer: A. The Answer: D", "D"),
    ],
)
def test_wemath_reads_the_letter_behind_the_last_answer(prediction, letter):
    assert rate_judged.read_wemath_letter(prediction) == letter


def ask_wemath(name, steps, right, whole):
    parts = [*range(1, steps + 1), "multi"]
    return [
        say(f"{name}/{part}", "A", "A" if hit else "B", key=f"{steps}steps_{part}", ID=name)
        for part, hit in zip(parts, [*right, whole], strict=True)
    ]


def test_wemaths_four_shares():
    rows = [
        *ask_wemath(1, 2, [True, True], True),  # mastery
        *ask_wemath(2, 2, [True, False], True),  # strict: rote; loose: mastery
        *ask_wemath(3, 2, [False, False], True),  # rote
        *ask_wemath(4, 3, [True, True, True], False),  # generalization
        *ask_wemath(5, 3, [True, False, True], False),  # knowledge
        *ask_wemath(6, 3, [True, True, True], True)[:-1],  # the whole is not there: none
    ]
    rating = rate("wemath", rows)
    (line,) = rating.table
    assert line["Score (Strict)"] == pytest.approx(100 * (525 - 0.5 - 2 - 1) / 525)
    assert line["Score (Loose)"] == pytest.approx(100 * (525 - 0.5 - 1 - 1) / 525)
    assert line["InsufficientKnowledge (Strict)"] == pytest.approx(100 / 525)
    assert line["InadequateGeneralization (Loose) count"] == 1
    assert line["CompleteMastery (Strict) count"] == 1
    assert line["CompleteMastery (Loose) count"] == 2
    assert line["RoteMemorization (Strict)"] == pytest.approx(200 / 3)
    assert line["RoteMemorization (Loose)"] == pytest.approx(100 / 3)
    assert [unit.values["score_strict"] for unit in rating.units] == [1, 0, 0, 0.5, 0, 1]
    assert "found 6 composite problems" in rating.notes[1]
    judged = [row | {"hit": 1, "prediction": "?"} for row in rows]
    assert rate("wemath", judged).table[0]["Score (Strict)"] == 100.0
    score = rating.scores["Score (Loose)"]
    assert score.low < score.value < score.high


def ask_vista(prediction, answer, kind="integer", **more):
    return say(0, answer, prediction, question_type="free_form", answer_type=kind, task="t",
               skills="['s', 'u']", **more)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "result"),
    [
        (ask_vista("5", "5"), 5),
        (ask_vista("5", 5), 5),
        (ask_vista("5.0", "5"), False),
        (ask_vista("It is 5", "5"), False),
        (ask_vista("6", "5"), False),
        (ask_vista("0", "0"), 0),  # as the harness: a true 0 is not read
        (ask_vista("0.50", "0.5", "float"), 0.5),
        (ask_vista("red", "red", "text"), False),
        (ask_vista("[1]", "[1]", "list"), False),
        (
            ask_vista("B", "blue", choices="['red', 'blue']") | {"question_type": "multi_choice"},
            "B",
        ),
    ],
)
def test_mathvista_prefetches_as_the_harness(row, result):
    assert rate_judged.prefetch_mathvista(row, DEFAULT.matcher) == result


def test_judged_sets_report_what_rules_read_and_no_accuracy():
    choice = ask_vista("A", "red", choices="['red', 'blue']", answer_option="A")
    rows = [
        ask_vista("5", "5"), ask_vista("It is 5", "5"), choice | {"question_type": "multi_choice"},
    ]  # fmt: skip
    rating = rate("mathvista", rows)
    table = {row["Task&Skill"]: row for row in rating.table}
    assert table["Overall"] == {
        "Task&Skill": "Overall", "tot": 3, "prefetch": 2,
        "prefetch_rate": pytest.approx(200 / 3), "prefetched_right": 2,
    }  # fmt: skip
    assert list(table) == ["Overall", "t", "s", "u"] and not rating.is_final
    assert set(rating.rates) == {"prefetch"} and not rating.units
    assert not rate("mmvet", rows).is_final


@pytest.mark.parametrize(
    ("prediction", "answer", "choices", "result"),
    [
        (r"so \boxed{12}", "12", "[]", "12"),
        ("0.50", "0.5", "[]", "0.50"),
        ("X", "x", "[]", "X"),
        ("12 cm", "12", "[]", False),
        (r"\boxed{B}", "A", "['1', '2']", "B"),
    ],
)
def test_mathvision_prefetches_letters_and_equal_texts(prediction, answer, choices, result):
    row = say(0, answer, prediction, choices=choices, category="c")
    assert rate_judged.prefetch_mathvision(row, DEFAULT.matcher) == result
    assert rate_judged.check_mathvision(row, result) is (result not in (False, "B"))
    assert rate("mathvision", [row]).table[1]["Subject"] == "c"
