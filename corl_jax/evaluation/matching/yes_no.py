"""Reads yes or no out of an answer, by VLMEvalKit's rules.

Source: VLMEvalKit `vlmeval/dataset/utils/yorn.py`, and the punctuation rules of the VQA challenge
in `vqa_eval.py`.
"""

from __future__ import annotations

import re

YES, NO, UNKNOWN = "Yes", "No", "Unknown"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA = re.compile(r"\d,\d")
# The original's look-behind is misspelt and never matches, so "3." loses its period as well.
PERIOD = re.compile(r"\.(?!\d)")
# The original passes the flag re.UNICODE, which is 32, as the number of replacements.
MAX_PERIODS = 32


def extract_yes_no(answer: str) -> str:
    """Returns YES or NO if an answer has exactly one of these words, else UNKNOWN."""
    words = remove_punctuation(answer.lower()).split()
    if ("yes" in words) == ("no" in words):
        return UNKNOWN
    return YES if "yes" in words else NO


def remove_punctuation(text: str) -> str:
    """Deletes punctuation that stands next to a space somewhere; the other becomes a space.

    A comma between digits makes all punctuation deleted. Periods before no digit are deleted.
    """
    deletes_all = DIGIT_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        # In the given text, not in the result: one mark's removal does not change another's rule.
        is_deleted = deletes_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_deleted else " ")
    return PERIOD.sub("", result, count=MAX_PERIODS)
