"""A `Run`: everything a training loop uses, resolved from the config before the loop starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from corl_jax.devices import batches
from corl_jax.devices.offload import Offloadable
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Run:
    """Values and functions; built by `build`, read by everything else in `train`."""

    # the policy
    model_config: JanusConfig
    processor: Any  # data.processor.Processor
    mesh: Mesh
    dtype: Any  # compute dtype
    frozen: Params
    reference: Offloadable | None  # trained parameters at the start of the run, for the KL
    source_dtypes: dict[str, Any]  # by path, as the checkpoint stores them
    layer_dtypes: dict[str, list[str]]  # by path, where its layers are stored in several types

    # the data
    train_loader: Any  # data.dataset.Loader
    eval_loader: Any  # None without held-out rows
    steps: int  # iterations of the whole run; each makes num_iterations optimizer steps
    seed: int
    image_side: int  # pixels of a drawn image

    # one iteration
    iterate: Callable  # (run, state, prompts, step) -> (state, Iteration)
    train_step: Callable
    score_step: Callable
    samplers: dict[str, Callable]  # task -> (params, prompts, keys) -> Rollout
    rewards: dict[str, list]  # task -> resolved rewards
    networks: dict[
        str, Any
    ]  # frozen networks that rewards ask, rewards.samples.FrozenNetwork by name
    comparison: dict[str, Any]  # keywords of the advantage computation
    tasks: tuple[str, ...]
    group_size: int
    rollout_batch: int  # prompts of all processes sampled at once
    num_iterations: int
    mask_truncated: bool
    sft: Any  # config.Sft
    schedule: Callable  # optimizer step -> learning rate
    phases: Any  # metrics.Phases, a context manager by phase name


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What an iteration leaves for the log: scalars, and one example of each task."""

    metrics: dict[str, Any]
    samples: dict[str, Any]  # task -> rewards.registry.Samples
    rewards: dict[str, dict[str, np.ndarray]]
    updates: list[dict[str, Any]]  # each update's own metrics, in order; scalars of the device


def put(run: Run, tree: Any) -> Any:
    """Host arrays of this process's rows as global arrays, rows spread over the mesh."""
    return batches.put_rows(run.mesh, tree)
