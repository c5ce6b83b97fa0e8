"""Chooses which codes of an image are hidden while they are scored.

Every pass over a segment, of the policy, the old policy and the reference, must hide the same
codes. What decides is recorded in `Segment.replay`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from corl_jax.policies.chunked_logprobs import repeat_rows
from corl_jax.policies.family import NOISE_KEYS, LogprobOptions, Unmasking
from corl_jax.policies.show_o.reading import FRONT, move_padding_last
from corl_jax.tasks import CODES
from corl_jax.types import EncodedPrompts, Segment

HIDDEN_SHARES, COMMITTED_AT = "hidden_shares", "committed_at"
"""Keys of `Segment.replay`: the share [N] of the codes to hide, equal in a group; the step [N, M]
of the sampler that committed a code."""
HIDING_KEYS = 2**31 - 1
"""Folded into the keys that draw an image; no sampler has so many steps."""
SMALL_IMAGE, FEW_STEPS, MANY_STEPS = 256, 16, 50
"""Most codes of a small image, and the sampler's usual steps for it and for a larger one."""
POSITIONS, SHARES, STEPS = range(3)
"""Folded into NOISE_KEYS: the numbers of the positions, of the share, of the scored steps."""


def count_steps(unmasking: Unmasking, num_places: int) -> int:
    """Returns the number of steps in which the sampler draws an image of so many codes."""
    usual = FEW_STEPS if num_places <= SMALL_IMAGE else MANY_STEPS
    return unmasking.steps or usual


def make_replay(
    keys: jax.Array, group_size: int, committed_at: jax.Array, unmasking: Unmasking
) -> dict[str, jax.Array]:
    """Returns the replay of images that were drawn with keys [N]."""
    if unmasking.logprobs == "none":
        return {}
    keys = _fold(keys, HIDING_KEYS)
    replay = {NOISE_KEYS: jax.random.key_data(keys)}
    if unmasking.logprobs == "trajectory":
        return replay | {COMMITTED_AT: committed_at}
    # One share for a group: with shares of their own, its completions would not compare.
    shares = jnp.repeat(draw_shares(keys[::group_size]), group_size)
    return replay | {HIDDEN_SHARES: shares}


def draw_shares(keys: jax.Array) -> jax.Array:
    """Returns the share of codes to hide for each key [N], by the cosine schedule."""
    times = jax.vmap(jax.random.uniform)(_fold(keys, SHARES))
    return jnp.cos(times * (jnp.pi / 2))


def choose_hidden(segment: Segment) -> jax.Array:
    """Returns the hidden places [N, M] of images: a share of them, at least one.

    Source: Show-o's `mask_or_random_replace_tokens`.
    """
    keys, num_places = _get_keys(segment), segment.values.shape[1]
    shares = segment.replay.get(HIDDEN_SHARES)
    if shares is None:  # given images: each has a share of its own
        shares = draw_shares(keys)
    counts = jnp.maximum(jnp.round(shares * num_places), 1)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (num_places,)))(_fold(keys, POSITIONS))
    # argsort, not its inverse, the ranks: both hide as many places at random, and the original
    # compares this one.
    return jnp.argsort(draws, axis=-1) < counts[:, None]


def choose_steps(segment: Segment, unmasking: Unmasking) -> jax.Array:
    """Returns the steps [N, S] of the sampler whose codes are scored, different ones for a row."""
    count = count_steps(unmasking, segment.values.shape[1])
    chosen = unmasking.scored_steps or count
    every = jnp.broadcast_to(jnp.arange(count), (len(segment.values), count))
    # All in order: then nothing depends on the key.
    if chosen >= count:
        return every
    order = jax.vmap(lambda key: jax.random.permutation(key, count))
    return order(_fold(_get_keys(segment), STEPS))[:, :chosen]


def list_passes(segment: Segment, unmasking: Unmasking) -> tuple[jax.Array, jax.Array]:
    """Returns the passes that score a segment: (known, scored), each [passes, N, M] bool.

    The codes of known places are read, those of scored places are scored.
    """
    if unmasking.logprobs == "trajectory":
        committed_at = segment.replay[COMMITTED_AT].astype(jnp.int32)
        steps = choose_steps(segment, unmasking).T[..., None]
        return committed_at < steps, committed_at == steps
    hidden = choose_hidden(segment)
    if unmasking.logprobs == "one_shot":
        return ~hidden[None], hidden[None]
    return jnp.stack([~hidden, hidden]), jnp.stack([hidden, ~hidden])


def choose_scored(
    prompts: EncodedPrompts, segments: tuple[Segment, ...], options: LogprobOptions
) -> tuple[jax.Array, ...]:
    """Returns the loss masks of each segment: all of a text's tokens, some codes [N, M].

    With `released` the tokens around the codes have masks, [N, M + 2], and those of a question in
    front of its answer, with padding behind them.
    """
    return tuple(
        _choose_codes(segment, options)
        if segment.kind == CODES
        else _choose_tokens(prompts, segment, options)
        for segment in segments
    )


def _choose_codes(segment: Segment, options: LogprobOptions) -> jax.Array:
    scored = segment.mask & list_passes(segment, options.unmasking)[1].any(axis=0)
    if not options.released:
        return scored
    ends = jnp.asarray(segment.mask).any(axis=-1, keepdims=True)
    return jnp.concatenate([ends, scored, ends], axis=1)


def _choose_tokens(prompts: EncodedPrompts, segment: Segment, options: LogprobOptions) -> jax.Array:
    mask = jnp.asarray(segment.mask)
    # Show-o's own code scores answers alone behind CLIP's features.
    if not options.released or options.image.clip is not None:
        return mask
    ids, lengths = move_padding_last(jnp.asarray(prompts.input_ids), options.special)
    image = options.image.num_tokens + FRONT
    is_question = jnp.arange(ids.shape[1] - image) < (lengths - image)[:, None]
    is_question = repeat_rows(is_question, len(mask) // len(ids)) & mask.any(axis=-1, keepdims=True)
    return jnp.concatenate([is_question, mask], axis=1)


def _get_keys(segment: Segment) -> jax.Array:
    return jax.random.wrap_key_data(segment.replay[NOISE_KEYS])


def _fold(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
