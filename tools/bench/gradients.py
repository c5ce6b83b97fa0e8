"""Checks log-probs and gradients of the update's attention against exact ones.

With one update per rollout the value of the loss does not depend on the network. So it cannot show
an error, and the gradients are compared instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from corl_jax.algorithms.losses import CLIPPED_POLICY_LOSS, LossConstants
from corl_jax.params import leaf_paths, partition
from corl_jax.policies.family import LogprobOptions
from corl_jax.train import agreement, step
from corl_jax.types import Params
from tools.bench import inputs
from tools.bench.generation import STREAMS, make_prompts
from tools.bench.setting import COMPUTE, Setting, trained_patterns
from tools.bench.timing import Record
from tools.bench.training import LATENT_CLIP


def measure_gradients(setting: Setting) -> Iterator[Record]:
    """Measures errors of each task's gradients against float32, as fractions of their length.

    `error` is of the update's attention in bfloat16, `error_xla` of XLA's in bfloat16, which a
    correct kernel should not exceed by much. `largest` and `largest_xla` are those of the leaf with
    the largest error. `value` and `value_xla` are the mean absolute differences of the log-probs
    in nats, `value_max` and `value_max_xla` the largest. Exact numbers use float32 products of full
    precision and XLA's attention.
    """
    trained, frozen = partition(setting.make_policy(jnp.float32), trained_patterns(setting))
    for task in STREAMS:
        batch = {task: _make_batch(setting, task)}
        with jax.default_matmul_precision("highest"):
            options = make_options(setting, "xla", jnp.float32, task)
            values = step.make_logprob_step(setting.size.family, setting.size.policy, options)
            # As if the sampler had recorded them, so that the metrics say how far others are off.
            batch = {task: _record(batch[task], values(trained, frozen, batch)[task])}
            exact, _ = _differentiate(setting, options, (trained, frozen, batch))
        figures: dict[str, Any] = {"attention": setting.attention}
        off = {}
        # A set: with --attention xla the two are the same.
        for kernel in {setting.attention, "xla"}:
            options = make_options(setting, kernel, COMPUTE, task)
            gradients, metrics = _differentiate(setting, options, (trained, frozen, batch))
            apart = (float(metrics[f"{task}/{name}"]) for name in agreement.DIFFERENCES)
            values_off = dict(zip(("value", "value_max"), apart, strict=True))
            off[kernel] = measure_errors(gradients, exact) | values_off
            del gradients
        for kernel, suffix in ((setting.attention, ""), ("xla", "_xla")):
            figures |= {f"{name}{suffix}": x for name, x in off[kernel].items()}
        yield Record("gradients", task, None, figures)


def _make_batch(setting: Setting, task: str) -> step.TaskBatch:
    """Returns left-padded prompts, and answers of which some end early."""
    size = setting.size
    length = size.limits.image_tokens if task == "t2i" else size.answer
    made = inputs.make_task_batch(
        size, setting.processor.special, make_prompts(setting, task), setting.group, length
    )
    return setting.place(made)


def _record(batch: step.TaskBatch, logprobs: tuple[Any, ...]) -> step.TaskBatch:
    """Returns the batch with log-probs of its segments."""
    segments = tuple(
        dataclasses.replace(segment, logprobs=of_segment)
        for segment, of_segment in zip(batch.segments, logprobs, strict=True)
    )
    return dataclasses.replace(batch, segments=segments)


def make_options(setting: Setting, kernel: Any, dtype: Any, task: str) -> step.UpdateOptions:
    """Returns the update options of one task."""
    scoring = LogprobOptions(
        setting.processor.special, remat=setting.remat, attention=kernel,
        unmasking=setting.unmasking, cfg_scale=setting.size.cfg_scale,
        denoising=setting.size.denoising,
    )  # fmt: skip
    pieces = setting.prompts // (setting.micro_batch or setting.prompts)
    return step.UpdateOptions(
        CLIPPED_POLICY_LOSS, LossConstants(), scoring, ((task, 1.0),), dtype=dtype,
        micro_batches=pieces, latent_clip=LATENT_CLIP,
    )  # fmt: skip


def _differentiate(setting: Setting, options: step.UpdateOptions, arguments: Any) -> Any:
    """Returns (gradients, metrics) of (trained, frozen, batch)."""

    @jax.jit
    def compute(trained: Params, frozen: Params, batch: step.Batch) -> Any:
        size = setting.size
        return step.gradients(size.family, size.policy, options, trained, frozen, batch)

    return compute(*arguments)


def measure_errors(gradients: Params, exact: Params) -> dict[str, float]:
    """Returns the relative error of the gradients: of all leaves, and the largest of one leaf.

    Leaves without gradient, such as those of the other task's head, are left out.
    """
    apart, lengths = (
        {path: float(_sum_squares(leaf)) for path, leaf in leaf_paths(tree)}
        for tree in (jax.tree.map(jnp.subtract, gradients, exact), exact)
    )
    seen = {path: (apart[path] / lengths[path]) ** 0.5 for path in lengths if lengths[path]}
    overall = (sum(apart.values()) / sum(lengths.values())) ** 0.5
    return {"error": overall, "largest": max(seen.values())}


@jax.jit
def _sum_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))
