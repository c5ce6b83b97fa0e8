"""Holds the instruction templates of the published question sets, and fills them in.

The published `qa_problem` columns already contain them. The drawn world fills them in itself.
Source: the appendix of the CoRL paper and ULM-R1's data files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

OPTION_LETTERS = "ABCDEFGHIJKLMN"
INSTRUCTIONS = ("auto", "choice", "open", "none")
"""Templates for a plain question. choice: MCQ; open: VQA; none: no template; auto: MCQ if the
question lists options, else VQA."""

_KNOWLEDGE = "Answer the question based on the image and your world knowledge."
_THINK = (
    "Please write your thinking process inside <think> </think> tags, and provide your final answer"
)
_STRICT = "inside <answer> </answer> tags.\nYour response MUST strictly follow this format:"

MCQ = (
    f"{{question}}\n\n{_KNOWLEDGE}\n\n{_THINK} (option letter, e.g., A/B/C/D) {_STRICT} "
    "<think> ... </think><answer>option letter</answer>"
)
VQA = (
    f"{{question}}\n\n{_KNOWLEDGE}\n\n{_THINK} (only 1–3 words) {_STRICT} "
    "<think> ... </think><answer>concise answer</answer>"
)
CLS = (
    "Identify the species of the most prominent {category} in the image.\n\n"
    f"{_THINK} {_STRICT} <think> ... </think> <answer>species name</answer>"
)
OD = (
    "Detect all objects belonging to the category '{category}' in the image, and provide the "
    "bounding boxes (between 0 and 384, integer) and confidence (between 0 and 1, with two decimal "
    f"places).\n\n{_THINK} {_STRICT} <think> ... </think> "
    "<answer>[{{'Position': [x1, y1, x2, y2], 'Confidence': number}}, ...]</answer>"
)
CAPTION = "Describe the main content of the image in one sentence."


def list_options(question: str, options: Sequence[str]) -> str:
    """Returns the question, a line `Options:`, and a line for each option, as `A. red`."""
    lines = [f"{letter}. {text}" for letter, text in zip(OPTION_LETTERS, options, strict=False)]
    return "\n".join([question, "Options:", *lines])


def ask_multiple_choice(question: str, options: Sequence[str]) -> str:
    """Returns the question with its options in the MCQ template."""
    return MCQ.format(question=list_options(question, options))


def ask_open_ended(question: str) -> str:
    """Returns the question in the VQA template."""
    return VQA.format(question=question)


def add_instruction(question: str, instruction: str) -> str:
    """Adds the template of one of INSTRUCTIONS to a question.

    A question that already mentions answer tags is returned unchanged.
    """
    if instruction == "none" or ("<answer>" in question and "</answer>" in question):
        return question
    if instruction == "auto":
        instruction = "choice" if lists_options(question) else "open"
    return (MCQ if instruction == "choice" else VQA).format(question=question.strip())


def lists_options(question: str) -> bool:
    """Returns whether a text has a line `A. ...` and then a line `B. ...`; also A) or (A)."""
    letters = re.findall(r"^\s*\(?([A-N])[.):]\s*\S", question, re.MULTILINE)
    return letters[:2] == ["A", "B"]


def recognize_instruction(questions: Iterable[str]) -> str | None:
    """Returns the name in INSTRUCTIONS whose template all these questions have.

    Returns `auto` if both templates occur. Returns None without questions, or if a question has
    no template.
    """
    kinds = {_find_template(question) for question in questions}
    if not kinds or None in kinds:
        return None
    return kinds.pop() if len(kinds) == 1 else "auto"


def _find_template(question: str) -> str | None:
    # Data sets differ in line breaks, so white space is made equal on both sides.
    text = " ".join(question.split())
    for name, template in (("choice", MCQ), ("open", VQA)):
        if text.endswith(" ".join(template.removeprefix("{question}").split())):
            return name
    return None
