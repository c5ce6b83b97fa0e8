"""Reads numbers in answers: digits and English number words, by value.

`read_number` follows our rules, `spell_digits` those of the released code.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from word2number import w2n

# "1,000" but not "1,00"; ".5" but not "5."; the minus sign may be U+2212.
_DIGITS = re.compile(r"[+\u2212-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
# Characters of digits, as int() refuses thousands of them, or words, as reading them recurses.
LONGEST_NUMBER = 64
_OPENING, _CLOSING = "\"'([", ".,;:!?\"')]"

# Largest first: "two hundred thousand" must split at "thousand".
_SCALES = ("billion", "million", "thousand", "hundred")
_WORDS = {word: value for word, value in w2n.american_number_system.items() if word != "point"}


def read_number(text: str) -> Fraction | None:
    """Returns the number that the whole text is, in digits or English words; None if it is none.

    In: "21", "1,000", "-3.50", "twenty-one", "one hundred and five", "three point five".
    None: "two dogs", "no one", "two and three", "3.5 cm".
    """
    text = text.strip().lower()
    if (number := _read_digits(text)) is not None:
        return number
    words = text.replace("-", " ").split()  # "twenty-one" -> ["twenty", "one"]
    if not 0 < len(words) <= LONGEST_NUMBER:
        return None
    if any(word not in w2n.american_number_system and word != "and" for word in words):
        return None
    return _read_words(tuple(words))


def _read_digits(text: str) -> Fraction | None:
    if len(text) > LONGEST_NUMBER or not _DIGITS.fullmatch(text):
        return None
    return Fraction(text.replace(",", "").replace("\u2212", "-"))


@functools.lru_cache(maxsize=4096)
def _read_words(words: tuple[str, ...]) -> Fraction | None:
    if "point" not in words:
        whole = _read_whole(words)
        return None if whole is None else Fraction(whole)
    place = words.index("point")
    before, digits = words[:place], words[place + 1 :]
    whole = _read_whole(before) if before else 0
    if whole is None or not digits or any(word not in w2n.decimal_words for word in digits):
        return None
    # ("three", "point", "one", "four"): whole 3, decimals "14" -> Fraction("3.14"). A Fraction is
    # exact, with any number of digits.
    decimals = "".join(str(_WORDS[word]) for word in digits)
    return Fraction(f"{whole}.{decimals}")


def _read_whole(words: tuple[str, ...]) -> int | None:
    """Returns the whole number of words: "two hundred and five" is 205, "two three" is None."""
    for scale in _SCALES:
        if scale not in words:
            continue
        place, size = words.index(scale), _WORDS[scale]
        before, after = words[:place], words[place + 1 :]
        if after[:1] == ("and",):
            after = after[1:]
            if not after:
                return None
        # "two thousand and five": before ("two",) is 2, after ("five",) is 5 -> 2 * 1000 + 5.
        times = _read_whole(before) if before else 1
        rest = _read_whole(after) if after else 0
        # "fifteen hundred" is used, "two thousand thousand" is not.
        most = 100 if scale == "hundred" else 1000
        if times is None or rest is None or not 0 < times < most or rest >= size:
            return None
        return times * size + rest
    values = [_WORDS[word] for word in words if word in _WORDS]
    if len(values) < len(words):  # an "and" that joins nothing
        return None
    if len(values) == 1:
        return values[0]
    # "twenty one" is 21; "one twenty" and "twenty ten" are no numbers.
    if len(values) == 2 and values[0] in range(20, 100, 10) and values[1] in range(1, 10):
        return values[0] + values[1]
    return None


def spell_digits(text: str) -> str | None:
    """Returns the digits of a text that is one of word2number's 33 words, else None: "two" -> "2".

    Source: the released code, which never converts a longer text.
    """
    return str(w2n.word_to_num(text)) if text in w2n.american_number_system else None


def normalise_word(word: str) -> str:
    """Returns a word with digits written in one way: "2.0", "2," and "(2)" are "2".

    Number words stay as they are: "no one is there" contains no number.
    """
    for candidate in (word, word.lstrip(_OPENING).rstrip(_CLOSING)):
        if (number := _read_digits(candidate)) is not None:
            return str(number)
    return word


def is_numeric_word(word: str) -> bool:
    """Returns whether a word has a digit or is a number word."""
    # The caller does not compare such words by spelling, which misleads: "35" and "3.5" have
    # similar spellings, as do "10:30" and "10:31", "seven" and "seventy".
    return any(letter.isdigit() for letter in word) or read_number(word) is not None
