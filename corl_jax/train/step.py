"""One optimizer step: gradients over micro-batches, clip, update. Mathematics only.

The loss of a batch is w_t2i L_t2i + w_mm2t L_mm2t; each L is a sum over rows (or tokens)
divided by a count that depends on masks alone. The counts are taken over the whole batch
before the first micro-batch, so that splitting it changes nothing but memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from corl_jax.algorithms import grpo
from corl_jax.devices.mesh import constrain
from corl_jax.metrics import Metric, to_metrics
from corl_jax.params import merge
from corl_jax.policies.janus import network
from corl_jax.policies.janus.logprobs import TASK_LOGPROBS, LogprobOptions
from corl_jax.policies.janus.network import Janus, JanusConfig
from corl_jax.types import Array, EncodedPrompts, Params

DIFFERENCE_MEAN = "sampling/sampling_logp_difference/mean"
DIFFERENCE_MAX = "sampling/sampling_logp_difference/max"
"""Between the log-probs of sampler and trainer, by token."""

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Metrics as (sum, denominator), so that micro-batches add up exactly."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes; donated to each step."""

    step: Array  # scalar int32, updates applied; a skipped one does not count
    params: Params  # the trained ones
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaskBatch:
    """The completions of one task with all that its loss needs; None where it does not."""

    prompts: EncodedPrompts  # B rows
    tokens: Array  # [N, T] int32
    mask: Array  # [N, T] bool, tokens in the loss
    advantages: Array | None = None  # [N]; None in supervised training
    sampler_logprobs: Array | None = None  # [N, T] as recorded when drawn
    old_logprobs: Array | None = None  # [N, T]; None: the policy itself
    ref_logprobs: Array | None = None  # [N, T]; None: no KL


Batch = dict[str, TaskBatch]
"""By task name."""


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What is minimised; hashable, so that a step is compiled once for it."""

    scoring: LogprobOptions
    weights: tuple[tuple[str, float], ...]  # task name -> weight of its loss
    kl_coef: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dtype: Any = jnp.bfloat16
    micro_batches: int = 1


def loss_rows(batch: TaskBatch) -> jax.Array:
    """What a task's summed loss is divided by: rows for GRPO, tokens for supervised training."""
    if batch.advantages is None:
        return batch.mask.sum().astype(jnp.float32)
    return batch.mask.any(axis=-1).sum().astype(jnp.float32)


def task_loss(
    model: Janus, task: str, batch: TaskBatch, objective: LossOptions
) -> tuple[jax.Array, Sums, jax.Array]:
    """(summed loss, metrics, largest sampler/trainer difference) of one task's rows."""
    logprobs, entropy = TASK_LOGPROBS[objective_task(task)](
        model, batch.prompts, batch.tokens, objective.scoring
    )
    tokens = batch.mask.sum().astype(jnp.float32)
    if batch.advantages is None:
        total = -jnp.where(batch.mask, logprobs, 0.0).sum()
        sums = {"nll": (total, tokens)}
        return total, sums | {"entropy": _masked(entropy, batch.mask)}, jnp.float32(0)
    total, rows, sums = grpo.policy_loss(
        logprobs, batch.old_logprobs, batch.advantages, batch.mask, batch.ref_logprobs,
        objective.kl_coef, objective.clip_low, objective.clip_high, entropy,
    )  # fmt: skip
    sums = sums | {"loss": (total, rows)}
    if batch.sampler_logprobs is None:
        return total, sums, jnp.float32(0)
    difference, count, largest = grpo.logprob_difference(
        batch.sampler_logprobs, logprobs, batch.mask
    )
    return total, sums | {DIFFERENCE_MEAN: (difference, count)}, largest


def objective_task(name: str) -> str:
    """The task whose scoring a batch entry uses: `caption` is understanding, like `mm2t`."""
    return "t2i" if name == "t2i" else "mm2t"


