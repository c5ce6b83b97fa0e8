"""The completions of a batch of prompts with their rewards, as an iteration passes them on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.devices.batches import all_gather_rows, take_own_rows
from corl_jax.metrics import Metric
from corl_jax.rewards.samples import Samples
from corl_jax.train.rollout_metrics import TokenCounts
from corl_jax.train.run import Run, put_batch
from corl_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Scored:
    """One task's completions of this process, with their rewards by name."""

    samples: Samples
    rewards: dict[str, np.ndarray]  # [N] float32, NaN where not applicable
    # reward -> seconds; failures since the start; of a user's reward, failed samples of these
    costs: dict[str, dict[str, float]]
    num_scored: int  # completions that the costs are of


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The completions of all tasks of a step."""

    rollouts: dict[str, Rollout]
    scored: dict[str, Scored]
    tokens: TokenCounts  # of all that was sampled, also of what is no longer in the rollouts


def place_rewards(
    run: Run, rewards: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, jax.Array]:
    """Returns each task's rewards [F, N] of the rows of all processes, spread over the mesh."""
    # Processes that hold the same rows may score them differently, if a reward is not
    # deterministic. The gather gives all of them the scores of one process.
    # [rewards, N] -> [N, rewards] and back: gathers and shardings are over the leading axis.
    stacked = {
        task: take_own_rows(run.mesh, all_gather_rows(run.mesh, np.stack(list(values.values())).T))
        for task, values in rewards.items()
    }
    return {task: value.T for task, value in put_batch(run, stacked).items()}


def average_failures(run: Run, scored: Scored) -> dict[str, jax.Array]:
    """Returns the fraction of all processes' samples on which each user's reward failed."""
    shares = {
        name: cost["failed"] / scored.num_scored
        for name, cost in scored.costs.items()
        if "failed" in cost
    }
    return {
        name: jnp.mean(put_batch(run, np.full(len(scored.samples), share, np.float32)))
        for name, share in shares.items()
    }


def list_costs(run: Run, drawn: Drawn) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Returns the metrics of what each reward cost, and `NAME of TASK` -> its failed fraction."""
    metrics: dict[str, Metric] = {}
    failed: dict[str, Any] = {}
    for task, scored in drawn.scored.items():
        for name, cost in scored.costs.items():
            metrics[f"{task}/rewards/{name}/seconds"] = Metric(cost["seconds"], "max")
            metrics[f"{task}/rewards/{name}/failures"] = Metric(cost["failures"], "sum")
        for name, share in average_failures(run, scored).items():
            metrics[f"{task}/rewards/{name}/failed"] = Metric(share)
            failed[f"{name} of {task}"] = share
    return metrics, failed
