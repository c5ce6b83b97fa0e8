"""One iteration of reinforcement learning: sample every task, reward, compare in groups, update.

Each function takes the `Run`, in which every option is already a value; nothing here reads the
config.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms.losses import mask_truncated
from corl_jax.devices.batches import (
    all_gather_rows,
    join_pieces,
    num_batch_shards,
    split_positions,
    take_own_rows,
)
from corl_jax.metrics import Metric, to_metrics
from corl_jax.params import merge
from corl_jax.policies.turns import decode_segment, sample_turn
from corl_jax.rewards.registry import Context, Samples, score_and_measure
from corl_jax.tasks import PLAN_COLUMN, TASKS, TEXT, image_tasks, text_tasks
from corl_jax.train.rollout_metrics import describe_rollouts, has_ended
from corl_jax.train.run import Iteration, Run, put_batch
from corl_jax.train.step import RATIO_SHARES, Batch, TaskBatch, TrainState
from corl_jax.types import Params, Prompts, Rollout


def rl_iteration(run: Run, state: TrainState, prompts: Prompts, step: int):
    """Returns (next state, Iteration) of one batch of prompts."""
    params = merge(state.params, run.frozen)
    # Texts first: the host decodes and scores them while the device still generates images.
    order = (*text_tasks(run.tasks), *image_tasks(run.tasks))
    scored: dict[str, Scored] = {}
    with run.phases("rollout"):
        # Dispatched, not awaited: the device works through them in this order.
        rollouts = {task: sample(run, task, params, prompts) for task in order}
        for task in order[:-1]:
            scored[task] = score_rollout(run, task, params, prompts, rollouts[task], step)
        jax.block_until_ready(rollouts)
    with run.phases("reward"):
        last = order[-1]
        scored[last] = score_rollout(run, last, params, prompts, rollouts[last], step)
        rewards = {task: scored[task].rewards for task in run.tasks}
        advantages, stats = compare(run, rewards)
    with run.phases("update"):
        batch = make_batch(run, state, {task: rollouts[task] for task in run.tasks}, advantages)
        updates = []
        for _ in range(run.num_iterations):
            state, metrics = run.train_step(state, run.frozen, batch)
            updates.append(metrics)
        jax.block_until_ready(updates[-1])
    # Only the first update starts from the policy that sampled, so only its sampler-trainer
    # difference means anything.
    first = {name: metric for name, metric in updates[0].items() if metric.over == "first"}
    numbers = describe_rollouts(rollouts, eos=run.processor.special.eos, group_size=run.group_size)
    metrics = updates[-1] | first | to_metrics(stats | numbers.metrics)
    # A histogram is no number of the log.
    shares = {name: metrics.pop(name).value for name in [*metrics] if name.endswith(RATIO_SHARES)}
    failed = {}
    for task, result in scored.items():
        metrics |= result.metrics
        for name, share in average_failures(run, result).items():
            metrics[f"{task}/rewards/{name}/failed"] = Metric(share)
            failed[f"{name} of {task}"] = share
    samples = {task: scored[task].samples for task in run.tasks}
    return state, Iteration(
        metrics, samples, rewards, updates, failed, advantages, numbers.lengths, shares,
        numbers.num_tokens,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scored:
    """One task's completions of this process, with their rewards by name."""

    samples: Samples
    rewards: dict[str, np.ndarray]  # [N] float32, NaN where not applicable
    metrics: dict[str, Metric]  # what each reward cost
    failures: dict[str, float]  # user's reward -> fraction of this process's samples it failed on


def score_rollout(
    run: Run, task: str, params: Params, prompts: Prompts, rollout: Rollout, step: int
) -> Scored:
    """Decodes a rollout and scores it."""
    samples = decode(run, task, params, prompts, rollout)
    rewards, costs = score_samples(run, task, params, samples, step)
    metrics = {}
    for name, cost in costs.items():
        metrics[f"{task}/rewards/{name}/seconds"] = Metric(cost["seconds"], "max")
        metrics[f"{task}/rewards/{name}/failures"] = Metric(cost["failures"], "sum")
    failures = {name: cost["failed"] for name, cost in costs.items() if "failed" in cost}
    return Scored(samples, rewards, metrics, failures)


def average_failures(run: Run, scored: Scored) -> dict[str, jax.Array]:
    """Returns the fraction of all processes' samples on which each user's reward failed."""
    return {
        name: jnp.mean(put_batch(run, np.full(len(scored.samples), share, np.float32)))
        for name, share in scored.failures.items()
    }


