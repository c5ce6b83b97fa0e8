"""Separates the final answer from the thinking, where an answer has tags.

Harnesses read neither tag: `<answer>B</answer>` is no letter to VLMEvalKit, and a letter in the
thinking can decide.
"""

from __future__ import annotations

import dataclasses

OPEN, CLOSE = "<answer>", "</answer>"
ANSWER_TAG_MODES = ("auto", "off")
"""auto: the last <answer> is the prediction; off: the whole text."""


@dataclasses.dataclass(frozen=True)
class SplitAnswer:
    """An answer in two parts."""

    prediction: str  # what a harness reads
    thinking: str  # all other text
    has_tag: bool


def split_answer(text: str, mode: str = "auto") -> SplitAnswer:
    """Takes the content of the last `<answer>` as prediction; without one, or if off, all of it.

    A tag that no `</answer>` closes, as in a truncated answer, ends with the text. A last tag
    without content is passed over.
    """
    end = len(text)
    while mode == "auto" and (start := text.rfind(OPEN, 0, end)) >= 0:
        content, _, rest = text[start + len(OPEN) :].partition(CLOSE)
        if content.strip():
            before, after = text[:start].rstrip(), rest.lstrip()
            return SplitAnswer(content.strip(), "\n".join(filter(None, [before, after])), True)
        end = start
    return SplitAnswer(text, "", False)
