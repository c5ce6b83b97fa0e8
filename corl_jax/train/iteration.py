"""One iteration of reinforcement learning: sample every task, reward, compare in groups, update.

Each function takes the `Run`, in which every option is already a value; nothing here reads the
config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from corl_jax.algorithms.advantages import RewardInputs, total_rewards
from corl_jax.algorithms.losses import mask_truncated
from corl_jax.devices.batches import (
    join_pieces,
    num_batch_shards,
    split_positions,
    to_host_rows,
)
from corl_jax.metrics import Metric, to_metrics
from corl_jax.params import merge
from corl_jax.policies.turns import decode_segment, sample_turn
from corl_jax.rewards.registry import Context, Samples, score_and_measure
from corl_jax.tasks import (
    IMAGES,
    LATENTS,
    PLAN_COLUMN,
    TASKS,
    TEXT,
    TEXTS,
    choose_tasks_of_step,
    image_tasks,
    text_tasks,
)
from corl_jax.train.agreement import RATIO_SHARES
from corl_jax.train.answer_rows import measure_rows, pack_answers
from corl_jax.train.drawn import Drawn, Scored, list_costs, place_rewards
from corl_jax.train.greedy import separate_greedy
from corl_jax.train.image_codes import read_images
from corl_jax.train.kl_penalty import measure_penalties
from corl_jax.train.redraw import replace_flat_groups
from corl_jax.train.rollout_metrics import count_tokens, describe_rollouts, has_ended
from corl_jax.train.run import Iteration, Run, put_batch
from corl_jax.train.step import Batch, TaskBatch, TrainState
from corl_jax.train.tag_rewards import average_by_tag
from corl_jax.types import Params, Prompts, Rollout


def rl_iteration(run: Run, state: TrainState, prompts: Prompts, step: int):
    """Returns (next state, Iteration) of one batch of prompts."""
    params = merge(state.params, run.frozen)
    tasks = choose_tasks_of_step(run.tasks, run.alternate_every, step)
    drawn, extra_stats = draw(run, tasks, params, prompts, step), {}
    if run.redraws:
        redraw = functools.partial(draw, run, tasks, params, step=step)
        drawn, extra_stats = replace_flat_groups(run, drawn, redraw, step)
    greedy = penalties = None
    if run.greedy_samplers is not None:
        drawn, greedy = separate_greedy(drawn, run.completions_per_prompt)
    rewards = {task: drawn.scored[task].rewards for task in tasks}
    with run.phases("update"):
        batch = make_batch(run, state, {task: drawn.rollouts[task] for task in tasks})
    extra_stats = extra_stats | measure_rows(run, batch)
    with run.phases("reward"):
        if run.kl_penalty is not None:
            penalties, of_penalties = measure_penalties(batch, run.kl_penalty)
            extra_stats = extra_stats | of_penalties
        advantages, stats = compare(run, rewards, greedy, penalties)
    with run.phases("update"):
        state, updates = update(run, state, make_update_batch(run, batch, advantages), step)
    return state, describe(run, drawn, rewards, updates, advantages, stats | extra_stats)


def describe(
    run: Run, drawn: Drawn, rewards: Mapping[str, Any], updates: list[dict[str, Metric]],
    advantages: dict[str, Any], stats: Mapping[str, Any],
) -> Iteration:  # fmt: skip
    """Returns the results of an iteration for the log."""
    # Only the first update starts from the policy that sampled, so only its sampler-trainer
    # difference means anything.
    first = {name: metric for name, metric in updates[0].items() if metric.over == "first"}
    eos = run.processor.special.eos
    numbers = describe_rollouts(drawn.rollouts, eos=eos, group_size=run.group_size)
    tokens = {f"{name}/tokens": count for name, count in drawn.tokens.texts.items()}
    by_tag = average_by_tag(run, drawn)
    metrics = updates[-1] | first | to_metrics({**stats, **numbers.metrics, **tokens, **by_tag})
    # A histogram is no number of the log.
    shares = {name: metrics.pop(name).value for name in [*metrics] if name.endswith(RATIO_SHARES)}
    costs, failed = list_costs(run, drawn)
    return Iteration(
        metrics | costs, {task: drawn.scored[task].samples for task in rewards}, dict(rewards),
        updates, failed, advantages, numbers.lengths, shares, drawn.tokens.num_tokens,
    )  # fmt: skip


def draw(run: Run, tasks: Sequence[str], params: Params, prompts: Prompts, step: int) -> Drawn:
    """Samples and scores the completions of each task."""
    # Texts first: the host decodes and scores them while the device still generates images.
    order = tuple(dict.fromkeys((*text_tasks(tasks), *image_tasks(tasks))))
    scored: dict[str, Scored] = {}
    with run.phases("rollout"):
        # Dispatched, not awaited: the device works through them in this order.
        rollouts = {task: sample(run, task, params, prompts, True) for task in order}
        for task in order[:-1]:
            scored[task] = score_rollout(run, task, params, prompts, rollouts[task], step)
        jax.block_until_ready(rollouts)
    with run.phases("reward"):
        last = order[-1]
        scored[last] = score_rollout(run, last, params, prompts, rollouts[last], step)
    return Drawn(rollouts, scored, count_tokens(rollouts))


def update(
    run: Run, state: TrainState, batch: Batch, step: int
) -> tuple[TrainState, list[dict[str, Metric]]]:
    """Returns the state after the updates on a batch, and the metrics of each."""
    # The reference is no input of the update.
    reference, state = state.reference, dataclasses.replace(state, reference=None)
    updates = []
    for _ in range(run.num_iterations):
        state, metrics = run.train_step(state, run.frozen, batch)
        updates.append(metrics)
    state = dataclasses.replace(state, reference=reference)
    if run.moving is not None:
        state = run.moving.move(state, step)
    jax.block_until_ready(updates[-1])
    return state, updates


def score_rollout(
    run: Run, task: str, params: Params, prompts: Prompts, rollout: Rollout, step: int
) -> Scored:
    """Decodes a rollout and scores it."""
    samples = decode(run, task, params, prompts, rollout)
    rewards, costs = score_samples(run, task, params, samples, step)
    for cost in costs.values():
        if "failed" in cost:
            cost["failed"] *= len(samples)
    return Scored(samples, rewards, costs, len(samples))


def sample(
    run: Run, task: str, params: Params, prompts: Prompts, for_training: bool = False
) -> Rollout:
    """Samples `group_size` completions of every prompt, `rollout_batch` prompts at a time.

    `for_training`: with a greedy one more as the last of each group, if the algorithm compares
    with it.
    """
    samplers, group_size = run.evaluation_samplers, run.group_size
    if for_training:
        samplers, group_size = run.greedy_samplers or run.samplers, run.completions_per_prompt
    encoded = prompts.encoded[task]
    shards = num_batch_shards(run.mesh)
    pieces = []
    for rows in split_positions(run.mesh, len(prompts), run.rollout_batch):
        piece = jax.tree.map(lambda x: x[rows], encoded)  # noqa: B023
        rollout = sample_turn(
            samplers[task], params, piece, prompts.index[rows],
            seed=run.seed, stream=TASKS[task].stream, group_size=group_size,
            place=functools.partial(put_batch, run),
        )  # fmt: skip
        pieces.append(rollout)
    return pieces[0] if len(pieces) == 1 else join_pieces(pieces, shards=shards)


def decode(run: Run, task: str, params: Params, prompts: Prompts, rollout: Rollout) -> Samples:
    """Returns the images and texts that rewards read, with the data row of each completion."""
    # G = 2: [p0, p1] -> [p0, p0, p1, p1], the order in which samplers return completions.
    columns = {
        name: [value for value in values for _ in range(rollout.group_size)]
        for name, values in prompts.columns.items()
    }
    results: dict[str, Any] = {}
    segments = iter(rollout.segments)
    for turn in TASKS[task].turns:
        # The last segment of a turn is its result; a text before it is the plan of the result.
        *plans, segment = itertools.islice(segments, len(turn.segments))
        model = run.family, run.sizes, params, run.processor
        for plan in plans:
            columns[PLAN_COLUMN] = decode_segment(*model, plan)
        results[TEXTS if segment.kind == TEXT else IMAGES] = decode_segment(*model, segment)
        if segment.kind == TEXT:
            results["num_tokens"] = to_host_rows(segment.mask).sum(axis=-1)
    return Samples(columns, **results)


def score_samples(
    run: Run, task: str, params: Params, samples: Samples, step: int
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Returns each reward by name, [N] float32 with NaN where not applicable, and its cost."""
    return score_and_measure(run.rewards[task], samples, make_context(run, params, step))


