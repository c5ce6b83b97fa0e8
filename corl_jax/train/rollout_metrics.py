"""Statistics of sampled segments: lengths of texts, repeated codes, spread of latents."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from corl_jax.tasks import CODES, LATENTS, TEXT, name_segments
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens of sampled completions."""

    texts: dict[str, jax.Array]  # of each text segment, by its metric prefix
    num_tokens: jax.Array  # of prompts and completions, each prompt once per completion

    def add(self, other: TokenCounts) -> TokenCounts:
        """Returns the sums of both."""
        return jax.tree.map(jnp.add, self, other)


@jax.jit
def count_tokens(rollouts: dict[str, Rollout]) -> TokenCounts:
    """Returns the numbers of tokens of the rollouts of all tasks."""
    texts: dict[str, jax.Array] = {}
    num_tokens = jnp.int32(0)
    for task, rollout in rollouts.items():
        prompts = rollout.prompts
        while prompts is not None:
            num_tokens += rollout.group_size * prompts.attention_mask.sum()
            prompts = prompts.next
        for name, segment in _name_rollout(task, rollout):
            tokens = segment.mask.sum()
            num_tokens += tokens
            if segment.kind == TEXT:
                texts[name] = tokens
    return TokenCounts(texts, num_tokens)


def measure_group_difference(tokens: jax.Array, group_size: int) -> jax.Array:
    """Returns the mean share of places [T] at which two rows of a group differ; NaN with G = 1.

    `tokens` [N, T]. It is a measure of diversity: 0 if all rows of each group are equal.
    """
    groups = tokens.reshape(-1, group_size, tokens.shape[-1])
    different = (groups[:, :, None] != groups[:, None, :]).mean(axis=-1)  # [groups, G, G]
    # A row does not differ from itself, so the G zeros of each diagonal only count.
    pairs = different.shape[0] * group_size * (group_size - 1)
    return different.sum() / pairs if pairs else jnp.float32(jnp.nan)


def measure_latent_difference(images: jax.Array, group_size: int) -> jax.Array:
    """Returns the root of the mean squared difference of latents of two rows of a group.

    `images` [N, ...]. The mean is over all pairs; it is NaN with G = 1.
    """
    groups = images.astype(jnp.float32).reshape(-1, group_size, images[0].size)
    # The sum over all pairs of rows is 2 G times the sum of the squared distances from the mean.
    # Groups of 2 with values 0 and 2: mean 1, 1 + 1 = 2, and 2 * 2 * 2 / 2 = 4 = (0 - 2)^2.
    distances = jnp.square(groups - groups.mean(axis=1, keepdims=True)).sum(axis=1).mean()
    return jnp.sqrt(2 * distances / (group_size - 1)) if group_size > 1 else jnp.float32(jnp.nan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutStats:
    """Numbers of the completions of all tasks."""

    metrics: dict[str, jax.Array]  # by metric name
    lengths: dict[str, jax.Array]  # task -> choices of each completion [N] int32


def describe_rollouts(
    rollouts: Mapping[str, Rollout], *, eos: int, group_size: int
) -> RolloutStats:
    """Returns the numbers of the completions of all tasks."""
    return _describe(dict(rollouts), eos=eos, group_size=group_size)


@functools.partial(jax.jit, static_argnames=("eos", "group_size"))
def _describe(rollouts: dict[str, Rollout], *, eos: int, group_size: int) -> RolloutStats:
    metrics: dict[str, jax.Array] = {}
    lengths: dict[str, jax.Array] = {}
    for task, rollout in rollouts.items():
        per_segment = [segment.mask.sum(axis=-1) for segment in rollout.segments]
        lengths[task] = functools.reduce(jnp.add, per_segment)
        for name, segment in _name_rollout(task, rollout):
            if segment.kind == CODES:
                metrics |= _describe_codes(name, segment.values, group_size)
            if segment.kind == LATENTS:
                metrics |= _describe_latents(name, segment, group_size)
            if segment.kind == TEXT:
                metrics |= _describe_text(name, segment, eos)
    return RolloutStats(metrics, lengths)


def _name_rollout(task: str, rollout: Rollout) -> list[tuple[str, Segment]]:
    """Returns (metric prefix, segment) of each segment."""
    names = name_segments(task, [segment.kind for segment in rollout.segments])
    return list(zip(names, rollout.segments, strict=True))


def _describe_codes(name: str, codes: jax.Array, group_size: int) -> dict[str, jax.Array]:
    """Returns the metrics of image codes [N, T]; all images have the same length."""
    # Sorted, equal codes are neighbours: [7, 3, 7] -> [3, 7, 7], which has 2 distinct codes.
    ordered = jnp.sort(codes, axis=-1)
    distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=-1)
    return {
        f"{name}/completions/mean_length": jnp.float32(codes.shape[1]),
        f"{name}/distinct_token_fraction": distinct.mean() / codes.shape[1],
        f"{name}/duplicate_fraction": count_duplicates(codes, group_size),
        f"{name}/group_difference": measure_group_difference(codes, group_size),
    }


def _describe_latents(name: str, latents: Segment, group_size: int) -> dict[str, jax.Array]:
    """Returns the metrics of images that are made by denoising; their choices are its steps."""
    return {
        f"{name}/completions/mean_length": latents.mask.sum(axis=-1).mean(dtype=jnp.float32),
        # The last latents are the image.
        f"{name}/group_difference": measure_latent_difference(latents.values[:, -1], group_size),
    }


def _describe_text(name: str, text: Segment, eos: int) -> dict[str, jax.Array]:
    lengths = text.mask.sum(axis=-1)
    metrics = {
        f"{name}/completions/{kind}_length": getattr(lengths, kind)()
        for kind in ("mean", "min", "max")
    }
    # NaN, not TRL's 0, if no text has ended: 0 would look like a length.
    terminated = jnp.where(has_ended(text, eos), lengths, jnp.nan)
    metrics |= {
        f"{name}/completions/{kind}_terminated_length": getattr(jnp, f"nan{kind}")(terminated)
        for kind in ("mean", "min", "max")
    }
    metrics[f"{name}/completions/clipped_ratio"] = 1 - has_ended(text, eos).mean()
    return metrics
