"""Draws several codes of an image in one pass: reads a window of guesses, and checks them.

Code t is a function of the logits of its place and of the random numbers that its key and t make;
see `choices.Choice.draw`. So the codes of an image are the fixed point of a map of all codes, and
each guess becomes the code that the same random numbers choose after the guesses before it. A code
is final once all codes before it were final when they were read. The first code behind the final
ones is so in every pass. The final codes are those that are drawn one by one, whatever the guesses
were: the distribution, guidance included, is exactly the same.

Source: Teng et al. 2024 (speculative Jacobi decoding, arXiv 2410.01699), with random numbers that
belong to a code instead of a test by the ratio p / q. Both make as many codes final, as measured.
Here no q is stored, images do not depend on the window, and greedy draws need no other rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

WindowRead = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(codes [N, W], number [N] of the first, caches) -> (states of all rows [., W, D], caches)."""
WindowDraw = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(states of all rows [., W, D], numbers [N, W] of codes) -> (codes, log-probs), each [N, W]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowState:
    """The values that one pass hands to the next."""

    count: jax.Array  # [N] int32, number of final codes, at least 1
    passes: jax.Array  # [N] int32, passes until the row was complete
    codes: jax.Array  # [N, T + 2 W] int32, the final ones, guesses, and room for whole windows
    logprobs: jax.Array  # [N, T + 2 W] float32
    caches: Any  # keys and values, per layer, with room for T + W - 1 codes


def draw_in_windows(
    draw: WindowDraw,
    read: WindowRead,
    first: tuple[jax.Array, jax.Array],
    length: int,
    window: int,
    caches: Any,
) -> WindowState:
    """Draws the codes of images from the first one, (codes, log-probs), each [N].

    A pass reads `window` codes of each row: the last final one, and guesses behind it. Rows go on
    at their own pace, until all have `length` codes.
    """
    return lax.while_loop(
        lambda state: (state.count < length).any(),
        lambda state: make_pass(draw, read, state, length, window),
        start_windows(first, length, window, caches),
    )


def start_windows(
    first: tuple[jax.Array, jax.Array], length: int, window: int, caches: Any
) -> WindowState:
    """Returns the state before the first pass: every guess is the first code again."""
    code, logprob = first
    room = (len(code), length + 2 * window)
    return WindowState(
        count=jnp.ones_like(code),
        passes=jnp.zeros_like(code),
        codes=jnp.broadcast_to(code[:, None], room),
        logprobs=jnp.broadcast_to(logprob[:, None], room),
        caches=caches,
    )


def make_pass(
    draw: WindowDraw, read: WindowRead, state: WindowState, length: int, window: int
) -> WindowState:
    """Reads a window of each row; at least one more code of each incomplete row becomes final."""
    # Codes a, b are final, count = 2, W = 3: reads [b, c, d] and draws [c', d', e'].
    #   c' is final; d' if c' = c, because it was drawn after c; e' if also d' = d.
    # Guesses of the next pass: what was drawn behind the final ones, then its last code repeated.
    codes = _take(state.codes, state.count - 1, window)
    hidden, caches = read(codes, state.count - 1, state.caches)
    drawn, logprobs = draw(hidden, state.count[:, None] + jnp.arange(window))
    is_right = jnp.cumprod(drawn[:, :-1] == codes[:, 1:], axis=1)
    more = 1 + is_right.sum(axis=1, dtype=jnp.int32)
    guesses = jnp.repeat(drawn[:, -1:], window, axis=1)
    return WindowState(
        # A complete row stays where it is, and writes behind its end.
        count=jnp.minimum(state.count + more, length),
        passes=state.passes + (state.count < length),
        codes=_put(state.codes, jnp.concatenate([drawn, guesses], axis=1), state.count),
        logprobs=_put(state.logprobs, logprobs, state.count),
        caches=caches,
    )


def _take(rows: jax.Array, first: jax.Array, window: int) -> jax.Array:
    return jax.vmap(lambda row, start: lax.dynamic_slice_in_dim(row, start, window))(rows, first)


def _put(rows: jax.Array, values: jax.Array, first: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, x, start: lax.dynamic_update_slice_in_dim(row, x, start, 0))(
        rows, values, first
    )
