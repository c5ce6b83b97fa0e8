"""Answers that are read by the rules of VLMEvalKit and MMMU, defects included."""

from __future__ import annotations

import pytest

from corl_jax.evaluation.matching import mmmu, yes_no
from corl_jax.evaluation.matching.answer_tags import split_answer
from corl_jax.evaluation.matching.matchers import MATCHERS, infer_choice, infer_text

BUS = {"A": "a red car", "B": "a blue bus", "C": "a green bicycle", "D": "none of these"}
VERSIONS = ("2025-05", "2026-05", "2026-08")
LONG = "Correct answer is **B**. Here is why: the others do not fit the picture at all."


def read_in_all(answer, choices=BUS, **options):
    return [infer_choice(answer, dict(choices), MATCHERS[v], **options) for v in VERSIONS]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "BBB"),
        ("(B)", "BBB"),
        ("B. a blue bus", "BBB"),
        ("<answer> B </answer>", "BBB"),
        ("<answer>(B)</answer>", "BBB"),
        ("<answer>a blue bus</answer>", "BBB"),
        ("<answer>B</answer>", "---"),
        ("<think>The bus is blue.</think><answer>B</answer>", "---"),
        ("<think>So the answer is A.</think><answer>B</answer>", "AAA"),
        ("<think>The answer is a bus.</think><answer>B</answer>", "--A"),
        ("The answer is a blue bus.", "BBA"),
        ("The answer is A or B", "--A"),
        (LONG, "B-B"),
        ("The answer is dark", "--D"),
        ("the answer is clearly this", "--C"),
        # The first occurrence counts, and must be among the last four words.
        ("B one two three four B", "B--"),
        ("x B one two three", "BBB"),
        ("B one two three four", "B--"),
        ("I chose Z", "ZZZ"),
        ("Z or B", "BBB"),
        ("b", "---"),
        ("a blue bus or a red car", "---"),
        ("A BLUE BUS", "AAA"),  # an article is a letter too
        ("Failed to obtain answer via API.", "---"),
        ("Cannot determine the answer, but B", "ZZZ"),
        ("I'm sorry, but without the image provided I guess B", "ZZZ"),
        ("I can't process this file.", "ZZZ"),
        ("Sorry, I can't help with images of people yet. B", "ZZZ"),
    ],
)
def test_choices_are_read_as_each_version_reads_them(answer, expected):
    assert ["-" if letter is False else letter for letter in read_in_all(answer)] == list(expected)


def test_a_failed_call_is_no_letter_but_may_match_a_text():
    """The text rule still reads it, as in the original."""
    options = {"A": "api", "B": "something else that is long enough for the limit"}
    assert read_in_all("Failed to obtain answer via API.", options) == ["A"] * 3


def test_the_text_rule_has_a_limit_of_length_since_august_2025():
    choices = {"A": "red", "B": "blue"}  # 14 characters at most
    assert read_in_all("it is blue ok!", choices) == ["B", "B", "B"]
    assert read_in_all("it is blue okay", choices) == ["B", False, False]


def test_the_text_rule_makes_the_callers_texts_lower_case_unless_the_answer_is_too_long():
    choices = {"A": "Red", "B": 5.0}
    assert infer_text("RED", choices, MATCHERS["2026-08"]) == "A"
    assert choices == {"A": "red", "B": "5.0"}
    choices = {"A": "Red"}
    assert infer_text("a long answer with red", choices, MATCHERS["2026-08"]) is False
    assert choices == {"A": "Red"}


def test_verbose_refuses_an_a_among_more_than_three_words():
    assert read_in_all("this is option A") == ["A", "A", "A"]
    assert read_in_all("this is option A", verbose=True) == [False] * 3
    assert read_in_all("option A it", verbose=True) == ["A"] * 3


def test_the_stated_answer_must_be_an_option():
    assert read_in_all("answer is D", {"A": "x", "B": "y"}) == [False] * 3
    assert infer_choice(None, {"A": "none", "B": "y"}, MATCHERS["2026-08"]) == "A"


