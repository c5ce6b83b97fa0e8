"""Pads prompts on the left, as every family's processor does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from corl_jax.errors import InputError
from corl_jax.types import EncodedPrompts


def pad_on_the_left(rows: Sequence[Sequence[int]], length: int, pad: int) -> EncodedPrompts:
    """Returns rows of ids as ids and mask [len(rows), length], padded on the left with `pad`.

    Raises: InputError naming every row that is longer than `length`.
    """
    # A prompt that is too long is an error, not cut: a cut on the left, as in the code released
    # with CoRL, loses BOS or image tokens (Q15).
    problems = [
        f"prompt {i}: found {len(row)} tokens (image tokens counted); expected at most {length}"
        for i, row in enumerate(rows)
        if len(row) > length
    ]
    if problems:
        raise InputError(problems)
    input_ids = np.full((len(rows), length), pad, np.int32)
    attention_mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        input_ids[i, length - len(row) :] = row
        attention_mask[i, length - len(row) :] = True
    return EncodedPrompts(input_ids, attention_mask)
