"""Text rewards, case by case: the repaired defaults and the released behaviours."""

from __future__ import annotations

import functools
import itertools
import math
import os
import string
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corl_jax.errors import InputError
from corl_jax.rewards import answers, numerals, text

PROBLEM = """What is the hazard?
Options:
A. choking
B. burning
C. a red car
D. 12 cats

Answer the question based on the image and your world knowledge."""


def full(answer, think="because"):
    return f"<think>{think}</think><answer>{answer}</answer>"


def mc(answer, solution="<answer>B</answer>", problem=PROBLEM, **options):
    return text.qa_accuracy(full(answer), solution, "MC", problem=problem, **options)


def oe(answer, solution, **options):
    return text.qa_accuracy(full(answer), f"<answer>{solution}</answer>", "OE", **options)


# --- format ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a\nb</think>\n\n<answer>\nb\n</answer>", 1),
        ("<think>a</think> ... . <answer>b</answer>", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a</think>, <answer>b</answer>", 0),
        ("<think>a</think>so<answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>!", 0),
        ("Well. <think>a</think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer>", 0),
        ("<think>a</think>", 0),
        ("<Think>a</Think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0),
        ("<think><answer>x</answer></think><answer>b</answer>", 0),
        ("<think>a<think>b</think><answer>c</answer>", 0),
        ("<think>a</think><answer>b</think></answer>", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_format(completion, expected):
    assert text.format_reward(completion) == expected


@pytest.mark.parametrize("space", [" ", "\n", "\t \n"])
def test_format_strip_switch(space):
    for completion in (space + full("b"), full("b") + space):
        assert text.format_reward(completion) == 1.0
        assert text.format_reward(completion, strip=False) == 0.0
    assert text.format_reward(full("b"), strip=False) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a</think><think>b</think><answer>c</answer>",
        "<think><answer>x</answer></think><answer>b</answer>",
    ],
)
def test_repeated_blocks_pass_only_as_released(completion):
    assert text.format_reward(completion) == 0.0
    assert text.format_reward(completion, repeated_blocks=True) == 1.0
    assert text.format_reward(f" {completion}", strip=False, repeated_blocks=True) == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (full("b"), 0.5),
        ("</answer><answer></think><think>", 0.5),  # order is not asked for
        ("<think>a</think>b", 0.25),
        ("<think><think>a</think><answer>b</answer>", 0.375),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_format_tag(completion, expected):
    assert text.format_tag_reward(completion) == expected


# --- what is compared -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer> cat </answer>", "cat"),
        ("<answer>cat</answer><answer>dog</answer>", "cat"),
        ("<think>dog</think> Answer: cat", "cat"),
        ("<think>dog\n</think>cat</answer>", "cat"),
        ("<think>dog and cat", "dog and cat"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("", ""),
        ("<think><answer>x</answer></think><answer>b</answer>", "b"),
        ("<think>is it <answer>x</answer>?</think> b", "b"),
        ("<think><answer>x</answer></think>", ""),
        ("<think>a <think>b</think> <answer>x</answer></think><answer>c</answer>", "c"),
        ("<think>a</think><answer>b</answer><think>c</think><answer>d</answer>", "b"),
        ("<think>never closed <answer>b</answer>", "b"),
    ],
)
def test_predicted_answer(completion, expected):
    assert answers.read_answer(completion) == expected


