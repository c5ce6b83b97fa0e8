"""Reads the chosen option out of an answer, by VLMEvalKit's rules in three of its versions.

The rules are reproduced with their defects, because scores are compared with published ones.
Source: VLMEvalKit `vlmeval/utils/matching_util.py` at 2026-08 (e8e78f05), 2026-05 (0bccf452) and
2025-05 (abe926ee).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

FAILED_CALL = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_OPTION = "Z"
"""The letter of an answer that refuses to choose."""
WORD_BREAKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 4
QUANTIFIER_WORDS = 3
# Without a word boundary, and in any case: "answer is a ..." and "answer is dark" match too.
STATED_ANSWER = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


@dataclasses.dataclass(frozen=True)
class Matcher:
    """A version of the rules; each field is a rule that came with a later version."""

    only_last_words: bool  # a letter counts among the last 4 words; else anywhere
    short_answers: bool  # an option's text counts in answers of up to twice the options' length
    stated_answer: bool  # "answer is X" counts where no letter does


MATCHERS = {
    "2026-08": Matcher(only_last_words=True, short_answers=True, stated_answer=True),
    "2026-05": Matcher(only_last_words=True, short_answers=True, stated_answer=False),
    "2025-05": Matcher(only_last_words=False, short_answers=False, stated_answer=False),
}
DEFAULT_MATCHER = "2026-08"

Match = str | Literal[False]
"""The letter of an option, NO_OPTION for a refusal, or False if no rule reads the answer."""


def infer_choice(
    answer: Any, choices: dict[str, Any], matcher: Matcher, *, verbose: bool = False
) -> Match:
    """Returns the letter of the option that an answer chooses: by its letter, else by its text.

    `choices` maps letters to options; their texts may become lower case. `verbose` is VLMEvalKit's
    VERBOSE: an "A" among more than 3 words is then no letter.
    """
    answer = str(answer)
    letter = infer_letter(answer, choices, matcher, verbose=verbose)
    return letter or infer_text(answer, choices, matcher)


def infer_letter(
    answer: str, choices: dict[str, Any], matcher: Matcher, *, verbose: bool = False
) -> Match:
    """Returns the letter that an answer names as a word, or behind "answer is"."""
    if FAILED_CALL in answer:
        return False
    if any(refusal in answer for refusal in REFUSALS):
        return NO_OPTION
    words = answer.translate(WORD_BREAKS).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1:
        if verbose and "A" in words and len(words) > QUANTIFIER_WORDS:
            return False
        # The place of the first occurrence, also where the letter stands at the end again.
        if not matcher.only_last_words or words.index(letters[0]) >= len(words) - LAST_WORDS:
            return letters[0]
    elif not letters and NO_OPTION in words:
        return NO_OPTION
    stated = STATED_ANSWER.search(answer) if matcher.stated_answer else None
    letter = stated.group(1).upper() if stated else ""
    return letter if letter in choices else False


def infer_text(answer: str, choices: dict[str, Any], matcher: Matcher) -> Match:
    """Returns the letter of the only option whose text is in the answer, in any case.

    Makes the texts of `choices` lower case, in place, as VLMEvalKit does.
    """
    answer = answer.lower()
    length = sum(len(str(text)) for text in choices.values())
    if matcher.short_answers and len(answer) > 2 * length:
        return False
    for letter, text in choices.items():
        choices[letter] = str(text).lower()
    letters = [letter for letter, text in choices.items() if text in answer]
    return letters[0] if len(letters) == 1 else False
