"""Samples the turns of a task for a batch of prompts, and reads images or texts from its segments.

Training, evaluation, the command `generate` and rewards that ask questions all sample here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from corl_jax.devices.batches import pad_rows, to_host_rows
from corl_jax.policies.choices import sample_keys
from corl_jax.policies.family import Family, Sample, SamplingOptions
from corl_jax.policies.processor import Processor
from corl_jax.tasks import LATENTS, TEXT
from corl_jax.types import EncodedPrompts, Params, Rollout, Segment, Sizes

Sampler = Callable[[Params, EncodedPrompts, jax.Array], tuple[Segment, ...]]
"""(params, B prompts, N keys) -> the segments of all turns, each of N rows."""


def bind_sampler(sample: Sample, sizes: Sizes, options: SamplingOptions) -> Sampler:
    """Returns a family's sampler with its sizes and options bound."""
    return functools.partial(_call_sampler, sample, sizes, options)


def _call_sampler(
    sample: Sample, sizes: Sizes, options: SamplingOptions,
    params: Params, prompts: EncodedPrompts, keys: jax.Array,
) -> tuple[Segment, ...]:  # fmt: skip
    return sample(sizes, params, prompts, keys, options)


def sample_turn(
    sampler: Sampler,
    params: Params,
    prompts: EncodedPrompts,
    rows: Sequence[int] | np.ndarray,
    *,
    seed: int,
    stream: int,
    group_size: int = 1,
    first: int | Sequence[int] | np.ndarray = 0,
    step: int | None = None,
    fill_to: int | None = None,
    place: Callable[[Any], Any] = lambda tree: tree,
) -> Rollout:
    """Samples completions `first` to `first + group_size - 1` of each prompt.

    `rows` are the numbers of the prompts in the data; with the other numbers they make the random
    keys, see `sample_keys`. `fill_to` repeats the last prompt up to so many, for the shape of an
    earlier call; its completions come last. `first` may be a number for each prompt. `place` puts
    host arrays on the devices of a mesh.
    """
    if fill_to is not None:
        prompts = jax.tree.map(lambda x: pad_rows(x, fill_to), prompts)
        rows = pad_rows(rows, fill_to)
        first = first if isinstance(first, int) else pad_rows(first, fill_to)
    keys = sample_keys(seed, rows, group_size, stream, first=first, step=step)
    # Keys [N] have a type that numpy lacks. Their bits [N, 2] uint32 are placed instead.
    prompts, bits = place((prompts, np.asarray(jax.random.key_data(keys))))
    return Rollout(prompts, sampler(params, prompts, jax.random.wrap_key_data(bits)))


def decode_segment(
    family: Family, sizes: Sizes, params: Params, processor: Processor, segment: Segment
) -> Any:
    """Returns this process's images uint8 [N, S, S, 3], or its N texts."""
    if segment.kind == TEXT:
        return [processor.decode(tokens) for tokens in list_tokens(segment)]
    return to_host_rows(family.decode_images(sizes, params, segment.values))


def list_tokens(segment: Segment) -> list[np.ndarray]:
    """Returns this process's choices that count, row by row; those of latents are no tokens."""
    # An image has thousands of numbers in its latents, which no report of samples could show.
    if segment.kind == LATENTS:
        return [np.empty(0, np.int32)] * len(to_host_rows(segment.mask))
    # values [5, 8, pad], mask [T, T, F] -> [5, 8]
    values, mask = to_host_rows(segment.values), to_host_rows(segment.mask)
    return [row[counts] for row, counts in zip(values, mask, strict=True)]