def sample(run: Run, task: str, params: Params, prompts: Prompts) -> Rollout:
    """Samples `group_size` completions of every prompt, `rollout_batch` prompts at a time."""
    encoded = prompts.encoded[task]
    shards = num_batch_shards(run.mesh)
    pieces = []
    for rows in split_positions(run.mesh, len(prompts), run.rollout_batch):
        piece = jax.tree.map(lambda x: x[rows], encoded)  # noqa: B023
        rollout = sample_turn(
            run.samplers[task], params, piece, prompts.index[rows],
            seed=run.seed, stream=TASKS[task].stream, group_size=run.group_size,
            place=functools.partial(put_batch, run),
        )  # fmt: skip
        pieces.append(rollout)
    return pieces[0] if len(pieces) == 1 else join_pieces(pieces, shards=shards)


def decode(run: Run, task: str, params: Params, prompts: Prompts, rollout: Rollout) -> Samples:
    """Returns the images or texts that rewards read, with the data row of each completion."""
    # G = 2: [p0, p1] -> [p0, p0, p1, p1], the order in which samplers return completions.
    columns = {
        name: [value for value in values for _ in range(run.group_size)]
        for name, values in prompts.columns.items()
    }
    # The last segment of a turn is its result; a text before it is the plan of the result.
    *plans, segment = rollout.segments
    for plan in plans:
        columns[PLAN_COLUMN] = decode_segment(run.family, run.sizes, params, run.processor, plan)
    result = decode_segment(run.family, run.sizes, params, run.processor, segment)
    if segment.kind == TEXT:
        return Samples(columns, texts=result)
    return Samples(columns, images=result)


def score_samples(
    run: Run, task: str, params: Params, samples: Samples, step: int
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Returns each reward by name, [N] float32 with NaN where not applicable, and its cost."""
    context = Context(
        family=run.family,
        config=run.sizes,
        params=params,
        processor=run.processor,
        dtype=run.dtype,
        seed=run.seed,
        step=step,
        networks=run.networks,
    )
    return score_and_measure(run.rewards[task], samples, context)


@functools.partial(jax.jit, static_argnames=("advantages", "options"))
def _compute_advantages(rewards, *, advantages, options):
    result, stats = advantages(rewards, options)
    return (
        result,
        stats,
        {task: jax.vmap(_measure_spread)(values) for task, values in rewards.items()},
    )


def _measure_spread(values: jax.Array) -> dict[str, jax.Array]:
    """Returns mean and unbiased std of a reward [N] where it applies, and how often it does not."""
    return {
        "mean": jnp.nanmean(values),
        "std": jnp.nanstd(values, ddof=1),
        "not_applicable": jnp.isnan(values).mean(),
    }


def compare(run: Run, rewards: Mapping[str, Mapping[str, np.ndarray]]):
    """Returns (advantages by task, statistics), over the rows of all processes."""
    # Processes that hold the same rows may score them differently, if a reward is not
    # deterministic. The gather gives all of them the scores of one process.
    # [rewards, N] -> [N, rewards] and back: gathers and shardings are over the leading axis.
    stacked = {
        task: take_own_rows(run.mesh, all_gather_rows(run.mesh, np.stack(list(values.values())).T))
        for task, values in rewards.items()
    }
    placed = {task: value.T for task, value in put_batch(run, stacked).items()}
    # One program for all rows: baselines and spreads are over the whole batch.
    advantages, stats, spread = _compute_advantages(
        placed, advantages=run.recipe.advantages, options=run.advantage_options
    )
    for task, values in rewards.items():
        for number, name in enumerate(values):
            for what, column in spread[task].items():
                stats[f"{task}/rewards/{name}/{what}"] = column[number]
    return advantages, stats


def make_batch(
    run: Run, state: TrainState, rollouts: Mapping[str, Rollout], advantages: dict[str, Any]
) -> Batch:
    """Returns rollouts and advantages as the update reads them, with old and reference logprobs."""
    batch: Batch = {
        task: TaskBatch(
            prompts=rollout.prompts,
            segments=tuple(set_loss_mask(run, segment) for segment in rollout.segments),
            advantages=advantages[task],
        )
        for task, rollout in rollouts.items()
    }
    if run.num_iterations > 1:
        # With one update the old policy is the current one, and the loss needs no old log-probs.
        old = run.logprob_step(state.params, run.frozen, batch)
        batch = {t: dataclasses.replace(b, old_logprobs=old[t]) for t, b in batch.items()}
    if run.reference is not None:
        with run.reference.use() as reference:
            ref = run.logprob_step(reference, run.frozen, batch)
        batch = {t: dataclasses.replace(b, ref_logprobs=ref[t]) for t, b in batch.items()}
    return batch


def set_loss_mask(run: Run, segment: Any) -> Any:
    """Returns the segment with its loss mask, which may leave out truncated texts and plans."""
    if segment.kind != TEXT or not run.mask_truncated:
        return segment
    mask = mask_truncated(segment.mask, has_ended(segment, run.processor.special.eos))
    return dataclasses.replace(segment, mask=mask)
