"""Reads answers from completions, before anything is scored.

Pure functions on strings: the answer block, equality of strings, option letters, detections.
Numbers are in `numerals`.
"""

from __future__ import annotations

import ast
import math
import re
from typing import NamedTuple

from corl_jax.rewards import numerals

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
ANSWER_ONE_LINE = re.compile(r"<answer>(.*?)</answer>")
THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
# Deleted from a completion without an answer block, as in the released code.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
STRAY = (*TAGS, "Answer:", "Answer")
OPTION_LINE = re.compile(r"^\s*([A-Na-n])\.\s*(.+?)\s*$", re.MULTILINE)
# "red", `red`, 'red': a single quote is no quotation mark inside a word ("don't").
QUOTED = re.compile(r"[\"“`]([^\"“”`]+)[\"”`]|(?<!\w)['‘]([^'‘’]+)['’](?!\w)")

# A capital is an option letter wherever a letter is expected. A small letter is one only before a
# mark or the end: "the answer is a dog" names no option.
_LETTER = r"\b(?:([A-N])(?![\w'’])|([a-n])(?=\s?(?:[.)\]}:;,*\"'`!]|$)))"
# Possessive quantifiers (*+) wherever another repetition follows: the time for a completion of
# marks and spaces must be linear in its length.
_GAP = r"[\s*\"'`(\[{:=#]*+"
LETTER_FORMS = (
    # "The answer is B", "Answer: (B)", "ans = option B"
    re.compile(
        rf"(?i:\b(?:answer|ans)\b){_GAP}(?i:(?:is|would be|should be|must be)\b)?{_GAP}"
        rf"(?i:(?:the )?(?:option|choice|letter)\b)?{_GAP}{_LETTER}"
    ),
    # "option B", "choice (B)"
    re.compile(rf"(?i:\b(?:option|choice|letter)\b){_GAP}{_LETTER}"),
    # "B.", "B) text", "(B) text", "**B**: text", at the start; not "e.g."
    re.compile(r"^[\s*\"'`(\[{]*+([A-Na-n])[\s*\"'`]*+[.):\]}](?![A-Za-z]\.)"),
    # nothing but a letter and marks: "b", "**B**", "'B'"
    re.compile(r"^[\W_]*([A-Na-n])[\W_]*$"),
    # "B, because ..", "B; C is wrong", "B - text", at the start; no list ("B, C", "B, or C") and
    # not the pronoun ("I, too, ..")
    re.compile(
        r"^[\s*\"'`(\[{]*+([A-HJ-Na-hj-n])[*\"'`)\]}]*+(?:\s*+[,;]|\s++[-–—]\s)"
        r"(?!\s*(?:(?:and|or)\s+)?[(\[*]*[A-Na-n][)\]*]*\s*(?:$|[,;/.\-–—]|(?:and|or)\b))"
    ),
    # "(B)", "[B]", "\boxed{B}", anywhere
    re.compile(r"[(\[{]\s*([A-N])\s*[)\]}]"),
    # "**B**", "'B'", "**B.**", anywhere
    re.compile(r"(?:\*\*|[\"'`“‘])\s*([A-N])\s*[.)]?\s*(?:\*\*|[\"'`”’])"),
    # a capital by itself, anywhere; "A" before a small word is the article, "I" the pronoun
    re.compile(
        r"(?<![\w.'’-])([B-HJ-N]|[AI](?! (?!(?:is|or|and|but|because|since|as)\b)[a-z]))(?![\w'’-])"
    ),
)
# "not B", "not option (B)": read as if it were not there
NEGATED = re.compile(
    r"(?i:\bnot (?:the )?(?:option |choice |letter |answer )?)[*\"'`(\[]*[A-N]\b[*\"'`)\]]*"
)
# Without the last form: a capital by itself, as in "vitamin C", is not explicit.
_EXPLICIT_FORMS = LETTER_FORMS[:7]
# "B." or "B. text" at the start, or nothing but the letter.
_LEADING_FORMS = LETTER_FORMS[2:4]


