"""Calls one reward several times with the same samples, and describes the differences."""

from __future__ import annotations

import numpy as np

from corl_jax.errors import RewardError
from corl_jax.rewards import registry
from corl_jax.rewards.registry import BoundReward, Context, Samples


def call_once(reward: BoundReward, samples: Samples, context: Context) -> np.ndarray | str:
    """Returns the rewards [N], or the traceback if the user's reward failed."""
    try:
        return registry.score([reward], samples, context)[reward.name]
    except RewardError:
        return reward.function.last_failure.trace  # type: ignore[union-attr]


def describe_failures(reward: BoundReward, traces: dict[int, str], num_calls: int) -> str:
    """Returns which calls of a user's reward failed, and the traceback of the first one.

    `traces`: number of a failed call, from 1 on -> its traceback.
    """
    use, trace = reward.function.use, next(iter(traces.values()))  # type: ignore[union-attr]
    if num_calls == 1:
        return f"reward {reward.name} ({use}): its call failed with\n{trace}"
    numbers = ", ".join(map(str, traces))
    return (
        f"reward {reward.name} ({use}): {len(traces)} of {num_calls} calls failed ({numbers}), "
        f"the first of them with\n{trace}"
    )


def describe_differences(values: np.ndarray, names: list[str]) -> str:
    """Returns how much rewards [calls, samples] differ between calls; `names` are the samples'."""
    # calls [[1, nan, 3], [1, 2, 4]] -> changes_null [F, T, F], spread [0, inf, 1]: a reward that is
    # null in some calls only differs more than any number does.
    absent = np.isnan(values)
    changes_null = (absent != absent[:1]).any(0)
    present = np.where(absent, 0, values)
    spread = np.where(changes_null, np.inf, present.max(0) - present.min(0))
    if not spread.any():
        return f"{len(values)} calls gave the same"
    largest = int(spread.argmax())
    change = "is null at times" if changes_null[largest] else f"differs by {spread[largest]:.4g}"
    return (
        f"{len(values)} calls differ in {np.count_nonzero(spread)} of {len(names)} cases, most in "
        f"{names[largest]}, which {change}"
    )
