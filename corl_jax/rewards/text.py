"""Scores texts: strings -> one float. NaN means that the reward does not apply to a row.

The defaults correct known bugs of the released code (Q numbers: docs/explained/released_code.md). A
keyword argument switches each released behaviour on.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Sequence

from corl_jax.data.column_values import read_question_type
from corl_jax.rewards import answers, numerals

# Between the blocks only dots and white space, as in the released code.
FORMAT = re.compile(r"<think>.*?</think>[.\s]*<answer>.*?</answer>", re.DOTALL)
TAGS = answers.TAGS
MIN_WORD_RATIO = 0.8
UNKNOWN = "unk"
# t2i_oc, scores of the released code: equal, contained, named in the prompt, unknown
OC_TAGGED = (1.0, 0.9, 0.5, 0.2)
OC_UNTAGGED = (0.8, 0.7, 0.3, 0.0)
QA_UNTAGGED = 0.8
QA_UNKNOWN = 0.2
OC_CONTAINED = 0.9
ARTICLES = frozenset({"a", "an", "the"})
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Words that deny an answer, or leave a choice.
_DENIAL_OR_CHOICE = re.compile(
    r"\b(?:not|no|non|never|none|neither|nor|nothing|cannot|without|except|or|and|either|maybe)\b"
    r"|n['’]t\b|[,;/|&]"
)

Box = Sequence[float]


def format_reward(
    completion: str | None, *, strip: bool = True, repeated_blocks: bool = False
) -> float:
    """Returns 1.0 if the completion is a think block and then an answer block, else 0.0.

    Only dots and white space may be between the blocks, and each of the four tags occurs once.
    Released behaviours: `strip=False`, white space around the completion gives 0 (Q20);
    `repeated_blocks=True`, tags may occur again inside the blocks.
    """
    completion = completion or ""
    # A full match alone accepts "<think><think></think><answer></answer>", hence the count.
    if FORMAT.fullmatch(completion.strip() if strip else completion) is None:
        return 0.0
    return float(repeated_blocks or all(completion.count(tag) == 1 for tag in TAGS))


def format_tag_reward(completion: str | None) -> float:
    """Returns 0.125 for each of the four tags that occurs exactly once, in [0, 0.5]."""
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
    """Scores an answer: 0 or 1 for multiple choice, a soft overlap in [0, 1] if open-ended.

    `qa_type` is MC or OE in any usual spelling; null counts as OE. `problem` is the question with
    its options, whose texts identify an answer without a letter. NaN without a solution.

    Released behaviours: `multiline_answer=False` ignores an answer block with several lines (Q21).
    `answer_in_thoughts=True` also reads a block inside the thoughts. `numbers_by_value=False`
    compares numbers by their spelling. `mc=False` scores multiple choice as open-ended (Q3).

    Raises:
        InputError: another type.
    Source: the released code.
    """
    kind = read_question_type(qa_type)
    truth = answers.read_solution(solution or "", multiline_answer)
    if not truth:
        return math.nan
    prediction = answers.read_answer(completion or "", multiline_answer, answer_in_thoughts)
    if answers.are_equal(prediction, truth, numbers_by_value):
        return 1.0
    if mc and kind == "MC":
        return float(_is_right_choice(prediction, truth, problem, numbers_by_value))
    return soft_jaccard(prediction.rstrip(".,!?"), truth, numbers_by_value)


def soft_jaccard(first: str | None, second: str | None, numbers_by_value: bool = False) -> float:
    """Computes the overlap of two texts as sets of words, in [0, 1]; similar words count in part.

    Words are lower-cased and split at white space. Equal words count 1. Each other word of the
    first text takes the most similar free word of the second text. Their difflib ratio counts if it
    is at least 0.8. The result is overlap / (n1 + n2 - overlap), 0 for two empty texts.
    `numbers_by_value`: "2.0" and "2" are one word; words with a digit and number words match only
    equal words. The cycle reward uses it too, with (prompt, caption).
    """
    # {red, fox} and {red, foxes, two}: red counts 1; fox and foxes have ratio 0.75, so they count
    # nothing -> 1 / (2 + 3 - 1).
    words1, words2 = set((first or "").lower().split()), set((second or "").lower().split())
    if numbers_by_value:
        words1, words2 = (set(map(numerals.normalise_word, words)) for words in (words1, words2))
    equal = words1 & words2
    overlap = float(len(equal))
    # Sorted: the released code iterates over sets, so its matches change with Python's hash seed.
    rest1, rest2 = sorted(words1 - equal), sorted(words2 - equal)
    if numbers_by_value:
        rest1, rest2 = (
            [word for word in words if not numerals.is_numeric_word(word)]
            for words in (rest1, rest2)
        )
    for word in rest1:
        # -i: of equally similar words the first one wins.
        ratio, _, match = max(
            ((_compute_word_ratio(word, other), -i, other) for i, other in enumerate(rest2)),
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
    """Scores the class of an answer: 1.0 if equal, up to 0.9 if one is a part of the other.

    Case does not matter. Parts are whole words, see `score_contained`. An empty answer scores 0
    (Q22). NaN without a solution. Released behaviours: `multiline_answer=False` and
    `answer_in_thoughts=True` as in `qa_accuracy`; `substrings=True` gives 0.9 if one text contains
    the other.
    Source: the released code, common_cls.
    """
    truth = answers.read_solution(solution or "", multiline_answer).lower()
    if not truth:
        return math.nan
    completion = completion or ""
    prediction = answers.read_answer(completion, multiline_answer, answer_in_thoughts).lower()
    # Without an answer block the released code compares the thoughts and all tags too.
    if (
        answer_in_thoughts
        and answers.find_tagged_answer(completion, multiline_answer, True) is None
    ):
        prediction = completion.strip().lower()
    if prediction == truth:
        return 1.0
    return OC_CONTAINED * score_contained(prediction, truth, substrings)


def score_contained(prediction: str, truth: str, substrings: bool = False) -> float:
    """Scores how much of an answer is the true class, in [0, 1]; both texts are in lower case.

    The score is the number of words of the shorter text over that of the longer. The shorter text
    must occur in the longer as a phrase; articles and a plural s are ignored. "fox" for "red fox"
    is 1/2. An answer that denies or leaves a choice ("not a dog", "dog or cat", "dog, cat") is 0.
    `substrings` is the released rule: 1 if one text contains the other.
    """
    if substrings:
        return float(bool(prediction) and (prediction in truth or truth in prediction))
    if set(_DENIAL_OR_CHOICE.findall(prediction)) - set(_DENIAL_OR_CHOICE.findall(truth)):
        return 0.0
    # A share of the words, so that naming k classes gives no more than choosing one: "dog cat owl"
    # for "dog" is 1/3.
    shorter, longer = sorted((_split_class(prediction), _split_class(truth)), key=len)
    size = len(shorter)
    phrases = (longer[place : place + size] for place in range(len(longer) - size + 1))
    if not shorter or not any(all(map(_is_same_word, shorter, phrase)) for phrase in phrases):
        return 0.0
    return size / len(longer)


def _split_class(text: str) -> list[str]:
    words = _WORD.findall(text)
    # If articles are the only words, they are the class: the letter "a", for example.
    return [word for word in words if word not in ARTICLES] or words


def _is_same_word(first: str, second: str) -> bool:
    shorter, longer = sorted((first, second), key=len)
    return longer in (shorter, f"{shorter}s", f"{shorter}es")


def oc_answer_score(
    answer: str | None, solution: str | None, prompt: str | None, *, substrings: bool = False
) -> float:
    """Scores the class that the scorer names for a generated image (t2i_oc).

    `answer` is the scorer's answer about the image, `prompt` the prompt of the image. With an
    answer block: 1.0 equal, 0.9 contained, 0.5 a part of the prompt, 0.2 for "UNK". Without a
    block: 0.8, 0.7, 0.3, 0. A contained class gets the fraction of `score_contained`. A part of the
    prompt is a phrase of it. `substrings` is the released rule, which compares letters. NaN without
    a solution.
    Source: the released code.
    """
    truth = answers.read_solution(solution or "").lower()
    if not truth:
        return math.nan
    answer = answer or ""
    tagged = answers.find_tagged_answer(answer) is not None
    equal, contained, in_prompt, unknown = OC_TAGGED if tagged else OC_UNTAGGED
    prediction = answers.read_answer(answer).lower()
    if not prediction:
        return 0.0
    if prediction == truth:
        return equal
    # The released code compares with "UNK" after lower-casing, so it never gives this score.
    if prediction == UNKNOWN:
        return unknown
    if share := score_contained(prediction, truth, substrings):
        return contained * share
    demanded = (prompt or "").lower()
    if substrings:
        return in_prompt if prediction in demanded else 0.0
    # With more words than the prompt, the prompt would be a part of the answer.
    is_part = len(_split_class(prediction)) <= len(_split_class(demanded))
    return in_prompt if is_part and score_contained(prediction, demanded) else 0.0


def qa_answer_score(
    answer: str | None, solution: str | None, qa_type: str | None, problem: str | None = None
) -> float:
    """Scores the scorer's answer to the row's question about a generated image (t2i_qa).

    The score is that of `qa_accuracy`, times 0.8 without an answer block; 0.2 for "UNK". NaN
    without a solution.
    Source: the released code, for option letters; open answers use the same scale.
    """
    answer = answer or ""
    score = qa_accuracy(answer, solution, qa_type, problem=problem)
    if math.isnan(score) or (score == 1.0 and answers.find_tagged_answer(answer) is not None):
        return score
    if answers.read_answer(answer).rstrip(".").lower() == UNKNOWN:
        return QA_UNKNOWN
    return score if answers.find_tagged_answer(answer) is not None else QA_UNTAGGED * score


def od_answer_score(
    answer: str | None, solution: str | Sequence[Box] | None, *, min_iou: float = 0.5
) -> float:
    """Scores how well detected boxes match the true boxes, in [0, 1] (t2i_od).

    `answer` contains a list of {'Position', 'Confidence'}. `solution` is such a text or the true
    boxes (x1, y1, x2, y2). The score is an F1 in which a match counts its IoU:
    2 * (sum of matched IoUs) / (number detected + number true). Unreadable answers score 0. An
    empty list scores 1 if there are no true boxes. NaN without a readable solution.
    Source: ours. The paper gives no such reward and the released function returns nothing.
    """
    truth = _read_true_boxes(solution)
    if truth is None:
        return math.nan
    detections = answers.parse_detections(answers.read_answer(answer or ""))
    if detections is None:
        return 0.0
    if not truth and not detections:
        return 1.0
    # Most confident first: each takes the free true box with the largest IoU, so that a second
    # detection of one object is a false one.
    total, free = 0.0, list(truth)
    for detection in sorted(detections, key=lambda d: -d.confidence):
        overlaps = [iou(detection.position, box) for box in free]
        best = max(overlaps, default=0.0)
        if best >= min_iou:
            total += best
            free.pop(overlaps.index(best))
    return 2.0 * total / (len(detections) + len(truth))


def iou(first: Box, second: Box) -> float:
    """Computes intersection over union of two boxes (x1, y1, x2, y2); 0 for a box without area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [max(b[2] - b[0], 0.0) * max(b[3] - b[1], 0.0) for b in (first, second)]
    if width <= 0 or height <= 0 or 0.0 in areas:
        return 0.0
    return width * height / (sum(areas) - width * height)