def test_an_answer_in_the_thoughts_decides_only_as_released():
    completion = "<think><answer>dog</answer></think><answer>cat</answer>"
    for score in (functools.partial(text.qa_accuracy, qa_type="OE"), text.oc_accuracy):
        assert score(completion, "dog") == 0.0 and score(completion, "cat") == 1.0
        assert score(completion, "dog", answer_in_thoughts=True) == 1.0
    choice = full("B", think="<answer>A</answer>")
    assert text.qa_accuracy(choice, "B", "MC") == 1.0
    assert text.qa_accuracy(choice, "B", "MC", answer_in_thoughts=True) == 0.0
    assert text.qa_answer_score(completion, "cat", "OE") == 1.0
    assert text.oc_answer_score(completion, "cat", None) == 1.0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("Two", "2", True),
        ("2", "two", True),
        ("twenty-one", "21", True),
        ("Cat.", " cat", True),
        ("two", "three", False),
        ("two", "3", False),
        ("cat", "cats", False),
        ("million", "2", False),
        ("one million million", "2", False),
        ("9" * 5000, "2", False),  # longer than int() reads
        ("²", "2", False),
        ("", "0", False),
        ("no one is there", "1", False),
        ("the one on the left", "1", False),
        ("two dogs and three cats", "5", False),
        ("two dogs", "2", False),
        ("point", "0", False),
        ("2.0", "two", True),
        ("3.50", "3.5", True),
        ("35", "3.5", False),
        ("1,000", "one thousand", True),
        ("+7", "7", True),
        ("-7", "7", False),
        ("7 .", "seven", True),
        ("\u22123.0", "-3", True),
    ],
)
def test_safe_string_equal(first, second, expected):
    assert answers.are_equal(first, second) is expected
    assert answers.are_equal(second, first) is expected


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("zero", 0), ("twenty one", 21), ("Twenty-One", 21), ("hundred", 100),
        ("one hundred and five", 105), ("two thousand", 2000), ("fifteen hundred", 1500),
        ("two thousand three hundred and forty-five", 2345), ("hundred thousand", 100_000),
        ("one million two hundred thousand and six", 1_200_006), ("one billion", 10**9),
        ("three point five", 3.5), ("point five", 0.5), ("one two", None), ("two and three", None),
        ("one hundred and", None), ("and five", None), ("twenty zero", None), ("and", None),
        ("thousand million", None), ("zero hundred", None), ("three point", None),
        ("three point ten", None), ("one point two point three", None), ("", None),
    ],
)  # fmt: skip
def test_number_words_are_read_as_a_whole(words, number):
    assert numerals.read_number(words) == number


def test_number_words_as_released():
    """One of word2number's 33 words as the whole text, and nothing else."""
    equal = functools.partial(answers.are_equal, by_value=False)
    for first, second in (("two", "2"), ("Two.", "2"), ("hundred", "100"), ("point", "0")):
        assert equal(first, second) and equal(second, first)
    for text_, number in (
        ("twenty one", "21"), ("twenty-one", "21"), ("no one is there", "1"),
        ("two dogs and three cats", "5"), ("2.0", "two"), ("3.50", "3.5"),
    ):  # fmt: skip
        assert not equal(text_, number) and not equal(number, text_)


# --- multiple choice ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "B", "b", "B.", "(B)", "b)", " B ", "**B**", "'B'", "[B]", "\nB\n", "\\boxed{B}",
        "B. burning", "b. burning", "(B) burning", "B: burning", "B) it burns", "**B.** burning",
        "The answer is B", "the answer is (B).", "Answer: B", "The correct answer is option B.",
        "The answer is: **B**", "The answer would be b.", "Option B", "I choose option (B), fire",
        "It is B, not A", "So B is right", "A dog is seen, so B", "Not A but B", "not (A) but (B)",
        "The answer is A? No, the answer is B.", "e.g. fire, so the answer is B",
        "B, because A is wrong", "B; A is wrong", "B: not A", "B - A is wrong", "B – burning",
        "(B), as A is not seen", "**B**, because it burns", "b, not a", "B , since (A) is out",
        "A, no, the answer is B",
        "burning", "Burning.", "It is 'burning'", "the hazard is burning", "I think burning",
    ],
)  # fmt: skip
def test_right_choices(answer):
    assert mc(answer) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "A", "C.", "(D)", "Z", "E", "", " ", ".", "A. choking", "The answer is A", "option C",
        "A, B, C, D", "A or B", "(A) (B)", "A/B/C/D", "B or C", "choking", "choking or burning",
        "The answer is not B", "not option B", "not B", "Bob", "B's", "vitamin-B", "unburning",
        "The answer is B. Or rather, the answer is C.", "C. burning", "None of them",
        "'choking', not burning", "burn", "not burning",
        "A, B", "A, or B", "A; B; D", "A and B", "A, B and C", "A - B", "A, because B is wrong",
    ],
)  # fmt: skip
def test_wrong_choices(answer):
    assert mc(answer) == 0.0