# Bounds for the parser and the matching of boxes: a completion can contain any text.
MAX_DETECTION_CHARACTERS = 4096
MAX_DETECTIONS = 64
_DETECTION_KEYS = re.compile(r"(['\"])(?:Position|Confidence)\1")
# What is allowed between the keys. Without other letters the literal contains no name, string or
# keyword, so parsing it has no side effects, not even warnings.
_DETECTION_REST = re.compile(r"[\[\](){}:,.\s\d+\-eE]*")


class Detection(NamedTuple):
    """One detected box: (x1, y1, x2, y2) in pixels of a 384 image, confidence in [0, 1]."""

    position: tuple[float, float, float, float]
    confidence: float


def find_tagged_answer(text: str, multiline: bool = True, in_thoughts: bool = False) -> str | None:
    """Returns the content of the first answer block outside the thoughts, None without a block.

    Released behaviours: `multiline=False` ignores a block with a line break (Q21);
    `in_thoughts=True` also reads a block inside the thoughts.
    """
    match = (ANSWER if multiline else ANSWER_ONE_LINE).search(
        text if in_thoughts else remove_thoughts(text)
    )
    return match.group(1).strip() if match else None


def read_answer(completion: str, multiline: bool = True, in_thoughts: bool = False) -> str:
    """Returns the answer block of a completion, or else its text without thoughts and tags."""
    tagged = find_tagged_answer(completion, multiline, in_thoughts)
    if tagged is not None:
        return tagged
    # The released code looks for pairs of tags only.
    text = THINK.sub("", completion) if in_thoughts else remove_thoughts(completion)
    for stray in STRAY:
        text = text.replace(stray, "")
    return text.strip()


def remove_thoughts(text: str) -> str:
    """Returns a text without its thoughts: from <think> to the last </think> before another.

    "<think>a <think>b</think> c</think>d" is "d". Thoughts without an end stay, because the answer
    may be inside them.
    """
    # By `find`, not by a regular expression: thoughts can contain "</think>", and a lazy pattern
    # would end at the first one.
    opened, closed = "<think>", "</think>"
    parts, position = [], 0
    while (begin := text.find(opened, position)) >= 0:
        first_end = text.find(closed, begin)
        if first_end < 0:
            break
        # "<think>a</think>b</think>c<think>d</think>": `first_end` is behind a, `end` behind b, and
        # `following` before d. The first pass removes all before c.
        following = text.find(opened, first_end)
        end = text.rfind(closed, first_end, following if following >= 0 else len(text))
        parts.append(text[position:begin])
        position = end + len(closed)
    return "".join([*parts, text[position:]])


def read_solution(solution: str, multiline: bool = True) -> str:
    """Returns the answer block of a solution column, or else the whole text."""
    # In thoughts too: people write solutions, and these have no misleading thoughts.
    tagged = find_tagged_answer(solution, multiline, in_thoughts=True)
    return solution.strip() if tagged is None else tagged


def are_equal(first: str, second: str, by_value: bool = True) -> bool:
    """Returns whether two texts are equal without case, outer spaces and final dots.

    Numbers compare by value: "two", "2" and "2.0" are equal, and "twenty-one" and "21". Only a
    whole text is a number ("two dogs" is none). `by_value=False` is the released behaviour: a text
    that is one of word2number's 33 words equals its digits, and nothing else is a number.
    """
    first, second = _normalise(first), _normalise(second)
    if first == second:
        return True
    if not by_value:
        return second == numerals.spell_digits(first) or first == numerals.spell_digits(second)
    number = numerals.read_number(first)
    return number is not None and number == numerals.read_number(second)


def read_options(problem: str | None) -> dict[str, str]:
    """Returns the options of a question, letter -> text; one option per line, as "A. text".

    If a letter occurs twice, the first counts.
    """
    options: dict[str, str] = {}
    for letter, text in OPTION_LINE.findall(problem or ""):
        options.setdefault(letter.upper(), text)
    return options


def find_letter(text: str) -> str | None:
    """Returns the option letter that a text chooses, None if it names none or several."""
    return _find_first_letter(text, LETTER_FORMS)


