"""Draws the codes of images in any order, the most certain ones first.

All places start unknown. Each of T steps draws a code at every unknown place from the distribution
that the network gives with the known ones in sight, commits the codes that are the most likely, up
to noise that becomes smaller, and masks the others again. A committed code stays.

Source: MaskGIT (arXiv 2202.04200) as in Show-o (arXiv 2408.12528), `t2i_generate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from corl_jax.policies.choices import token_logprobs
from corl_jax.policies.chunked_logprobs import map_chunks

# log of the largest float32: confidence of known places, above every other one with its noise.
KNOWN = np.log(np.finfo(np.float32).max)
SMALLEST = 1e-20  # of the numbers whose logarithms make Gumbel noise from uniform noise
GIVEN = -1
"""Step of places that were known from the start."""
CHUNK = 16384
"""Places, over all rows, whose logits exist at once: 512 MiB of float32 for 8,192 codes."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """The random numbers of all steps."""

    # (step, places [C]) -> Gumbel noise [N, C, K] that chooses codes, as argmax(log p + noise)
    gumbels: Callable[[jax.Array, jax.Array], jax.Array]
    # step -> uniform noise [N, M] in [0, 1) for the order in which codes are committed
    uniforms: Callable[[jax.Array], jax.Array]


def make_noise(keys: jax.Array, num_places: int, num_codes: int) -> Noise:
    """Returns the noise of rows with keys [N]; a row's noise depends on its key alone."""

    def fold(number: jax.Array) -> Callable[[jax.Array], jax.Array]:
        return lambda key: jax.random.fold_in(key, number)

    # Step s has the keys 2 s and 2 s + 1. Each place has a key, so that pieces change nothing.
    def draw_gumbels(step: jax.Array, places: jax.Array) -> jax.Array:
        def draw(key: jax.Array, place: jax.Array) -> jax.Array:
            return jax.random.gumbel(fold(place)(key), (num_codes,))

        of_step = jax.vmap(fold(2 * step))(keys)
        return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(of_step, places)

    def draw_uniforms(step: jax.Array) -> jax.Array:
        of_step = jax.vmap(fold(2 * step + 1))(keys)
        return jax.vmap(lambda key: jax.random.uniform(key, (num_places,)))(of_step)

    return Noise(draw_gumbels, draw_uniforms)


def give_noise(gumbels: jax.Array, uniforms: jax.Array) -> Noise:
    """Returns given noise: [T, N, M, K] that chooses codes, and [T, N, M] of the order."""
    return Noise(
        lambda step, places: jnp.take(gumbels[step], places, axis=1),
        lambda step: uniforms[step],
    )


def list_masked_counts(num_places: int, steps: int) -> np.ndarray:
    """Returns how many of M places the cosine schedule masks again after each step, [T] int32.

    The last one is -1; see `choose_masked`.
    """
    # All in float32, whose rounding decides a count: cos(pi / 2) is -4.4e-8, and with T = 12 step 8
    # has M / 2 or one less. The cosine itself is rounded once.
    ratios = np.asarray([(step + 1) / steps for step in range(steps)], np.float32)
    angles = ratios * np.float32(np.pi) * np.float32(0.5)
    shares = np.cos(angles.astype(np.float64)).astype(np.float32)
    return np.floor(np.float32(num_places) * shares).astype(np.int32)


def list_temperatures(steps: int) -> np.ndarray:
    """Returns the factor of the noise of the order in each step, [T] float32."""
    # A product: 8 steps: 0.875, 0.875 * 0.75, ..; Show-o overwrites its temperature in each step.
    ratios = [(step + 1) / steps for step in range(steps)]
    return np.cumprod([1.0 - ratio for ratio in ratios]).astype(np.float32)


def choose_masked(
    logprobs: jax.Array, known: jax.Array, count: jax.Array, temperature: jax.Array,
    uniforms: jax.Array,
) -> jax.Array:  # fmt: skip
    """Returns the places [N, M] bool that are masked again after a step.

    `count` [N] or a scalar is the number of them by the schedule; at least one and at most all but
    one of the unknown places are masked. `logprobs` are those of the drawn codes.
    """
    unknown = (~known).sum(axis=-1)
    count = jnp.maximum(1, jnp.minimum(unknown - 1, count))
    inner = jnp.maximum(-jnp.log(jnp.maximum(uniforms, SMALLEST)), SMALLEST)
    confidence = jnp.where(known, KNOWN, logprobs) - temperature * jnp.log(inner)
    # A sort and a threshold, because the counts are traced and differ by row. A single place has
    # no other one to compare with.
    place = jnp.minimum(count, known.shape[-1] - 1)[:, None]
    cut = jnp.take_along_axis(jnp.sort(confidence, axis=-1), place, axis=-1)
    # Only without any unknown place would the threshold reach known ones: they stay.
    return (confidence < cut) & ~known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """The state before a step and its draws, with a leading axis of steps."""

    codes: jax.Array  # [N, M] int16, of known places; K elsewhere, which is the mask token
    known: jax.Array  # [N, M] bool
    drawn: jax.Array  # [N, M] int16; the known code at known places
    conditional: jax.Array  # [N, M] float32, log-probs of `drawn` without guidance
    guided: jax.Array  # [N, M] float32, log-probs under the distribution that it is drawn from


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """The result of all steps."""

    codes: jax.Array  # [N, M] int32
    # [N, M] int32: the step after which a code stayed, GIVEN where it was known from the start. The
    # place that the last step masks has the last step. A place is known before step s if its
    # step is smaller than s: these numbers and the codes give the state before each step.
    committed_at: jax.Array
    # [N, M] float32: log-prob of the code in that step, without guidance and with; 0 where GIVEN
    conditional: jax.Array
    guided: jax.Array
    steps: Step | None  # if they are recorded


