"""The table of algorithms. Each row has a function that makes advantages, a loss, and defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from corl_jax.algorithms import advantages as compare
from corl_jax.algorithms import losses
from corl_jax.algorithms.advantages import AdvantageOptions, RewardInputs
from corl_jax.algorithms.divergences import KlEstimator
from corl_jax.algorithms.estimators import Scale
from corl_jax.algorithms.losses import Loss, Reduction, make_policy_loss

Compare = Callable[
    [RewardInputs, AdvantageOptions], tuple[dict[str, jax.Array], dict[str, jax.Array]]
]
"""(rewards by task, options) -> (advantages [N] by task, statistics by metric name)."""


TOKEN_MEAN: tuple[Reduction, ...] = ("token_mean", "sequence_mean", "constant")
"""Reductions of a recipe whose default is the mean over all tokens."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of `RECIPES`. The values are those of options that a config leaves at null.

    Of `scales` and `reductions` the first is the default, and the others can be chosen.
    """

    advantages: Compare
    loss: Loss
    ignored: frozenset[str] = frozenset()  # options of the block `algorithm` that it does not read
    min_group_size: int = 2  # fewest completions per prompt; 1: another prompt's, or a greedy one
    min_batch_size: int = 1  # fewest completions per step
    uses_greedy: bool = False  # also samples one greedy completion of each prompt
    max_iterations: int | None = None  # most updates per rollout; a loss without ratio allows 1
    scales: tuple[Scale, ...] = ("group", "batch", "none")
    reductions: tuple[Reduction, ...] = ("sequence_mean", "token_mean", "constant")
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_in: str = "loss"  # or "reward"
    kl_estimator: KlEstimator = "k3"
    redraws: int = 0  # of groups with equal rewards


RECIPES: dict[str, Recipe] = {
    # arXiv 2402.03300; for two tasks arXiv 2505.17534
    "grpo": Recipe(compare.compare_within_groups, losses.CLIPPED_POLICY_LOSS),
    # arXiv 2503.20783
    "dr_grpo": Recipe(
        compare.compare_within_groups, losses.CLIPPED_POLICY_LOSS,
        scales=("none", "group", "batch"),
        reductions=("constant", "sequence_mean", "token_mean"),
    ),
    # arXiv 2503.14476; its soft length penalty is the reward `soft_overlong`
    "dapo": Recipe(
        compare.compare_within_groups, losses.CLIPPED_POLICY_LOSS, reductions=TOKEN_MEAN,
        clip_high=0.28, redraws=3,
    ),
    # arXiv 2507.18071; TRL's clip range
    "gspo": Recipe(
        compare.compare_within_groups, make_policy_loss(losses.clip_mean_ratios),
        clip_low=3e-4, clip_high=4e-4,
    ),
    # arXiv 2506.13585; the ratio is bounded by 5
    "cispo": Recipe(
        compare.compare_within_groups, make_policy_loss(losses.weigh_logprobs_by_ratio),
        ignored=frozenset({"clip_low", "dual_clip"}), reductions=TOKEN_MEAN,
        clip_low=1.0, clip_high=4.0,
    ),
    # arXiv 2402.14740
    "rloo": Recipe(
        compare.compare_leave_one_out, make_policy_loss(losses.clip_sequence_ratios),
        ignored=frozenset({"ddof"}),
        # A completion is one action: its loss is not a sum over tokens with other averages.
        scales=("none", "batch"), reductions=("sequence_mean",), kl_in="reward", kl_estimator="k1",
    ),
    # arXiv 2310.10505
    "remax": Recipe(
        compare.compare_with_greedy, make_policy_loss(losses.weigh_logprobs),
        ignored=frozenset({"clip_low", "clip_high", "dual_clip", "ddof"}), min_group_size=1,
        uses_greedy=True, max_iterations=1, scales=("none", "batch"), reductions=TOKEN_MEAN,
        # In the loss k2 has the gradient of a k1 penalty of each token in its reward.
        kl_estimator="k2",
    ),
    # arXiv 2501.03262
    "reinforce_pp": Recipe(
        compare.compare_with_batch, losses.CLIPPED_POLICY_LOSS, ignored=frozenset({"ddof"}),
        min_group_size=1, min_batch_size=2,
        scales=("batch", "none"), reductions=TOKEN_MEAN, kl_in="reward", kl_estimator="k1",
    ),
    # arXiv 2601.05242
    "gdpo": Recipe(
        compare.compare_each_reward, losses.CLIPPED_POLICY_LOSS, ignored=frozenset({"ddof"}),
        scales=("group", "batch", "none"),
    ),
}  # fmt: skip
"""`algorithm.name` -> recipe."""
