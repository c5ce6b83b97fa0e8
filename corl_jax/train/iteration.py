"""One GRPO iteration: sample both tasks, reward, compare within groups, update.

Each function takes the `Run`, in which every option is already a value; nothing here looks at
the config again. Answers are sampled first, so that the host decodes and scores them while the
device still draws.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms import grpo
from corl_jax.devices.batches import (
    all_gather_rows,
    num_batch_shards,
    process_shard,
    take_own_rows,
    to_host_rows,
)
from corl_jax.devices.mesh import constrain
from corl_jax.params import merge
from corl_jax.policies.janus import sampling
from corl_jax.rewards.registry import Context, Samples, score_timed
from corl_jax.runs.guards import FAILED
from corl_jax.train.run import Iteration, Run, put
from corl_jax.train.step import Batch, TaskBatch, TrainState
from corl_jax.types import STREAMS, EncodedPrompts, Params, Prompts, Rollout


def rl_iteration(run: Run, state: TrainState, prompts: Prompts, step: int):
    """(next state, Iteration) of one batch of prompts."""
    params = merge(state.params, run.frozen)
    scored: dict[str, Scored] = {}
    with run.phases("rollout"):
        # Dispatched, not awaited: the device works through both in this order.
        rollouts = {task: sample(run, task, params, prompts) for task in reversed(run.tasks)}
        if len(rollouts) > 1:
            scored["mm2t"] = reward(run, "mm2t", params, prompts, rollouts["mm2t"], step)
        jax.block_until_ready(rollouts)
    with run.phases("reward"):
        for task in rollouts.keys() - scored.keys():
            scored[task] = reward(run, task, params, prompts, rollouts[task], step)
        rewards = {task: scored[task].rewards for task in run.tasks}
        advantages, stats = compare(run, rewards)
    with run.phases("update"):
        batch = make_batch(run, state, {task: rollouts[task] for task in run.tasks}, advantages)
        updates = []
        for _ in range(run.num_iterations):
            state, metrics = run.train_step(state, run.frozen, batch)
            updates.append(metrics)
        jax.block_until_ready(updates[-1])
    # Later updates have left the policy that sampled; only the first can tell a wrong sampler.
    agreement = {name: value for name, value in updates[0].items() if "/sampling/" in name}
    metrics = updates[-1] | agreement | stats | length_metrics(run, rollouts)
    for one in scored.values():
        metrics |= one.metrics | failed_shares(run, one)
    samples = {task: scored[task].samples for task in run.tasks}
    return state, Iteration(metrics, samples, rewards, updates)


@dataclasses.dataclass(frozen=True)
class Scored:
    """One task's completions of this process, with their rewards by name."""

    samples: Samples
    rewards: dict[str, np.ndarray]  # [N] float32, NaN where not applicable
    metrics: dict[str, float]  # what each reward cost
    failed: dict[str, float]  # metric of a user's reward -> share of these samples that it failed


def reward(
    run: Run, task: str, params: Params, prompts: Prompts, rollout: Rollout, step: int
) -> Scored:
    """Decodes a rollout and scores it."""
    samples = decode(run, task, params, prompts, rollout)
    rewards, costs = score_task(run, task, params, samples, step)
    metrics = {
        f"{task}/rewards/{name}/{what}": value
        for name, cost in costs.items()
        for what, value in cost.items()
    }
    failed = {name: metrics.pop(name) for name in [*metrics] if name.endswith(FAILED)}
    return Scored(samples, rewards, metrics, failed)


def failed_shares(run: Run, scored: Scored) -> dict[str, jax.Array]:
    """The share of all processes' samples that each reward failed on, so that all see the same."""
    return {
        name: jnp.mean(put(run, np.full(len(scored.samples), share, np.float32)))
        for name, share in scored.failed.items()
    }