def make_context(run: Run, params: Params, step: int) -> Context:
    """Returns what the rewards of a step share."""
    return Context(
        family=run.family,
        config=run.sizes,
        params=params,
        processor=run.processor,
        dtype=run.dtype,
        seed=run.seed,
        step=step,
        networks=run.networks,
        max_new_tokens=run.max_new_tokens,
    )


@functools.partial(jax.jit, static_argnames=("advantages", "options"))
def _compute_advantages(inputs, *, advantages, options):
    result, stats = advantages(inputs, options)
    if inputs.greedy is not None:
        alone = dataclasses.replace(options, group_size=1)
        totals = total_rewards(RewardInputs(inputs.greedy), alone)
        stats |= {f"{task}/greedy_reward": jnp.nanmean(total) for task, total in totals.items()}
    return (
        result,
        stats,
        {task: jax.vmap(_measure_spread)(values) for task, values in inputs.sampled.items()},
    )


def _measure_spread(values: jax.Array) -> dict[str, jax.Array]:
    """Returns mean and unbiased std of a reward [N] where it applies, and how often it does not."""
    return {
        "mean": jnp.nanmean(values),
        "std": jnp.nanstd(values, ddof=1),
        "not_applicable": jnp.isnan(values).mean(),
    }


def compare(
    run: Run,
    rewards: Mapping[str, Mapping[str, np.ndarray]],
    greedy: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    penalties: dict[str, jax.Array] | None = None,
):
    """Returns (advantages by task, statistics), over the rows of all processes."""
    baselines = None if greedy is None else place_rewards(run, greedy)
    inputs = RewardInputs(place_rewards(run, rewards), baselines, penalties)
    # One program for all rows: baselines and spreads are over the whole batch.
    advantages, stats, spread = _compute_advantages(
        inputs, advantages=run.recipe.advantages, options=run.advantage_options
    )
    for task, values in rewards.items():
        for number, name in enumerate(values):
            for what, column in spread[task].items():
                stats[f"{task}/rewards/{name}/{what}"] = column[number]
    return advantages, stats