# ---- yes or no


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("YES!", "Yes"),
        ("<answer>Yes</answer>", "Yes"),
        ("<think>There is no dog.</think><answer>Yes</answer>", "Unknown"),
        ("Yes, it is", "Yes"),
        ("yes,it", "Yes"),  # the comma becomes a space
        ("yes-no", "Unknown"),  # the hyphen becomes a space
        ("yes- no", "Unknown"),
        ("yes-it is- no way", "No"),  # a hyphen next to a space: all are deleted
        ("1,000 yes/maybe", "Unknown"),  # a comma between digits: all marks are deleted
        ("yes:", "Unknown"),  # no mark of the list
        ("**yes**", "Unknown"),
        ("yes.5", "Unknown"),  # a period before a digit stays
        ("", "Unknown"),
        ("maybe", "Unknown"),
        ("nan", "Unknown"),
    ],
)
def test_yes_and_no_are_read_with_the_punctuation_rules(answer, expected):
    assert yes_no.extract_yes_no(answer) == expected


def test_only_32_periods_are_removed():
    assert yes_no.remove_punctuation("." * 40) == "." * 8
    assert yes_no.extract_yes_no(". " * 32 + "yes.") == "Unknown"
    assert yes_no.extract_yes_no(". " * 31 + "yes.") == "Yes"


# ---- MMMU

OPTIONS = {"A": "Monet", "B": "Van Gogh", "C": "Dali"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("'B.'", None),  # the period is stripped before the quote behind it
        ("'B'", "B"),
        ("Answer: B", "B"),
        ("(A) or (C)", "C"),
        ("(A) B", "A"),  # letters in brackets come first
        ("B or A", "A"),
        ("b", None),
        ("Van Gogh", None),  # not more than five words
        ("I think it was painted by van gogh", "B"),
        ("It was Monet and not Dali or him", "C"),
        ("It is not clear to me at all", None),
        ("", None),
    ],
)
def test_mmmu_reads_choices(answer, expected):
    assert mmmu.parse_choice(answer, OPTIONS) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("The answer is 5", "5", True),
        ("The answer is 5.004", "5", True),
        ("5.01", "5", False),
        ("1,234.5", "1234.5", True),
        ("It equals 1e3", "1000", True),
        ("x = 12", "12", True),
        ("x = 12\nso y = 13", "12", False),  # the first line has no cue
        ("x is 12\nso y = 13", "12", True),
        ("It is a cat. So a dog", "cat", False),  # the last cue wins: the text is lower case
        ("a large dog", "dog", True),
        ("dogma", "dog", True),
        ("b", "b", True),
        ("bc", "b", False),  # " b" and "b " are in no word that goes on
        ("result is b now", "b", True),
        ("-3", "-3", True),
        ("", "x", False),
        ("12%", "12", True),
    ],
)
def test_mmmu_reads_open_answers(answer, truth, right):
    assert mmmu.is_right_open(truth, mmmu.parse_open(answer)) is right


def test_mmmu_takes_any_of_several_truths():
    values = mmmu.parse_open("The result is 0.5")
    assert mmmu.is_right_open(["1/2", "0.50"], values)
    assert not mmmu.is_right_open(["1/2"], values)
    assert mmmu.is_right_choice(["A", "B"], "B") and not mmmu.is_right_choice("A", "B")
    assert not mmmu.is_right_choice("A", None)


# ---- tags


@pytest.mark.parametrize(
    ("text", "prediction", "thinking"),
    [
        ("<think>So A.</think><answer>B</answer>", "B", "<think>So A.</think>"),
        ("<answer>A</answer> no: <answer> B </answer>.", "B", "<answer>A</answer> no:\n."),
        ("<think>x</think><answer>B", "B", "<think>x</think>"),
        ("<answer>B</answer><answer></answer>", "B", "<answer></answer>"),
        ("<answer></answer>", "<answer></answer>", ""),
        ("plain B", "plain B", ""),
        ("<Answer>: <<B>>", "<Answer>: <<B>>", ""),
    ],
)
def test_the_last_answer_tag_is_the_prediction(text, prediction, thinking):
    parts = split_answer(text)
    assert (parts.prediction, parts.thinking) == (prediction, thinking)
    assert split_answer(text, "off").prediction == text