@dataclasses.dataclass(frozen=True)
class Unmasker:
    """The functions and numbers of drawing that do not change from step to step."""

    # codes [N, M], of unknown places the mask token K -> states of all places, [N, M, ...] each
    read: Callable[[jax.Array], Any]
    # states of some places [N, C, ...] -> float32 logits [N, C, K] (conditional, guided)
    logits_of: Callable[[Any], tuple[jax.Array, jax.Array]]
    noise: Noise
    num_codes: int  # K
    steps: int  # T
    temperature: jax.Array | float = 1.0  # of the codes
    greedy: jax.Array | bool = False  # or [N]: the most likely codes, in the order of certainty
    count_unknown: bool = False  # counts of the schedule from unknown places, not from all
    record: bool = False
    chunk: int = CHUNK

    def draw(self, codes: jax.Array, known: jax.Array) -> Drawn:
        """Draws the codes [N, M] of places that are not known; the schedule counts all places."""
        rows, num_places = codes.shape
        greedy = jnp.broadcast_to(jnp.asarray(self.greedy), (rows,))[:, None]
        counts = self._count_masked(known)
        temperatures = jnp.asarray(list_temperatures(self.steps))

        def step(state: tuple, number: jax.Array) -> tuple[tuple, Step | None]:
            codes, known, committed_at, *committed = state
            before = jnp.where(known, codes, self.num_codes)
            drawn, *logprobs = self._draw_codes(self.read(before), before, known, greedy, number)
            masked = choose_masked(
                logprobs[1], known, counts[number],
                jnp.where(greedy, 0.0, temperatures[number]), self.noise.uniforms(number),
            )  # fmt: skip
            is_new = ~known & (~masked | (number == self.steps - 1))
            committed = [
                jnp.where(is_new, new, old) for new, old in zip(logprobs, committed, strict=True)
            ]  # fmt: skip
            committed_at = jnp.where(is_new, number, committed_at)
            small = (x.astype(jnp.int16) for x in (before, drawn))
            record = Step(next(small), known, next(small), *logprobs) if self.record else None
            return (drawn, known | ~masked, committed_at, *committed), record

        zeros = jnp.zeros((rows, num_places), jnp.float32)
        start = jnp.where(known, GIVEN, self.steps - 1)
        first = (codes.astype(jnp.int32), known, start, zeros, zeros)
        last, steps = lax.scan(step, first, jnp.arange(self.steps))
        codes, _, committed_at, conditional, guided = last
        return Drawn(codes, committed_at, conditional, guided, steps)

    def _count_masked(self, known: jax.Array) -> jax.Array:
        """Returns the counts [T, N] of the schedule."""
        num_places = known.shape[-1]
        if not self.count_unknown:
            counts = jnp.asarray(list_masked_counts(num_places, self.steps))
            return jnp.broadcast_to(counts[:, None], (self.steps, len(known)))
        table = np.stack([list_masked_counts(n, self.steps) for n in range(num_places + 1)], axis=1)
        return jnp.asarray(table)[:, (~known).sum(axis=-1)]

    def _draw_codes(
        self, states: Any, codes: jax.Array, known: jax.Array, greedy: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (codes, log-probs without guidance, log-probs with it), each [N, M]."""

        def draw(piece: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
            states, codes, known, places = piece
            conditional, guided = (x / self.temperature for x in self.logits_of(states))
            gumbels = jnp.where(greedy[..., None], 0.0, self.noise.gumbels(number, places[0]))
            drawn = jnp.argmax(guided + gumbels, axis=-1).astype(jnp.int32)
            drawn = jnp.where(known, codes, drawn)
            return drawn, token_logprobs(conditional, drawn), token_logprobs(guided, drawn)

        places = jnp.broadcast_to(jnp.arange(codes.shape[1]), codes.shape)
        return map_chunks(draw, (states, codes, known, places), self.chunk)