def _masked(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.where(mask, values, 0.0).sum(), mask.sum().astype(jnp.float32)


def split_batch(batch: Batch, pieces: int) -> Batch:
    """Leaves [rows, ...] -> [pieces, rows / pieces, ...], whole groups staying together.

    Piece m takes every pieces-th prompt, so that each device contributes to each piece the
    prompts it already holds.
    """

    def split(task: TaskBatch) -> TaskBatch:
        prompts = task.prompts.input_ids.shape[0]

        def leaf(x: jax.Array) -> jax.Array:
            group = x.shape[0] // prompts
            x = x.reshape(prompts // pieces, pieces, group, *x.shape[1:]).swapaxes(0, 1)
            return x.reshape(pieces, -1, *x.shape[3:])

        return jax.tree.map(leaf, task)

    return {name: split(task) for name, task in batch.items()}


def gradients(
    config: JanusConfig, objective: LossOptions, trained: Params, frozen: Params, batch: Batch
) -> tuple[Params, dict[str, jax.Array]]:
    """(gradients in the parameters' dtype, metrics as scalars) of a whole batch."""
    counts = {name: jnp.maximum(loss_rows(task), 1.0) for name, task in batch.items()}
    weights = dict(objective.weights)

    def loss(trained: Params, piece: Batch) -> tuple[jax.Array, tuple[Sums, dict]]:
        model = network.bind(config, network.cast(merge(trained, frozen), objective.dtype))
        total, sums, largest = jnp.float32(0), {}, {}
        for name, task in piece.items():
            summed, metrics, most = task_loss(model, name, task, objective)
            total += weights[name] * summed / counts[name]
            sums |= {f"{name}/{key}": value for key, value in metrics.items()}
            if task.sampler_logprobs is not None:
                largest[f"{name}/{DIFFERENCE_MAX}"] = most
        return total, (sums, largest)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def accumulate(piece: Batch):
        piece = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), piece)
        (value, (sums, largest)), grads = gradient(trained, piece)
        return value, sums, largest, grads

    if objective.micro_batches == 1:
        value, sums, largest, grads = accumulate(batch)
    else:
        value, sums, largest, grads = _scan_sum(
            accumulate, split_batch(batch, objective.micro_batches)
        )
    metrics = {key: total / jnp.maximum(count, 1.0) for key, (total, count) in sums.items()}
    return grads, metrics | largest | {"loss": value}


def _scan_sum(accumulate: Callable, pieces: Batch):
    """Sums of values, metrics and gradients over pieces; the maximum of the differences."""

    def add(carry, piece):
        value, sums, largest, grads = accumulate(piece)
        old = carry
        return (
            old[0] + value,
            jax.tree.map(jnp.add, old[1], sums),
            jax.tree.map(jnp.maximum, old[2], largest),
            jax.tree.map(jnp.add, old[3], grads),
        ), None

    shapes = jax.eval_shape(accumulate, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(add, zeros, pieces)[0]


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation, loss: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(next state, metrics); `grad_norm` is the gradients' global norm before clipping.

    Unless both loss and norm are finite, the update is skipped: parameters, optimizer and `step`
    keep their bits, and so the learning rate its place in the schedule. A norm is finite only
    if the squares of all gradients are, so what the optimizers here make of them is too.
    `update/skipped` is 1 for a skipped update, `update/applied` the state's step.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    moved = TrainState(state.step + 1, params, opt_state)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
    skipped = 1.0 - finite.astype(jnp.float32)
    metrics = {"grad_norm": norm, "update/skipped": skipped, "update/applied": state.step}
    return state, metrics


def make_train_step(
    config: JanusConfig, objective: LossOptions, optimizer: optax.GradientTransformation, **jit: Any
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Metric]]]:
    """The jitted step (state, frozen, batch) -> (state, metrics); the state is donated.

    `jit` passes on to jax.jit, e.g. out_shardings.
    """

    @functools.partial(jax.jit, donate_argnums=0, **jit)
    def train_step(state: TrainState, frozen: Params, batch: Batch):
        grads, metrics = gradients(config, objective, state.params, frozen, batch)
        state, update = apply_gradients(state, grads, optimizer, metrics["loss"])
        # Only the first update starts from the policy that sampled, so only its difference
        # between sampler and trainer means anything.
        names = [f"{task}/{name}" for task in batch for name in (DIFFERENCE_MEAN, DIFFERENCE_MAX)]
        first = {name: Metric(metrics[name], "first") for name in names if name in metrics}
        return state, to_metrics(metrics | update) | first

    return train_step


def make_logprob_step(config: JanusConfig, objective: LossOptions) -> Callable:
    """The jitted (trained, frozen, batch) -> {task: log-probs [N, T]}, no gradients.

    For old log-probs before the first of several updates, and for the reference: with adapters
    that is the network without them, which has nothing trained.
    """

    @jax.jit
    def score_step(trained: Params, frozen: Params, batch: Batch) -> dict[str, jax.Array]:
        params = network.cast(merge(trained, frozen), objective.dtype)
        model = network.bind(config if trained else network.base(config), params)

        def score(piece: Batch) -> dict[str, jax.Array]:
            return {
                name: TASK_LOGPROBS[name](model, task.prompts, task.tokens, objective.scoring)[0]
                for name, task in piece.items()
            }

        pieces = objective.micro_batches
        if pieces == 1:
            return score(batch)
        scores = lax.map(score, split_batch(batch, pieces))
        return {name: _unsplit(x, batch[name], pieces) for name, x in scores.items()}

    return score_step


def _unsplit(x: jax.Array, task: TaskBatch, pieces: int) -> jax.Array:
    """Undoes split_batch for one array [pieces, rows / pieces, T]."""
    prompts = task.prompts.input_ids.shape[0]
    group = task.tokens.shape[0] // prompts
    x = x.reshape(pieces, prompts // pieces, group, x.shape[-1]).swapaxes(0, 1)
    return x.reshape(prompts * group, -1)