def find_explicit_letter(text: str) -> str | None:
    """Does the same as `find_letter`, but ignores other capitals in the text ("vitamin C")."""
    return _find_first_letter(text, _EXPLICIT_FORMS)


def find_leading_letter(text: str) -> str | None:
    """Returns the letter of "B", "(B)" or "B. text": the forms in which solutions are written."""
    return _find_first_letter(text, _LEADING_FORMS)


def find_option_by_text(text: str, options: dict[str, str]) -> str | None:
    """Returns the letter of the only option whose text is contained in `text`, else None.

    Quoted parts are read first. An option inside a longer option that is also contained ("red" in
    "dark red") does not count.
    """
    quoted = " \n ".join(double or single for double, single in QUOTED.findall(text))
    for part in (quoted, text):
        contained = {
            letter: option for letter, option in options.items() if _contains_phrase(option, part)
        }
        # A: "red", B: "dark red", part "it is dark red" -> both are contained, only B is longest.
        longest = [
            letter
            for letter, option in contained.items()
            if not any(o != option and _contains_phrase(option, o) for o in contained.values())
        ]
        if len(longest) == 1:
            return longest[0]
    return None


def parse_detections(text: str) -> list[Detection] | None:
    """Returns the detections of an answer, or None if it is not a list of them.

    Expected: [{'Position': [x1, y1, x2, y2], 'Confidence': number}, ...]; at most 64 entries and
    4096 characters. A missing confidence counts as 1.
    """
    text = text.strip()
    if len(text) > MAX_DETECTION_CHARACTERS:
        return None
    if not _DETECTION_REST.fullmatch(_DETECTION_KEYS.sub("", text)):
        return None
    try:
        entries = ast.literal_eval(text)
    # literal_eval's documentation names all of these for bad or deeply nested input.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    if not isinstance(entries, list) or len(entries) > MAX_DETECTIONS:
        return None
    detections = [box for entry in entries if (box := _read_detection(entry)) is not None]
    return detections if len(detections) == len(entries) else None


def _read_detection(entry: object) -> Detection | None:
    if not isinstance(entry, dict) or not {"Position"} <= set(entry) <= {"Position", "Confidence"}:
        return None
    position, confidence = entry["Position"], entry.get("Confidence", 1.0)
    if not isinstance(position, list | tuple) or len(position) != 4:
        return None
    if not all(_is_finite(value) for value in (*position, confidence)):
        return None
    if not 0.0 <= confidence <= 1.0:
        return None
    x1, y1, x2, y2 = (float(value) for value in position)
    return Detection((x1, y1, x2, y2), float(confidence))


def _is_finite(value: object) -> bool:
    # abs() before isfinite(): an integer too large for a float would raise there.
    return isinstance(value, int | float) and abs(value) < 1e9 and math.isfinite(value)


def _normalise(text: str) -> str:
    return text.rstrip(".").lower().strip()


def _find_first_letter(text: str, forms: tuple[re.Pattern[str], ...]) -> str | None:
    """Returns the letter of the first form that names exactly one letter, None without such a form.

    If "the answer is .." occurs several times, the last letter counts.
    """
    text = NEGATED.sub("", " ".join(text.split()))  # the forms know single spaces only
    for form in forms:
        letters = ["".join(match.groups("")).upper() for match in form.finditer(text)]
        # A completion that corrects itself says "the answer is" twice: "the answer is A .. no, the
        # answer is B" chooses B.
        if letters and (form is LETTER_FORMS[0] or len(set(letters)) == 1):
            return letters[-1]
    return None


def _contains_phrase(phrase: str, text: str) -> bool:
    """Returns whether a text has the phrase as whole words, without case, and not after "not"."""
    # Lookarounds, because \b does not match beside a mark, with which a phrase may begin: "(red)".
    phrase = _normalise(phrase)
    return bool(phrase) and bool(
        re.search(rf"(?<!\w)(?<!\bnot ){re.escape(phrase)}(?!\w)", text, re.IGNORECASE)
    )
