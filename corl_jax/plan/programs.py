"""The programs of a GRPO iteration, ready to be lowered: the run's own functions, shapes as inputs.

Nothing is materialised: parameters, optimizer state and batches are ShapeDtypeStructs with the
shardings that a run gives them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from corl_jax.data.columns import IMAGE_COLUMN
from corl_jax.devices.mesh import batch_sharding, param_shardings
from corl_jax.params import merge, partition
from corl_jax.policies.choices import split_steps
from corl_jax.tasks import TASKS, image_tasks
from corl_jax.train import build
from corl_jax.train.optimizer import make_optimizer, master_dtype
from corl_jax.train.resolve import RunOutline
from corl_jax.train.step import Batch, TaskBatch, TrainState
from corl_jax.types import EncodedPrompts, Params, Segment


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of the iteration with the shapes of its inputs."""

    name: str
    function: Any  # jitted
    resident: tuple  # inputs that stay on the device between programs
    inputs: tuple  # the others
    calls: int = 1  # in an iteration
    rounds: int = 1  # of a loop whose end depends on what is drawn, at most

    def lower(self) -> Any:
        """Within `jax.set_mesh`."""
        return self.function.lower(*self.resident, *self.inputs)


@dataclasses.dataclass(frozen=True)
class Held:
    """What stays on the devices for the whole run."""

    state: TrainState
    frozen: Params
    reference: Params | None

    def parts(self) -> dict[str, Any]:
        return {
            "trained parameters": self.state.params,
            "optimizer": self.state.opt_state,
            "frozen parameters": self.frozen,
            "reference": self.reference,
        }


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes that know where they lie; `shardings` is a tree like theirs, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def held(outline: RunOutline, stored: Any = jnp.bfloat16) -> tuple[Held, Any, TrainState]:
    """(what the run keeps, its optimizer, the state's shardings), as `build.build` lays it out.

    `stored` is the dtype of the model's files, in which the frozen parameters stay.
    """
    config, mesh = outline.config, outline.mesh
    parts = partition(outline.family.abstract(outline.sizes), outline.trained)
    master = master_dtype(config.compat.bfloat16_master)
    trained, frozen = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), part)  # noqa: B023
        for part, dtype in zip(parts, (master, stored), strict=True)
    )
    optimizer = make_optimizer(config.optimizer, outline.optimizer_steps)
    shardings = build.state_shardings(optimizer, trained, mesh, outline.family.rules)
    fresh = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(optimizer.init, trained)
    )
    reference = None
    if config.algorithm.kl_coef:
        cast = functools.partial(outline.family.cast, dtype=build.DTYPES[config.model.dtype])
        # Adapters have none: the reference is what is frozen.
        first, where = ({}, {}) if config.lora.rank else (trained, shardings.params)
        reference = with_shardings(jax.eval_shape(cast, first), where)
    frozen = with_shardings(frozen, param_shardings(frozen, mesh, outline.family.rules))
    return Held(with_shardings(fresh, shardings), frozen, reference), optimizer, shardings


def prompts(outline: RunOutline, task: str, count: int, length: int) -> EncodedPrompts:
    """`count` prompts of `length` padded tokens, with pixels where the task reads a picture."""
    rows = batch_sharding(outline.mesh)
    side = outline.limits.input_image_side
    has_image = IMAGE_COLUMN in TASKS[task].columns
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=rows)
    return EncodedPrompts(
        shape((count, length), jnp.int32),
        shape((count, length), jnp.bool_),
        shape((count, side, side, 3), jnp.float32) if has_image else None,
    )


def completion_length(outline: RunOutline, task: str) -> int:
    if TASKS[task].makes_text:
        return outline.config.rollout.max_new_tokens
    return outline.limits.image_tokens


def batch(outline: RunOutline, lengths: dict[str, int], extra: tuple[str, ...]) -> Batch:
    """What an update reads; `extra` names the log-probs that it needs besides the sampler's."""
    config = outline.config
    count = config.train.prompts_per_step
    rows = count * config.rollout.group_size
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(outline.mesh))

    def of(task: str) -> TaskBatch:
        size = (rows, completion_length(outline, task))
        (kind,) = TASKS[task].turn.segments
        logprobs = shape(size, jnp.float32)
        return TaskBatch(
            prompts(outline, task, count, lengths[task]),
            (Segment(kind, shape(size, jnp.int32), shape(size, jnp.bool_), logprobs),),
            shape((rows,), jnp.float32),
            **dict.fromkeys(extra, (logprobs,)),
        )

    return {task: of(task) for task in outline.tasks}


def programs(
    outline: RunOutline, lengths: dict[str, int], stored: Any = jnp.bfloat16
) -> tuple[Held, list[Program]]:
    """What a GRPO iteration runs on the devices, rewards excluded, in its order.

    `lengths` are the padded tokens of each task's prompts, `stored` is the dtype of the model's
    files, which for the released ones is bfloat16.
    """
    config, group = outline.config, outline.config.rollout.group_size
    kept, optimizer, shardings = held(outline, stored)
    params = merge(kept.state.params, kept.frozen)
    count = config.rollout.batch_prompts or config.train.prompts_per_step
    rows = batch_sharding(outline.mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count * group))
    listed = [
        Program(
            f"sample {task}",
            jax.jit(sampler),
            (params,),
            (prompts(outline, task, count, lengths[task]), with_shardings(keys, rows)),
            calls=config.train.prompts_per_step // count,
            rounds=split_steps(completion_length(outline, task) - 1)[0],
        )
        for task, sampler in build.make_samplers(outline).items()
        if task in outline.tasks
    ]
    for task in image_tasks(outline.tasks):
        shape = (config.train.prompts_per_step * group, completion_length(outline, task))
        codes = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        decode = functools.partial(outline.family.decode_images, outline.sizes)
        listed.append(Program("codes to pixels", jax.jit(decode), (params,), (codes,)))
    train_step, score_step = build.make_steps(outline, optimizer, shardings)
    old = ("old_logprobs",) if outline.updates_per_step > 1 else ()
    extra = (*old, *(("ref_logprobs",) if kept.reference is not None else ()))
    if extra:
        # The reference is in the compute dtype, which changes only what the scoring casts.
        scored = (kept.state.params, kept.frozen)
        listed.append(
            Program("log-probs", score_step, scored, (batch(outline, lengths, ()),), len(extra))
        )
    update = (batch(outline, lengths, extra),)
    listed.append(
        Program("update", train_step, (kept.state, kept.frozen), update, outline.updates_per_step)
    )
    return kept, listed
