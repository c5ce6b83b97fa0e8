"""Text rewards: strings -> one float.

The defaults mend the released code's quirks (Q numbers: docs/released_code.md); a keyword
argument switches each released behaviour back on. NaN means that a reward does not apply to a row.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Sequence

from corl_jax.rewards import answers

FORMAT = re.compile(r"<think>.*?</think>[.\s]*<answer>.*?</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MIN_WORD_RATIO = 0.8
UNKNOWN = "unk"
# t2i_oc: equal, contained, named in the prompt, unknown
OC_TAGGED = (1.0, 0.9, 0.5, 0.2)
OC_UNTAGGED = (0.8, 0.7, 0.3, 0.0)
QA_UNTAGGED = 0.8
QA_UNKNOWN = 0.2
OC_CONTAINED = 0.9

Box = Sequence[float]


def format_reward(completion: str | None, *, strip: bool = True) -> float:
    """1.0 if the whole completion is a think block and then an answer block, else 0.0.

    Only dots and white space may stand between the blocks. `strip=False` is the released
    behaviour (Q20): white space around the completion spoils it.
    """
    completion = completion or ""
    return float(FORMAT.fullmatch(completion.strip() if strip else completion) is not None)


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
    mc: bool = True,
) -> float:
    """How right an answer is: 0 or 1 for multiple choice, a soft overlap in [0, 1] for open ends.

    `qa_type` is MC or OE (anything else counts as OE); `problem` is the question with its
    options, by whose texts an answer without a letter is found. `multiline_answer=False` and
    `mc=False` are released behaviours: an answer block over several lines is not seen (Q21),
    and multiple choice is scored as if it were open-ended (Q3). NaN without a solution.
    Source: the released code.
    """
    truth = answers.true_answer(solution or "", multiline_answer)
    if not truth:
        return math.nan
    prediction = answers.predicted_answer(completion or "", multiline_answer)
    if answers.safe_string_equal(prediction, truth):
        return 1.0
    if mc and (qa_type or "").strip().upper() == "MC":
        return float(_right_choice(prediction, truth, problem))
    return soft_jaccard(prediction.rstrip(".,!?"), truth)


def soft_jaccard(first: str | None, second: str | None) -> float:
    """The overlap of two texts as sets of words, spelling variants counting in part; in [0, 1].

    Lower-cased words split at white space. Equal words count 1; each remaining word of the
    first text, in sorted order, takes the most similar remaining word of the second, if their
    difflib ratio is at least 0.8, and counts that ratio. Overlap / (n1 + n2 - overlap), 0 for
    two empty texts. Also the text term of the cycle reward (prompt, caption).
    """
    words1, words2 = set((first or "").lower().split()), set((second or "").lower().split())
    equal = words1 & words2
    overlap = float(len(equal))
    rest = sorted(words2 - equal)
    for word in sorted(words1 - equal):
        ratio, _, match = max(
            ((_word_ratio(word, other), -i, other) for i, other in enumerate(rest)),
            default=(0.0, 0, ""),
        )
        if ratio >= MIN_WORD_RATIO:
            overlap += ratio
            rest.remove(match)
    union = len(words1) + len(words2) - overlap
    return overlap / union if union else 0.0


def oc_accuracy(
    completion: str | None, solution: str | None, *, multiline_answer: bool = True
) -> float:
    """How well an answer names a class: 1.0 equal, 0.9 one contained in the other, else 0.0.

    Without case. An empty answer scores 0 (Q22). NaN without a solution.
    Source: the released code, common_cls.
    """
    truth = answers.true_answer(solution or "", multiline_answer).lower()
    if not truth:
        return math.nan
    prediction = answers.predicted_answer(completion or "", multiline_answer).lower()
    if prediction == truth:
        return 1.0
    return OC_CONTAINED if _contained(prediction, truth) else 0.0


def oc_answer_score(answer: str | None, solution: str | None, prompt: str | None) -> float:
    """t2i_oc: how well what the policy sees in its own image names the class it should show.

    `answer` is the policy's answer about the generated image, `prompt` the caption it was drawn
    from. With an answer block 1.0 equal, 0.9 contained, 0.5 a part of the prompt, 0.2 for "UNK";
    without one 0.8, 0.7, 0.3, 0. NaN without a solution.
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
    if _contained(prediction, truth):
        return contained
    return in_prompt if prediction in (prompt or "").lower() else 0.0


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


def _right_choice(prediction: str, truth: str, problem: str | None) -> bool:
    """Whether a prediction chooses the true option (the released order of tests)."""
    options = answers.options_of(problem) | answers.options_of(truth)
    letter = _true_letter(truth, options)
    chosen = answers.option_letter(prediction)
    if letter is None:  # a solution in words that is no listed option
        texts = answers.options_of(prediction).values()
        return any(answers.safe_string_equal(text, truth) for text in texts)
    if len(prediction) <= 2 and chosen:
        return chosen == letter
    if chosen and re.search(rf"\b{letter}\b", prediction, re.IGNORECASE):
        return chosen == letter
    explicit = answers.explicit_letter(prediction)
    if explicit not in (None, letter):  # "B. choking" is wrong even if choking is A
        return False
    return answers.option_by_text(prediction, options) == letter


def _true_letter(truth: str, options: dict[str, str]) -> str | None:
    leading = answers.leading_letter(truth)
    if leading:
        return leading
    equal = [k for k, text in options.items() if answers.safe_string_equal(text, truth)]
    return equal[0] if len(equal) == 1 else None


def _contained(prediction: str, truth: str) -> bool:
    return bool(prediction) and (prediction in truth or truth in prediction)


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
