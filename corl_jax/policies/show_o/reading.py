"""Lets a Show-o read prompts and images: texts first, once, and then images behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.devices.mesh import constrain
from corl_jax.policies.decoding import Rows
from corl_jax.policies.show_o.network import ShowO
from corl_jax.policies.show_o.tokens import SpecialTokens
from corl_jax.types import EncodedPrompts

FRONT = 3
"""Tokens beside the codes in front of a question: mmu, soi and eoi."""
IMAGE_ORDERS = "causal", "full"
"""A text is causal, and its image sees all of itself; see `models.phi.Order`."""


def blank_ids(input_ids: Any, special: SpecialTokens) -> jax.Array:
    """Returns the ids [B, P] of prompts with an empty text, the unconditional rows of guidance."""
    # [PAD, t2i, sot, a, cat, eot] -> [PAD, PAD, PAD, t2i, sot, eot]
    ids = jnp.full_like(jnp.asarray(input_ids), special.pad)
    return ids.at[:, -3:].set(jnp.asarray([special.t2i, special.eos, special.eos], ids.dtype))


def move_padding_last(ids: jax.Array, special: SpecialTokens) -> tuple[jax.Array, jax.Array]:
    """Returns left-padded ids [B, P] with the padding behind them, and their lengths [B]."""
    # By id, not by the attention mask, which a blank prompt shares with the prompt that it replaces
    # P = 4, length 3: [x, a, b, c], source = (0..3 + 1) % 4 = [1, 2, 3, 0] -> [a, b, c, x]
    lengths = (ids != special.pad).sum(axis=-1, dtype=jnp.int32)
    size = ids.shape[1]
    source = (jnp.arange(size) + size - lengths[:, None]) % size
    return jnp.take_along_axis(ids, source, axis=1), lengths


def prepare_texts(
    prompts: EncodedPrompts, rows: Rows, special: SpecialTokens
) -> tuple[jax.Array, jax.Array]:
    """Returns the ids of the prompts of all rows, with padding behind them, and their lengths."""
    ids = jnp.asarray(prompts.input_ids)
    return move_padding_last(rows.interleave_prompts(ids, blank_ids(ids, special)), special)


def frame_codes(codes: jax.Array, special: SpecialTokens) -> jax.Array:
    """Returns the ids [N, M + 2] of soi, codes [N, M] and eoi; code K is the mask token."""
    ids = jnp.pad(codes + special.first_code, ((0, 0), (1, 1)))
    return ids.at[:, 0].set(special.soi).at[:, -1].set(special.eoi)


def split_image_states(
    hidden: jax.Array, rows: Rows, *, framed: bool = False
) -> tuple[jax.Array, ...]:
    """Returns the states [N, M, D] of the codes: conditional ones, and unconditional with guidance.

    `hidden` [rows, M + 2, D] are those of the ids of `frame_codes`; `framed` keeps all of them.
    """
    states = rows.split(hidden if framed else hidden[:, 1:-1])
    return states if rows.guided else states[:1]


def compute_image_logits(
    image_logits: Callable[[jax.Array], jax.Array], states: tuple[jax.Array, ...], cfg_scale: Any
) -> tuple[jax.Array, jax.Array]:
    """Computes float32 logits [..., K] of states of `split_image_states`: (conditional, guided).

    `image_logits` are those of a `ShowO`, or of its `take_image_head`. Without unconditional states
    both are the same.
    """
    # float32 before the guidance, which enlarges rounding.
    conditional, *other = (image_logits(x).astype(jnp.float32) for x in states)
    if not other:
        return conditional, conditional
    # Muse's form, in this order as in the original: weight 5 is a scale of 6.
    return conditional, cfg_scale * conditional - (cfg_scale - 1) * other[0]


def embed_questions(
    model: ShowO, prompts: EncodedPrompts, special: SpecialTokens
) -> tuple[jax.Array, jax.Array]:
    """Returns the embeddings [B, P, D] of questions, and which tokens all others see, [B, P] bool.

    These are marked as if the padding stood behind a prompt. Without pixels the codes of the images
    must be in the ids.
    """
    if model.config.clip is None:
        ids = fill_codes(model, prompts, special)
        # mmu, soi, the codes and eoi see each other in both directions.
        is_seen = jnp.arange(ids.shape[1]) < model.config.num_image_tokens + FRONT
        return model.embed_text(ids), is_seen[None]
    ids = jnp.asarray(prompts.input_ids)
    is_seen = move_padding_last(ids, special)[0] == special.mask
    return embed_features(model, ids, prompts.pixel_values, special), is_seen


def embed_features(
    model: ShowO, ids: jax.Array, pixel_values: Any, special: SpecialTokens
) -> jax.Array:
    """Returns the embeddings [B, P, D] of ids, CLIP's features in the places of the mask token."""
    features, embeds = model.embed_pixels(jnp.asarray(pixel_values)), model.embed_text(ids)
    is_image = ids == special.mask
    order = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, features.shape[1] - 1)
    placed = jnp.take_along_axis(features, order[..., None], axis=1)
    return jnp.where(is_image[..., None], placed.astype(embeds.dtype), embeds)


def fill_codes(model: ShowO, prompts: EncodedPrompts, special: SpecialTokens) -> jax.Array:
    """Returns the ids [B, P] of questions with the codes of their images.

    Without pixels the codes must be in the ids.
    """
    ids = jnp.asarray(prompts.input_ids)
    if prompts.pixel_values is None:
        return ids
    return place_codes(ids, model.vqmodel.encode(prompts.pixel_values), special)


@functools.partial(jax.jit, static_argnames="special")
def place_codes(ids: jax.Array, codes: jax.Array, special: SpecialTokens) -> jax.Array:
    """Puts codes [B, M] in the places of the mask token in ids [B, P]."""
    is_image = ids == special.mask
    # ids [t, I, I, t] -> cumsum - 1 = [-1, 0, 1, 1]: values at other places are not used.
    order = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, codes.shape[1] - 1)
    placed = jnp.take_along_axis(codes, order, axis=1) + special.first_code
    return constrain(jnp.where(is_image, placed, ids), "batch", "length")
