"""Statistics of sampled segments: lengths of texts, repetition of image codes."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from corl_jax.tasks import CODES, TEXT
from corl_jax.types import Rollout, Segment


def has_ended(text: Segment, eos: int) -> jax.Array:
    """Returns [N] bool: whether each text has its end token."""
    return ((text.values == eos) & text.mask).any(axis=-1)


def count_duplicates(tokens: jax.Array, group_size: int) -> jax.Array:
    """Returns the fraction of rows [N, T] that repeat an earlier row of their group."""
    groups = tokens.reshape(-1, group_size, tokens.shape[-1])
    # same [groups, G, G]: entry (i, j) says whether rows i and j of a group are equal. Entries
    # below the diagonal compare a row with the earlier ones.
    same = (groups[:, :, None] == groups[:, None, :]).all(axis=-1)
    return jnp.tril(same, k=-1).any(axis=-1).mean()


def describe_rollouts(
    rollouts: Mapping[str, Rollout], *, eos: int, group_size: int
) -> dict[str, jax.Array]:
    """Returns the metrics of the completions of each task, by metric name."""
    return _describe(dict(rollouts), eos=eos, group_size=group_size)


@functools.partial(jax.jit, static_argnames=("eos", "group_size"))
def _describe(rollouts: dict[str, Rollout], *, eos: int, group_size: int) -> dict[str, jax.Array]:
    metrics: dict[str, jax.Array] = {}
    for task, rollout in rollouts.items():
        for segment in rollout.segments:
            if segment.kind == CODES:
                metrics |= _describe_codes(task, segment.values, group_size)
            if segment.kind == TEXT:
                metrics |= _describe_text(task, segment, eos)
    return metrics


def _describe_codes(task: str, codes: jax.Array, group_size: int) -> dict[str, jax.Array]:
    """Returns the metrics of image codes [N, T]; all images have the same length."""
    # Sorted, equal codes are neighbours: [7, 3, 7] -> [3, 7, 7], which has 2 distinct codes.
    ordered = jnp.sort(codes, axis=-1)
    distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=-1)
    return {
        f"{task}/completions/mean_length": jnp.float32(codes.shape[1]),
        f"{task}/distinct_token_fraction": distinct.mean() / codes.shape[1],
        f"{task}/duplicate_fraction": count_duplicates(codes, group_size),
    }


def _describe_text(task: str, text: Segment, eos: int) -> dict[str, jax.Array]:
    lengths = text.mask.sum(axis=-1)
    metrics = {
        f"{task}/completions/{name}_length": getattr(lengths, name)()
        for name in ("mean", "min", "max")
    }
    metrics[f"{task}/completions/clipped_ratio"] = 1 - has_ended(text, eos).mean()
    metrics[f"{task}/tokens"] = lengths.sum()
    return metrics
