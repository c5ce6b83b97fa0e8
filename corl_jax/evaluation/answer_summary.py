"""Summarises answers by category: accuracy, length, and signs of answers by habit."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

from corl_jax.evaluation.intervals import Rate
from corl_jax.rewards.answers import read_answer


@dataclasses.dataclass(frozen=True)
class AnswerSummary:
    """The answers to the questions of one category."""

    accuracy: Rate
    mean_length: float  # in tokens
    empty: Rate  # answers without a letter or digit
    cut: Rate  # answers that ended at the largest number of tokens
    # In nats, of the distribution of the answers as texts; 0 if all are equal. A model that
    # answers by habit says the same about every image.
    entropy: float


def summarize_answers(
    texts: Sequence[str],
    categories: Sequence[str],
    correct: Sequence[bool],
    lengths: Sequence[int],
    is_cut: Sequence[bool],
) -> dict[str, AnswerSummary]:
    """Returns category -> summary, in the order in which categories come first.

    `lengths` are in tokens with the end token. `is_cut`: whether an answer has no end token.
    """
    rows: dict[str, list[int]] = {}
    for row, category in enumerate(categories):
        rows.setdefault(category, []).append(row)
    return {
        category: AnswerSummary(
            accuracy=Rate.of(sum(bool(correct[row]) for row in chosen), len(chosen)),
            mean_length=math.fsum(lengths[row] for row in chosen) / len(chosen),
            empty=Rate.of(sum(is_empty(texts[row]) for row in chosen), len(chosen)),
            cut=Rate.of(sum(bool(is_cut[row]) for row in chosen), len(chosen)),
            entropy=measure_entropy([texts[row] for row in chosen]),
        )
        for category, chosen in rows.items()
    }


def is_empty(text: str) -> bool:
    """Returns whether an answer, without its thoughts and tags, has no letter and no digit."""
    return not any(letter.isalnum() for letter in read_answer(text))


def measure_entropy(texts: Sequence[str]) -> float:
    """Computes the entropy in nats of answers as texts, without case and outer spaces and dots."""
    counts = collections.Counter(read_answer(text).strip(" .\n").lower() for text in texts)
    # 4 equal answers -> 0; 2 and 2 -> ln 2
    shares = [number / len(texts) for number in counts.values()]
    return max(0.0, -math.fsum(share * math.log(share) for share in shares))