@pytest.mark.parametrize(
    ("solution", "answer", "expected"),
    [
        ("A", "A. choking", 1),
        ("A", "a dog, so C", 0),
        ("A", "A dog", 0),  # the article is no choice
        ("A", "I see A dog", 0),
        ("A", "A is right", 1),
        ("A", "A, because B is wrong", 1),
        ("A", "A; B is wrong", 1),
        ("A", "A, B", 0),
        ("A", "A, or B", 0),
        ("A", "A; B; C", 0),
        ("A", "A or B", 0),
        ("A", "A and B", 0),
        ("I", "I, too, see B", 0),
        ("<answer>A. choking</answer>", "A", 1),
        ("<answer>A. choking</answer>", "choking", 1),
        ("<answer>(A)</answer>", "A", 1),
        ("<answer>choking</answer>", "A", 1),  # a solution in words is found among the options
        ("<answer>choking</answer>", "B", 0),
        ("<answer>C</answer>", "red car", 0),
        ("<answer>C</answer>", "It is a red car.", 1),
        ("<answer>C</answer>", "The answer is a red car.", 1),
        ("<answer>D</answer>", "12 cats", 1),
        ("<answer>D</answer>", "2 cats", 0),
        ("<answer>I</answer>", "I think so", 0),
        ("<answer>\nB\n</answer>", "B", 1),
    ],
)
def test_choices_against_solutions(solution, answer, expected):
    assert mc(answer, solution) == expected


def test_short_option_texts_are_found():
    problem = "How many?\nA. 2\nB. 4\nC. 14"
    assert mc("4", problem=problem) == 1.0
    assert mc("four", "<answer>four</answer>", problem) == 1.0
    assert mc("14", problem=problem) == 0.0
    assert mc("the answer is '4'", problem=problem) == 1.0


def test_an_option_inside_a_longer_one():
    problem = "Colour?\nA. red\nB. dark red"
    assert mc("dark red", problem=problem) == 1.0
    assert mc("red", problem=problem) == 0.0
    assert mc("red", "<answer>A</answer>", problem) == 1.0
    assert mc("dark red", "<answer>A</answer>", problem) == 0.0


def test_choices_without_the_question():
    assert mc("B", problem=None) == mc("The answer is B", problem=None) == 1.0
    assert mc("burning", problem=None) == 0.0
    assert mc("burning", "<answer>B. burning</answer>", None) == 1.0
    assert mc("B. burning", "<answer>burning</answer>", None) == 1.0


def test_option_texts_with_regex_characters():
    problem = "Which?\nA. f(x) [0, 1)\nB. c++ (really?)"
    assert mc("it is c++ (really?)", problem=problem) == 1.0
    assert mc("it is f(x) [0, 1)", problem=problem) == 0.0


def test_released_multiple_choice():
    """Q3: soft Jaccard in place of letters, with the values the audit saw."""
    assert mc("A. choking", "<answer>A</answer>", mc=False) == 0.0
    assert mc("The answer is B", mc=False) == 0.25
    assert mc("B.", mc=False) == 1.0  # equality comes first either way


@pytest.mark.parametrize(
    "qa_type",
    ["mc", " MC ", "MC", "mcq", "MCQ", "Multiple Choice", "multiple-choice", "multi_choice",
     "multi‑choice", "MultipleChoice", "multiple  choice", "single-choice"],
)  # fmt: skip
def test_spellings_of_multiple_choice(qa_type):
    assert text.qa_accuracy("B. burning", "B", qa_type) == 1.0


