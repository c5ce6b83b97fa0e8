"""The question that a language model is asked: whether two answers are the same, and its reply.

Source: the evaluation of showlab/UniRL, letter by letter. It prints question and output as Python
lists of one text, and its judge is Qwen2.5-7B-Instruct-1M.
"""

from __future__ import annotations

SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
MAX_NEW_TOKENS = 30
JUDGE_MODEL = "Qwen/Qwen2.5-7B-Instruct-1M"
SAME = "same"


def write_judge_prompt(question: str, truth: str, output: str) -> str:
    """Returns the text that asks whether a model's output says the same as the true answer."""
    # [question] prints as ['How many items in this image?'], with Python's quotes and escapes.
    return (
        f"Please help to judge the two answers same or not.The question is {[question]} One is "
        f"the standard answer, another is model's output. The standard answer is {truth} and the "
        f"model's output is {[output]}. Please only use one word to answer me same or not same"
    )


def write_messages(question: str, truth: str, output: str) -> list[dict[str, str]]:
    """Returns the messages of a chat that asks the judge."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": write_judge_prompt(question, truth, output)},
    ]


def is_same(reply: str) -> bool:
    """Returns whether the judge's reply is exactly `same` in any case; "Same." is not."""
    return reply.lower() == SAME
