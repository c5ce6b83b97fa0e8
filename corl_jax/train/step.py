"""One optimizer step: gradients over micro-batches, clip, update. Mathematics only.

The loss of a batch is the weighted sum of its tasks' losses. Each is a sum over rows (or tokens)
divided by a count that depends on masks alone. The model, the task and the algorithm are not
known here: the family, the segments and the loss are values.
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

from corl_jax.algorithms.losses import (
    Extremes,
    Loss,
    LossConstants,
    LossInputs,
    mask_indifferent,
    weigh_by_entropy,
)
from corl_jax.devices.mesh import constrain
from corl_jax.metrics import Metric, to_metrics
from corl_jax.params import merge
from corl_jax.policies.family import Family, LogprobOptions, MeasureKl, Scores
from corl_jax.tasks import LATENTS, TurnKinds, name_kind, name_segments
from corl_jax.train.agreement import measure_agreement, pick_first
from corl_jax.types import Array, EncodedPrompts, Params, Segment, Sizes

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Metrics as (sum, count), so that micro-batches add up exactly."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes; donated to each step."""

    step: Array  # scalar int32, updates applied; a skipped one does not count
    params: Params  # the trained ones
    opt_state: Any
    # The reference model of the KL penalty if it moves, which no step reads or changes.
    reference: Params | None = None
    average: Params | None = None  # the mean of the params over steps, which none reads either


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaskBatch:
    """The completions of one task with the inputs of its loss; None where the loss needs none."""

    prompts: EncodedPrompts  # B rows
    # The masks say which choices are in the loss. The log-probs are the sampler's, or None.
    segments: tuple[Segment, ...]
    advantages: Array | None = None  # [N]; None in supervised training
    old_logprobs: tuple[Array, ...] | None = None  # of each segment; None: the policy itself
    # Of each segment: log-probs of tokens, from which the divergence is estimated, and velocities
    # of latents; None for the other kind. None: no KL penalty
    ref_logprobs: tuple[Array | None, ...] | None = None
    ref_velocities: tuple[Array | None, ...] | None = None
    # The kinds of the segments of each turn; None: one turn has all segments.
    turns: TurnKinds | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the segments of all turns."""
        return tuple(segment.kind for segment in self.segments)

    @property
    def turn_kinds(self) -> TurnKinds:
        """The kinds of the segments of each turn, by which a family finds how to score them."""
        return self.turns or (tuple(map(name_kind, self.kinds)),)


Batch = dict[str, TaskBatch]
"""By task name."""
Scored = dict[str, tuple[Array | None, ...]]
"""Log-probs or velocities of each segment, by task name."""


@dataclasses.dataclass(frozen=True)
class TokenSelection:
    """Weights of the tokens of one kind of segment; see `weigh_by_entropy`."""

    kind: str
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class UpdateOptions:
    """What is minimised, and how; hashable, so that a step is compiled once for it."""

    loss: Loss
    constants: LossConstants
    logprobs: LogprobOptions
    weights: tuple[tuple[str, float], ...]  # metric prefix of a segment -> weight of its loss
    dtype: Any = jnp.bfloat16  # compute dtype
    micro_batches: int = 1
    selections: tuple[TokenSelection, ...] = ()  # their weights are multiplied
    # Clip range of denoising steps, whose log-probs are means over an image; None: as of tokens
    latent_clip: float | None = None
    masks_indifferent: bool = False  # completions whose advantage is 0 are not in the loss

    def choose_constants(self, kind: str) -> LossConstants:
        """Returns the constants of the loss of a kind of segment."""
        clip = self.latent_clip
        if kind != LATENTS or clip is None:
            return self.constants
        return dataclasses.replace(self.constants, clip_low=clip, clip_high=clip)


def make_loss_inputs(
    task: TaskBatch, scores: tuple[Scores, ...], measure_kl: MeasureKl | None,
    options: UpdateOptions,
) -> list[LossInputs]:  # fmt: skip
    """Returns the loss inputs of each segment with its scores."""
    nothing = (None,) * len(task.segments)
    return [
        LossInputs(
            logprobs=logprobs,
            mask=segment.mask,
            advantages=task.advantages,
            old_logprobs=old,
            ref_logprobs=ref,
            kl=measure_kl(segment, of_latents[0], reference, options.logprobs)
            if measure_kl is not None and reference is not None
            else None,
            entropy=entropy,
            sampler_logprobs=segment.logprobs,
            weights=weigh_tokens(segment, entropy, options.selections),
            alignment=of_latents[1] if len(of_latents) > 1 else None,
        )
        for segment, (logprobs, entropy, *of_latents), old, ref, reference in zip(
            task.segments, scores, task.old_logprobs or nothing, task.ref_logprobs or nothing,
            task.ref_velocities or nothing, strict=True,
        )
    ]  # fmt: skip


def weigh_tokens(
    segment: Segment, entropy: jax.Array | None, selections: tuple[TokenSelection, ...]
) -> jax.Array | None:
    """Returns the weights [N, T] of a segment's tokens; None if all count the same."""
    weights = [] if segment.weights is None else [segment.weights]
    weights += [
        weigh_by_entropy(entropy, segment.mask, selection.share)
        for selection in selections
        if selection.kind == segment.kind and entropy is not None
    ]
    return functools.reduce(jnp.multiply, weights) if weights else None


