"""Text rewards: strings -> one float.

The defaults mend the released code's quirks (Q numbers: docs/explained/released_code.md); a keyword
argument switches each released behaviour back on. NaN means that a reward does not apply to a row.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Sequence

from corl_jax.rewards import answers, numerals

FORMAT = re.compile(r"<think>.*?</think>[.\s]*<answer>.*?</answer>", re.DOTALL)
TAGS = answers.TAGS
MIN_WORD_RATIO = 0.8
UNKNOWN = "unk"
# t2i_oc: equal, contained, named in the prompt, unknown
OC_TAGGED = (1.0, 0.9, 0.5, 0.2)
OC_UNTAGGED = (0.8, 0.7, 0.3, 0.0)
QA_UNTAGGED = 0.8
QA_UNKNOWN = 0.2
OC_CONTAINED = 0.9
ARTICLES = frozenset({"a", "an", "the"})
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# What denies an answer, or leaves a choice of several.
_DENIAL_OR_CHOICE = re.compile(
    r"\b(?:not|no|non|never|none|neither|nor|nothing|cannot|without|except|or|and|either|maybe)\b"
    r"|n['’]t\b|[,;/|&]"
)

Box = Sequence[float]


def format_reward(
    completion: str | None, *, strip: bool = True, repeated_blocks: bool = False
) -> float:
    """1.0 if the whole completion is a think block and then an answer block, else 0.0.

    Only dots and white space may stand between the blocks, and each of the four tags once.
    Released behaviours: `strip=False`, white space around the completion spoils it (Q20);
    `repeated_blocks=True`, tags may stand within the blocks again.
    """
    completion = completion or ""
    if FORMAT.fullmatch(completion.strip() if strip else completion) is None:
        return 0.0
    return float(repeated_blocks or all(completion.count(tag) == 1 for tag in TAGS))


def format_tag_reward(completion: str | None) -> float:
    """0.125 for each of the four tags that occurs exactly once, in [0, 0.5]."""
    completion = completion or ""
    return 0.125 * sum(completion.count(tag) == 1 for tag in TAGS)


def qa_accuracy(
    completion: str | None,
    solution: str | None,
    qa_type: str | None,
    *,
    problem: str | None = None,
    multiline_answer: bool = True,
    answer_in_thoughts: bool = False,
    numbers_by_value: bool = True,
    mc: bool = True,
) -> float:
    """How right an answer is: 0 or 1 for multiple choice, a soft overlap in [0, 1] for open ends.

    `qa_type` is MC or OE in any usual spelling, null counts as OE; `problem` is the question
    with its options, by whose texts an answer without a letter is found. NaN without a solution.

    Released behaviours: `multiline_answer=False`, an answer block over several lines is not
    seen (Q21); `answer_in_thoughts=True`, one inside the thoughts counts;
    `numbers_by_value=False`, numbers are compared by their spelling; `mc=False`, multiple
    choice is scored as if it were open-ended (Q3).

    Raises:
        InputError: another type.
    Source: the released code.
    """
    kind = answers.read_question_type(qa_type)
    truth = answers.true_answer(solution or "", multiline_answer)
    if not truth:
        return math.nan
    prediction = answers.predicted_answer(completion or "", multiline_answer, answer_in_thoughts)
    if answers.safe_string_equal(prediction, truth, numbers_by_value):
        return 1.0
    if mc and kind == "MC":
        return float(_right_choice(prediction, truth, problem, numbers_by_value))
    return soft_jaccard(prediction.rstrip(".,!?"), truth, numbers_by_value)


def soft_jaccard(first: str | None, second: str | None, numbers_by_value: bool = False) -> float:
    """The overlap of two texts as sets of words, spelling variants counting in part; in [0, 1].

    Lower-cased words split at white space. Equal words count 1; each remaining word of the
    first text, in sorted order, takes the most similar remaining word of the second, if their
    difflib ratio is at least 0.8, and counts that ratio. Overlap / (n1 + n2 - overlap), 0 for
    two empty texts. `numbers_by_value`: "2.0" and "2" are one word, and no word with a digit
    and no number word resembles another. Also the text term of the cycle reward (prompt,
    caption).
    """
    words1, words2 = set((first or "").lower().split()), set((second or "").lower().split())
    if numbers_by_value:
        words1, words2 = (set(map(numerals.canonical_word, words)) for words in (words1, words2))
    equal = words1 & words2
    overlap = float(len(equal))
    rest1, rest2 = sorted(words1 - equal), sorted(words2 - equal)
    if numbers_by_value:
        rest1, rest2 = (
            [word for word in words if not numerals.is_by_value(word)] for words in (rest1, rest2)
        )
    for word in rest1:
        ratio, _, match = max(
            ((_word_ratio(word, other), -i, other) for i, other in enumerate(rest2)),
            default=(0.0, 0, ""),
        )
        if ratio >= MIN_WORD_RATIO:
            overlap += ratio
            rest2.remove(match)
    union = len(words1) + len(words2) - overlap
    return overlap / union if union else 0.0


def oc_accuracy(
    completion: str | None,
    solution: str | None,
    *,
    multiline_answer: bool = True,
    answer_in_thoughts: bool = False,
    substrings: bool = False,
) -> float:
    """How well an answer names a class: 1.0 equal, up to 0.9 if one is a part of the other.

    Without case; parts are whole words, see `contained_score`. An empty answer scores 0 (Q22).
    NaN without a solution. Released behaviours: `multiline_answer=False` and
    `answer_in_thoughts=True` as in `qa_accuracy`, but without an answer block the thoughts and
    all tags are compared too; `substrings=True`, 0.9 wherever one text holds the other.
    Source: the released code, common_cls.
    """
    truth = answers.true_answer(solution or "", multiline_answer).lower()
    if not truth:
        return math.nan
    completion = completion or ""
    prediction = answers.predicted_answer(completion, multiline_answer, answer_in_thoughts).lower()
    if answer_in_thoughts and answers.tagged_answer(completion, multiline_answer, True) is None:
        prediction = completion.strip().lower()
    if prediction == truth:
        return 1.0
    return OC_CONTAINED * contained_score(prediction, truth, substrings)


def contained_score(prediction: str, truth: str, substrings: bool = False) -> float:
    """How much of an answer is the true class, in [0, 1]: words of the shorter / of the longer.

    The words of the one must stand in the other as a phrase; articles and a plural s do not
    count. "fox" for "red fox" is 1/2, "dog cat owl" for "dog" 1/3: naming k classes never
    earns more than choosing one. An answer that denies or leaves a choice ("not a dog", "dog or
    cat", "dog, cat") is 0. `substrings` is the released rule: 1 if one text holds the other.
    Both texts in small letters.
    """
    if substrings:
        return float(bool(prediction) and (prediction in truth or truth in prediction))
    if set(_DENIAL_OR_CHOICE.findall(prediction)) - set(_DENIAL_OR_CHOICE.findall(truth)):
        return 0.0
    shorter, longer = sorted((_class_words(prediction), _class_words(truth)), key=len)
    size = len(shorter)
    phrases = (longer[place : place + size] for place in range(len(longer) - size + 1))
    if not shorter or not any(all(map(_is_same_word, shorter, phrase)) for phrase in phrases):
        return 0.0
    return size / len(longer)


def _class_words(text: str) -> list[str]:
    words = _WORD.findall(text)
    # Without one of them "a" is a class of its own, as of letters.
    return [word for word in words if word not in ARTICLES] or words


def _is_same_word(first: str, second: str) -> bool:
    shorter, longer = sorted((first, second), key=len)
    return longer in (shorter, f"{shorter}s", f"{shorter}es")


def oc_answer_score(
    answer: str | None, solution: str | None, prompt: str | None, *, substrings: bool = False
) -> float:
    """t2i_oc: how well what the policy sees in its own image names the class it should show.

    `answer` is the policy's answer about the generated image, `prompt` the caption it was drawn
    from. With an answer block 1.0 equal, 0.9 contained, 0.5 a part of the prompt, 0.2 for "UNK";
    without one 0.8, 0.7, 0.3, 0. What is contained earns the share that `contained_score` says,
    and a part of the prompt is a phrase of it; `substrings` is the released rule, which compares
    letters. NaN without a solution.
    Source: the released code; the released code lower-cases first and never sees its "UNK".
    """
    truth = answers.true_answer(solution or "").lower()
    if not truth:
        return math.nan
    answer = answer or ""
    tagged = answers.tagged_answer(answer) is not None
    equal, contained, in_prompt, unknown = OC_TAGGED if tagged else OC_UNTAGGED
    prediction = answers.predicted_answer(answer).lower()
    if not prediction:
        return 0.0
    if prediction == truth:
        return equal
    if prediction == UNKNOWN:
        return unknown
    if share := contained_score(prediction, truth, substrings):
        return contained * share
    drawn = (prompt or "").lower()
    if substrings:
        return in_prompt if prediction in drawn else 0.0
    # Not more words than the prompt: then it is the prompt that is a part of the answer.
    is_part = len(_class_words(prediction)) <= len(_class_words(drawn))
    return in_prompt if is_part and contained_score(prediction, drawn) else 0.0


def qa_answer_score(
    answer: str | None, solution: str | None, qa_type: str | None, problem: str | None = None
) -> float:
    """t2i_qa: whether the policy can answer the prompt's question from its own image.

    The score of `qa_accuracy`, times 0.8 without an answer block; 0.2 for the honest "UNK".
    NaN without a solution.
    Source: the released code (given there for option letters; open answers follow the same scale).
    """
    answer = answer or ""
    score = qa_accuracy(answer, solution, qa_type, problem=problem)
    if math.isnan(score) or (score == 1.0 and answers.tagged_answer(answer) is not None):
        return score
    if answers.predicted_answer(answer).rstrip(".").lower() == UNKNOWN:
        return QA_UNKNOWN
    return score if answers.tagged_answer(answer) is not None else QA_UNTAGGED * score


def od_answer_score(
    answer: str | None, solution: str | Sequence[Box] | None, *, min_iou: float = 0.5
) -> float:
    """t2i_od: how well detected boxes match the true ones, in [0, 1].

    `answer` holds a list of {'Position', 'Confidence'}; `solution` is such a text
    or the true boxes (x1, y1, x2, y2). Detections, most confident first, take the free true box
    of the largest IoU, if that is at least `min_iou`; the score is
    2 * (sum of the matched IoUs) / (number detected + number true): an F1 in which a match is
    worth its IoU. Unreadable answers score 0; NaN without a readable solution. With nothing to
    detect, an empty list scores 1.
    Source: ours. The paper gives no such reward and the released function returns nothing.
    """
    truth = _true_boxes(solution)
    if truth is None:
        return math.nan
    found = answers.parse_detections(answers.predicted_answer(answer or ""))
    if found is None:
        return 0.0
    if not truth and not found:
        return 1.0
    total, free = 0.0, list(truth)
    for detection in sorted(found, key=lambda d: -d.confidence):
        overlaps = [iou(detection.position, box) for box in free]
        best = max(overlaps, default=0.0)
        if best >= min_iou:
            total += best
            free.pop(overlaps.index(best))
    return 2.0 * total / (len(found) + len(truth))


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 for a box without area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [max(b[2] - b[0], 0.0) * max(b[3] - b[1], 0.0) for b in (first, second)]
    if width <= 0 or height <= 0 or 0.0 in areas:
        return 0.0
    return width * height / (sum(areas) - width * height)


def _right_choice(prediction: str, truth: str, problem: str | None, numbers_by_value: bool) -> bool:
    """Whether a prediction chooses the true option (the released order of tests)."""
    options = answers.options_of(problem) | answers.options_of(truth)
    letter = _true_letter(truth, options, numbers_by_value)
    chosen = answers.option_letter(prediction)
    if letter is None:  # a solution in words that is no listed option
        texts = answers.options_of(prediction).values()
        return any(answers.safe_string_equal(text, truth, numbers_by_value) for text in texts)
    if len(prediction) <= 2 and chosen:
        return chosen == letter
    if chosen and re.search(rf"\b{letter}\b", prediction, re.IGNORECASE):
        return chosen == letter
    explicit = answers.explicit_letter(prediction)
    if explicit not in (None, letter):  # "B. choking" is wrong even if choking is A
        return False
    return answers.option_by_text(prediction, options) == letter


def _true_letter(truth: str, options: dict[str, str], numbers_by_value: bool) -> str | None:
    leading = answers.leading_letter(truth)
    if leading:
        return leading
    equal = [
        letter
        for letter, text in options.items()
        if answers.safe_string_equal(text, truth, numbers_by_value)
    ]
    return equal[0] if len(equal) == 1 else None


def _true_boxes(solution: str | Sequence[Box] | None) -> list[Box] | None:
    if solution is None:
        return None
    if not isinstance(solution, str):
        return [tuple(box) for box in solution]
    detections = answers.parse_detections(answers.true_answer(solution))
    return None if detections is None else [detection.position for detection in detections]


@functools.lru_cache(maxsize=65536)  # the answers of a group share most of their words
def _word_ratio(first: str, second: str) -> float:
    total = len(first) + len(second)
    if 2 * min(len(first), len(second)) < MIN_WORD_RATIO * total:  # no match could reach it
        return 0.0
    return difflib.SequenceMatcher(None, first, second).ratio()
