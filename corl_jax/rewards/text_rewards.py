"""Scores answers without a network: Samples -> [N] float32. `text` has the rules for one text."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from pydantic import PositiveInt

from corl_jax.data.column_values import QuestionType
from corl_jax.errors import InputError
from corl_jax.rewards import text
from corl_jax.rewards.samples import (
    Context,
    Samples,
    read_class_questions,
    read_question_types,
    score_rows,
)


def score_format(
    samples: Samples, context: Context, *, strip: bool = True, repeated_blocks: bool = False
) -> np.ndarray:
    """Returns 1 for one think block followed by one answer block; see `text.format_reward`.

    `strip` ignores white space around the completion.
    """
    score = functools.partial(text.format_reward, strip=strip, repeated_blocks=repeated_blocks)
    return score_rows(score, samples.require_texts())


def score_format_tags(samples: Samples, context: Context) -> np.ndarray:
    """Returns 0.125 for each of the four tags that occurs exactly once."""
    return score_rows(text.format_tag_reward, samples.require_texts())


def score_qa_accuracy(
    samples: Samples,
    context: Context,
    *,
    multiline_answer: bool = True,
    answer_in_thoughts: bool = False,
    numbers_by_value: bool = True,
    mc: bool = True,
    default_type: QuestionType | None = None,
) -> np.ndarray:
    """Scores answers to the row's question, in [0, 1]; see `text.qa_accuracy` for the options.

    `default_type` is the type of rows whose `qa_type` is null. None counts them as OE.

    Raises:
        InputError: a type that is neither MC nor OE, by its row.
    """

    def score_answer(completion, solution, kind, problem) -> float:
        return text.qa_accuracy(
            completion, solution, kind or default_type,
            problem=problem, multiline_answer=multiline_answer,
            answer_in_thoughts=answer_in_thoughts, numbers_by_value=numbers_by_value, mc=mc,
        )  # fmt: skip

    solutions, problems = samples.column("qa_solution"), samples.column("qa_problem")
    types = read_question_types(samples)
    return score_rows(score_answer, samples.require_texts(), solutions, types, problems)


def score_oc_accuracy(
    samples: Samples,
    context: Context,
    *,
    multiline_answer: bool = True,
    answer_in_thoughts: bool = False,
    substrings: bool = False,
) -> np.ndarray:
    """Scores the class that answers name, in [0, 1]; see `text.oc_accuracy` for the options.

    Rows without `cls_solution` use `qa_solution`.
    """
    score = functools.partial(
        text.oc_accuracy,
        multiline_answer=multiline_answer,
        answer_in_thoughts=answer_in_thoughts,
        substrings=substrings,
    )
    _, solutions = read_class_questions(samples)
    return score_rows(score, samples.require_texts(), solutions)


def score_soft_overlong(
    samples: Samples,
    context: Context,
    *,
    max_tokens: PositiveInt | None = None,
    buffer: PositiveInt | None = None,
) -> np.ndarray:
    """Returns 0 for answers of up to max_tokens - buffer tokens, falling to -1 at max_tokens.

    Longer answers get -1. `max_tokens` is by default the longest answer of the run,
    rollout.max_new_tokens; `buffer` a fifth of it. The end token counts.

    Raises:
        InputError: the numbers of tokens are not known, or max_tokens is null outside of a run.

    Source: DAPO (arXiv 2503.14476) eq. 13; the fifth is its 4096 of 20480 tokens.
    """
    limit = max_tokens or context.max_new_tokens
    if samples.num_tokens is None or limit is None:
        raise InputError(
            "soft_overlong: the numbers of tokens of the answers and max_tokens are known in a run "
            "only; elsewhere give both"
        )
    size = buffer or max(limit // 5, 1)
    # max_tokens 10, buffer 4: 6 -> 0, 7 -> -0.25, 10 -> -1, 12 -> -1
    beyond = np.asarray(samples.num_tokens) - (limit - size)
    return np.clip(-beyond / size, -1, 0).astype(np.float32)


def find_buffer_problems(options: Mapping, defaults: Mapping) -> list[str]:
    """Returns a problem if the buffer of `score_soft_overlong` is longer than the answers."""
    limit, buffer = options.get("max_tokens"), options.get("buffer")
    if limit is None or buffer is None or buffer <= limit:
        return []
    return [f"option buffer: found {buffer}; expected at most max_tokens, which is {limit}"]