def split_batch(batch: Batch, pieces: int) -> Batch:
    """Splits leaves [rows, ...] into [pieces, rows / pieces, ...], groups staying together.

    Piece m takes every pieces-th prompt.
    """
    # A device holds neighbouring rows. Taking every pieces-th prompt gives each device a part of
    # each piece, so no row moves to another device.

    def split(task: TaskBatch) -> TaskBatch:
        prompts = task.prompts.input_ids.shape[0]

        def split_leaf(x: jax.Array) -> jax.Array:
            # Two pieces, G = 1: rows [p0, p1, p2, p3] -> [[p0, p2], [p1, p3]].
            group = x.shape[0] // prompts
            x = x.reshape(prompts // pieces, pieces, group, *x.shape[1:]).swapaxes(0, 1)
            return x.reshape(pieces, -1, *x.shape[3:])

        return jax.tree.map(split_leaf, task)

    return {name: split(task) for name, task in batch.items()}


def choose_loss_masks(family: Family, options: UpdateOptions, batch: Batch) -> Batch:
    """Returns the batch with the loss masks of what the family scores and the options keep."""

    def restrict(task: TaskBatch) -> TaskBatch:
        choose = family.turns[task.turn_kinds].choose_scored
        masks = tuple(segment.mask for segment in task.segments)
        if choose is not None:
            masks = choose(task.prompts, task.segments, options.logprobs)
        if options.masks_indifferent:
            assert task.advantages is not None
            masks = tuple(mask_indifferent(mask, task.advantages) for mask in masks)
        segments = tuple(
            dataclasses.replace(segment, mask=mask)
            for segment, mask in zip(task.segments, masks, strict=True)
        )
        return dataclasses.replace(task, segments=segments)

    return {name: restrict(task) for name, task in batch.items()}


def count_terms(options: UpdateOptions, batch: Batch) -> dict[str, list[jax.Array]]:
    """Returns the number that divides the loss of each segment, by task; at least 1."""
    return {
        name: [
            jnp.maximum(options.loss.count(segment.mask, options.constants), 1.0)
            for segment in task.segments
        ]
        for name, task in batch.items()
    }


def gradients(
    family: Family, sizes: Sizes, options: UpdateOptions, trained: Params, frozen: Params,
    batch: Batch,
) -> tuple[Params, dict[str, jax.Array]]:  # fmt: skip
    """Returns (gradients in the parameters' dtype, metrics as scalars) of a whole batch."""
    batch = choose_loss_masks(family, options, batch)
    # Over the whole batch, before it is split: so a micro-batch changes nothing but memory.
    counts = count_terms(options, batch)
    weights = dict(options.weights)

    def loss(trained: Params, piece: Batch) -> tuple[jax.Array, tuple[Sums, Extremes]]:
        # Cast inside of the differentiated function: gradients then have the type of the masters.
        params = family.cast(merge(trained, frozen), options.dtype)
        total, sums, extremes = jnp.float32(0), {}, ({}, {})
        for name, task in piece.items():
            program = family.turns[task.turn_kinds]
            scores = program.logprobs(sizes, params, task.prompts, task.segments, options.logprobs)
            inputs = make_loss_inputs(task, scores, program.measure_kl, options)
            for prefix, segment, of_segment, count in zip(
                name_segments(name, task.kinds), task.segments, inputs, counts[name], strict=True
            ):
                value, metrics, of_both = segment_loss(of_segment, segment, options)
                total += weights[prefix] * value / count
                sums |= {f"{prefix}/{key}": pair for key, pair in metrics.items()}
                for numbers, of_segment_numbers in zip(extremes, of_both, strict=True):
                    numbers |= {f"{prefix}/{key}": x for key, x in of_segment_numbers.items()}
        return total, (sums, extremes)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def accumulate(piece: Batch):
        # A piece comes out of a reshape and a swap; this keeps its rows spread over the mesh.
        piece = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), piece)
        (value, (sums, extremes)), grads = gradient(trained, piece)
        return value, sums, extremes, grads

    if options.micro_batches == 1:
        value, sums, (largest, smallest), grads = accumulate(batch)
    else:
        value, sums, (largest, smallest), grads = _scan_sum(
            accumulate, split_batch(batch, options.micro_batches)
        )
    metrics = {key: total / jnp.maximum(count, 1.0) for key, (total, count) in sums.items()}
    return grads, metrics | largest | smallest | {"loss": value}


def segment_loss(
    inputs: LossInputs, segment: Segment, options: UpdateOptions
) -> tuple[jax.Array, Sums, Extremes]:
    """Returns (summed loss, metrics, extremes) of one segment's rows."""
    constants = options.choose_constants(segment.kind)
    total, count, sums = options.loss.compute(inputs, constants)
    find_extremes = options.loss.extremes
    largest, smallest = find_extremes(inputs, constants) if find_extremes else ({}, {})
    if inputs.advantages is None:
        return total, sums, (largest, smallest)
    sums = sums | {"loss": (total, count)}
    if segment.logprobs is not None:
        agreement, (above, below) = measure_agreement(
            segment.logprobs, inputs.logprobs, segment.mask
        )
        sums, largest, smallest = sums | agreement, largest | above, smallest | below
    return total, sums, (largest, smallest)


