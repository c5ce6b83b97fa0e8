"""Reads and checks answers by MMMU's own rules, which differ from VLMEvalKit's.

Source: MMMU-Benchmark/MMMU `mmmu/utils/eval_utils.py` (bb0b95a).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

OUTER_MARKS = ",.!?;:'"
MARKS = (":", ",", ".", "!", "?", ";", "'")
LONG_ANSWER_WORDS = 5
GUESS_SEED = 42
"""The seed of MMMU's random guesses."""
CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""Words behind which an answer may stand."""
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # scientific
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

Value = str | float


def parse_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter that an answer chooses; None where MMMU would guess at random.

    `options` maps each letter to its text. Of several, the one that occurs last wins.
    """
    for mark in OUTER_MARKS:  # one after the other: only the last can stand behind another
        answer = answer.strip(mark)
    answer = f" {answer} "
    for pattern in ("({})", " {} "):
        places = {letter: answer.rfind(pattern.format(letter)) for letter in options}
        if max(places.values(), default=-1) >= 0:
            return _take_last(places)
    if len(answer.split()) > LONG_ANSWER_WORDS:
        lower = answer.lower()
        places = {letter: lower.rfind(text.lower()) for letter, text in options.items()}
        if max(places.values(), default=-1) >= 0:
            return _take_last(places)
    return None


def parse_open(answer: str) -> list[Value]:
    """Returns the texts and numbers that an open answer may mean."""
    parts = _find_key_parts(answer)
    texts = parts + [
        number for part in parts for pattern in NUMBERS for number in pattern.findall(part)
    ]
    values = [value for text in texts for value in normalize(text)]
    return list(dict.fromkeys(values))


def is_right_choice(truth: str | Sequence[str], letter: str | None) -> bool:
    """Returns whether a letter is the true one, or one of several."""
    return letter == truth if isinstance(truth, str) else letter in truth


def is_right_open(truth: str | Iterable[str], values: Iterable[Value]) -> bool:
    """Returns whether a true answer is in one of the texts, or equals one of the numbers."""
    truths = [truth] if isinstance(truth, str) else list(truth)
    forms = [value for text in truths for value in normalize(text)]
    for value in values:
        if isinstance(value, str):
            if any(isinstance(other, str) and other in value for other in forms):
                return True
        elif value in forms:
            return True
    return False


def normalize(text: str) -> list[Value]:
    """Returns a number rounded to 2 decimals, or a text in lower case.

    A text of one character becomes two texts with a space, so that it matches no part of a word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _find_key_parts(answer: str) -> list[str]:
    """Returns, of each line, the shortest rest behind a cue; the whole answer if there is none."""
    answer = answer.strip().strip(".").lower()
    lines, parts = answer.split("\n"), []
    for number, line in enumerate(lines):
        # An equation counts in the last line alone.
        cues = (*CUES, "=") if number == len(lines) - 1 else CUES
        rests = [line.split(cue)[-1].strip() for cue in cues if cue in line]
        # A rest that is empty is replaced by the next one, whatever its length.
        shortest = ""
        for rest in rests:
            if not shortest or len(rest) < len(shortest):
                shortest = rest
        if shortest and shortest not in MARKS:
            parts.append(shortest)
    return parts or [answer]


def _take_last(places: Mapping[str, int]) -> str:
    # Of equal places the first letter, as numpy's argmax.
    return max(places, key=lambda letter: places[letter])
