"""The instruction templates of the published question sets, as constants, and the option layout.

The published `qa_problem` columns already contain them; the drawn world applies them itself.
Source: the appendix of the CoRL paper and ULM-R1's data files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

OPTION_LETTERS = "ABCDEFGHIJKLMN"
INSTRUCTIONS = ("auto", "choice", "open", "none")
"""How a plain question is asked: `choice` and `open` put it into MCQ and VQA, `none` leaves it, and
`auto` takes MCQ for a question that lists its options, else VQA."""

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
    """The question line, `Options:`, and a line per option, `A. red`."""
    lines = [f"{letter}. {text}" for letter, text in zip(OPTION_LETTERS, options, strict=False)]
    return "\n".join([question, "Options:", *lines])


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """The MC problem: the question with its options, in the MCQ template."""
    return MCQ.format(question=list_options(question, options))


def open_ended(question: str) -> str:
    """The OE problem: the question in the VQA template."""
    return VQA.format(question=question)


def add_instruction(question: str, instruction: str) -> str:
    """Returns a question as one of INSTRUCTIONS has it asked.

    A question that asks for answer tags itself stays as it is.
    """
    if instruction == "none" or ("<answer>" in question and "</answer>" in question):
        return question
    if instruction == "auto":
        instruction = "choice" if lists_options(question) else "open"
    return (MCQ if instruction == "choice" else VQA).format(question=question.strip())


def lists_options(question: str) -> bool:
    """True for a text with a line `A. ...` and a line `B. ...` after it, or with A) or (A)."""
    letters = re.findall(r"^\s*\(?([A-N])[.):]\s*\S", question, re.MULTILINE)
    return letters[:2] == ["A", "B"]


def recognise_instruction(questions: Iterable[str]) -> str | None:
    """Returns the one of INSTRUCTIONS under which all these questions were asked.

    `auto` where both templates occur; None without questions or where one has neither.
    """
    kinds = {_template_of(question) for question in questions}
    if not kinds or None in kinds:
        return None
    return kinds.pop() if len(kinds) == 1 else "auto"


def _template_of(question: str) -> str | None:
    text = " ".join(question.split())
    for name, template in (("choice", MCQ), ("open", VQA)):
        if text.endswith(" ".join(template.removeprefix("{question}").split())):
            return name
    return None
