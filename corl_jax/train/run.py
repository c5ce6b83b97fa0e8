"""A `Run`: everything that a training loop uses, made from the config before the loop starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from corl_jax.algorithms.advantages import AdvantageOptions
from corl_jax.algorithms.recipes import Recipe
from corl_jax.devices.batches import put_rows
from corl_jax.devices.offload import Offloadable
from corl_jax.metrics import Metric
from corl_jax.policies.family import Family
from corl_jax.policies.packing import Blocks
from corl_jax.policies.turns import Sampler
from corl_jax.train.kl_penalty import KlPenalty
from corl_jax.train.reference import MovingReference
from corl_jax.types import Params, Sizes


@dataclasses.dataclass(frozen=True)
class Run:
    """Values and functions; made by `build`, read by everything else in `train`."""

    # the policy
    family: Family
    sizes: Sizes  # with adapters, if the config asks for them
    processor: Any  # policies.processor.Processor
    mesh: Mesh
    dtype: Any  # compute dtype
    frozen: Params
    reference: Offloadable | None  # trained parameters at the start of the run, for the KL
    moving: MovingReference | None  # a reference that follows the policy instead
    source_dtypes: dict[str, Any]  # by path, as the checkpoint stores them
    layer_dtypes: dict[str, list[str]]  # by path, where its layers are stored in several types

    # the data
    train_loader: Any  # data.dataset.Loader
    evaluations: tuple[Any, ...]  # train.evaluations.Evaluation; that of eval.suite is the first
    steps: int  # iterations of the whole run; each makes num_iterations optimizer steps
    seed: int
    image_side: int  # pixels of a generated image

    # one iteration
    iterate: Callable  # (run, state, prompts, step) -> (state, Iteration)
    train_step: Callable
    logprob_step: Callable
    velocity_step: Callable  # the same for the velocities of latents
    samplers: dict[str, Sampler]  # by task
    evaluation_samplers: dict[str, Sampler]  # the same for evaluations and pictures of the log
    # The same, but the last completion of each prompt is greedy; None if no baseline needs it.
    greedy_samplers: dict[str, Sampler] | None
    rewards: Mapping[str, list]  # task -> rewards with their options bound
    networks: dict[str, Any]  # name -> rewards.samples.FrozenNetwork
    recipe: Recipe
    advantage_options: AdvantageOptions | None  # None where no rewards are compared
    loss_weights: tuple[tuple[str, float], ...]  # metric prefix of a segment -> weight
    tasks: tuple[str, ...]
    kl_penalty: KlPenalty | None  # of rewards; None without, or if the penalty is in the loss
    alternate_every: int  # steps after which the trained task changes; 0: all in each step
    group_size: int
    redraws: int  # most further batches of a step, for groups with equal rewards
    rollout_batch: int  # prompts of all processes sampled at once
    num_iterations: int
    answer_blocks: Blocks | None  # of prompts whose answers may share rows in an update
    max_new_tokens: int  # of a text
    mask_truncated: bool
    sft: Any  # schema.Sft
    schedule: Callable  # optimizer step -> learning rate
    phases: Any  # runs.pace.Phases, a context manager by phase name

    @property
    def completions_per_prompt(self) -> int:
        """The completions of each prompt in an iteration: the group, and the greedy one if used."""
        return self.group_size + (self.greedy_samplers is not None)


@dataclasses.dataclass(frozen=True)
class Iteration:
    """The results of an iteration for the log: metrics, and the samples of each task."""

    metrics: dict[str, Metric]
    samples: dict[str, Any]  # task -> rewards.registry.Samples
    rewards: dict[str, dict[str, np.ndarray]]
    updates: list[dict[str, Metric]]  # each update's own metrics, in order; scalars of the device
    # user's reward -> fraction of all processes' samples that it failed on
    failed: dict[str, Any] = dataclasses.field(default_factory=dict)
    # of the rows of all processes, on the devices
    advantages: dict[str, Any] = dataclasses.field(default_factory=dict)  # task -> [N]
    lengths: dict[str, Any] = dataclasses.field(default_factory=dict)  # task -> [N] choices
    ratio_shares: dict[str, Any] = dataclasses.field(default_factory=dict)  # by metric name
    num_tokens: Any = None  # of prompts and completions; None without samples


def put_batch(run: Run, tree: Any) -> Any:
    """Returns host arrays of this process's rows as global arrays, rows spread over the mesh."""
    return put_rows(run.mesh, tree)
