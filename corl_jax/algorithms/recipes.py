"""The table of algorithms. Each row has a function that makes advantages, and a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax

from corl_jax.algorithms.advantages import AdvantageOptions, compare_within_groups
from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, Loss

Compare = Callable[
    [Mapping[str, jax.Array], AdvantageOptions],
    tuple[dict[str, jax.Array], dict[str, jax.Array]],
]
"""(rewards [F, N] by task, options) -> (advantages [N] by task, statistics by metric name)."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of `RECIPES`."""

    advantages: Compare
    loss: Loss
    ignored: frozenset[str] = frozenset()  # options of the block `algorithm` that it does not read


RECIPES: dict[str, Recipe] = {
    # arXiv 2402.03300; for two tasks arXiv 2505.17534
    "grpo": Recipe(compare_within_groups, CLIPPED_POLICY_LOSS),
}
"""`algorithm.name` -> recipe."""
