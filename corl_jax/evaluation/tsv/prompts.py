"""Writes the questions of a TSV as Janus is asked in VLMEvalKit, or as CoRL trains it.

Source: VLMEvalKit `vlmeval/vlm/janus.py`, and of open questions the data sets' own prompts; see
`data.instructions` for CoRL's.
"""

from __future__ import annotations

import dataclasses
import re

from corl_jax.data.instructions import add_instruction
from corl_jax.evaluation.tsv.kinds import CHOICE, KINDS, KNOWN_OPEN, OPEN, YES_NO
from corl_jax.evaluation.tsv.table import Values, list_options

VLMEVALKIT, CORL = "vlmevalkit", "corl"
PROMPT_STYLES = (VLMEVALKIT, CORL)
ROLES = {VLMEVALKIT: "old", CORL: None}
"""The chat roles of each style, if none are given; None: those of the tokenizer."""
REQUEST = " Please answer yes or no."
SYSTEM_PROMPT = (
    "You are a helpful assistant. Please answer truthfully and write out your thinking step by "
    "step to be sure you get the right answer."
)
"""Of MM-Vet, in VLMEvalKit's style."""
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
DIRECT_ANSWER = "Answer the question directly. "
SHORT_ANSWER_SETS = re.compile(r"ocrvqa|textvqa|docvqa|infovqa|chartqa|gqa", re.IGNORECASE)
"""Open data sets whose own prompt asks for a word or phrase."""
THOUGHT_COLUMN = "query_cot"  # of MathVerse, if the data set's name has "cot"


@dataclasses.dataclass(frozen=True)
class Question:
    """The text of a prompt."""

    text: str  # directly behind the images
    system_prompt: str = ""


def write_question(
    row: Values, kind: str, name: str, style: str, instruct: bool = True
) -> Question:
    """Returns the prompt of a row of the data set `name`, in one of PROMPT_STYLES.

    Without `instruct` CoRL's style is the bare question with its options.
    """
    spec, question = KINDS[kind], str(row["question"])
    if style == CORL:
        return Question(_write_corl(row, question, spec.question, instruct))
    if spec.question == CHOICE:
        return Question(_write_choice(row, question))
    if spec.question == YES_NO:
        question = question.replace(REQUEST, "") if spec.drops_request else question
        return Question(f"\n{question}{SHORT_ANSWER}")
    if spec.thinks_aloud:
        return Question(f"\n{question}", SYSTEM_PROMPT)
    if kind == "mathverse" and "cot" in name and row.get(THOUGHT_COLUMN) is not None:
        return Question(str(row[THOUGHT_COLUMN]))
    if kind == OPEN and not re.search(KNOWN_OPEN, name, re.IGNORECASE):
        # VLMEvalKit takes a data set of an unknown name for one of choices, here without any.
        return Question(_write_choice({}, question))
    # Without a line break behind the images.
    return Question(question + (SHORT_ANSWER if SHORT_ANSWER_SETS.search(name) else ""))


def _write_choice(row: Values, question: str) -> str:
    options = "".join(f"{letter}. {value}\n" for letter, value in list_options(row).items())
    hint = f"Hint: {row['hint']}\n" if row.get("hint") is not None else ""
    return f"\n{hint}{question}\n" + (f"{options}{LETTER}" if options else DIRECT_ANSWER)


def _write_corl(row: Values, question: str, kind: str, instruct: bool) -> str:
    if row.get("hint") is not None:
        question = f"Hint: {row['hint']}\n{question}"
    # The letters of the columns, which may have gaps.
    options = [f"{letter}. {value}" for letter, value in list_options(row).items()]
    instruction = "open"
    if kind == CHOICE and options:
        question, instruction = "\n".join([question, "Options:", *options]), "choice"
    return "\n" + add_instruction(question, instruction if instruct else "none")
