"""The KL penalty in the reward: how far each completion is from the reference, by its log-probs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from corl_jax.algorithms.divergences import KlEstimator, estimate_kl, k3_kl
from corl_jax.tasks import name_segments
from corl_jax.train.step import Batch


@dataclasses.dataclass(frozen=True)
class KlPenalty:
    """The KL penalty of rewards; hashable, because jit takes it as a static argument."""

    coefficient: float  # beta
    estimator: KlEstimator


@functools.partial(jax.jit, static_argnames="penalty")
def measure_penalties(
    batch: Batch, penalty: KlPenalty
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns (penalties [N] by task, statistics by metric name) of a batch with log-probs.

    A penalty is the estimate of each kept token, summed over the completion, times the
    coefficient. `kl` is the mean of k3 over tokens, as with the penalty in the loss.
    """
    penalties, stats = {}, {}
    for name, task in batch.items():
        assert task.old_logprobs is not None and task.ref_logprobs is not None
        total = jnp.float32(0)
        for prefix, segment, policy, reference in zip(
            name_segments(name, task.kinds), task.segments, task.old_logprobs, task.ref_logprobs,
            strict=True,
        ):  # fmt: skip
            assert reference is not None, "a penalty in the reward is of tokens alone"
            # Padding may hold anything, -inf included, and inf - inf is NaN.
            policy, reference = (jnp.where(segment.mask, x, 0.0) for x in (policy, reference))
            # 0 where both are 0, so padding adds nothing.
            total += estimate_kl(policy, reference, penalty.estimator).sum(axis=-1)
            tokens = jnp.maximum(segment.mask.sum(), 1)
            stats[f"{prefix}/kl"] = k3_kl(policy, reference).sum() / tokens
        penalties[name] = penalty.coefficient * total
        stats[f"{name}/kl_penalty"] = penalties[name].mean()
    return penalties, stats