def make_batch(run: Run, state: TrainState, rollouts: Mapping[str, Rollout]) -> Batch:
    """Returns rollouts with their loss masks, and the old and reference log-probs if needed."""
    batch: Batch = {
        task: TaskBatch(
            prompts=rollout.prompts,
            segments=tuple(set_loss_mask(run, segment) for segment in rollout.segments),
            turns=TASKS[task].turn_kinds,
        )
        for task, rollout in rollouts.items()
    }
    batch = pack_answers(run, read_images(run, merge(state.params, run.frozen), batch))
    if run.num_iterations > 1 or run.kl_penalty is not None:
        # With one update the old policy is the current one, and the loss needs no old log-probs.
        old = run.logprob_step(state.params, run.frozen, batch)
        batch = {t: dataclasses.replace(b, old_logprobs=old[t]) for t, b in batch.items()}
    if run.reference is not None or run.moving is not None:
        # Without the log-probs, so that both calls are of one program.
        scored = {t: dataclasses.replace(b, old_logprobs=None) for t, b in batch.items()}
        latents = {t: b for t, b in scored.items() if LATENTS in b.kinds}
        tokens = {t: b for t, b in scored.items() if LATENTS not in b.kinds}
        with use_reference(run, state) as reference:
            ref = run.logprob_step(reference, run.frozen, tokens) if tokens else {}
            # An exact divergence needs velocities, and no log-probs of the reference.
            ref |= run.velocity_step(reference, run.frozen, latents) if latents else {}
        batch = {t: add_reference(b, ref[t]) for t, b in batch.items()}
    return batch


def add_reference(task: TaskBatch, scores: Sequence[Any]) -> TaskBatch:
    """Returns the task with the reference's scores: velocities of latents, log-probs of tokens."""
    of_kinds = list(zip(task.kinds, scores, strict=True))
    return dataclasses.replace(
        task,
        ref_logprobs=tuple(None if kind == LATENTS else score for kind, score in of_kinds),
        ref_velocities=tuple(score if kind == LATENTS else None for kind, score in of_kinds),
    )


def make_update_batch(run: Run, batch: Batch, advantages: Mapping[str, Any]) -> Batch:
    """Returns the batch with its advantages, without the log-probs that the loss does not read."""
    unused: dict[str, None] = {}
    if run.num_iterations == 1:
        unused["old_logprobs"] = None
    if run.kl_penalty is not None:
        unused["ref_logprobs"] = None
    return {
        task: dataclasses.replace(part, advantages=advantages[task], **unused)
        for task, part in batch.items()
    }


def use_reference(run: Run, state: TrainState) -> contextlib.AbstractContextManager[Params]:
    """Returns a context with the reference's trained parameters on the device."""
    if run.moving is not None:
        return run.moving.use(state.reference)
    assert run.reference is not None
    return run.reference.use()


def set_loss_mask(run: Run, segment: Any) -> Any:
    """Returns the segment with its loss mask, which may leave out truncated texts and plans."""
    if segment.kind != TEXT or not run.mask_truncated:
        return segment
    mask = mask_truncated(segment.mask, has_ended(segment, run.processor.special.eos))
    return dataclasses.replace(segment, mask=mask)