@pytest.mark.parametrize(
    "qa_type", ["OE", "oe", "open", "Open-Ended", "open_ended", "OPEN ENDED", "free form", "", None]
)
def test_spellings_of_open_ended(qa_type):
    assert text.qa_accuracy("<answer>the answer is B</answer>", "B", qa_type) == 0.25


@pytest.mark.parametrize("qa_type", ["other", "M", "yes/no", "multiple", "open choice", "MC or OE"])
def test_every_other_type_is_refused(qa_type):
    with pytest.raises(InputError, match=r"found '.*', expected MC or OE"):
        text.qa_accuracy("B", "B", qa_type)


def test_of_two_options_with_one_letter_the_first_counts():
    problem = "Which?\nA. cat\nB. dog\nB. owl\na. cow"
    assert answers.read_options(problem) == {"A": "cat", "B": "dog"}
    assert mc("dog", problem=problem) == 1.0
    assert mc("owl", problem=problem) == 0.0


# --- open ends ------------------------------------------------------------------------------


def test_open_answers():
    assert oe("a red car", "A red car.") == 1.0
    assert oe("two", "2") == 1.0
    assert oe("red car!?", "red car") == 1.0
    assert oe("red", "red car") == 0.5
    assert oe("green boat", "red car") == 0.0
    assert oe("", "red car") == 0.0
    assert oe("no one is there", "1") < 1 and oe("two dogs and three cats", "5") == 0.0
    assert text.qa_accuracy("<think>red</think>car", "car", "OE") == 1.0
    assert text.qa_accuracy(None, "car", "OE") == 0.0


@pytest.mark.parametrize("solution", [None, "", "  ", "<answer></answer>"])
def test_without_a_solution_accuracy_does_not_apply(solution):
    assert math.isnan(text.qa_accuracy(full("B"), solution, "MC"))
    assert math.isnan(text.oc_accuracy(full("B"), solution))
    assert math.isnan(text.oc_answer_score(full("B"), solution, "a prompt"))
    assert math.isnan(text.qa_answer_score(full("B"), solution, "OE"))


def test_multiline_answer_switch():
    completion = "<think>it is a cat</think><answer>\nred\ncar</answer>"
    assert text.qa_accuracy(completion, "red car", "OE") == 1.0
    # Released: the tags are deleted instead, which here leaves the same words ...
    assert text.qa_accuracy(completion, "red car", "OE", multiline_answer=False) == 1.0
    # ... but not when something stands around the block.
    loud = "Well, " + completion
    assert text.qa_accuracy(loud, "red car", "OE") == 1.0
    assert text.qa_accuracy(loud, "red car", "OE", multiline_answer=False) == pytest.approx(2 / 3)
    assert answers.find_tagged_answer("<answer>a\nb</answer>", multiline=False) is None


def test_soft_jaccard_by_hand():
    assert text.soft_jaccard("a red car", "a red car") == 1.0
    assert text.soft_jaccard("A car", "a CAR car") == 1.0
    assert text.soft_jaccard("a b", "b c d") == pytest.approx(1 / 4)
    # cars/car: difflib 2 * 3 / 7; overlap 1 + 6/7 of 2 + 2 words
    overlap = 1 + 6 / 7
    assert text.soft_jaccard("red cars", "red car") == pytest.approx(overlap / (4 - overlap))
    assert text.soft_jaccard("cat", "car") == 0.0  # 2/3 is below 0.8
    assert text.soft_jaccard("abcde", "abcdf") == pytest.approx(0.8 / 1.2)  # 0.8 counts
    assert text.soft_jaccard("", "") == text.soft_jaccard(None, "a") == 0.0


