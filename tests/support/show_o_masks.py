"""Attention masks of Show-o's sequences, [B, L, L] bool: True where row i attends to column j.

Networks read the two parts of a sequence, see `models.phi`, and need no such mask. These masks say
what the parts see, for sequences that are read at once.

Source: Show-o's `create_attention_mask_predict_next` and `create_attention_mask_for_mmu`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from corl_jax.policies.show_o.tokens import SpecialTokens


def make_generation_mask(input_ids: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns the mask of left-padded prompts with their images, ids [B, L].

    A text sees itself causally, and neither padding nor image. The image, from soi on, sees the
    text and all of itself. Padding sees the padding before it.
    """
    # [PAD, t2i, a, soi, x, eoi] -> rows PAD 100000, t2i 010000, a 011000, soi, x and eoi 011111
    causal = _make_causal_mask(input_ids.shape[1])
    is_padding = input_ids == special.pad
    in_image = jnp.cumsum(input_ids == special.soi, axis=-1) > 0
    seen = causal | in_image[:, :, None]
    return jnp.where(is_padding[:, :, None], causal, seen & ~is_padding[:, None, :])


def make_text_mask(input_ids: jax.Array) -> jax.Array:
    """Returns the causal mask of texts [B, L], which are padded on the right."""
    return jnp.broadcast_to(
        _make_causal_mask(input_ids.shape[1]), (*input_ids.shape, input_ids.shape[1])
    )


def make_question_mask(input_ids: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns the mask of questions [B, L] without padding in front, with answers behind them.

    Everything up to eoi sees itself in both directions; the text behind it is causal.
    """
    # [mmu, soi, x, eoi, a, b] -> rows mmu to eoi 111100, a 111110, b 111111
    ends = jnp.argmax(input_ids == special.eoi, axis=-1)
    before_text = jnp.arange(input_ids.shape[1]) <= ends[:, None]
    return _make_causal_mask(input_ids.shape[1]) | before_text[:, None, :]


def _make_causal_mask(length: int) -> jax.Array:
    return jnp.tril(jnp.ones((length, length), bool))