def _scan_sum(accumulate: Callable, pieces: Batch):
    """Sums values, metrics and gradients over pieces; takes the extremes of the extremes."""

    def add(carry, piece):
        value, sums, (largest, smallest), grads = accumulate(piece)
        old = carry
        return (
            old[0] + value,
            jax.tree.map(jnp.add, old[1], sums),
            (
                jax.tree.map(jnp.maximum, old[2][0], largest),
                jax.tree.map(jnp.minimum, old[2][1], smallest),
            ),
            jax.tree.map(jnp.add, old[3], grads),
        ), None

    # The scan starts from zeros, whose shapes are those of one piece. No metric is negative, so 0
    # is below each maximum; minima start from infinity.
    shapes = jax.eval_shape(accumulate, jax.tree.map(lambda x: x[0], pieces))
    value, sums, (largest, smallest), grads = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), shapes
    )
    smallest = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), smallest)
    return lax.scan(add, (value, sums, (largest, smallest), grads), pieces)[0]


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation, loss: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns (next state, metrics); `grad_norm` is the global norm before clipping.

    Unless both loss and norm are finite, the update is skipped: parameters, optimizer and `step`
    keep their bits. `update/skipped` is 1 for a skipped update, `update/applied` is the state's
    step.
    """
    # The norm is finite only if the squares of all gradients are. Then the results of the
    # optimizers here are finite too.
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    moved = TrainState(state.step + 1, params, opt_state)
    # The optimizer state has the step of the schedule: a skipped update leaves the learning rate in
    # its place.
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
    skipped = 1.0 - finite.astype(jnp.float32)
    metrics = {"grad_norm": norm, "update/skipped": skipped, "update/applied": state.step}
    return state, metrics


def make_train_step(
    family: Family, sizes: Sizes, options: UpdateOptions, optimizer: optax.GradientTransformation,
    **jit: Any,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Metric]]]:  # fmt: skip
    """Returns the jitted step (state, frozen, batch) -> (state, metrics); the state is donated.

    `jit` passes on to jax.jit, for example out_shardings.
    """

    @functools.partial(jax.jit, donate_argnums=0, **jit)
    def train_step(state: TrainState, frozen: Params, batch: Batch):
        grads, metrics = gradients(family, sizes, options, state.params, frozen, batch)
        state, update = apply_gradients(state, grads, optimizer, metrics["loss"])
        kinds = {
            prefix: kind
            for name, task in batch.items()
            for prefix, kind in zip(name_segments(name, task.kinds), task.kinds, strict=True)
        }
        return state, to_metrics(metrics | update) | pick_first(metrics, kinds)

    return train_step


def make_logprob_step(
    family: Family, sizes: Sizes, options: UpdateOptions, *, velocities: bool = False
) -> Callable:
    """Returns the jitted (trained, frozen, batch) -> {task: log-probs [N, T] of each segment}.

    It computes old log-probs before the first of several updates, and reference log-probs. With
    `velocities` it returns the velocities [N, T, ...] of latents in the place of their log-probs.
    """

    def select(scores: Scores) -> Array:
        logprobs, _, *of_latents = scores
        return of_latents[0] if of_latents and velocities else logprobs

    @jax.jit
    def logprob_step(trained: Params, frozen: Params, batch: Batch) -> Scored:
        params = family.cast(merge(trained, frozen), options.dtype)
        # With adapters the reference has no trained parameters: it is the network without them.
        scored_sizes = sizes if trained else family.base(sizes)

        def compute(piece: Batch) -> Scored:
            outputs = {
                name: family.turns[task.turn_kinds].logprobs(
                    scored_sizes, params, task.prompts, task.segments, options.logprobs
                )
                for name, task in piece.items()
            }
            return {name: tuple(map(select, segments)) for name, segments in outputs.items()}

        pieces = options.micro_batches
        if pieces == 1:
            return compute(batch)
        return _undo_split(lax.map(compute, split_batch(batch, pieces)), batch, pieces)

    return logprob_step


def _undo_split(scored: Scored, batch: Batch, pieces: int) -> Scored:
    """Undoes `split_batch` for arrays [pieces, rows / pieces, T, ...]."""

    def join(x: jax.Array, prompts: int) -> jax.Array:
        # Two pieces, G = 1: [[l0, l2], [l1, l3]] -> [l0, l1, l2, l3].
        shape = x.shape[2:]
        x = x.reshape(pieces, prompts // pieces, -1, *shape).swapaxes(0, 1)
        return x.reshape(-1, *shape)

    return {
        name: jax.tree.map(lambda x: join(x, batch[name].prompts.input_ids.shape[0]), segments)  # noqa: B023
        for name, segments in scored.items()
    }