@pytest.mark.parametrize(
    ("answer", "solution", "by_value", "by_letters"),
    [
        ("35", "3.5", 0, 2 / 3),
        ("seventy", "seven", 0, 5 / 7),
        ("10:30", "10:31", 0, 2 / 3),
        ("3.5cm", "35cm", 0, 0.8),
        ("3.50 cm", "3.5 cm", 1, 0.8667),
        ("(2) cats", "2 cats", 1, 1 / 3),
        ("cars", "car", 0.75, 0.75),
    ],
)
def test_numbers_in_open_answers_are_compared_by_value(answer, solution, by_value, by_letters):
    assert oe(answer, solution) == pytest.approx(by_value)
    assert oe(answer, solution, numbers_by_value=False) == pytest.approx(by_letters, abs=1e-3)


def test_each_word_is_matched_once():
    # Both on the left resemble the one on the right; only one may take it.
    overlap = 2 * 5 / 11
    assert text.soft_jaccard("horses horsey", "horse") == pytest.approx(overlap / (3 - overlap))


WORDS = st.lists(st.text("abc ", max_size=6), max_size=6).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS)
def test_soft_jaccard_is_a_similarity(first, second):
    score = text.soft_jaccard(first, second)
    assert 0.0 <= score <= 1.0
    assert text.soft_jaccard(" ".join(reversed(first.split())), second) == score
    if first.split():
        assert text.soft_jaccard(first, first) == 1.0


def test_soft_jaccard_does_not_depend_on_the_hash_seed():
    code = (
        "from corl_jax.rewards.text import soft_jaccard as s;"
        "print(repr(s('horses horsey horsed ponies pony', 'horse horset ponyy ponie')))"
    )
    root = str(Path(text.__file__).parents[2])
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


# --- classes, and the policy's answers about its own images ----------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Red Fox", 1.0), ("a red fox", 0.9), ("red foxes.", 0.9), ("fox", 0.45), ("wolf", 0.0),
        ("a big red fox", 0.6), ("", 0.0), (" ", 0.0), ("a", 0.0), ("the", 0.0), ("ox", 0.0),
        ("red", 0.45), ("fox red", 0.0), ("firefox", 0.0),
        ("not a red fox", 0.0), ("no red fox", 0.0), ("it isn't a red fox", 0.0),
        ("red fox or wolf", 0.0), ("wolf, red fox", 0.0), ("wolf/red fox", 0.0),
        ("wolf cat cow red fox owl pig", 0.9 * 2 / 7),
    ],
)  # fmt: skip
def test_oc_accuracy(answer, expected):
    assert text.oc_accuracy(full(answer), "<answer>red fox</answer>") == pytest.approx(expected)
    assert text.oc_accuracy(answer, "red fox") == pytest.approx(expected)


@pytest.mark.parametrize("classes", range(2, 9))
def test_naming_classes_never_earns_more_than_choosing_one(classes):
    names = ["cat", "dog", "owl", "cow", "pig", "hen", "fox", "elk"][:classes]
    for hedge in (" ".join(names), ", ".join(names), " or ".join(names), "|".join(names)):
        assert text.oc_accuracy(full(hedge), "dog") < 1 / classes
        assert text.oc_accuracy(full(hedge), "dog", substrings=True) == 0.9


def test_classes_as_released():
    for answer in ("fox", "red fox or wolf", "not a red fox", "e", "firefox", "red foxglove"):
        held = answer in "red fox" or "red fox" in answer
        score = text.oc_accuracy(full(answer), "red fox", substrings=True)
        assert score == (0.9 if held else 0.0)
    assert text.oc_accuracy("<think>dog</think>cat", "dog", answer_in_thoughts=True) == 0.0
    both = {"answer_in_thoughts": True, "substrings": True}
    assert text.oc_accuracy("<think>dog</think>cat", "dog", **both) == 0.9