def sample(run: Run, task: str, params: Params, prompts: Prompts) -> Rollout:
    """`group_size` completions of every prompt, at most `rollout_batch` prompts at a time."""
    encoded: EncodedPrompts = getattr(prompts, task)
    blocks = num_batch_shards(run.mesh)
    each = run.rollout_batch // blocks
    # Every piece has rows of each block of the mesh, so that all of them stay where they are.
    places = np.arange(len(prompts)).reshape(blocks // process_shard(run.mesh)[1], -1)
    pieces = []
    for first in range(0, places.shape[1], each):
        rows = places[:, first : first + each].ravel()
        keys = sampling.sample_keys(run.seed, prompts.index[rows], run.group_size, STREAMS[task])
        # Typed keys are no host arrays: their bits are spread over the mesh.
        bits = np.asarray(jax.random.key_data(keys))
        piece, bits = put(run, (jax.tree.map(lambda x: x[rows], encoded), bits))  # noqa: B023
        pieces.append(run.samplers[task](params, piece, jax.random.wrap_key_data(bits)))
    return pieces[0] if len(pieces) == 1 else _joined(pieces, blocks=blocks)


@functools.partial(jax.jit, static_argnames="blocks")
def _joined(pieces: list[Rollout], *, blocks: int) -> Rollout:
    """One rollout of pieces that each have rows of every block."""

    def join(*xs: jax.Array) -> jax.Array:
        split = [x.reshape(blocks, -1, *x.shape[1:]) for x in xs]
        joined = jnp.concatenate(split, axis=1).reshape(-1, *xs[0].shape[1:])
        return constrain(joined, "batch", *[None] * (joined.ndim - 1))

    return jax.tree.map(join, *pieces)


def decode(run: Run, task: str, params: Params, prompts: Prompts, rollout: Rollout) -> Samples:
    """What rewards look at: pixels or strings, with each completion's row."""
    columns = {
        name: [value for value in values for _ in range(run.group_size)]
        for name, values in prompts.columns.items()
    }
    tokens, mask = to_host_rows(rollout.tokens), to_host_rows(rollout.mask)
    if task == "t2i":
        pixels = sampling.decode_images(run.model_config, params, rollout.tokens)
        return Samples(columns, images=to_host_rows(pixels))
    texts = [run.processor.decode(row[kept]) for row, kept in zip(tokens, mask, strict=True)]
    return Samples(columns, texts=texts)


def score_task(
    run: Run, task: str, params: Params, samples: Samples, step: int
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Each of the task's rewards by name, [N] float32 with NaN where not applicable; its cost."""
    context = Context(
        config=run.model_config,
        params=params,
        processor=run.processor,
        dtype=run.dtype,
        seed=run.seed,
        step=step,
        networks=run.networks,
    )
    return score_timed(run.rewards[task], samples, context)


@functools.partial(
    jax.jit,
    static_argnames=("weights", "mode", "group_size", "mm2t_weight", "eps", "scale", "each"),
)
def _compare(rewards, *, weights, mode, group_size, mm2t_weight, eps, scale, each):
    weights = {task: jnp.asarray(values) for task, values in weights}
    totals = {
        task: grpo.combine_rewards(values, weights[task], group_size)
        for task, values in rewards.items()
    }
    judged = totals
    if each:
        judged = {
            task: grpo.normalize_each(values, weights[task], group_size, eps, scale)
            for task, values in rewards.items()
        }
    a_t2i, a_mm2t = grpo.joint_advantages(
        judged.get("t2i"), judged.get("mm2t"), mode,
        group_size=group_size, mm2t_weight=mm2t_weight, eps=eps, scale=scale, compared=each,
    )  # fmt: skip
    stats = {
        f"{task}/{name}": value
        for task, total in totals.items()
        for name, value in grpo.reward_stats(total, group_size).items()
    }
    if len(totals) == 2:
        joint = grpo.unified_reward(totals["t2i"], totals["mm2t"], mm2t_weight, group_size)
    else:
        (joint,) = totals.values()
    stats |= grpo.reward_stats(joint, group_size)
    spread = {task: jax.vmap(_spread)(values) for task, values in rewards.items()}
    return {"t2i": a_t2i, "mm2t": a_mm2t}, stats, spread


def _spread(values: jax.Array) -> dict[str, jax.Array]:
    """Mean and unbiased std of one reward [N] over the rows it applies to; the others' share."""
    return {
        "mean": jnp.nanmean(values),
        "std": jnp.nanstd(values, ddof=1),
        "not_applicable": jnp.isnan(values).mean(),
    }


def compare(run: Run, rewards: dict[str, dict[str, np.ndarray]]):
    """(advantages by task, statistics), over all processes' rows.

    Every process sees the rewards of all, so that all compute the same advantages.
    """
    stacked = {
        task: take_own_rows(run.mesh, all_gather_rows(run.mesh, np.stack(list(values.values())).T))
        for task, values in rewards.items()
    }
    placed = {task: value.T for task, value in put(run, stacked).items()}
    advantages, stats, spread = _compare(placed, **run.comparison)
    for task, values in rewards.items():
        for number, name in enumerate(values):
            for what, column in spread[task].items():
                stats[f"{task}/rewards/{name}/{what}"] = column[number]
    return advantages, stats


def make_batch(
    run: Run, state: TrainState, rollouts: dict[str, Rollout], advantages: dict
) -> Batch:
    """Rollouts and advantages as the update wants them, with old and reference log-probs."""
    batch: Batch = {}
    for task, rollout in rollouts.items():
        mask = rollout.mask
        if task == "mm2t" and run.mask_truncated:
            mask = grpo.mask_truncated(mask, ended(rollout, run.processor.special.eos))
        batch[task] = TaskBatch(
            prompts=rollout.prompts,
            tokens=rollout.tokens,
            mask=mask,
            advantages=advantages[task],
            sampler_logprobs=rollout.logprobs,
        )
    if run.num_iterations > 1:
        scores = run.score_step(state.params, run.frozen, batch)
        batch = {t: dataclasses.replace(b, old_logprobs=scores[t]) for t, b in batch.items()}
    if run.reference is not None:
        with run.reference.use() as reference:
            scores = run.score_step(reference, run.frozen, batch)
        batch = {t: dataclasses.replace(b, ref_logprobs=scores[t]) for t, b in batch.items()}
    return batch


def ended(rollout: Rollout, eos: int) -> jax.Array:
    """[N] bool: answers that drew EOS."""
    return ((rollout.tokens == eos) & rollout.mask).any(axis=-1)


def duplicates(tokens: jax.Array, group_size: int) -> jax.Array:
    """Share of rows [N, T] that repeat an earlier one of their group token by token."""
    groups = tokens.reshape(-1, group_size, tokens.shape[-1])
    same = (groups[:, :, None] == groups[:, None, :]).all(axis=-1)
    return jnp.tril(same, k=-1).any(axis=-1).mean()


def length_metrics(run: Run, rollouts: dict[str, Rollout]) -> dict[str, Any]:
    """Lengths of the answers; images always have all their tokens and are never truncated."""
    return _lengths(rollouts, eos=run.processor.special.eos, group_size=run.group_size)


@functools.partial(jax.jit, static_argnames=("eos", "group_size"))
def _lengths(rollouts: dict[str, Rollout], *, eos: int, group_size: int) -> dict[str, jax.Array]:
    metrics: dict[str, jax.Array] = {}
    if "t2i" in rollouts:
        tokens = jnp.sort(rollouts["t2i"].tokens, axis=-1)
        distinct = 1 + (tokens[:, 1:] != tokens[:, :-1]).sum(axis=-1)
        metrics["t2i/completions/mean_length"] = jnp.float32(tokens.shape[1])
        metrics["t2i/distinct_token_fraction"] = distinct.mean() / tokens.shape[1]
        metrics["t2i/duplicate_fraction"] = duplicates(rollouts["t2i"].tokens, group_size)
    if "mm2t" in rollouts:
        lengths = rollouts["mm2t"].mask.sum(axis=-1)
        for name in ("mean", "min", "max"):
            metrics[f"mm2t/completions/{name}_length"] = getattr(lengths, name)()
        metrics["mm2t/completions/clipped_ratio"] = 1 - ended(rollouts["mm2t"], eos).mean()
        metrics["mm2t/tokens"] = lengths.sum()
    return metrics
