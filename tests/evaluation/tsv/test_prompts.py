"""The prompts of VLMEvalKit's Janus, word for word, and CoRL's instruction."""

from __future__ import annotations

import pytest

from corl_jax.data.instructions import MCQ, VQA
from corl_jax.evaluation.tsv.prompts import SYSTEM_PROMPT, write_question

ROW = {"question": "Which?", "A": "red", "B": 5.0, "D": "blue", "C": None}


def write(kind, row=ROW, name="X", style="vlmevalkit", **options):
    return write_question(row, kind, name, style, **options)


@pytest.mark.parametrize(
    ("kind", "row", "text"),
    [
        (
            "choice", ROW,
            "\nWhich?\nA. red\nB. 5.0\nD. blue\n\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        (
            "mmmu", {**ROW, "hint": "Look."},
            "\nHint: Look.\nWhich?\nA. red\nB. 5.0\nD. blue\n\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        ("mmmu", {"question": "<image 1> Why?"},
         "\n<image 1> Why?\nAnswer the question directly. "),
        ("yes_no", {"question": "Is it? Please answer yes or no."},
         "\nIs it? Please answer yes or no.\n"
         "Answer the question using a single word or phrase."),
        ("pope", {"question": "Is it? Please answer yes or no."},
         "\nIs it?\nAnswer the question using a single word or phrase."),
        ("mmvet", {"question": "Why?"}, "\nWhy?"),
        ("mathvista", {"question": "Why?"}, "Why?"),
    ],
)  # fmt: skip
def test_vlmevalkits_prompts(kind, row, text):
    question = write(kind, row)
    assert question.text == text
    assert question.system_prompt == (SYSTEM_PROMPT if kind == "mmvet" else "")


def test_open_data_sets_have_their_own_prompts():
    row = {"question": "Why?", "query_cot": "Think. Why?"}
    assert write("mathverse", row, "MathVerse_MINI_Vision_Only_cot").text == "Think. Why?"
    assert write("mathverse", row, "MathVerse_MINI").text == "Why?"
    short = "Why?\nAnswer the question using a single word or phrase."
    assert write("open", row, "TextVQA_VAL").text == short
    assert write("open", row, "LLaVABench").text == "Why?"
    assert write("open", row, "mine").text == "\nWhy?\nAnswer the question directly. "


def test_corls_instruction():
    listed = "Which?\nOptions:\nA. red\nB. 5.0\nD. blue"
    assert write("choice", style="corl").text == "\n" + MCQ.format(question=listed)
    assert write("choice", style="corl", instruct=False).text == "\n" + listed
    hinted = {"question": "Why {?}", "hint": "Look."}
    expected = "\n" + VQA.format(question="Hint: Look.\nWhy {?}")
    assert write("pope", hinted, style="corl").text == expected
    assert write("mmvet", hinted, style="corl").system_prompt == ""
