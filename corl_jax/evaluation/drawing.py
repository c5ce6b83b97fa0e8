"""Draws images of numbered prompts with a model in memory.

An image is named by a pair (prompt number, sample number). Its random key depends on the seed and
on this pair alone. So batch size, devices, processes and the pairs that are left after an
interruption change an image only by rounding, and two models share their noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from corl_jax.devices.batches import (
    num_batch_shards,
    put_rows,
    take_own_rows,
    to_host_rows,
)
from corl_jax.policies.family import SamplingOptions
from corl_jax.policies.turns import bind_sampler, sample_turn
from corl_jax.rewards.samples import Policy
from corl_jax.tasks import IMAGE_GENERATION

Pair = tuple[int, int]
"""(number of a prompt in the whole list, number of a sample of it)."""


@dataclasses.dataclass(frozen=True)
class DrawnImage:
    """An image of a prompt."""

    prompt: int
    sample: int
    pixels: np.ndarray  # uint8 [S, S, 3]


def draw_prompts(
    policy: Policy,
    prompts: Sequence[str],
    pairs: Sequence[Pair],
    sampling: SamplingOptions,
    *,
    seed: int,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Iterator[DrawnImage]:
    """Yields the image of each pair, in their order.

    `prompts` is the whole list, because its longest prompt decides the length of the program.
    `mesh` is the mesh of the parameters; None: they are on one device. On a mesh of several
    processes all give the same pairs, and each gets the images of its own rows.
    """
    if not pairs:
        return
    turn, processor = IMAGE_GENERATION.turn, policy.processor
    ids = [processor.prompt_ids(turn.prompt, {"prompt": prompt}) for prompt in prompts]
    # One shape for all calls: another shape is another program, with other rounding, and an image
    # that is drawn after an interruption should have the same bits.
    length = processor.bucket(max(map(len, ids)))
    size = round_batch(batch_size, mesh)
    sampler = bind_sampler(
        policy.family.turns[IMAGE_GENERATION.turn_kinds].sample, policy.config, sampling
    )

    def start_call(filled: Sequence[Pair]) -> jax.Array:
        encoded = processor.encode(turn.prompt, [ids[prompt] for prompt, _ in filled], None, length)
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            rollout = sample_turn(
                sampler, policy.params, encoded, [prompt for prompt, _ in filled],
                seed=seed, stream=IMAGE_GENERATION.stream, first=[sample for _, sample in filled],
                place=functools.partial(put_rows, mesh) if mesh is not None else keep_place,
            )  # fmt: skip
            codes = rollout.segments[-1].values
            return policy.family.decode_images(policy.config, policy.params, codes)

    # The device begins the next call while the host takes the images of the last one.
    running: tuple[Sequence[Pair], np.ndarray, jax.Array] | None = None
    for filled, is_real in split_pairs(pairs, size, mesh):
        started = (filled, is_real, start_call(filled))
        if running is not None:
            yield from _take_images(*running)
        running = started
    if running is not None:
        yield from _take_images(*running)


def keep_place(tree: Any) -> Any:
    """Returns host arrays as they are: jit puts them on its device."""
    return tree


def split_pairs(
    pairs: Sequence[Pair], size: int, mesh: Mesh | None
) -> Iterator[tuple[Sequence[Pair], np.ndarray]]:
    """Yields this process's pairs of each call, and which of them are no repetitions [N] bool.

    The last call repeats its last pair: 3 pairs, size 4: [a, b, c, c], [T, T, T, F].
    """
    for first in range(0, len(pairs), size):
        batch = pairs[first : first + size]
        filled = [*batch, *[batch[-1]] * (size - len(batch))]
        is_real = np.arange(size) < len(batch)
        if mesh is not None:
            filled, is_real = take_own_rows(mesh, filled), take_own_rows(mesh, is_real)
        yield filled, is_real


def _take_images(
    filled: Sequence[Pair], is_real: np.ndarray, images: jax.Array
) -> Iterator[DrawnImage]:
    for (prompt, sample), real, pixels in zip(filled, is_real, to_host_rows(images), strict=True):
        if real:
            yield DrawnImage(prompt, sample, pixels)


def round_batch(batch_size: int, mesh: Mesh | None) -> int:
    """Returns the number of images of a call: the batch size, or more so that shards are equal."""
    # Batch 6 on 4 shards: 8, two on each.
    shards = 1 if mesh is None else num_batch_shards(mesh)
    return -(-batch_size // shards) * shards