def _is_right_choice(
    prediction: str, truth: str, problem: str | None, numbers_by_value: bool
) -> bool:
    """Returns whether a prediction chooses the true option."""
    # The order of the tests is the released one. Of two options with one letter the solution's
    # counts: in `|` the right dict wins.
    options = answers.read_options(problem) | answers.read_options(truth)
    letter = _find_true_letter(truth, options, numbers_by_value)
    chosen = answers.find_letter(prediction)
    if letter is None:  # the solution is no option of the question
        texts = answers.read_options(prediction).values()
        return any(answers.are_equal(text, truth, numbers_by_value) for text in texts)
    if len(prediction) <= 2 and chosen:
        return chosen == letter
    if chosen and re.search(rf"\b{letter}\b", prediction, re.IGNORECASE):
        return chosen == letter
    explicit = answers.find_explicit_letter(prediction)
    if explicit not in (None, letter):  # "B. choking" is wrong even if choking is A
        return False
    return answers.find_option_by_text(prediction, options) == letter


def _find_true_letter(truth: str, options: dict[str, str], numbers_by_value: bool) -> str | None:
    leading = answers.find_leading_letter(truth)
    if leading:
        return leading
    equal = [
        letter
        for letter, text in options.items()
        if answers.are_equal(text, truth, numbers_by_value)
    ]
    return equal[0] if len(equal) == 1 else None


def _read_true_boxes(solution: str | Sequence[Box] | None) -> list[Box] | None:
    if solution is None:
        return None
    if not isinstance(solution, str):
        return [tuple(box) for box in solution]
    detections = answers.parse_detections(answers.read_solution(solution))
    return None if detections is None else [detection.position for detection in detections]


@functools.lru_cache(maxsize=65536)  # the answers of a group share most of their words
def _compute_word_ratio(first: str, second: str) -> float:
    total = len(first) + len(second)
    if 2 * min(len(first), len(second)) < MIN_WORD_RATIO * total:  # no match could reach it
        return 0.0
    return difflib.SequenceMatcher(None, first, second).ratio()