def test_a_class_may_hold_what_would_deny_or_leave_a_choice():
    assert text.oc_accuracy(full("salt and pepper"), "salt and pepper") == 1.0
    assert text.oc_accuracy(full("the salt and pepper"), "salt and pepper") == 0.9
    assert text.oc_accuracy(full("A."), "a") == 0.9


@pytest.mark.parametrize(
    ("answer", "tagged", "untagged"),
    [
        ("Red fox", 1.0, 0.8),
        ("a red fox", 0.9, 0.7),
        ("fox", 0.45, 0.35),
        ("snow", 0.5, 0.3),
        ("s", 0.0, 0.0),
        ("red fox or wolf", 0.0, 0.0),
        ("UNK", 0.2, 0.0),
        ("wolf", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_oc_answer_score(answer, tagged, untagged):
    prompt = "A red fox in the Snow"
    assert text.oc_answer_score(full(answer), "red fox", prompt) == tagged
    assert text.oc_answer_score(answer, "red fox", prompt) == untagged


def test_oc_answer_score_without_a_prompt():
    assert text.oc_answer_score(full("snow"), "red fox", None) == 0.0
    assert text.oc_answer_score(None, "red fox", "p") == 0.0
    assert text.oc_answer_score(full("a fox or not"), "fox", "p", substrings=True) == 0.9
    assert text.oc_answer_score(full("s"), "red fox", "in snow", substrings=True) == 0.5


def test_qa_answer_score():
    score = text.qa_answer_score
    assert score(full("B. burning"), "B", "MC", PROBLEM) == 1.0
    assert score("The option is B", "B", "MC", PROBLEM) == 0.8
    assert score(full("A"), "B", "MC", PROBLEM) == score("A", "B", "MC", PROBLEM) == 0.0
    assert score(full("UNK"), "B", "MC", PROBLEM) == score("unk.", "B", "MC", PROBLEM) == 0.2
    assert score(full("red"), "red car", "OE") == 0.5
    assert score("red", "red car", "OE") == pytest.approx(0.4)


# --- detection ------------------------------------------------------------------------------


def boxes(*entries):
    return full(str([{"Position": list(p), "Confidence": c} for *p, c in entries]))


TRUTH = [(0, 0, 100, 100), (200, 200, 300, 300)]


def test_iou():
    assert text.iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert text.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert text.iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    assert text.iou((5, 5, 5, 5), (0, 0, 10, 10)) == 0.0
    assert text.iou((10, 10, 0, 0), (0, 0, 10, 10)) == 0.0  # corners swapped: no box


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (boxes((0, 0, 100, 100, 0.9), (200, 200, 300, 300, 0.8)), 1.0),
        (boxes((0, 0, 100, 100, 0.9)), 2 / 3),  # one missed
        (boxes((0, 0, 100, 80, 0.9), (200, 200, 300, 300, 0.8)), 0.9),  # IoU 0.8 and 1
        (boxes((0, 0, 100, 40, 0.9)), 0.0),  # IoU 0.4
        (boxes((0, 0, 100, 100, 0.9), (0, 0, 100, 100, 0.8)), 0.5),  # the second has no box left
        (boxes((0, 0, 100, 80, 0.2), (0, 0, 100, 100, 0.9)), 0.5),  # the sure one is served first
        (boxes((0, 0, 100, 80, 0.9), (0, 0, 100, 100, 0.2)), 0.4),
        (boxes(), 0.0),
        (full("two boxes"), 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_od_answer_score(answer, expected):
    assert text.od_answer_score(answer, TRUTH) == pytest.approx(expected)


def test_od_solutions():
    answer = boxes((0, 0, 100, 100, 0.9))
    assert text.od_answer_score(answer, boxes((0, 0, 100, 100, 1.0))) == 1.0
    assert text.od_answer_score(boxes(), []) == 1.0
    assert text.od_answer_score(answer, []) == 0.0
    assert math.isnan(text.od_answer_score(answer, None))
    assert math.isnan(text.od_answer_score(answer, "<answer>a cat</answer>"))


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os')", "[{'Position': [1, 2, 3]}]", "[{'Position': [1, 2, 3, 'x']}]",
        "[{'Confidence': 1}]", "[{'Position': [1, 2, 3, 4], 'Confidence': 2}]", "{}", "3", "[",
        "[{'Position': [1, 2, 3, 1e999]}]", "[{'Position': [1, 2, 3, 1" + "0" * 400 + "]}]",
        "[" * 4000, "-" * 4000 + "1", "(" * 150 + ")" * 150, "{[]: 1}", "[{{}: 1}]",
        "[{'Position': [1, 2, 3, 4], 'Confidence': 1e}]", "\\", "[1" + ", 1" * 2000 + "]",
        "[{'Position': [1, 2, 3, 4]}," * 65 + "]", "[{'Position': {1, 2, 3, 4}}]", "[...]",
        str([{"Position": [1, 2, 3, 4]}] * 65), "[{'Position': [1, 2, 3, 4j]}]",
    ],
)  # fmt: skip
def test_unreadable_detections(answer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answers.parse_detections(answer) is None


def test_readable_detections():
    found = answers.parse_detections(' [{"Position": (1, 2.5, -3, 4e1)}]\n')
    assert found == [answers.Detection((1.0, 2.5, -3.0, 40.0), 1.0)]
    assert answers.parse_detections("[]") == []


# --- any string -----------------------------------------------------------------------------

TAG_SOUP = st.lists(
    st.one_of(
        st.sampled_from([*text.TAGS, "A", "B", "(B)", "answer is ", "Answer:", "two", "\n", ". "]),
        st.text(string.printable, max_size=8),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(TAG_SOUP, TAG_SOUP, st.sampled_from(["MC", "OE"]))
@example("point", "0", "MC")
def test_every_reward_takes_any_string(completion, solution, qa_type):
    scores = [
        text.format_reward(completion),
        text.format_tag_reward(completion),
        text.oc_accuracy(completion, solution),
        text.oc_answer_score(completion, solution, completion),
        text.qa_answer_score(completion, solution, qa_type, PROBLEM),
        text.od_answer_score(completion, solution),
    ]
    for multiline, choice, mended in itertools.product([True, False], repeat=3):
        scores.append(
            text.qa_accuracy(
                completion,
                solution,
                qa_type,
                problem=PROBLEM,
                multiline_answer=multiline,
                answer_in_thoughts=not mended,
                numbers_by_value=mended,
                mc=choice,
            )
        )
        scores.append(
            text.oc_accuracy(
                completion,
                solution,
                multiline_answer=multiline,
                answer_in_thoughts=choice,
                substrings=not mended,
            )
        )
    assert all(math.isnan(score) or 0.0 <= score <= 1.0 for score in scores)


@pytest.mark.parametrize(
    "completion",
    [
        "<think>" + "</think><answer>" * 400,
        "<think>" * 2000,
        "**" * 4000,
        "A " * 4000,
        "(" * 4000,
        "the answer" * 800,
        "answer" + " " * 8000 + "x",
        "'a' " * 2000,
        "\n" * 4000 + "A.",
        "one hundred and " * 1000,
        "<think></think>" * 1000,
        " ".join(map(str, range(2000))),
    ],
)
def test_hostile_completions_are_scored(completion):
    """Each takes milliseconds; a pattern that backtracks would take minutes, or never end."""
    start = time.process_time()
    text.format_reward(completion)
    for qa_type in ("MC", "OE"):
        text.qa_accuracy(completion, "<answer>B</answer>", qa_type, problem=PROBLEM)
    text.soft_jaccard("a small red car on a long road", completion)
    text.oc_accuracy(completion, "a small red car")
    text.oc_accuracy(completion, completion[: len(completion) // 2])
    assert time.process_time() - start < 60
