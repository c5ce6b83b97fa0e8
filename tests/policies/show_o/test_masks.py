"""Attention masks against slow loops, written from their definition."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from corl_jax.policies.show_o.tokens import SpecialTokens
from tests.support.show_o_masks import (
    make_generation_mask,
    make_question_mask,
    make_text_mask,
)

SPECIAL = SpecialTokens(eos=0, pad=1, soi=2, eoi=3, t2i=4, mmu=5, first_code=20, mask=28)
SOI, EOI, PAD = SPECIAL.soi, SPECIAL.eoi, SPECIAL.pad


def loop(length: int, sees) -> np.ndarray:
    return np.array([[sees(i, j) for j in range(length)] for i in range(length)])


@pytest.mark.parametrize("pads", [0, 1, 4])
def test_generation(pads):
    ids = [PAD] * pads + [SPECIAL.t2i, 0, 10, 11, 0, SOI, 21, 28, 22, 28, EOI]
    s = ids.index(SOI)

    def sees(i, j):
        if i < pads:
            return j <= i
        return pads <= j <= i if i < s else j >= pads

    both = jnp.array([ids, [7] * (len(ids) - 6) + ids[-6:]])
    mask = make_generation_mask(both, SPECIAL)
    np.testing.assert_array_equal(mask[0], loop(len(ids), sees))
    assert np.asarray(mask).any(axis=-1).all()


def test_questions():
    ids = [SPECIAL.mmu, SOI, 21, 22, 23, EOI, 0, 10, 11, 0, PAD, PAD]
    end = ids.index(EOI)
    mask = make_question_mask(jnp.array([ids, ids]), SPECIAL)
    expected = loop(len(ids), lambda i, j: j <= i or j <= end)
    np.testing.assert_array_equal(mask, np.stack([expected] * 2))
    # Padding behind the text is seen by nothing before it.
    assert not np.asarray(mask)[0, :10, 10:].any()


def test_texts():
    mask = make_text_mask(jnp.array([[0, 10, 11, 0, PAD]] * 2))
    np.testing.assert_array_equal(mask, np.stack([loop(5, lambda i, j: j <= i)] * 2))
